"""The configuration files of an exported checkpoint: those of its base, with what changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedgrad.loading.folder import CONFIG

GENERATION = "generation_config.json"

# Where methods of quantization list the layers that they leave alone; unset: the head among them.
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules", "ignore")


def quantization_of(source: Path) -> str:
    """Name of the method that the checkpoint in `source` is quantized by; "" for a plain one."""
    settings = _read(source / CONFIG).get("quantization_config")
    return str(settings.get("quant_method", "an unknown method")) if settings else ""


def write_config(source: Path, folder: Path, *, vocabulary: int, head: str, dtype: str) -> None:
    """Write config.json for a table of so many rows and an output layer `head` of its own.

    `dtype` is the precision that all weights were rounded to; "": they were not.
    """
    config = _read(source / CONFIG)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    text["vocab_size"] = vocabulary
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    if dtype:
        named = {key for part in (text, config) for key in ("dtype", "torch_dtype") if key in part}
        for key in named or {"dtype"}:
            text[key] = config[key] = dtype
    quantization = config.get("quantization_config") or {}
    for key in _LEFT_ALONE:
        layers = quantization.get(key)
        if isinstance(layers, list) and head not in layers:
            layers.append(head)
    _write(folder / CONFIG, config)


def write_generation_config(
    source: Path, folder: Path, generation: Any, suppressed: Sequence[int]
) -> None:
    """Write generation settings by which `generate` never gives these ids.

    `generation` is the loaded model's, for a folder without a file.
    """
    file = source / GENERATION
    values = _read(file) if file.is_file() else generation.to_diff_dict()
    # By it transformers 4 would take config.json's settings instead of this file's.
    values.pop("_from_model_config", None)
    values["suppress_tokens"] = [*(values.get("suppress_tokens") or ()), *suppressed]
    _write(folder / GENERATION, values)


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
