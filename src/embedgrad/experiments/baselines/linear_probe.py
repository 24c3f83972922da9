"""Linear probe: logistic regression on frozen hidden states.

Source: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from embedgrad.experiments.baselines.frozen_features import FrozenFeatures, folds

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
ITERATIONS = 100  # of L-BFGS


@final
class LinearProbe(FrozenFeatures):
    """Multinomial logistic regression; layer and penalty by cross-validation in five folds."""

    setting = "penalty"

    def cross_validate(
        self, features_NF: Tensor, gold_N: Tensor, groups: Sequence[str], choices: int
    ) -> Iterator[tuple[float, Tensor]]:
        parts = folds(groups)
        for penalty in PENALTIES:
            shares_NC = torch.zeros(len(gold_N), choices)
            for held in parts:
                rest = torch.ones(len(gold_N), dtype=torch.bool)
                rest[held] = False
                fitted = self.fit(features_NF[rest], gold_N[rest], penalty, choices)
                shares_NC[held] = self.predict(fitted, features_NF[held])
            yield penalty, shares_NC

    def fit(
        self, features_NF: Tensor, gold_N: Tensor, setting: float, choices: int
    ) -> dict[str, Tensor]:
        weights = torch.zeros(features_NF.shape[1] + 1, choices, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=ITERATIONS,
            tolerance_grad=1e-4,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            scores_NC = features_NF @ weights[:-1] + weights[-1]
            loss: Tensor = functional.cross_entropy(scores_NC, gold_N, reduction="sum")
            loss = (loss + setting / 2 * weights[:-1].square().sum()) / len(gold_N)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return {"weights": weights.detach()}

    def predict(self, fitted: Mapping[str, Tensor], features_NF: Tensor) -> Tensor:
        weights = fitted["weights"]
        return torch.softmax(features_NF @ weights[:-1] + weights[-1], dim=1)
