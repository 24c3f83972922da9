"""llama.cpp: a GGUF file with one new token per refined row."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS
from gguf import GGMLQuantizationType as Kind

from embedgrad.atomic_files import write_file
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.formats.chat_template import (
    check_rendering,
    exported_template,
    exported_tokenizer,
)
from embedgrad.deploy.formats.gguf_file import (
    LM_HEAD,
    TABLE,
    Contents,
    Entry,
    Weight,
    entry,
    from_gguf,
    row_bytes,
    served_kind,
    table_rows,
    write_gguf,
)
from embedgrad.deploy.formats.gguf_from_checkpoint import from_checkpoint
from embedgrad.deploy.formats.guard_row import guard_row
from embedgrad.deploy.formats.hf_files import unused
from embedgrad.deploy.formats.token_names import token_names
from embedgrad.deploy.job import Destination, Job
from embedgrad.errors import ExportError
from embedgrad.events import stage

FILE = "model.gguf"
GRAMMAR = "choices.gbnf"  # for all requests, so only where all prompts have the same choices
_CONTROL, _UNUSED, _NEVER_MERGED = 3, 5, -1000.0
_TOKENS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_SCORES, _TEMPLATE = "tokenizer.ggml.scores", "tokenizer.chat_template"
_ADDS_BOS = "tokenizer.ggml.add_bos_token"
_SAMPLING = "general.sampling."  # settings that llama.cpp's server would take from the file
_FILE_TYPE, _FILE_TYPES = "general.file_type", {"f32": 0, "f16": 1, "q8_0": 7}
_TABLE_KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "float16": Kind.F16}


@final
class Gguf(Destination):
    """The model as a GGUF file, made from its GGUF file if it has one, else from its checkpoint."""

    name = "gguf"

    def bytes_needed(self, job: Job) -> int:
        template = exported_template(job.prompts, job.tag, job.settings.system)
        return _extend(job, _contents(job), guard=0).nbytes + 4 * len(template)

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        contents, system = _contents(job), job.settings.system
        tokenizer = exported_tokenizer(job.prompts, job.model.tokenizer, job.tag, system)
        check_rendering(job.prompts, tokenizer, job.tag)
        stage(job.report, "searching the least likely output row")
        guard = guard_row(job)
        stage(job.report, f"writing {FILE}")
        extended = _extend(job, contents, guard.row)
        metadata = {**extended.metadata, _TEMPLATE: entry(str(tokenizer.chat_template))}
        write_gguf(folder / FILE, extended._replace(metadata=metadata))
        kinds = {weight.name: weight.kind.name for weight in extended.weights}
        (table,) = (weight for weight in extended.weights if weight.name == TABLE)
        left_out = (key for key in contents.metadata if key.startswith(_SAMPLING))
        notes = unused([key.removeprefix(_SAMPLING) for key in left_out])
        grammars = {choices and choices.grammar for choices in map(Choices.of, job.prompts)}
        grammar = grammars.pop() if len(grammars) == 1 else None
        if grammar:
            write_file(folder / GRAMMAR, grammar.encode())
        if table.kind == Kind.F32 and job.settings.gguf != "f32":
            notes.append(
                f"the embedding table takes {table.nbytes / 1e6:,.0f} MB in f32, which keeps "
                "refined rows exact; export.dtype = 'float16' halves it"
            )
        return {
            "notes": notes,
            "file": FILE,
            "grammar": grammar is not None,
            "tokens": {name: list(ids) for name, ids in _ids(job).items()},
            "added": list(_added_ids(job, contents)),
            "size": len(extended.metadata[_TOKENS].value),
            "types": dict(Counter(kinds.values())),
            "embedding": kinds[TABLE],
            "output": kinds[LM_HEAD],
            "untied": LM_HEAD not in {weight.name for weight in contents.weights},
            "guard": guard.record(str(contents.metadata[_TOKENS].value[guard.row])),
        }

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        limit = (
            f" --grammar-file {shlex.quote(str(folder / GRAMMAR))}" if written["grammar"] else ""
        )
        return [
            f"llama-server -m {shlex.quote(str(folder / written['file']))} --jinja --temp 0{limit} "
            "--host 127.0.0.1 --port 8080"
        ]


def _contents(job: Job) -> Contents:
    """The base model in GGUF's terms. Raises `ExportError` for models llama.cpp cannot serve."""
    info = job.model.info
    contents = from_gguf(info) if info.gguf_sha256 else from_checkpoint(job.model)
    arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}.get(contents.architecture)
    if arch is not None and MODEL_TENSOR.OUTPUT not in MODEL_TENSORS[arch]:
        raise ExportError(
            f"gguf: llama.cpp always uses the embedding table of {contents.architecture} as its "
            "output layer, so refined rows would be answers too; export to 'vocabulary'"
        )
    return contents


