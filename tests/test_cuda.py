"""On a GPU: bfloat16 passes with fp32 rows, prefixes beyond the GPU's budget in host memory."""

from __future__ import annotations

import pytest
import torch

import tiny
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.model.prefix_cache import PrefixCache
from kit_loss import loss_and_gradient, mixed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(architecture: str, dtype: torch.dtype) -> LanguageModel:
    loaded = tiny.loaded(architecture, dtype=dtype, attention="sdpa", tie=False)
    return LanguageModel(LoadedModel(loaded.model.to("cuda"), loaded.tokenizer, loaded.info))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_loss_and_gradient_are_those_of_the_cpu(
    architecture: str, dtype: torch.dtype, near: float
) -> None:
    made = mixed(architecture, dtype=torch.float32, attention="sdpa")
    model = on_gpu(architecture, dtype)
    assert model.why_not_reusable is None
    loss, gradient = loss_and_gradient(model, made.start.to("cuda"), made.sequences)
    expected, slope = loss_and_gradient(made.model, made.start, made.sequences)
    assert gradient.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < near
    assert ((gradient.cpu() - slope).norm() / slope.norm()).item() < near


def test_prefixes_over_the_budget_lie_in_host_memory() -> None:
    made = mixed(dtype=torch.float32, attention="sdpa")
    model = on_gpu("llama", torch.float32)
    rows = made.start.to("cuda")
    expected = loss_and_gradient(model, rows, made.sequences)
    (prefix,) = model.prefixes_of([made.sequences[0].prefix])
    model = model.with_prefix_cache(PrefixCache(prefix.nbytes, host=2**30))
    for _ in range(2):
        loss, gradient = loss_and_gradient(model, rows, made.sequences)
        assert torch.allclose(loss, expected[0], rtol=1e-5)
        assert torch.allclose(gradient, expected[1], rtol=1e-3, atol=1e-5)
    assert len(model.prefix_cache) == len({s.prefix for s in made.sequences})


def test_replies_are_those_of_the_cpu() -> None:
    made = mixed(dtype=torch.float32, attention="sdpa")
    model = on_gpu("llama", torch.float32)
    for decoding in (Decoding(8), Decoding(8, temperature=0.7, top_p=0.9, samples=3)):
        found = replies(model, made.start.to("cuda"), made.sequences, decoding, end_ids=())
        assert found == replies(made.model, made.start, made.sequences, decoding, end_ids=())
