"""Law: how a pass is computed changes none of its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import tiny
from embedgrad.errors import ModelError
from embedgrad.model.attention import attend, attend_to
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.model.kv_cache import CachedKV, FixedKVCache, TokenLayout
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from kit import REUSING, noisy
from kit_loss import assert_same, full_loss_and_gradient, loss_and_gradient, mixed


@pytest.mark.parametrize("architecture", REUSING)
def test_what_was_found_out_about_a_model(architecture: str) -> None:
    model = LanguageModel(tiny.loaded(architecture))
    assert not model.forward.joins_keys
    # Gemma 2 bounds its logits, Granite scales them.
    assert model.forward.linear_lm_head == (architecture not in ("gemma2", "granite"))


@pytest.mark.parametrize("architecture", REUSING)
def test_the_last_feed_forward_part_sees_only_what_is_read(architecture: str) -> None:
    made = mixed(architecture)
    part = made.model.forward.feed_forward
    assert part is not None
    seen: list[int] = []
    with patched(part, lambda plain, hidden: seen.append(hidden[..., 0].numel()) or plain(hidden)):
        rows = noisy(made.start)
        made.model.prefixes_of([s.prefix for s in made.sequences])
        assert set(seen) == {0}
        seen.clear()
        loss_and_gradient(made.model, rows, made.sequences[:2])
    wanted = sum(batch_of(s.targets) for s in made.sequences[:2])
    assert sum(seen) == wanted


def batch_of(targets: tuple[tuple[int, ...], ...]) -> int:
    """Places that are read: beginnings of targets, each once."""
    return len({target[:i] for target in targets for i in range(len(target))})


@contextmanager
def patched(
    part: torch.nn.Module, forward: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    plain = part.forward
    part.forward = lambda hidden: forward(plain, hidden)
    try:
        yield
    finally:
        part.forward = plain


def test_a_feed_forward_part_that_looks_at_neighbors_is_left_alone() -> None:
    loaded = tiny.loaded("llama", tie=False)
    last = loaded.model.base_model.layers[-1].mlp
    with patched(last, lambda plain, hidden: plain(hidden).cumsum(dim=1)):
        model = LanguageModel(loaded)
    assert model.forward.feed_forward is None
    # Stored prefixes cannot give sums over earlier tokens either.
    assert model.why_not_reusable is not None


@pytest.mark.parametrize(
    ("architecture", "placement"),
    # All of Mistral's windows end before a system prompt, so nothing depends on it.
    [(a, p) for a in REUSING for p in ("user-after", "system") if (a, p) != ("mistral", "system")],
)
def test_a_model_with_its_own_attention_gets_all_keys_in_one_piece(
    architecture: str, placement: str
) -> None:
    made = mixed(architecture, placement)
    rows = noisy(made.start)
    decoding = Decoding(max_new_tokens=12)
    free = replies(made.model, rows, made.sequences, decoding, end_ids=())
    made.model.forward.joins_keys = True
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )
    assert replies(made.model, rows, made.sequences, decoding, end_ids=()) == free


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_attention_that_gives_other_scores_is_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(
        "embedgrad.model.attention._product", lambda left, right: 1.3 * left @ right
    )
    model = LanguageModel(tiny.loaded("llama", dtype=dtype))
    assert model.forward.joins_keys
    assert model.why_not_reusable is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_queries_in_blocks(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr("embedgrad.model.attention.BLOCK", 3)
    made = mixed(architecture)
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_row_in_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr("embedgrad.model.packing.PASS_COST", 0)
    made = mixed(architecture, "system")
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )


def test_attention_can_be_differentiated_twice_by_default() -> None:
    made = mixed(attention="sdpa")
    rows = noisy(made.start).requires_grad_(True)
    loss = made.model.outcome(rows, made.sequences).logprobs_BC.clamp(min=-100).sum()
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), rows)
    step = 1e-5
    toward = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)

    def squared(at: Tensor) -> float:
        at = at.detach().requires_grad_(True)
        loss = made.model.outcome(at, made.sequences).logprobs_BC.clamp(min=-100).sum()
        return torch.autograd.grad(loss, at)[0].pow(2).sum().item()

    slope = (squared(rows + step * toward) - squared(rows - step * toward)) / (2 * step)
    assert (second * toward).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("opening", [0, 7])
@pytest.mark.parametrize("length", [1, 3, 5, 9, 14, 25, 130])
def test_the_bits_of_a_prefix_do_not_depend_on_its_company(
    architecture: str, opening: int, length: int
) -> None:
    model = LanguageModel(tiny.loaded(architecture, dtype=torch.float32, attention="sdpa"))
    generator = torch.Generator().manual_seed(length)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 200, (count,), generator=generator).tolist())

    begin = ids(opening)
    prefixes = [begin + ids(length) for _ in range(9)]
    together = model.prefixes_of(prefixes, [opening] * 9)
    for count in (1, 2, 3, 5):
        model.prefix_cache.clear()
        some = model.prefixes_of(prefixes[4 : 4 + count], [opening] * count)
        for one, other in zip(some, together[4 : 4 + count], strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


def test_so_it_is_on_a_processor_without_avx512() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}  # embedgrad sets it
    these = [f"{Path(__file__)}::{test_the_bits_of_a_prefix_do_not_depend_on_its_company.__name__}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *these, "-k=-7-"],
        env={**environment, "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "21 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("grouped", [1, 2])
def test_sinks_take_their_share(grouped: int) -> None:
    """gpt-oss has a score per prefix for nothing at all."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = numbers(2, 2 * grouped, 4, 8), numbers(2, 2, 9, 8), numbers(2, 2, 9, 8)
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, grouped
    module.sinks = torch.nn.Parameter(numbers(2 * grouped))
    before = TokenLayout.trunk(torch.arange(5)[None])
    piece = CachedKV(key[None, :, :, :5], value[None, :, :, :5], before, plain=True)
    cache = FixedKVCache([piece])
    cache.see(TokenLayout.trunk(torch.arange(5, 9).expand(2, 4)), {"all": None}, torch.float64)
    with attend_to(SimpleNamespace(_attn_implementation="eager"), cache):
        found, _ = attend(
            module, query, key[:, :, 5:], value[:, :, 5:], None, scaling=0.3, s_aux=module.sinks
        )
    mask = torch.full((4, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(6)
    expected, _ = eager_attention_forward(
        module.eval(), query, key, value, mask[None, None], scaling=0.3
    )
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_of_the_models_own_is_seen_whatever_its_numbers(dtype: torch.dtype) -> None:
    """Falcon never asks for ours: without the stored keys it would differ by little."""
    config = FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=300,
        initializer_range=0.001,
        new_decoder_architecture=False,
        alibi=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        falcon = FalconForCausalLM(config).eval().requires_grad_(False).to(dtype)
    plain = tiny.loaded("llama", dtype=dtype)
    model = LanguageModel(LoadedModel(falcon, plain.tokenizer, plain.info))
    assert model.why_not_reusable is not None or model.forward.joins_keys


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_model_that_gives_all_logits(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    made = mixed(architecture)
    rows = noisy(made.start)
    expected = loss_and_gradient(made.model, rows, made.sequences)
    plain = made.loaded.model.forward
    whole = lambda *a, logits_to_keep=None, **options: plain(*a, **options)  # noqa: E731
    monkeypatch.setattr(made.loaded.model, "forward", whole)
    model = LanguageModel(made.loaded)
    model.forward.linear_lm_head = False
    assert_same(loss_and_gradient(model, rows, made.sequences), expected)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_model_that_runs_on_no_batch_is_refused(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    loaded = tiny.loaded(architecture)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("size 4 must match\nsize 8")

    monkeypatch.setattr(loaded.model, "forward", fail)
    with pytest.raises(ModelError, match=r"does not run .* \(size 4 must match size 8 \(Runtime"):
        LanguageModel(loaded)


def test_unknown_scores_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="position_bias"):
        attend(None, *[torch.zeros(1, 1, 1, 1)] * 3, None, position_bias=torch.zeros(1))


def test_passes_of_several_threads_go_one_after_the_other() -> None:
    made = mixed()
    rows = noisy(made.start)
    expected = made.model.outcome(rows, made.sequences).logprobs_BC
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: made.model.outcome(rows, made.sequences).logprobs_BC, range(24))
        )
    assert all(torch.equal(one, expected) for one in found)
    assert made.loaded.model.config._attn_implementation == "eager"


def test_too_little_room_makes_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes that cannot be stored are not built ahead of time."""
    made = mixed()
    sizes = [prefix.nbytes for prefix in made.model.prefixes_of([s.prefix for s in made.sequences])]
    model = LanguageModel(made.loaded, prefix_cache_budget=max(sizes))
    model.prefixes_of([made.sequences[0].prefix])
    built = model.prefix_cache.misses
    model.prepare(made.sequences[1:])
    assert model.prefix_cache.misses == built
    made.model.prefix_cache.clear()
    made.model.prepare(made.sequences)
    assert len(made.model.prefix_cache) == len({s.prefix for s in made.sequences})
