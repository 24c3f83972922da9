"""The choices of an exported prompt, as a server is asked for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, final

from pydantic import TypeAdapter

from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.rules import made_up
from embedgrad.prompt.boundaries import Ids


@final
@dataclass(frozen=True)
class Choices:
    """What the model writes for every choice.

    `names` are the recipe's, `texts` what follows the prompt, `target.answer_prefix` included;
    `tokens` are the ids that training scored, and `written` how many of them are text, as the end
    of the turn may be scored too. `normalize`: choices are compared by log-probability per token.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[Ids, ...]
    written: tuple[int, ...]
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

        def decode(*ids: int) -> str:
            text: str = sequencer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            return text

        shown = len(decode(*before))
        pairs = zip(row.targets, written, strict=True)
        texts = tuple(decode(*before, *ids[:n])[shown:] for ids, n in pairs)
        return cls(target.choices, texts, row.targets, tuple(written), target.normalize)

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self | None:
        """Those of a prompt's entry in `export.json`; None for free answers."""
        known = entry.get("choices")
        return known and TypeAdapter(cls).validate_python(known)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `export.json`."""
        return asdict(self)

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return set(self.written) == {1} and all(len(ids) == 1 for ids in self.tokens)

    @property
    def grammar(self) -> str:
        """GBNF that allows the tokens of one choice, cut as in training, and nothing else.

        A grammar of their texts would allow any cut, and greedy decoding would prefer the choice
        whose first letter is likely.
        """
        return "root ::= " + " | ".join(map(self.forced, range(len(self.texts))))

    def forced(self, choice: int) -> str:
        """The tokens of one choice in GBNF."""
        return " ".join(f"<[{i}]>" for i in self.tokens[choice][: self.written[choice]])

    def find(self, reply: str) -> int | None:
        """The choice that a reply is."""
        stripped = [text.strip() for text in self.texts]
        return stripped.index(reply.strip()) if reply.strip() in stripped else None
