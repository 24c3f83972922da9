"""A batch's loss as a pure function of theta, and its gradient."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from embedgrad.errors import DivergenceError, is_out_of_memory
from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
from embedgrad.model.workers import here
from embedgrad.parts.objectives import Objective, State
from embedgrad.parts.parameterizations import Theta
from embedgrad.parts.transforms import Gradients
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.training.settings import Parts


@final
class Gradient(NamedTuple):
    """The objective of a batch, its gradient in theta, and what it was computed from."""

    loss: float
    gradients: Gradients
    losses_B: Tensor
    outcome: Outcome


@final
@dataclass(frozen=True)
class Loss:
    """`losses_B = loss(theta, batch)`: one loss per example, a pure function of theta.

    `start` is the prompt that theta starts from. Differentiable twice with stored prefixes; in full
    passes only with eager attention.
    """

    model: Backbone
    parts: Parts
    target: Target
    start: Prompt

    def __call__(self, theta: Theta, batch: Sequence[TokenSequence]) -> Tensor:
        return self.parts.objective.losses(self.outcome(theta, batch))

    def losses_at(self, theta: Theta) -> Callable[[Sequence[TokenSequence]], Tensor]:
        """A function that gives the losses of examples, shape [B], without a graph."""

        @torch.no_grad()
        def losses(batch: Sequence[TokenSequence]) -> Tensor:
            return self(theta, batch)

        return losses

    def outcome(self, theta: Theta, batch: Sequence[TokenSequence]) -> Outcome:
        """What the model says of the batch with the prompt of theta."""
        prompt = self.parts.parameterization.prompt(theta, self.start)
        objective = self.parts.objective
        options: dict[str, Any] = {
            "choices": objective.needs_choices(available=bool(self.target.choices)),
            "normalize": self.target.normalize,
        }
        read = [ids for s in batch if (ids := objective.tokens_to_read(s)) is not None]
        if read:
            options["read"] = read
        if not reads_end(objective, self.target, batch):
            return self.model.outcome(prompt, batch, **options)
        rows = [sequence.with_end() for sequence in batch]
        outcome = self.model.outcome(prompt, rows, **options)
        last_B1 = torch.tensor([[len(s.targets)] for s in batch], device=outcome.gold_B.device)
        ended_B = outcome.logprobs_BC.gather(1, last_B1).squeeze(1)
        return dataclasses.replace(
            outcome,
            logprobs_BC=outcome.logprobs_BC.scatter(1, last_B1, -math.inf),
            tokens_BC=outcome.tokens_BC.scatter(1, last_B1, 0),
            end_logprobs_B=ended_B - outcome.answer_logprobs_B,
        )

    def gradient(
        self,
        theta: Theta,
        batch: Sequence[TokenSequence],
        accumulate: int = 1,
        state: State | None = None,
    ) -> Gradient:
        """The objective and its gradient, with the graph of one of `accumulate` parts at a time.

        `state` is what the objective remembers; None: nothing.

        The gradient does not depend on the parts, for any objective:

            d reduce / d theta = sum_b w_b d loss_b / d theta,   w = d reduce / d losses

        The weights w need all losses first, which takes a pass without a graph, but for a mean.
        """
        objective, leaves = self.parts.objective, list(theta.values())
        reduce = partial(objective.reduce_with, state or {})
        size = math.ceil(len(batch) / accumulate)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        weights_B: Tensor | None = None
        if len(parts) > 1 and not objective.is_mean:
            with torch.no_grad():
                outcomes = [self.outcome(theta, part) for part in parts]
                losses_B = torch.cat([objective.losses(outcome) for outcome in outcomes])
            loss = reduce(losses_B.requires_grad_(True), join_outcomes(outcomes))
            (weights_B,) = torch.autograd.grad(loss, losses_B)
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        outcomes, losses = [], []
        for i, part in enumerate(parts):
            outcome = self.outcome(theta, part)
            losses_B = objective.losses(outcome)
            if len(parts) == 1:
                share = reduce(losses_B, join_outcomes([outcome]))
            elif weights_B is None:
                share = losses_B.mean() * (len(part) / len(batch))
            else:
                share = (losses_B * weights_B[i * size : i * size + len(part)]).sum()
            # A model's own weights may have some that no text takes part in.
            found = torch.autograd.grad(share, leaves, materialize_grads=True)
            for held, new in zip(sums, found, strict=True):
                held += new
            outcomes.append(outcome)
            losses.append(losses_B.detach())
        if isinstance(self.model, LanguageModel):  # which computes this worker's examples alone
            here().add_up(sums)
        outcome, losses_B = join_outcomes(outcomes), torch.cat(losses)
        loss = reduce(losses_B, outcome)
        return Gradient(loss.item(), dict(zip(theta, sums, strict=True)), losses_B, outcome)

    def gradient_in_memory(
        self, theta: Theta, batch: Sequence[TokenSequence], accumulate: int, state: State
    ) -> tuple[Gradient, int]:
        """`gradient` in as many parts as fit into memory, at least `accumulate`; and how many.

        Among several workers none tries again alone, as the others would wait for its part. Raises
        `MemoryError` with the size of what does not fit.
        """
        while True:
            try:
                return self.gradient(theta, batch, accumulate, state), accumulate
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if accumulate >= len(batch) or here().count > 1:
                    raise MemoryError(self._size(batch, accumulate)) from error
            accumulate = min(2 * accumulate, len(batch))
            gc.collect()  # out here, as the error keeps the tensors of its frames
            torch.cuda.empty_cache()

    def _size(self, batch: Sequence[TokenSequence], accumulate: int) -> str:
        prompt = sum(rows.shape[-2] for rows in self.start.values())
        tokens = max(s.length(prompt) + max(map(len, s.targets), default=0) for s in batch)
        rows = f"a batch of {len(batch)} rows of up to {tokens} tokens"
        return f"out of memory for {rows}, {math.ceil(len(batch) / accumulate)} at a time"


def length_of(found: Gradient, step: int, batch: Sequence[TokenSequence]) -> float:
    """The gradient's length. Raises `DivergenceError` where it or the loss is not finite."""
    length = math.sqrt(sum(g.pow(2).sum().item() for g in found.gradients.values()))
    if math.isfinite(found.loss) and math.isfinite(length):
        return length
    bad = (~found.losses_B.isfinite()).nonzero().flatten().tolist()
    some = [batch[i] for i in bad] or batch
    where = ", ".join(s.example.source for s in some[:3]) + ", ..." * (len(some) > 3)
    raise DivergenceError(
        f"step {step + 1}: the loss is {found.loss} and its gradient's length {length} (rows "
        f"{where}); stopped before the step; try a smaller optimizer.learning_rate, or "
        "model.dtype = 'float32', or training.not_finite = 'skip'"
    )


