"""Nearest neighbours among the training rows, by frozen hidden states.

Source: Xu et al. 2023 (kNN prompting), https://arxiv.org/abs/2303.13824, on hidden states instead
of the distribution of the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from embedgrad.experiments.baselines.frozen_features import FrozenFeatures

COUNTS = (1, 3, 5, 9, 17, 33)


@final
class NearestNeighbors(FrozenFeatures):
    """The vote of the k nearest rows by cosine; layer and k by leaving out one group at a time."""

    setting = "k"

    def cross_validate(
        self, features_NF: Tensor, gold_N: Tensor, groups: Sequence[str], choices: int
    ) -> Iterator[tuple[float, Tensor]]:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        group_N = torch.tensor([number[group] for group in groups])
        likeness_NN = _cosines(features_NF, features_NF)
        likeness_NN[group_N[:, None] == group_N] = -torch.inf
        fewest = min(int(likeness_NN.isfinite().sum(dim=1).min()), len(gold_N))
        for k in COUNTS:
            if k <= fewest:
                yield k, _vote(likeness_NN, gold_N, k, choices)

    def fit(
        self, features_NF: Tensor, gold_N: Tensor, setting: float, choices: int
    ) -> dict[str, Tensor]:
        counts = torch.tensor([setting, choices], dtype=torch.long)
        return {"features": features_NF, "gold": gold_N, "counts": counts}

    def predict(self, fitted: Mapping[str, Tensor], features_NF: Tensor) -> Tensor:
        k, choices = fitted["counts"].tolist()
        return _vote(_cosines(features_NF, fitted["features"]), fitted["gold"], k, choices)


def _cosines(one_NF: Tensor, other_MF: Tensor) -> Tensor:
    return functional.normalize(one_NF, dim=1) @ functional.normalize(other_MF, dim=1).T


def _vote(likeness_NM: Tensor, gold_M: Tensor, k: int, choices: int) -> Tensor:
    """Shares [N, C] of the k nearest rows' answers, with one vote spread over all choices."""
    nearest_NK = likeness_NM.topk(k, dim=1).indices
    votes_NC = functional.one_hot(gold_M[nearest_NK], choices).sum(dim=1)
    return (votes_NC + 1 / choices) / (k + 1)
