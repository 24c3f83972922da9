"""What a model's configuration says about reusing keys and values."""

from __future__ import annotations

from typing import Any


def attention_windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, and how many tokens back each kind sees (None: all)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {
            kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))
        }
    return {"attention": window}


def layer_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer; empty where all are of one kind."""
    return list(getattr(config, "layer_types", None) or ())


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


def no_reuse(model: Any, config: Any) -> str:
    """Why the model cannot reuse prefixes, by its configuration; "" if nothing forbids it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange or getattr(model, "_is_stateful", False):
        return f"the model is recurrent or mixed ({', '.join(strange) or model.config.model_type})"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "the model's local attention (GPT-Neo) counts stored keys, padding included"
    if getattr(model, "is_activation_checkpointing", False):
        return "gradient checkpointing drops stored keys and values"
    return ""
