"""Copy a checkpoint's other files: tokenizer, config, template.

The files are edited, not saved by `transformers`: its versions write them differently, and an
engine may use an older one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from embedgrad.data.bounded_reads import read_json
from embedgrad.errors import ExportError, ModelError
from embedgrad.model.loading.checkpoint_folder import CONFIG
from embedgrad.model.loading.load import load_tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, ADDED = "chat_template.jinja", "added_tokens.json"
GENERATION = "generation_config.json"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
# Without the first, transformers 4 uses this file's settings, not config.json's.
_OF_NO_EFFECT = ("_from_model_config", "use_cache", "output_attentions", "output_hidden_states")
OTHERS = ("special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


def write_tokenizer(source: Path, folder: Path, exported: Any) -> Any:
    """Write `exported`, the extended tokenizer of `source`, and return it as read back.

    Raises `ExportError` if the new tokens are not read back as they are.
    """
    if (source / TOKENIZER).is_file():
        for pattern in OTHERS:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        _edit(source, folder, exported)
    else:
        exported.save_pretrained(folder)
    (folder / TEMPLATE).write_text(exported.chat_template, "utf-8")
    try:
        opened = load_tokenizer("the exported model", folder)
    except ModelError as error:
        raise ExportError(f"the model's tokenizer refuses new tokens: {error}") from error
    if opened.get_vocab() != exported.get_vocab() or opened.chat_template != exported.chat_template:
        changed = dict(opened.get_vocab().items() ^ exported.get_vocab().items())
        raise ExportError(
            "the model's tokenizer refuses new tokens: read back from its files, "
            f"{', '.join(sorted(changed)[:3]) or 'its chat template'} differs; "
            "export prompt embeddings (--to vllm) instead"
        )
    return opened


def _edit(source: Path, folder: Path, exported: Any) -> None:
    content = _read(source / TOKENIZER)
    known = {entry["id"] for entry in content["added_tokens"]}
    new = [(i, t) for i, t in sorted(exported.added_tokens_decoder.items()) if i not in known]
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {i: {key: getattr(token, key) for key in keys} for i, token in new}
    content["added_tokens"] += [{"id": i, **values} for i, values in flags.items()]
    _write(folder / TOKENIZER, content)
    config = _read(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).is_file() else {}
    # The file takes precedence, but older versions and other programs only know this place.
    config["chat_template"] = exported.chat_template
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): values for i, values in flags.items()}
    _write(folder / TOKENIZER_CONFIG, config)
    if (source / ADDED).is_file():
        _write(folder / ADDED, _read(source / ADDED) | {t.content: i for i, t in new})


_OWN_SIZES = {"decoder_vocab_size"}  # of a table, beside that of the output layer
# Where quantization methods list the layers that they skip; unset: the lm_head is skipped.
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules", "ignore")


def quantization_of(source: Path) -> str:
    """Name of the checkpoint's quantization method; "" for a plain one."""
    settings = _read(source / CONFIG).get("quantization_config")
    return str(settings.get("quant_method", "an unknown method")) if settings else ""


def write_config(source: Path, folder: Path, *, vocabulary: int, lm_head: str, dtype: str) -> None:
    """Write config.json for a table of `vocabulary` rows and a separate output layer `lm_head`.

    `dtype` is the precision that all weights were rounded to; "": they were not.
    """
    config = _read(source / CONFIG)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    for key in {"vocab_size", *_OWN_SIZES & text.keys()}:
        text[key] = vocabulary
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    if dtype:
        keys = {key for part in (text, config) for key in ("dtype", "torch_dtype") if key in part}
        for key in keys or {"dtype"}:
            text[key] = config[key] = dtype
    quantization = config.get("quantization_config") or {}
    for key in _LEFT_ALONE:
        layers = quantization.get(key)
        if isinstance(layers, list) and lm_head not in layers:
            layers.append(lm_head)
    _write(folder / CONFIG, config)


def write_generation_config(
    source: Path, folder: Path, generation: Any, suppressed: Sequence[int]
) -> list[str]:
    """Write generation settings that make `generate` never return the `suppressed` ids.

    `generation` is the loaded model's, for a folder without a file. Of the base model's own only
    special tokens are kept: servers take sampling, penalties and lengths from this file, with which
    the prompt was neither trained nor checked. Returns the names of those left out.
    """
    file = source / GENERATION
    values = _read(file) if file.is_file() else generation.to_diff_dict()
    kept = {key: value for key, value in values.items() if key in _KEPT}
    _write(folder / GENERATION, {**kept, "do_sample": False, "suppress_tokens": [*suppressed]})
    config: Any = GenerationConfig  # it has no types
    neutral = config().to_dict()
    return [
        key
        for key, value in values.items()
        if key not in (*_KEPT, *_OF_NO_EFFECT) and value not in (None, neutral.get(key))
    ]


def unused(settings: Sequence[str]) -> list[str]:
    """A note on generation settings of the base model that an export leaves out, if any."""
    names = ", ".join(settings)
    note = f"the base model's generation settings are left out, as training had none: {names}"
    return [note] if settings else []


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(path)
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
