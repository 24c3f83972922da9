"""Base of classifiers on the frozen model's hidden states.

    features = hidden state of a layer at the last token before the answer, with the text prompt

Layer and setting are those with the best cross-validated accuracy on the training rows, where rows
of one group stay together; the log-loss breaks ties.
"""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.errors import DataError
from embedgrad.events import scoring
from embedgrad.experiments.baselines.base import (
    Answers,
    Method,
    Task,
    Trained,
    facts_of,
    question_ids,
    question_tokens,
    why_not_choices,
)
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

PASS_TOKENS = 4096  # of one pass, whose hidden states of all layers are in memory


class FrozenFeatures(Method):
    """A classifier of the choices on hidden states; the language model itself is not changed."""

    seeded = False
    setting: str
    """The name of what `validated` varies."""

    def why_not(self, recipe: Recipe) -> str | None:
        return why_not_choices(recipe)

    @abstractmethod
    def cross_validate(
        self, features_NF: Tensor, gold_N: Tensor, groups: Sequence[str], choices: int
    ) -> Iterator[tuple[float, Tensor]]:
        """Settings, each with the probabilities [N, C] of rows that it was not fitted on."""

    @abstractmethod
    def fit(
        self, features_NF: Tensor, gold_N: Tensor, setting: float, choices: int
    ) -> dict[str, Tensor]:
        """The tensors that `predict` needs."""

    @abstractmethod
    def predict(self, fitted: Mapping[str, Tensor], features_NF: Tensor) -> Tensor:
        """Probabilities of the choices, shape [N, C]."""

    def train(self, task: Task, seed: int) -> Trained:
        began, choices = time.perf_counter(), len(task.sequencer.target.choices)
        gold_N = torch.tensor([sequence.gold for sequence in task.train])
        groups = [s.example.group or f"row {i}" for i, s in enumerate(task.train)]
        if len(set(groups)) < 2:
            raise DataError(
                f"{self.name}: all training rows are of one group, and cross-validation needs two; "
                "give rows of more groups, or leave it out"
            )
        states_LNF = hidden_states(task, task.learned)
        found: list[tuple[tuple[float, float], int, float]] = []
        for layer, states_NF in enumerate(states_LNF):
            features_NF = (states_NF - states_NF.mean(dim=0)) / deviation(states_NF)
            for setting, shares_NC in self.cross_validate(features_NF, gold_N, groups, choices):
                right = (shares_NC.argmax(dim=1) == gold_N).double().mean().item()
                loss = -shares_NC[torch.arange(len(gold_N)), gold_N].clamp(min=1e-12).log().mean()
                found.append(((right, -loss.item()), layer, setting))
            task.report(scoring("layers", layer + 1, len(states_LNF)))
        (accuracy, _), layer, setting = max(found, key=lambda entry: entry[0])
        scale = {"mean": states_LNF[layer].mean(dim=0), "deviation": deviation(states_LNF[layer])}
        features_NF = (states_LNF[layer] - scale["mean"]) / scale["deviation"]
        tensors = self.fit(features_NF, gold_N, setting, choices) | scale
        seconds = time.perf_counter() - began
        settings: dict[str, Any] = {"layer": layer, self.setting: setting}
        facts = facts_of(
            sum(tensor.nbytes for tensor in tensors.values()),
            self.score_on_dev(task, Trained(tensors, {"settings": settings})),
            seconds,
            {**settings, "cross_validated": accuracy},
            numbers=tensors["weights"].numel() if "weights" in tensors else 0,
            seen=len(task.train),
        )
        return Trained(tensors, facts)

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        layer = trained.facts["settings"]["layer"]
        features_NF = hidden_states(task, sequences, layer)[0]
        features_NF = (features_NF - trained.tensors["mean"]) / trained.tensors["deviation"]
        shares_NC = self.predict(trained.tensors, features_NF)
        choose, count = task.evaluator().choose, len(task.sequencer.prompt_ids)
        return Answers(
            [choose(s, p_C) for s, p_C in zip(sequences, shares_NC, strict=True)],
            [question_tokens(s, count, as_text=True) for s in sequences],
        )


def deviation(features_NF: Tensor) -> Tensor:
    """The standard deviation of each feature, 1 where it does not vary."""
    deviation_F = features_NF.std(dim=0, correction=0)
    return torch.where(deviation_F > 1e-6, deviation_F, 1.0)


def folds(groups: Sequence[str], count: int = 5) -> list[list[int]]:
    """The rows of each of up to `count` folds; a group is in one fold."""
    names = list(dict.fromkeys(groups))
    random.Random(0).shuffle(names)
    fold = {name: i % min(count, len(names)) for i, name in enumerate(names)}
    return [
        [i for i, group in enumerate(groups) if fold[group] == f]
        for f in range(min(count, len(names)))
    ]


@torch.no_grad()
def hidden_states(
    task: Task, sequences: Sequence[TokenSequence], layer: int | None = None
) -> Tensor:
    """Hidden states [L, N, F] at the last token before the answer, of one layer or of all.

    Layer 0 is the embeddings. The text prompt is read by its plain tokens.
    """
    model, device = task.model, task.model.device
    lines = [question_ids(task, s) for s in sequences]
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    states: dict[int, Tensor] = {}
    while len(states) < len(lines):
        left = order[len(states) :]
        # The longest of the first n is the last of them.
        size = sum((n + 1) * len(lines[i]) <= PASS_TOKENS for n, i in enumerate(left))
        # Rotary scaling by length would see the longest line of a pass.
        batch = left[: 1 if model.forward.longest_reuse is not None else max(1, size)]
        longest = len(lines[batch[-1]])
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, i in enumerate(batch):
            ids_BT[b, : len(lines[i])] = torch.tensor(lines[i])
            mask_BT[b, : len(lines[i])] = 1
        model.forward.forget_longest_pass()
        output = model.model.base_model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            output_hidden_states=True,
            use_cache=False,
        )
        layers = output.hidden_states if layer is None else output.hidden_states[layer : layer + 1]
        at_B = mask_BT.sum(dim=1) - 1
        of_batch = torch.stack([h[torch.arange(len(batch)), at_B].float().cpu() for h in layers])
        states |= {i: of_batch[:, b] for b, i in enumerate(batch)}
        task.report(scoring("hidden states", len(states), len(lines)))
    return torch.stack([states[i] for i in range(len(lines))], dim=1)
