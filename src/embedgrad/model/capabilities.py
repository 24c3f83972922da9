"""Try what a model allows: prefix reuse, and its own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.errors import ModelError
from embedgrad.model.generation import neutral_generation
from embedgrad.model.loading.quiet import one_line, silence_libraries
from embedgrad.prompt.sequence import TokenSequence

if TYPE_CHECKING:
    from embedgrad.model.forward import ForwardPass
    from embedgrad.model.prefixes import PrefixStore


def attention_windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, and how many tokens back each kind sees (None: all)."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def key_value_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    size = 0
    for layer in config.per_layer_config:  # Gemma 4's are not all alike
        heads = layer.num_attention_heads
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        head = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        size += 2 * kv_heads * head * itemsize
    return size


def rope_limit(config: Any) -> int | None:
    """Length from which rotary scaling changes for all tokens, stored ones included."""
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [
        int(s.get("original_max_position_embeddings") or config.max_position_embeddings)
        for s in scalings
        if s.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def why_not_reusable(model: Any, config: Any) -> str | None:
    """Why the model cannot reuse prefixes, by its configuration; None if nothing forbids it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange or getattr(model, "_is_stateful", False):
        return f"the model is recurrent or mixed ({', '.join(strange) or model.config.model_type})"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "the model's local attention (GPT-Neo) counts stored keys, padding included"
    if getattr(model, "is_activation_checkpointing", False):
        return "gradient checkpointing drops stored keys and values"
    return None


@torch.no_grad()
def try_reuse(forward: ForwardPass, prefixes: PrefixStore) -> None:
    """Set how a forward pass computes, by a trial; `prefixes` must store nothing.

    Raises `ModelError` where not even full passes run.
    """
    some = _some_ids(forward, 16)
    nobody = Example({}, "", "trial")
    a, b, c, d, e = (tuple(some[i:j]) for i, j in ((0, 5), (5, 8), (8, 10), (11, 13), (13, 15)))
    sequences = [
        TokenSequence(a, b, (c, (some[10],)), 0, None, nobody),
        TokenSequence(d, e, ((some[15],), (some[0], some[1])), 0, None, nobody),
    ]
    scored = [(s, s.targets, ()) for s in sequences]
    prompt_PD = forward.embed(torch.tensor(some[2:5], device=forward.device))

    def on_prefixes() -> Tensor:
        return forward.on_prefixes(prefixes.context_of(prompt_PD, sequences), scored, 2)

    fast, forward.feed_forward = forward.feed_forward, None
    full = _try(lambda: forward.in_full(prompt_PD, scored, 2))
    forward.feed_forward = fast
    if isinstance(full, str):
        raise ModelError(f"the model does not run on a few texts of several lengths ({full})")
    if forward.why_not_reusable is not None:
        return
    forward.linear_lm_head = _has_linear_lm_head(forward)
    exact = _is_exact(forward)
    if exact and _difference(_try(on_prefixes), full, 1e-3) is None:
        return  # the usual case, in the fewest passes
    forward.feed_forward, forward.joins_keys = None, True
    joined = _try(on_prefixes)
    forward.why_not_reusable = _difference(joined, full, 1e-2 if exact else 0.5)
    if isinstance(joined, str) or forward.why_not_reusable is not None:
        return
    # Rounding hides much in half precision; with joined keys it is nearly the same.
    for forward.feed_forward, forward.joins_keys in ((fast, False), (None, False), (None, True)):
        if _difference(_try(on_prefixes), joined, 1e-3 if exact else 0.1) is None:
            return


def _has_linear_lm_head(forward: ForwardPass) -> bool:
    """Whether logits are a linear layer of the last hidden states and nothing else."""
    ids = torch.tensor([[1, 2, 3]], device=forward.device) % max(forward.vocabulary, 1)
    seen: list[Tensor] = []

    def see(_: Any, __: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    try:
        with forward.model.base_model.register_forward_hook(see):
            plain = forward.model(input_ids=ids, use_cache=False).logits
        layer = forward.model.get_output_embeddings()
        if {seen[0].device, layer.weight.device} != {forward.device}:  # a model that is spread
            return False
        logits = torch.nn.functional.linear(seen[0], layer.weight, getattr(layer, "bias", None))
    except Exception:  # an unknown model may raise anything
        return False
    return torch.equal(logits, plain)  # the same operation on the same numbers


@torch.no_grad()
def try_generate(forward: ForwardPass) -> None:
    """Set whether the model's own `generate` gives from embeddings what full passes give."""
    embeds = forward.embed(torch.tensor([_some_ids(forward, 8)], device=forward.device))
    try:
        with silence_libraries(), neutral_generation(forward.model):
            made = forward.model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(
                    embeds.shape[:2], dtype=torch.long, device=forward.device
                ),
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
    except Exception:  # an unknown model may raise anything
        forward.can_generate = False
        return
    full = forward.last_logits(torch.cat([embeds, forward.embed(made.sequences[:, :2])], dim=1))
    most = (1e-3 if _is_exact(forward) else 0.1) * full.abs().max()
    forward.can_generate = bool((made.logits[2].to(full) - full).abs().max() <= most)


def _some_ids(forward: ForwardPass, count: int) -> list[int]:
    """Token ids to try a model with."""
    return [1 + i * 7 % max(forward.vocabulary - 1, 1) for i in range(count)]


def _is_exact(forward: ForwardPass) -> bool:
    return forward.dtype in (torch.float32, torch.float64)


def _try(compute: Callable[[], Tensor]) -> Tensor | str:
    """Log-probabilities, or why there are none."""
    try:
        return compute()
    except Exception as error:  # an unknown model may raise anything
        return one_line(error)


def _difference(found: Tensor | str, expected: Tensor, tolerance: float) -> str | None:
    """Why one way of computing cannot replace another; None if it can."""
    if isinstance(found, str):
        return f"this model does not take stored prefixes ({found})"
    if not (found - expected).abs().max().item() < tolerance:
        return "with stored prefixes this model gives other results than in full passes"
    return None
