"""What a folder must hold to be a model: config.json, safetensors weights, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from embedgrad.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

# Files that run code when they are opened; never read.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def problem_of(folder: Path) -> str | None:
    """Why `folder` is not a model folder; None if every file is there."""
    if not (folder / CONFIG).is_file():
        return f"no {CONFIG}{_other_format(folder)}"
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter (adapter_config.json); merge it into its base model first"
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        return "no tokenizer (tokenizer.json); save the model's tokenizer into the folder too"
    if (folder / WEIGHTS).is_file():
        return None
    if (folder / INDEX).is_file():
        missing = [shard.name for shard in _shards(folder) if not shard.is_file()]
        return f"{len(missing)} files of its {INDEX} are missing: {missing[0]}" if missing else None
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"only pickle weights ({pickles[0]}), which can run code when opened;"
            " only safetensors are read: save the model again with save_pretrained"
        )
    return f"no weights ({WEIGHTS})"


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless `folder` holds a whole model and every weights file opens."""
    if problem := problem_of(folder):
        raise ModelError(f"{folder}: not a model folder: {problem}")
    single = folder / WEIGHTS
    for file in [single] if single.is_file() else _shards(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a whole safetensors file ({file.stat().st_size:,} bytes):"
                f" {error}{_pointer(file)}; download or copy it again"
            ) from error


def _shards(folder: Path) -> list[Path]:
    try:
        named = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
        shards = sorted({str(name) for name in named})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = "not a list of weights files; download it again"
        raise ModelError(f"{folder / INDEX}: {problem}") from error
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            problem = f"names {name!r}, which is not a safetensors file beside it"
            raise ModelError(f"{folder / INDEX}: {problem}")
    return [folder / name for name in shards]


def _other_format(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return ", but an adapter (adapter_config.json); merge it into its base model first"
    files = sorted(folder.glob("*.gguf"))
    return f", but a GGUF file; name the file itself: {files[0]}" if files else ""


def _pointer(file: Path) -> str:
    with file.open("rb") as opened:
        is_pointer = opened.read(24) == b"version https://git-lfs."
    return " (a Git LFS pointer: run `git lfs pull`)" if is_pointer else ""