def reads_end(objective: Objective, target: Target, batch: Sequence[TokenSequence]) -> bool:
    """Whether the loss of a batch reads the end of the turn behind the right choices."""
    choices = objective.needs_choices(available=bool(target.choices))
    return choices and objective.needs_end and all(sequence.end for sequence in batch)


def join_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of the examples of several, without their graphs."""
    width = max(outcome.logprobs_BC.shape[1] for outcome in outcomes)

    def pad(values_BC: Tensor, fill: float) -> Tensor:
        missing = width - values_BC.shape[1]
        return torch.nn.functional.pad(values_BC.detach(), (0, missing), value=fill)

    def join_tokens(parts: Sequence[Tensor]) -> Tensor:
        longest = max(part.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        return torch.cat([pad(p.detach(), (0, 0, 0, longest - p.shape[1])) for p in parts])

    first, *_ = outcomes
    tokens = [o.token_logprobs_BTK for o in outcomes if o.token_logprobs_BTK is not None]
    ends = [o.end_logprobs_B.detach() for o in outcomes if o.end_logprobs_B is not None]
    return dataclasses.replace(
        first,
        logprobs_BC=torch.cat([pad(o.logprobs_BC, -math.inf) for o in outcomes]),
        tokens_BC=torch.cat([pad(o.tokens_BC, 0) for o in outcomes]),
        end_logprobs_B=torch.cat(ends) if ends else None,
        token_logprobs_BTK=join_tokens(tokens) if tokens else None,
        gold_B=torch.cat([o.gold_B for o in outcomes]),
        groups=tuple(group for o in outcomes for group in o.groups),
        tasks=tuple(task for o in outcomes for task in o.tasks),
        extra={
            name: [cell for o in outcomes for cell in o.extra.get(name, [None] * len(o.groups))]
            for name in dict.fromkeys(name for o in outcomes for name in o.extra)
        },
        reasoning_tokens=tuple(count for o in outcomes for count in o.reasoning_tokens),
    )
