"""Masked thought: noise in what the model reads of a worked solution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, final

from annotated_types import Ge, Le

from embedgrad.errors import RecipeError
from embedgrad.parts.augmentations.base import Augmentation, BatchContext
from embedgrad.prompt.sequence import DROPPED, MEAN, ZERO, TokenSequence

_IDS = {"mean": MEAN, "zero": ZERO, "drop": DROPPED}


@final
@dataclass(frozen=True)
class MaskedThought(Augmentation):
    """Let the model read noise in place of some tokens of a worked solution; its labels stay.

    share of the tokens, each drawn for itself, at step t of T:  rate min(1, t / (ramp T + 1))
    So the prompt cannot rely on the last few tokens alone. The tokens before the solution and all
    labels are left as they are, rows without a worked solution too, and dev and test are never
    noised. Source: Chen et al. 2024, https://arxiv.org/abs/2403.02178, with the ramp and the random
    tokens of its code, ChangyuChen347/MaskedThought. It trains weights, which can learn what a mask
    token means; the model here is frozen, so the other kinds of noise are ours.
    """

    rate: Annotated[float, Ge(0), Le(1)] = 0.2
    """Share of the tokens that are noised once the ramp is over, below 1."""
    noise: Literal["random", "mean", "zero", "drop"] = "random"
    """What is read instead: a random token of the vocabulary, the mean of all tokens' rows, zeros,
    or nothing: zeros that no other token attends to."""
    ramp: Annotated[float, Ge(0), Le(1)] = 0.66
    """Share of all steps over which the rate rises from 0."""
    protect_answer: bool = True
    """Whether the final answer and what follows it are never noised; the paper noises them too."""

    def __post_init__(self) -> None:
        if self.rate == 1:
            raise RecipeError("rate", ["1 leaves no token of a solution; give a share below 1"])

    def problem(self, train: Sequence[TokenSequence]) -> str | None:
        if any(sequence.reasoning for sequence in train):
            return None
        return (
            "masked_thought noises worked solutions, and no training row has one before its final "
            "answer; name a column of solutions in data.solution, or set solutions.source = "
            "'self-written', or take it out (choices, bare answers and answers that an objective "
            "samples have none)"
        )

    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        share = self.rate * min(1.0, context.step / (self.ramp * context.total + 1))
        generator = random.Random(f"{context.seed}:{context.step}/masked thought")

        def add_noise(sequence: TokenSequence) -> TokenSequence:
            (target,) = sequence.targets
            last = sequence.reasoning if self.protect_answer else len(target)
            inputs = list(sequence.inputs_of(target))
            for at in range(last):
                if generator.random() < share:
                    random_id = generator.randrange(context.vocabulary)
                    inputs[at] = _IDS.get(self.noise, random_id)
            return replace(sequence, inputs=(tuple(inputs),))

        return [add_noise(s) if share and s.reasoning else s for s in batch]
