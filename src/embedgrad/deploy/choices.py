"""The choices of an exported prompt, as a server is asked for one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from embedgrad.data.typed import adapter_of
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.rules import made_up
from embedgrad.prompt.boundaries import Ids


@final
@dataclass(frozen=True)
class Choices:
    """What the model writes for every choice.

    `names` are the recipe's, `texts` what follows the prompt, `target.answer_prefix` included;
    `tokens` are the ids that training scored, and `written` how many of them are text, as the end
    of the turn may be scored too. `pieces` are the written ones, with text in the place of tokens
    that are parts of a character. `normalize`: choices are compared by log-probability per token.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[Ids, ...]
    written: tuple[int, ...]
    pieces: tuple[tuple[int | str, ...], ...]
    normalize: bool

    @classmethod
    def of(cls, exported: ExportedPrompt) -> Self | None:
        """Those of a prompt; None for free answers."""
        sequencer = exported.sequencer
        if not sequencer.target.choices:
            return None
        # Of any row: only a row whose text comes right before the answer could change its tokens.
        target, row = sequencer.target, sequencer(made_up(exported.prompt)[0])
        before = row.context(exported.prompt.prompt_ids)[-8:]
        written = [sum(i not in sequencer.end_ids for i in ids) for ids in row.targets]

        def decode(ids: Ids) -> str:
            text: str = sequencer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            return text

        def after(ids: Ids) -> str:
            return decode(before + ids)[len(decode(before)) :]

        answers = [ids[:n] for ids, n in zip(row.targets, written, strict=True)]
        texts, pieces = tuple(map(after, answers)), tuple(_pieces(ids, after) for ids in answers)
        return cls(target.choices, texts, row.targets, tuple(written), pieces, target.normalize)

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self | None:
        """Those of a prompt's entry in `export.json`; None for free answers."""
        known = entry.get("choices")
        return known and adapter_of(cls).validate_python(known)

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return set(self.written) == {1} and all(len(ids) == 1 for ids in self.tokens)

    @property
    def grammar(self) -> str:
        """GBNF that allows the tokens of one choice, cut as in training, and nothing else.

        A grammar of their texts would allow any cut, and greedy decoding would prefer the choice
        whose first letter is likely. Only characters of several tokens are text here: llama.cpp's
        grammars refuse a token that completes no character.
        """
        return "root ::= " + " | ".join(map(self.grammar_of, range(len(self.texts))))

    def grammar_of(self, choice: int) -> str:
        """The tokens of one choice in GBNF."""
        return " ".join(
            f"<[{piece}]>" if isinstance(piece, int) else _literal(piece)
            for piece in self.pieces[choice]
        )

    @property
    def whole(self) -> bool:
        """Whether no token is a part of a character."""
        return all(isinstance(piece, int) for pieces in self.pieces for piece in pieces)

    def find(self, reply: str) -> int | None:
        """The choice that a reply is."""
        stripped = [text.strip() for text in self.texts]
        return stripped.index(reply.strip()) if reply.strip() in stripped else None


def _pieces(ids: Ids, decode: Callable[[Ids], str]) -> tuple[int | str, ...]:
    pieces: list[int | str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and decode(ids[:end]).endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # inside a character
        text = decode(ids[:end])[len(decode(ids[:begin])) :]
        pieces.append(ids[begin] if end - begin == 1 else text)
        begin = end
    return tuple(pieces)


def _literal(text: str) -> str:
    escaped = "".join(rf"\U{ord(character):08X}" for character in text)
    return f'"{escaped}"'
