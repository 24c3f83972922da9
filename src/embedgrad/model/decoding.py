"""Decoding one free answer: sampling, stopping, text so far."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, final

from annotated_types import Ge, Gt, Le

from embedgrad.errors import ModelError, OptionError
from embedgrad.prompt.boundaries import Ids

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = "the model's logits are not finite; set model.dtype = 'float32'"
FEW = 256  # of the likeliest tokens, which seldom leave out any that top_p asks for
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a tokenizer with byte fallback


@final
@dataclass(frozen=True)
class Decoding:
    """How free answers are decoded: greedily, or by sampling."""

    max_new_tokens: Annotated[int, Gt(0)] = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """What logits are divided by before a token is drawn; 0: always the likeliest token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw among the fewest tokens whose joint probability reaches this."""
    samples: Annotated[int, Gt(0)] = 1
    """Answers per query."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which is cut before the first of them."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides what is drawn."""

    def __post_init__(self) -> None:
        check_stop(self.stop, "decoding.stop")


def before_end(ids: Sequence[int], end_ids: Ids) -> Ids:
    """The ids before the first one that ends an answer."""
    ends = (i for i, token in enumerate(ids) if token in end_ids)
    return tuple(ids[: next(ends, len(ids))])


def check_stop(stop: Sequence[str], option: str) -> None:
    """Refuse stop strings that would end every answer at once. Raises `EmbedgradError`."""
    if isinstance(stop, str) or "" in stop:
        given = stop if isinstance(stop, str) else list(stop)
        raise OptionError(
            f"{option}: {given!r}; expected a list of texts, none of them empty, "
            r'as in ["\n\n", "Question:"]'
        )


@final
class Generation:
    """One answer in progress, of at most `most` tokens.

    `number` tells apart what is drawn for different answers by one seed. `ended` says that the
    answer ended by an end token or a stop string, `over` that it takes no more tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        decoding: Decoding,
        *,
        end_ids: Ids,
        most: int,
        number: Sequence[int],
        watched: bool = False,
    ):
        self.decoding = decoding
        # A stop string that is a special token has no text in an answer.
        added = tokenizer.added_tokens_decoder.items() if decoding.stop else ()
        self.end_ids = end_ids + tuple(
            i for i, token in added if token.special and token.content in decoding.stop
        )
        self.most = most
        self.ids: list[int] = []
        self.end: Ids = ()  # the token that ended it
        self.logprobs: list[float] = []  # of all of these, where another engine drew them
        self.ended = self.over = False
        self._tokenizer = tokenizer
        self._text = GrowingText(tokenizer) if watched or decoding.stop else None
        self._random = random.Random(":".join(map(str, (decoding.seed, *number))))

    def next_uniform(self) -> float:
        """The number in [0, 1) by which its next token is drawn."""
        return self._random.random()

    def add(self, token: int) -> None:
        """Append a token; it is dropped once the answer is over."""
        if self.over:
            return
        self.ended = token in self.end_ids
        if self.ended:
            self.end = (token,)
        else:
            self.ids.append(token)
            self.ended = self._text is not None and self._stops(self._text, token)
        if self.ended or len(self.ids) >= self.most:
            self.over = True

    @property
    def text(self) -> str:
        """The answer, cut before a stop string."""
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        return _before_stop(text, self.decoding.stop)

    @property
    def certain(self) -> str:
        """The beginning that no later token can change or cut off; the answer must be `watched`."""
        assert self._text is not None
        text, stop = self._text.certain, self.decoding.stop
        kept = _before_stop(text, stop)
        if len(kept) < len(text):
            return kept
        begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _stops(self, text: GrowingText, token: int) -> bool:
        """Whether a stop string ends in the text of a new token."""
        old = len(text.certain)
        text.add(token)
        return any(text.text.find(s, max(0, old - len(s) + 1)) >= 0 for s in self.decoding.stop)


@final
class GrowingText:
    """The text of tokens that come one by one, as decoding all of them would give it.

    `text` is all of it so far, `certain` the part that no later token can change: a character may
    be spread over tokens. A new token is decoded behind the few before it, so that a long text
    costs no more per token than a short one.
    """

    def __init__(self, tokenizer: Any):
        self.text = self.certain = ""
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._ids: list[int] = []
        # Tokens from `_context` on are decoded again; up to `_read` their text is `_known`.
        self._context = self._read = 0
        self._known = ""

    def add(self, token: int) -> None:
        """Append a token."""
        if token in self._special:
            return  # it has no text
        self._ids.append(token)
        window = self._decode(self._context)
        self.text = self.certain + window[len(self._known) :]
        if not self._can_change(token):
            self.certain, alone = self.text, self._decode(self._read)
            # Behind tokens that show nothing, the next one might be taken for the first.
            if alone:
                self._context, self._known = self._read, alone
            else:
                self._known = window
            self._read = len(self._ids)

    def _decode(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True))

    def _can_change(self, last: int) -> bool:
        """Whether later tokens might change the text so far."""
        if self.text.endswith("\ufffd"):
            return True  # part of a character
        if _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(last) or ""):
            return True  # bytes in a row are valid together, or not at all
        # Spaces are taken away before marks such as "," and "n't".
        return bool(self._tokenizer.clean_up_tokenization_spaces) and " " in self.text[-4:]


def draw(logits_NV: Tensor, decoding: Decoding, uniform: Sequence[float]) -> Tensor:
    """Draw tokens [N] by nucleus sampling (Holtzman et al. 2020, section 3.1), each by a number.

    The numbers are in [0, 1). Tokens keep the order of their ids, so that rounding seldom changes
    which one it is. Raises `ModelError`.
    """
    import torch

    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    highest_N1 = wide.amax(dim=1, keepdim=True)
    if not torch.isfinite(highest_N1).all():
        raise ModelError(NOT_FINITE)
    temperature = max(decoding.temperature, torch.finfo(wide.dtype).tiny)
    shares_NV = wide.sub(highest_N1).div_(temperature).exp_()
    if decoding.top_p < 1:
        enough_N1 = decoding.top_p * shares_NV.sum(dim=1, keepdim=True, dtype=torch.float64)
        for most in (FEW, shares_NV.shape[1]):
            top = shares_NV.topk(min(most, shares_NV.shape[1]))
            outside = top.values.cumsum(1, dtype=torch.float64) >= enough_N1
            if outside[:, -1].all():
                break
        # The one that reaches the share is inside.
        inside = torch.nn.functional.pad(~outside[:, :-1], (1, 0), value=True)
        shares_NV = torch.zeros_like(shares_NV).scatter(1, top.indices, top.values * inside)
    ends_NV = shares_NV.cumsum(1, dtype=torch.float64)
    at_N1 = torch.tensor(uniform, dtype=torch.float64)[:, None].to(ends_NV) * ends_NV[:, -1:]
    return torch.searchsorted(ends_NV, at_N1, right=True).squeeze(1)


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
