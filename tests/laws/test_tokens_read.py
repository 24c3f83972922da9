"""Law: tokens read at each place of an answer have the full pass's log-probabilities there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import Objective
from embedgrad.parts.parameterizations import Free
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts
from kit import Kit, forget_longest_pass, noisy, spliced
from kit_loss import assert_same, mixed, weighted


def to_read(sequence: TokenSequence) -> list[Ids]:
    """The token itself and two others at each place."""
    return [(t, (t + 3) % 7 + i, 11) for i, t in enumerate(sequence.targets[sequence.gold])]


def read_in_full(made: Kit, rows_PD: Tensor, sequence: TokenSequence) -> Tensor:
    """Log-probabilities [T, K] by plain `transformers`, the right answer alone."""
    model: Any = made.loaded.model
    right = sequence.targets[sequence.gold]
    forget_longest_pass(model)
    embeds = spliced(made.loaded, rows_PD, sequence, right[:-1])
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -len(right) :]
    return torch.log_softmax(logits, dim=1).gather(1, torch.tensor(to_read(sequence)))


@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba", "llama-dynamic"])
def test_they_are_those_of_the_full_pass(architecture: str, choices: bool) -> None:
    made = mixed(architecture)
    rows = noisy(made.start).requires_grad_(True)
    read = [to_read(s) for s in made.sequences]
    outcome = made.model.outcome(rows, made.sequences, choices=choices, read=read)
    full = [read_in_full(made, rows, s) for s in made.sequences]
    assert outcome.token_logprobs_BTK is not None
    for values_TK, expected, sequence in zip(
        outcome.token_logprobs_BTK, full, made.sequences, strict=True
    ):
        count = len(sequence.targets[sequence.gold])
        assert (values_TK[:count] - expected).abs().max().item() < 1e-10
        assert not values_TK[count:].any()
    own = outcome.token_logprobs_BTK[..., 0].sum(1)
    assert (own - outcome.answer_logprobs_B).abs().max().item() < 1e-10
    counts = [len(s.targets[s.gold]) for s in made.sequences]
    found = weighted(
        [v[:n].flatten() for v, n in zip(outcome.token_logprobs_BTK, counts, strict=True)]
    )
    expected = weighted([v.flatten() for v in full])
    assert_same(
        (found.detach(), torch.autograd.grad(found, rows, retain_graph=True)[0]),
        (expected.detach(), torch.autograd.grad(expected, rows)[0]),
    )


def test_sums_are_the_same_beside_them() -> None:
    made = mixed()
    read = [to_read(s) for s in made.sequences]
    plain = made.model.outcome(made.start, made.sequences)
    beside = made.model.outcome(made.start, made.sequences, read=read)
    assert torch.equal(plain.logprobs_BC, beside.logprobs_BC)
    assert plain.token_logprobs_BTK is None


@dataclass(frozen=True)
class Surprise(Objective):
    """Squares of the log-probabilities of the answer's tokens and of one other."""

    def tokens_to_read(self, sequence: TokenSequence) -> list[Ids]:
        return [(t, 11) for t in sequence.targets[sequence.gold]]

    def needs_choices(self, *, available: bool) -> bool:
        return False

    def losses(self, outcome: Outcome) -> Tensor:
        assert outcome.token_logprobs_BTK is not None
        return outcome.token_logprobs_BTK.square().sum((1, 2))

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        assert outcome.token_logprobs_BTK is not None
        return losses_B.square().mean() + 0 * outcome.token_logprobs_BTK.sum()


def test_an_objective_may_read_them_in_any_number_of_parts() -> None:
    made = mixed()
    start = {"prompt": noisy(made.start)}
    parts = Parts(objective=Surprise(), parameterization=Free())
    loss = Loss(made.model, parts, made.sequencer.target, start)
    theta = parts.parameterization.init(start, torch.Generator())
    theta = {name: value.requires_grad_(True) for name, value in theta.items()}
    whole, split = (loss.gradient(theta, made.sequences, n) for n in (1, 3))
    assert abs(whole.loss - split.loss) < 1e-10 * abs(whole.loss)
    for name in theta:
        difference = whole.gradients[name] - split.gradients[name]
        assert difference.norm() < 1e-9 * whole.gradients[name].norm()
