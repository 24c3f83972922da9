"""A whole run, ours and the plain loop's: the same rows, batches, steps and evaluations.

Both start with a loaded model and token sequences. The plain loop gets no trust region, no schedule
and no clipping, so ours has none either, and both compute the same numbers. It pads each shuffled
batch to its longest row, and scores dev rows by the logits of the two answers at the last position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.speed.bench import Bench
from benchmarks.speed.measure import Side, alternate
from benchmarks.speed.peers import InputsEmbeds, pad
from benchmarks.speed.workloads import ROWS, examples
from embedgrad import Evaluation, LanguageModel, Parts, Training, TrustRegion, optimize
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.optimizers import AdamW, Schedule
from embedgrad.prompt.sequence import Sequencer, TokenSequence

LEARNING_RATE = 0.01
"""In root mean squares of a row; see `Free`."""


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    train: int = 256
    dev: int = 150
    epochs: int = 3
    batch: int = 16

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * math.ceil(self.train / self.batch)


@dataclass(frozen=True)
class Course:
    """What a run went through: the first losses, and (accuracy, log-loss) of every evaluation.

    Both runs start at the same rows, so the first of each are the same; later ones part as rounding
    differs, by little if the gradients are the same.
    """

    first_losses: tuple[float, ...]
    evaluations: tuple[tuple[float, float], ...]

    def compared(self, other: Course) -> dict[str, Any]:
        """Whether both began alike, and ended as rounding lets them."""
        ours, theirs = ([loss for _, loss in c.evaluations] for c in (self, other))
        steps = [abs(1 - a / b) for a, b in zip(self.first_losses, other.first_losses, strict=True)]
        first = [abs(1 - ours[0] / theirs[0]), steps[0]]
        last = abs(1 - ours[-1] / theirs[-1])
        # `all`, because `max` may pass over a NaN.
        alike = all(d <= 1e-5 for d in first) and all(d <= 1e-3 for d in steps) and last <= 0.05
        alike &= len(ours) == len(theirs)
        return {"same_result": alike, "result_difference": max(first)}

    def said(self) -> str:
        """The last evaluation, in words."""
        accuracy, log_loss = self.evaluations[-1]
        return f"{100 * accuracy:.1f} % and {log_loss:.4f} nats"


def measure(bench: Bench, letter: str, plan: Plan = Plan()) -> None:
    """H or I: one pair against the plain loop."""
    if bench.skips(letter, InputsEmbeds.name, ["built"], 1):
        return
    rows = ROWS[letter]
    sequencer, train, dev = examples(bench.model, rows, bench.data, plan.train, plan.dev)
    side = InputsEmbeds(bench.model.info.path, sequencer.prompt_ids)

    def counted(name: str, run: Callable[[Callable[[], None]], Course]) -> Side[Course]:
        def shown() -> Course:
            columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns) as progress:
                task = progress.add_task(f"{letter}: {name}", total=plan.steps + plan.epochs + 1)
                return run(lambda: progress.advance(task))

        return Side(shown)

    found = alternate(
        {
            "built": counted(
                "ours", lambda tick: ours(bench.model, sequencer, train, dev, plan, tick)
            )
        },
        counted(side.name, lambda tick: peer(side, train, dev, plan, tick)),
        1,
    )["built"]
    row = found.summary() | found.ours.compared(found.peer)
    row["note"] = f"dev at the end: ours {found.ours.said()}, the peer {found.peer.said()}"
    bench.put(letter, rows.title, "built", side.name, row)


def ours(
    model: LanguageModel,
    sequencer: Sequencer,
    train: Sequence[TokenSequence],
    dev: Sequence[TokenSequence],
    plan: Plan,
    tick: Callable[[], None],
) -> Course:
    """embedgrad's run; `tick` is called after every step and evaluation."""
    model.prefix_cache.clear()
    losses: list[float] = []
    evaluations: list[tuple[float, float]] = []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])
            tick()
        elif event["event"] == "evaluation":
            evaluations.append((event["accuracy"], event["log_loss"]))
            tick()

    optimize(
        model,
        sequencer,
        train,
        dev,
        training=Training(epochs=plan.epochs, batch_size=plan.batch),
        parts=Parts(
            trust_region=TrustRegion(radius=None),
            objective=CrossEntropy(over="answer"),
            transforms=(),
            optimizer=AdamW(learning_rate=LEARNING_RATE),
            schedule=Schedule(warmup=0.0, shape="constant"),
        ),
        evaluation=Evaluation(batch_size=plan.batch),
        report=report,
    )
    return Course(tuple(losses[:3]), tuple(evaluations))


def peer(
    side: InputsEmbeds,
    train: Sequence[TokenSequence],
    dev: Sequence[TokenSequence],
    plan: Plan,
    tick: Callable[[], None],
) -> Course:
    """The plain loop's run, with ours' batches."""
    start_PD = side.start
    scale = start_PD.pow(2).mean(dim=1, keepdim=True).sqrt()
    change = torch.zeros_like(start_PD, requires_grad=True)
    optimizer = torch.optim.AdamW([change], lr=LEARNING_RATE, weight_decay=0.0)
    losses: list[float] = []
    evaluations = [_evaluate(side, start_PD, dev, plan.batch)]
    tick()
    for epoch in range(plan.epochs):
        order = list(range(len(train)))
        random.Random(f"0:{epoch}").shuffle(order)
        for i in range(0, len(order), plan.batch):
            optimizer.zero_grad()
            batch = [train[j] for j in order[i : i + plan.batch]]
            loss = side.loss(batch, start_PD + scale * change)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            tick()
        rows = (start_PD + scale * change).detach()
        evaluations.append(_evaluate(side, rows, dev, plan.batch))
        tick()
    return Course(tuple(losses[:3]), tuple(evaluations))


def _evaluate(
    side: InputsEmbeds, rows_PD: torch.Tensor, dev: Sequence[TokenSequence], size: int
) -> tuple[float, float]:
    """Accuracy, and log-loss between the choices, which are one token each."""
    right, loss = 0, 0.0
    for i in range(0, len(dev), size):
        rows = dev[i : i + size]
        batch = pad(rows, len(rows_PD), [()] * len(rows))
        last = batch.mask_BT.sum(dim=1) - 1
        logits_BV = side.logits(batch, rows_PD)[torch.arange(len(rows)), last]
        labels_BC = torch.tensor([[token for (token,) in row.targets] for row in rows])
        logprobs_BC = logits_BV.gather(1, labels_BC).log_softmax(dim=1)
        gold_B = torch.tensor([row.gold for row in rows])
        right += int((logprobs_BC.argmax(dim=1) == gold_B).sum())
        loss -= float(logprobs_BC.gather(1, gold_B[:, None]).sum())
    return right / len(dev), loss / len(dev)
