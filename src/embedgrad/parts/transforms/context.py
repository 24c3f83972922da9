"""Context transforms: steps that follow the embeddings of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.parameterizations import Free, Theta, all_rows
from embedgrad.parts.transforms.base import Context, Gradients, Setup, State, Transform

AT_ONCE = 4096  # embeddings that are held in double precision


class RowMap(Transform, ABC):
    """One linear map of the width for all rows, R[..., D] -> R[..., D], symmetric and at least 0.

    So what it makes of a gradient is still a direction in which the loss does not rise.
    """

    of: Literal["gradient", "step"]

    @abstractmethod
    def apply(self, rows: Tensor, state: State) -> Tensor:
        """The map's image of rows [..., D]."""

    def before(
        self, gradients: Gradients, state: State, context: Context
    ) -> tuple[Gradients, State]:
        if self.of == "step":
            return gradients, state
        return {name: self.apply(g, state) for name, g in gradients.items()}, state

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        if self.of == "gradient":
            return new, state
        moved = {name: self.apply(new[name] - value, state) for name, value in old.items()}
        return {name: old[name] + step for name, step in moved.items()}, state


@final
@dataclass(frozen=True)
class ContextProjection(RowMap):
    """Keep mainly the part of each row's gradient in the span of the context's embeddings.

    g <- (1 - blend) g + blend g P^T P
    P [r, D]: the first principal components of the embeddings of the training rows' tokens.
    Inspired by, and no reproduction of, Context-Aware Neural Gradient Mapping,
    https://arxiv.org/abs/2501.14936, whose targets are principal components of input features.
    """

    energy: Annotated[float, Gt(0), Le(1)] = 0.95
    """Share of the variance that the components explain; as few as that takes."""
    rank: Annotated[int, Gt(0)] | None = None
    """Number of components, instead of a share; the model's width keeps everything."""
    blend: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the gradient that is projected; 0: none, 1: nothing leaves the span."""
    of: Literal["gradient", "step"] = "gradient"
    """What is mapped. AdamW rescales a mapped gradient number by number, out of the span again; a
    mapped step stays in it."""

    def init(self, theta: Theta, setup: Setup) -> State:
        _check_rows(theta, setup, "context_projection")
        values, directions = torch.linalg.eigh(_moments(train_tokens(setup), setup)[1])
        shares = values.clamp(min=0).flip(0).cumsum(0) / values.clamp(min=0).sum()
        rank = self.rank or 1 + int((shares < self.energy).sum())
        components_RD = directions.T.flip(0)[:rank]
        return {"components": components_RD.to(next(iter(theta.values())))}

    def apply(self, rows: Tensor, state: State) -> Tensor:
        components_RD = state["components"]
        return torch.lerp(rows, (rows @ components_RD.T) @ components_RD, self.blend)


@final
@dataclass(frozen=True)
class EmbeddingMetric(RowMap):
    """Move rows further in the directions in which tokens' embeddings differ.

    g <- g (Sigma + eps I)
    Sigma [D, D]: the covariance of embeddings, scaled to a mean eigenvalue of 1. It is the steepest
    descent in the metric (Sigma + eps I)^-1, in which rows stay close to real tokens.
    Inspired by, and no reproduction of, https://arxiv.org/abs/2501.14936, which speaks of
    Riemannian metrics and defines none.
    """

    tokens: Literal["vocabulary", "train"] = "vocabulary"
    """Whose embeddings: all tokens', or those of the training rows by how often they occur."""
    eps: Annotated[float, Ge(0)] = 1e-3
    """What every direction keeps, as a share of the mean."""
    of: Literal["gradient", "step"] = "gradient"
    """What is mapped. AdamW rescales a mapped gradient number by number, but not a mapped step."""

    def init(self, theta: Theta, setup: Setup) -> State:
        _check_rows(theta, setup, "embedding_metric")
        everything = dict.fromkeys(range(setup.vocabulary), 1)
        counts = train_tokens(setup) if self.tokens == "train" else everything
        sigma_DD = _moments(counts, setup)[1]
        sigma_DD /= sigma_DD.diagonal().mean().clamp(min=1e-30)
        sigma_DD.diagonal().add_(self.eps)
        return {"metric": sigma_DD.to(next(iter(theta.values())))}

    def apply(self, rows: Tensor, state: State) -> Tensor:
        return rows @ state["metric"]


