"""Cut a text to the longest beginning that fits the model's context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def longest_beginning(text: str, tokenizer: Any, excess: int, fits: Callable[[int], bool]) -> int:
    """How many of its characters fit, fewer than all; 0 where nothing does, or nothing at all.

    `excess` is by how many tokens the whole is too long, `fits` says whether a number of characters
    fits in the text's place. It is asked a few times: first at the ends of tokens, near the one
    that is likely to be right, then at single characters.
    """
    ends = _token_ends(text, tokenizer)
    low, high = 0, len(ends) - 1  # the whole does not fit
    likely = max(0, high - excess)
    while high - low > 1:
        # A text may have other tokens in its place than alone, but seldom many.
        near = [i for i in (likely, likely + 1, likely - 8, likely + 8) if low < i < high]
        i = near[0] if near else (low + high) // 2
        low, high = (i, high) if fits(ends[i]) else (low, i)
    # Tokens change with what follows them, so a little more may fit.
    further = range(ends[min(low + 2, len(ends) - 1)] - 1, ends[low], -1)
    return next((end for end in further if fits(end)), ends[low])


def _token_ends(text: str, tokenizer: Any) -> list[int]:
    """0 and the end of every token, in characters; every character if the tokenizer is slow."""
    if not tokenizer.is_fast:
        return [*range(len(text) + 1)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return sorted({0, len(text), *(end for _, end in encoded["offset_mapping"])})
