"""Convert a GGUF file to a safetensors folder, once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import shutil
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import check_seal, publish_folder, scratch_folder, seal
from embedgrad.data.bounded_reads import file_digest, read_json
from embedgrad.environment import cache_folder
from embedgrad.errors import ModelError
from embedgrad.events import Report, say
from embedgrad.model.loading.gguf_check import compare_with_llamacpp
from embedgrad.model.loading.gguf_header import GgufHeader, read_header
from embedgrad.model.loading.gguf_pretokenizers import set_split_rule
from embedgrad.model.loading.gguf_settings import VERSION, check_tensors, complete_settings
from embedgrad.model.loading.quiet import model_errors

SOURCE = "source.json"

_WEIGHTS_PER_SECOND = 7_000_000


def convert_gguf(file: Path, report: Report) -> tuple[Path, str]:
    """Convert `file` once; returns the folder and the file's SHA-256.

    The folder is written aside and renamed when it is whole, so neither a crash nor a second
    process leaves half of one. Raises `ModelError` for a file that is not a sound GGUF or
    that transformers cannot convert, and when the cache cannot hold the result.
    """
    header = read_header(file)
    digest = file_digest(file)
    parent = cache_folder() / "converted"
    folder = parent / f"{digest[:16]}-{VERSION}"
    if folder.is_dir():
        damage = _damage(folder)
        if damage is None:
            say(report, _source(folder)["notes"])
            return folder, digest
        say(report, [f"{folder}: {damage}; the model is converted again"])
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        try:
            aside = stack.enter_context(scratch_folder(parent, f".{folder.name}"))
        except OSError as error:
            raise ModelError(
                f"the cache folder {parent} cannot be written: {error.strerror};"
                " set EMBEDGRAD_CACHE to a folder that can"
            ) from error
        needed, free = header.weights * 4, shutil.disk_usage(parent).free
        if needed > free:
            raise ModelError(
                f"{file}: its safetensors copy needs {needed:,} bytes, but {parent} has {free:,} "
                "free; make room or set EMBEDGRAD_CACHE to another disk"
            )
        seconds = max(1, round(header.weights / _WEIGHTS_PER_SECOND))
        say(report, [f"converting {file.name} to safetensors (once, about {seconds} s)"])
        with model_errors(f"{file}: could not be converted to safetensors in {parent}"):
            notes = _convert(file, header, aside)
            libraries = ("gguf", "torch", "transformers", "tokenizers")
            source = {
                "file": file.name,
                "gguf_sha256": digest,
                "license": header.metadata.get("general.license"),
                "notes": notes,
                "versions": {name: importlib.metadata.version(name) for name in libraries},
                "files": {path.name: file_digest(path) for path in sorted(aside.iterdir())},
            }
            (aside / SOURCE).write_text(json.dumps(seal(source), indent=2) + "\n", "utf-8")
            try:
                publish_folder(aside, folder)
            except OSError:
                # Another process may have been faster, with as good a result.
                if not folder.is_dir() or _damage(folder):
                    raise
    say(report, notes)
    return folder, digest


def _damage(folder: Path) -> str | None:
    """What is damaged in a converted model's folder; None if it is as it was written."""
    try:
        for name, digest in _source(folder)["files"].items():
            if file_digest(folder / name) != digest:
                return f"{name} is damaged"
    except ModelError:
        return f"{SOURCE} is damaged"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    return None


def license_of(folder: Path) -> str | None:
    """The license named by the GGUF file that a folder was converted from."""
    name = _source(folder)["license"]
    return str(name) if name else None


def _source(folder: Path) -> dict[str, Any]:
    with model_errors(f"{folder / SOURCE}: damaged; delete its folder, to convert the model again"):
        source: dict[str, Any] = read_json(folder / SOURCE)
        check_seal(source)
        return source


def _convert(file: Path, header: GgufHeader, aside: Path) -> list[str]:
    """Write model and tokenizer of `file` into the empty folder `aside`, weights in float32.

    Returns what the user should know of the result.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto: Any = AutoModelForCausalLM
    # An absolute file in an empty folder: configuration files beside the GGUF stay out.
    names = {"gguf_file": str(file.resolve()), "local_files_only": True}
    plain: dict[str, Any] = {"dtype": "float32", "quantization_config": GgufConfig(dequantize=True)}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(aside, **names)
        plain["config"] = AutoConfig.from_pretrained(aside, **names)
        complete_settings(file, header, plain["config"])
        model, report = auto.from_pretrained(aside, **names, **plain, output_loading_info=True)
    check_tensors(file, header, model, report["unexpected_keys"])
    if report["missing_keys"]:
        raise ModelError(f"{file}: lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    set_split_rule(file, header.metadata, tokenizer)
    # The weights are plain float32 now, but marked as quantized, which forbids saving them.
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    return compare_with_llamacpp(file, model.eval(), tokenizer)