@final
@dataclass(frozen=True)
class ContextPull(Transform):
    """Pull the prompt's mean row towards the mean embedding of the training rows' tokens.

    E <- E - learning rate * strength * grad |c - m(E)|^2,  m(E) the mean of the prompt's P rows
    It comes closer in every step where learning rate * strength < P / 2.
    Inspired by, and no reproduction of, https://arxiv.org/abs/2501.14936, which prints the other
    sign and leaves m open; with that sign the prompt runs away from its context.
    """

    strength: Annotated[float, Ge(0)] = 0.0
    """How strongly; 0: not at all."""
    sign: Literal["minus", "paper"] = "minus"
    """The sign of the gradient; the paper's is refused."""

    def __post_init__(self) -> None:
        if self.sign == "paper":
            raise RecipeError(
                "transforms",
                [
                    "context_pull.sign: the sign printed in the paper moves the prompt away from "
                    "its context; take sign = 'minus'"
                ],
            )

    def init(self, theta: Theta, setup: Setup) -> State:
        _check_rows(theta, setup, "context_pull")
        if not self.strength:
            return {}
        start_PD = all_rows(setup.start)
        mean_D = _moments(train_tokens(setup), setup)[0].to(start_PD)
        return {"context": mean_D, **{f"start {name}": v for name, v in setup.start.items()}}

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        if not state:
            return new, state
        start = {name: state[f"start {name}"] for name in new}
        rows = Free().prompt(new, start)
        rows_PD = all_rows(rows)
        toward_D = 2 / len(rows_PD) * (state["context"] - rows_PD.mean(dim=0))
        move_D = context.learning_rate * self.strength * toward_D
        return Free().reach({name: value + move_D for name, value in rows.items()}, start), state


def train_tokens(setup: Setup) -> Counter[int]:
    """How often each token stands in the training rows, without the template's first tokens."""
    counts = Counter[int]()
    for row in setup.train:
        counts.update(row.prefix[row.shared :])
        counts.update(token for i, token in enumerate(row.suffix) if i not in row.later)
    return counts


def _moments(counts: Mapping[int, int], setup: Setup) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of tokens' embeddings, weighted by counts, in float64."""
    if not counts:
        raise RecipeError("transforms", ["the training rows have no text to take a context from"])
    ids, total = sorted(counts), sum(counts.values())
    width = all_rows(setup.start).shape[1]
    mean_D = torch.zeros(width, dtype=torch.float64)
    square_DD = torch.zeros(width, width, dtype=torch.float64)
    for i in range(0, len(ids), AT_ONCE):
        part = ids[i : i + AT_ONCE]
        rows_TD = setup.embed(part).double().cpu()
        weighted_TD = rows_TD * torch.tensor([[counts[t] / total] for t in part]).double()
        mean_D += weighted_TD.sum(dim=0)
        square_DD += rows_TD.T @ weighted_TD
    return mean_D, square_DD - torch.outer(mean_D, mean_D)


def _check_rows(theta: Theta, setup: Setup, name: str) -> None:
    if all_rows(setup.start).shape[1] != setup.embed([0]).shape[1]:
        problem = f"{name}: goes by the embeddings of words; leave it or parameterization.deep out"
        raise RecipeError("transforms", [problem])
    if max(train_tokens(setup), default=0) >= setup.vocabulary:
        problem = f"{name}: goes by the embeddings of words, and images have none; leave it out"
        raise RecipeError("transforms", [problem])
    if {n: v.shape for n, v in theta.items()} != {n: v.shape for n, v in setup.start.items()}:
        raise RecipeError(
            "transforms",
            [
                f"{name}: it changes rows, and other numbers are trained; take parameterization = "
                "'free', or leave it out"
            ],
        )
