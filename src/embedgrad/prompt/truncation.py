"""The longest beginning of a text that fits, in whole characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import regex


def longest_fit(tokenizer: Any, text: str, excess: int, fits: Callable[[int], bool]) -> int:
    """How many characters of a text that is `excess` tokens too long may stay.

    `fits` says whether that many do; 0 may be returned though it does not. What reads as one
    character, as an emoji of several or a letter with its accents, stays or goes as a whole.
    """
    whole = {0, *(match.end() for match in regex.finditer(r"\X", text))}  # Unicode's UAX 29
    ends = [end for end in _token_ends(tokenizer, text) if end in whole]
    low, high = 0, len(ends) - 1  # the whole does not fit
    likely = max(0, high - excess)
    while high - low > 1:
        # A text may have other tokens in its place than alone, but seldom many.
        near = [i for i in (likely, likely + 1, likely - 8, likely + 8) if low < i < high]
        i = near[0] if near else (low + high) // 2
        low, high = (i, high) if fits(ends[i]) else (low, i)
    # Tokens change with what follows them, so a little more may fit.
    further = range(ends[min(low + 2, len(ends) - 1)] - 1, ends[low], -1)
    return next((end for end in further if end in whole and fits(end)), ends[low])


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    """Where a text may be cut first: in characters, 0, then the end of every token."""
    if not tokenizer.is_fast:
        return [*range(len(text) + 1)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return sorted({0, len(text), *(end for _, end in encoded["offset_mapping"])})
