"""Tokenize text around spans, cut where exported tokens will be.

Refined rows are deployed as special tokens of their own, and a special token ends the text that a
tokenizer merges over. So the text on either side is tokenized here with such a token in between.
"""

from __future__ import annotations

import copy
from typing import Any, final

from embedgrad.errors import TemplateError

CUT = "<|embedgrad-cut|>"

Ids = tuple[int, ...]


@final
class CuttingTokenizer:
    """A tokenizer that can cut: `cut` tokenizes pieces apart, `plain` a whole text.

    With `adds_bos` the token that the tokenizer itself puts before plain text is added, unless the
    text already begins with it; chat templates write their own.
    """

    def __init__(self, tokenizer: Any, *, adds_bos: bool):
        self.tokenizer = tokenizer
        self._cutting = copy.deepcopy(tokenizer)
        self._cutting.add_special_tokens(
            {"additional_special_tokens": [CUT]}, replace_extra_special_tokens=False
        )
        self._cut_id = int(self._cutting.convert_tokens_to_ids(CUT))
        self._bos = _bos_ids(tokenizer) if adds_bos else ()

    def cut(self, *texts: str) -> tuple[Ids, ...]:
        """Ids of each text, with a special token behind each; raises `TemplateError`."""
        ids = self._cutting(CUT.join((*texts, "")), add_special_tokens=False)["input_ids"]
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self._cut_id:
                parts.append([])
            else:
                parts[-1].append(token)
        if len(parts) != len(texts) + 1:
            raise TemplateError(f"template: a row contains {CUT}, which embedgrad uses itself")
        return tuple(tuple(part) for part in parts[:-1])

    def prefix(self, text: str, whole: str) -> Ids:
        """Ids of text before a cut, with the BOS that `whole` gets."""
        return self.bos(whole) + self.cut(text)[0]

    def suffix(self, text: str) -> Ids:
        """Ids of text behind a cut."""
        return self.cut("", text)[1]

    def plain(self, text: str) -> Ids:
        """Ids of a text that nothing cuts."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.bos(text) + tuple(ids)

    def bos(self, text: str) -> Ids:
        """The BOS that belongs before this text."""
        if not self._bos or text.startswith(self.tokenizer.convert_ids_to_tokens(self._bos[0])):
            return ()
        return self._bos


def alike(one: Ids, other: Ids) -> int:
    """Ids by which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _bos_ids(tokenizer: Any) -> Ids:
    """The ids that the tokenizer puts before plain text by itself (a BOS, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()
