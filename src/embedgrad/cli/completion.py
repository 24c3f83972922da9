"""Values that the shell completes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# Repeated here, as the tables that they come from need PyTorch; a test compares them.
DESTINATIONS = ("safetensors", "vocabulary", "gguf", "peft", "vllm", "sglang")
ENGINES = ("llamacpp", "transformers", "vllm")
FIGURES = (
    *("curves", "drift", "reliability", "interpolation"),  # of a run
    *("cost", "forest"),  # of a comparison
    *("history", "settings", "front"),  # of a study
)
METHODS = (
    *("text", "no-template", "best-of-n", "few-shot", "batch-calibration", "threshold"),
    *("linear-probe", "knn", "embedgrad", "embedgrad-no-region", "random-init", "random-reward"),
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
    return [name for name in _find_settings(incomplete) if "=" not in name]


def settings(incomplete: str) -> list[str]:
    """Completes NAME=VALUE: the names of settings, and of parts as values."""
    return [name for name in _find_settings(incomplete) if "=" in name]


def _find_settings(incomplete: str) -> list[str]:
    """Lines of `completion.txt`, which `docs/generate.py` writes."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(incomplete)]
