"""Check that a folder holds a complete model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from safetensors import SafetensorError, safe_open

from embedgrad.data.bounded_reads import open_regular, read_json, read_object
from embedgrad.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Everything of a model that is read, besides its weights.
TEXTS = (
    *(CONFIG, INDEX, "generation_config.json", *TOKENIZERS, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "README.md"),
)
_LARGEST_CONFIG, _LARGEST_TEXT = 2**24, 2**28  # bytes; the largest tokenizer.json has 2**25
MERGE = " (adapter_config.json); merge it into its base model first"

# Files that run code when they are opened; never read.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def problem_of(folder: Path) -> str | None:
    """Why `folder` is not a model folder; None if every file is there."""
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / CONFIG).is_file():
        files = sorted(folder.glob("*.gguf"))
        if files and not adapter:
            return f"no {CONFIG}, but a GGUF file; name the file itself: {files[0]}"
        return f"no {CONFIG}{', but an adapter' + MERGE if adapter else ''}"
    if adapter:
        return f"it holds an adapter{MERGE}"
    reads_text = read_object(folder / CONFIG, _LARGEST_CONFIG).get("model_type") != "vit"
    if reads_text and not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
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
    for path in (path for name in TEXTS for path in folder.glob(name)):
        most = _LARGEST_CONFIG if path.name.endswith(CONFIG) else _LARGEST_TEXT
        try:
            open_regular(path, most).close()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}; it is none of a model's files") from error
    single = folder / WEIGHTS
    for file in [single] if single.is_file() else _shards(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            with file.open("rb") as opened:
                pointer = opened.read(24) == b"version https://git-lfs."
            hint = " (a Git LFS pointer: run `git lfs pull`)" if pointer else ""
            what = f"{file}: not a whole safetensors file ({file.stat().st_size:,} bytes)"
            raise ModelError(f"{what}: {error}{hint}; download or copy it again") from error


def missing_packages(folder: Path) -> list[str]:
    """Packages without which the tokenizer of `folder` cannot be read."""
    if (folder / "tokenizer.json").is_file():
        return []
    needed: dict[str, str] = {}  # package -> module
    for file in [*folder.glob("*.model"), *folder.glob("*.tiktoken")]:
        with file.open("rb") as opened:  # Llama 3 calls a file of tiktoken's tokenizer.model too
            sentencepiece = opened.read(1) == b"\n"
        names = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        needed |= names if sentencepiece else {"tiktoken": "tiktoken"}
    return [package for package, module in needed.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _shards(folder: Path) -> list[Path]:
    try:
        named = read_json(folder / INDEX)["weight_map"].values()
        shards = sorted({str(name) for name in named})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = "not a list of weights files; download it again"
        raise ModelError(f"{folder / INDEX}: {problem}") from error
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            problem = f"names {name!r}, which is not a safetensors file beside it"
            raise ModelError(f"{folder / INDEX}: {problem}")
    return [folder / name for name in shards]
