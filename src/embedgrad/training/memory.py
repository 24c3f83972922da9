"""What a finished training asks later ones to leave alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.parts.parameterizations import Free, Parameterization, Theta, all_rows
from embedgrad.parts.transforms.subspace import SubspaceMemory, top_directions
from embedgrad.prompt.sequence import Target, TokenSequence


def remember(
    subspace: SubspaceMemory,
    memory_RN: Tensor,
    model: Backbone,
    target: Target,
    sequences: Sequence[TokenSequence],
    *,
    rows: Prompt,
    before: Prompt,
    start: Prompt,
) -> Tensor:
    """The memory, and what a task of these training rows depends on, shape [r, N].

    `rows` is the prompt after the task's training, `before` that before it, `start` the text's.
    Memories are in the numbers of the free parameterization, the only one that begins at given
    rows.
    """
    theta, earlier = (Free().reach(prompt, start) for prompt in (rows, before))
    if subspace.source == "gradient":
        count = min(subspace.samples, len(sequences))
        chosen = random.Random(0).sample(list(sequences), count)
        found = margin_gradients(model, Free(), target, theta, start, chosen)
        return subspace.absorb(memory_RN, found)
    moved = {name: theta[name] - earlier[name] for name in theta}
    matrix_PD = all_rows(rows if subspace.source == "svd" else moved).double().cpu()
    every_row = torch.eye(len(matrix_PD), dtype=torch.float64)
    directions = top_directions(matrix_PD, subspace.energy).double()
    return subspace.absorb(memory_RN, torch.kron(every_row, directions), energy=1.0)


def margin_gradients(
    model: Backbone,
    parameterization: Parameterization,
    target: Target,
    theta: Theta,
    start: Prompt,
    sequences: Sequence[TokenSequence],
) -> Tensor:
    """The gradient of each row's score margin in theta, shape [M, N].

    Of margins and not of losses, whose gradients vanish where a task is learned.
    """
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in theta.items()}
    found = []
    for sequence in sequences:
        prompt = parameterization.prompt(leaves, start)
        (margin,) = margins(model, target, prompt, [sequence])
        parts = torch.autograd.grad(margin, list(leaves.values()))
        found.append(torch.cat([part.flatten() for part in parts]).double().cpu())
    return torch.stack(found)


def margins(
    model: Backbone, target: Target, prompt: Prompt, sequences: Sequence[TokenSequence]
) -> Tensor:
    """The right choice's score minus the best other's, or a free answer's log-probability, [B]."""
    choices = bool(target.choices)
    outcome = model.outcome(prompt, sequences, choices=choices, normalize=target.normalize)
    if not choices:
        return outcome.answer_logprobs_B
    scores_BC, gold_B1 = outcome.scores_BC, outcome.gold_B[:, None]
    others_B = scores_BC.scatter(1, gold_B1, -torch.inf).amax(dim=1)
    return scores_BC.gather(1, gold_B1).squeeze(1) - others_B
