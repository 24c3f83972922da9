"""Test parts, one for each seam that the shipped parts do not use yet, and a toy backbone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.model.backbone import Prompt
from embedgrad.model.outcome import Outcome
from embedgrad.parts.augmentations import Augmentation, BatchContext
from embedgrad.parts.objectives import CrossEntropy, Objective
from embedgrad.parts.parameterizations import Theta
from embedgrad.parts.transforms import Context, Gradients, Setup, State, Transform
from embedgrad.prompt.sequence import TokenSequence

# -- objectives --------------------------------------------------------------------


@dataclass(frozen=True)
class OrderedAverage(Objective):
    """Ordered weighted average: the larger a loss, the larger its weight."""

    def needs_choices(self, *, available: bool) -> bool:
        return available

    def losses(self, outcome: Outcome) -> Tensor:
        ranked = outcome.logprobs_BC.shape[1] > 1
        return CrossEntropy(over="choices" if ranked else "answer").losses(outcome)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        weights_B = torch.arange(len(losses_B), 0, -1, device=losses_B.device).to(losses_B)
        return (losses_B.sort(descending=True).values * weights_B / weights_B.sum()).sum()


@dataclass(frozen=True)
class Costly(OrderedAverage):
    """Mean of the losses, each with the weight that a column of the data gives; else its length."""

    column: str = "cost"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        costs = outcome.extra.get(self.column) or outcome.answer_tokens_B.tolist()
        costs_B = torch.tensor([float(c) for c in costs]).to(losses_B)
        return (costs_B * losses_B).sum() / costs_B.sum()


@dataclass(frozen=True)
class WorstGroup(OrderedAverage):
    """Mean loss of the group for which it is largest; it needs every group whole."""

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        groups: dict[str | None, list[int]] = {}
        for b, group in enumerate(outcome.groups):
            groups.setdefault(group, []).append(b)
        return torch.stack([losses_B[members].mean() for members in groups.values()]).max()


SEAM_OBJECTIVES: dict[str, type[Objective]] = {
    "ordered average": OrderedAverage,
    "costly": Costly,
}

# -- transforms --------------------------------------------------------------------


@dataclass(frozen=True)
class Protect(Transform):
    """Takes one random direction of theta out of every step."""

    def init(self, theta: Theta, setup: Setup) -> State:
        generator = torch.Generator().manual_seed(0)
        directions = {
            name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            for name, value in theta.items()
        }
        length = torch.stack([d.pow(2).sum() for d in directions.values()]).sum().sqrt()
        return {name: direction / length for name, direction in directions.items()}

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        along = sum(((new[name] - old[name]) * state[name]).sum() for name in new)
        return {name: value - along * state[name] for name, value in new.items()}, state


@dataclass(frozen=True)
class Average(Transform):
    """A running mean of the gradient, weighted by the loss: state, and context, that matter."""

    def init(self, theta: Theta, setup: Setup) -> State:
        return {name: torch.zeros_like(value) for name, value in theta.items()}

    def before(
        self, gradients: Gradients, state: State, context: Context
    ) -> tuple[Gradients, State]:
        share = 1 / (context.step + 1 + float(context.losses_B.mean()))
        state = {name: held + share * (gradients[name] - held) for name, held in state.items()}
        return dict(state), state


@dataclass(frozen=True)
class Throw(Transform):
    """Puts theta far away after every step."""

    def init(self, theta: Theta, setup: Setup) -> State:
        return {"calls": torch.zeros(())}

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        return {n: v + 100.0 for n, v in new.items()}, {"calls": state["calls"] + 1}


def no_setup(theta: Theta) -> Setup:
    """Rows to start from that are theta's own, one training row, and a table of random rows."""
    (width,) = {value.shape[-1] for value in theta.values()}
    table = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    row = TokenSequence((1, 2), (3, 4, 5), ((6,),), 0, None, Example({}, "", ""))
    return Setup(theta, [row], len(table), lambda ids: table[list(ids)])


def no_context() -> Context:
    """A context of one example that says nothing."""
    one = torch.zeros(1, 1)
    outcome = Outcome(one, one.long() + 1, one[0].long(), (None,))
    return Context(0, 1, [], outcome, one[0])


# -- augmentations --------------------------------------------------------------------


@dataclass(frozen=True)
class Noise(Augmentation):
    """The model reads another token in the place of a share of the answer's tokens."""

    share: float = 0.5
    token: int = 3

    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        rng = random.Random(f"{context.seed}:{context.step}")

        def noisy(ids: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(self.token if rng.random() < self.share else i for i in ids)

        return [dataclasses.replace(s, inputs=tuple(map(noisy, s.targets))) for s in batch]


# -- backbone --------------------------------------------------------------------


class DeepToy:
    """A frozen model that is no language model: rows of its own in every layer, and a toy head.

    The mean of a sequence's token vectors attends to the rows of layer after layer; the first token
    of each answer is read off at the end.
    """

    def __init__(self, vocabulary: int, layers: int = 3, width: int = 8):
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.table_VD = weights(vocabulary, width)
        self.layers_LDD = weights(layers, width, width) / width**0.5

    def start(self, rows: int) -> dict[str, Tensor]:
        layers = len(self.layers_LDD)
        ids = torch.arange(layers * rows) % len(self.table_VD)
        return {"layers": self.table_VD[ids].view(layers, rows, -1).clone()}

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.table_VD[list(ids)]

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
    ) -> Outcome:
        assert not isinstance(prompt, Tensor)
        hidden_BD = torch.stack([self.embed(s.prefix + s.suffix).mean(dim=0) for s in batch])
        for weight_DD, rows_PD in zip(self.layers_LDD, prompt["layers"], strict=True):
            attention_BP = torch.softmax(hidden_BD @ rows_PD.T, dim=1)
            hidden_BD = torch.tanh(hidden_BD @ weight_DD + attention_BP @ rows_PD)
        logprobs_BV = torch.log_softmax(hidden_BD @ self.table_VD.T, dim=1)
        firsts = [
            [ids[0] for ids in (s.targets if choices else (s.targets[s.gold],))] for s in batch
        ]
        logprobs_BC = logprobs_BV.gather(1, torch.tensor(firsts))
        return Outcome(
            logprobs_BC,
            torch.ones_like(logprobs_BC, dtype=torch.long),
            torch.tensor([s.gold if choices else 0 for s in batch]),
            tuple(s.example.group for s in batch),
            normalize,
        )

    def generate(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("it reads off one token")