def _ids(job: Job) -> dict[str, range]:
    """Ids of every prompt's tokens: they start at the tokenizer's length, prompt by prompt."""
    first, ids = len(job.model.tokenizer), {}
    for exported in job.prompts:
        ids[exported.name] = range(first, first + len(exported.rows_PD))
        first += len(exported.rows_PD)
    return ids


def _added_ids(job: Job, contents: Contents) -> tuple[int, int]:
    """The range of ids that the export adds to the model's: first, and one past the last."""
    stop = len(job.model.tokenizer) + sum(len(exported.rows_PD) for exported in job.prompts)
    return min(len(contents.metadata[_TOKENS].value), len(job.model.tokenizer)), stop


def _extend(job: Job, contents: Contents, guard: int) -> Contents:
    """The model with new tokens, their rows, and copies of output row `guard` for them."""
    info, setting = job.model.info, job.settings.gguf
    by_name = {weight.name: weight for weight in contents.weights}
    table = by_name[TABLE]
    lm_head = by_name.get(LM_HEAD) or replace(table, name=LM_HEAD)
    rows_PD = table_rows(torch.cat([exported.rows_PD for exported in job.prompts]), info)
    names = [t for e in job.prompts for t in token_names(job.tag, e.name, len(e.rows_PD))]
    first, stop = _added_ids(job, contents)
    # Tokens that only the tokenizer has get rows too, so that ids agree.
    missing = stop - first - len(names)
    rows_PD = torch.cat([torch.zeros(missing, info.width), rows_PD])
    lm_head = lm_head.convert(served_kind(lm_head, setting))
    kind = Kind.F16 if setting == "f16" else Kind.F32
    kind = _TABLE_KINDS.get(job.settings.dtype, kind)
    changed = {
        TABLE: table.convert(kind).with_rows(first, row_bytes(rows_PD, kind)),
        LM_HEAD: lm_head.with_rows(
            first, lm_head.read(guard, guard + 1).repeat(len(rows_PD), axis=0)
        ),
    }
    bias = by_name.get("output.bias")
    if bias:
        old = bias.convert(Kind.F32).read(0, 1).reshape(-1, 4)  # one f32 per token
        new = np.concatenate([old[:first], old[[guard] * len(rows_PD)], old[stop:]])
        row = new.reshape(1, -1)
        changed[bias.name] = Weight(bias.name, Kind.F32, (len(new),), lambda a, b: row[a:b])
    weights = [w.convert(served_kind(w, setting)) for w in contents.weights]
    weights = [changed.pop(weight.name, weight) for weight in weights]
    # A new output layer goes where llama.cpp's converter puts it: after the table.
    at = 1 + next(i for i, weight in enumerate(weights) if weight.name == TABLE)
    weights[at:at] = changed.values()
    tokens = [(f"[PAD{i}]", _UNUSED) for i in range(first, first + missing)]
    tokens += [(name, _CONTROL) for name in names]
    metadata = _with_tokens(contents, tokens, first)
    bos = job.model.tokenizer.bos_token_id
    if any(s.prefix[:1] != (bos,) for exported in job.prompts for s in exported.sequences):
        metadata[_ADDS_BOS] = entry(False)  # training had none
    if setting != "keep":
        metadata[_FILE_TYPE] = entry(_FILE_TYPES[setting])
    return Contents(contents.architecture, metadata, weights)


def _with_tokens(
    contents: Contents, added: Sequence[tuple[str, int]], first: int
) -> dict[str, Entry]:
    """The metadata with names and types of tokens from id `first` on."""
    metadata = dict(contents.metadata)
    tokens = [str(token) for token in metadata[_TOKENS].value]
    kinds = metadata.get(_KINDS, entry([1] * len(tokens)))
    stop = first + len(added)

    def put(values: Sequence[Any], new: Sequence[Any]) -> list[Any]:
        return [*values[:first], *new, *values[stop:]]

    metadata[_TOKENS] = entry(put(tokens, [name for name, _ in added]))
    metadata[_KINDS] = kinds._replace(value=put(kinds.value, [kind for _, kind in added]))
    if _SCORES in metadata:
        scores = metadata[_SCORES]
        metadata[_SCORES] = scores._replace(value=put(scores.value, [_NEVER_MERGED] * len(added)))
    size = f"{contents.architecture}.vocab_size"
    if size in metadata:
        metadata[size] = metadata[size]._replace(value=len(metadata[_TOKENS].value))
    # llama.cpp would choose a second template for requests with tools, and it lacks the span.
    others = (f"{_TEMPLATE}s", f"{_TEMPLATE}.", _SAMPLING)
    return {key: value for key, value in metadata.items() if not key.startswith(others)}
