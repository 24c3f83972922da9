"""Log-probabilities straight from hidden states: the numbers and gradients of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from embedgrad.model import token_logprobs as readout
from embedgrad.model.token_logprobs import hidden_logprobs, token_logprobs

ROWS = torch.tensor([0, 0, 2, 6, 5, 5, 5])
TOKENS = torch.tensor([3, 10, 3, 0, 1, 1, 12])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of logits at a time."""
    monkeypatch.setattr(readout, "CHUNK_BYTES", 2 * 13 * 8)


def numbers(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (13, 5), (13,))
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return hidden.requires_grad_(True), weight, bias


@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(biased: bool) -> None:
    hidden, weight, bias = numbers()
    offset = bias if biased else None
    found = hidden_logprobs(hidden, weight, offset, ROWS, TOKENS)
    expected = token_logprobs(F.linear(hidden, weight, offset), ROWS, TOKENS)
    assert torch.allclose(found, expected, atol=1e-12)
    scale = torch.linspace(1, 2, len(ROWS), dtype=torch.float64)
    (one,) = torch.autograd.grad((found * scale).sum(), hidden)
    (other,) = torch.autograd.grad((expected * scale).sum(), hidden)
    assert torch.allclose(one, other, atol=1e-12)
    assert (one[[1, 3, 4]] == 0).all()


def test_it_can_be_differentiated_twice() -> None:
    hidden, weight, bias = numbers()

    def function(h: Tensor) -> Tensor:
        return hidden_logprobs(h, weight, bias, ROWS, TOKENS)

    assert torch.autograd.gradcheck(function, (hidden,))
    assert torch.autograd.gradgradcheck(function, (hidden,))


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_a_gradient_that_is_differentiated_is_the_same(dtype: torch.dtype, far: float) -> None:
    hidden, weight, bias = numbers(dtype)
    total = hidden_logprobs(hidden, weight, 3 * bias, ROWS, TOKENS).sum()
    (plain,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(total, hidden, create_graph=True)
    assert plain.dtype == again.dtype == dtype
    assert again.requires_grad
    assert torch.allclose(plain, again, atol=far)


def test_nothing_as_long_as_the_vocabulary_is_kept_for_the_gradient() -> None:
    hidden, weight, _ = numbers()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_logprobs(hidden, weight, None, ROWS, TOKENS)
    assert kept
    assert {tuple(t.shape) for t in kept if t is not weight} <= {(7, 5), (7,)}


def test_half_precision_is_normalized_in_single() -> None:
    hidden, weight, bias = numbers(torch.bfloat16)
    found = hidden_logprobs(hidden, weight, bias, ROWS, TOKENS)
    assert found.dtype == torch.float32
    expected = token_logprobs(F.linear(hidden, weight, bias), ROWS, TOKENS)
    assert torch.allclose(found, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient.dtype == torch.bfloat16
    (other,) = torch.autograd.grad(expected.sum(), hidden)
    assert torch.allclose(gradient, other, atol=0.1)


def test_a_long_flat_vocabulary_does_not_overflow_float16() -> None:
    weight = torch.full((150_000, 4), 0.6, dtype=torch.float16)
    hidden = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        hidden_logprobs(hidden, weight, None, torch.tensor([0]), torch.tensor([1])).sum(), hidden
    )
    assert gradient.abs().max().item() < 0.05
