"""Values that the shell completes."""

from __future__ import annotations

from collections.abc import Callable

# Repeated here, as the tables that they come from need PyTorch; a test compares them.
DESTINATIONS = ("safetensors", "vocabulary", "gguf", "peft", "vllm", "sglang")
ENGINES = ("llamacpp", "transformers", "vllm")
FIGURES = ("curves", "drift", "reliability", "interpolation", "cost", "forest")
METHODS = (
    *("text", "no-template", "best-of-n", "few-shot", "batch-calibration", "threshold"),
    *("linear-probe", "knn", "embedgrad", "embedgrad-no-region", "random-init"),
    *("peft-prompt-tuning-text", "peft-prompt-tuning-random", "peft-cpt", "peft-lora"),
)
SPLITS = ("train", "dev", "test")


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completes one of a few values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """Completes the last of several methods, as in text,embedgrad."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in METHODS if name.startswith(last)]


def kinds(incomplete: str) -> list[str]:
    """Completes a kind of part or a section of a recipe."""
    from embedgrad.recipe.catalog import catalog

    return [name for name in catalog() if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Completes NAME=VALUE: the names of settings, and of parts as values."""
    from embedgrad.parts.registry import LISTS
    from embedgrad.recipe.catalog import catalog

    found: set[str] = set()
    for name, entry in catalog().items():
        if name in LISTS:
            continue
        section = "evaluation.scorer" if name == "scorer" else name
        parts = entry.get("parts", {})
        found |= {f"{section}.name={part}" for part in parts}
        for owner in (entry, *parts.values()):
            found |= {f"{section}.{option['name']}=" for option in owner.get("options", ())}
    return sorted(setting for setting in found if setting.startswith(incomplete))
