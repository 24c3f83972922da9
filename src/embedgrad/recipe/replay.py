"""Replay: rows of earlier tasks in every batch of a further one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from embedgrad.parts.augmentations import Augmentation, BatchContext
from embedgrad.prompt.sequence import TokenSequence


@final
@dataclass(frozen=True)
class Replay(Augmentation):
    """Adds earlier tasks' rows to a batch, so that they are a share of it.

    Source: experience replay, Rolnick et al. 2019, https://arxiv.org/abs/1811.11682.
    """

    earlier: Sequence[TokenSequence]
    share: float

    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        count = max(1, round(len(batch) * self.share / (1 - self.share)))
        draw = random.Random(f"replay:{context.seed}:{context.step}")
        return [*batch, *draw.choices(self.earlier, k=count)]
