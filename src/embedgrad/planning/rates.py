"""What one machine takes for a unit of each kind of work."""

from __future__ import annotations

from dataclasses import dataclass

from embedgrad.planning.course import Replies


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per unit of effort by kind, and what memory shows beside the computed bytes.

    `step_bytes` and `held_bytes` (of building heads) are bytes per computed byte, `scoring_bytes`
    those beyond the computed ones: there most is what earlier work left behind.

    `first` are seconds that the first step takes beyond any other. `replies` are the longest free
    answers to expect; `read` of them were read, of `mean_reply` tokens, and `cut` of these did not
    end in `upto` tokens.
    """

    heads: float = 0.0
    steps: float = 0.0
    scoring: float = 0.0
    decoding: float = 0.0
    first: float = 0.0
    step_bytes: float = 1.0
    scoring_bytes: float = 0.0
    held_bytes: float = 1.0
    replies: Replies = Replies()
    read: int = 0
    cut: int = 0
    upto: int = 0
    mean_reply: float = 0.0
    probe_seconds: float = 0.0
