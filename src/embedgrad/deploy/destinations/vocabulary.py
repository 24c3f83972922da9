"""Export to a Hugging Face checkpoint with new tokens.

The chat template puts the tokens where the prompt was trained, so that plain messages get it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.deploy.formats import hf_files
from embedgrad.deploy.formats.chat_template import check_rendering, exported_tokenizer
from embedgrad.deploy.formats.guard_row import guard_row
from embedgrad.deploy.formats.new_rows import Tables
from embedgrad.deploy.formats.token_names import token_names
from embedgrad.deploy.formats.weight_files import DTYPES, WeightFiles
from embedgrad.deploy.job import Destination, Job
from embedgrad.errors import ExportError
from embedgrad.events import stage

NAMES = {code: str(dtype).removeprefix("torch.") for code, dtype in DTYPES.items()}
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # copied with the weights


@final
class Vocabulary(Destination):
    name = "vocabulary"

    def bytes_needed(self, job: Job) -> int:
        source = Path(job.model.info.path)
        tables = _tables(job, source)
        changes = tables.changes(_rows_ND(job), len(job.model.tokenizer), 0, _code(job, source))
        weights = tables.files.bytes_needed(changes, tables.table, link=_links(job))
        others = (f for f in source.iterdir() if f.is_file() and f.suffix != ".safetensors")
        return weights + 2 * sum(f.stat().st_size for f in others) + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """The tokenizer first: it decides the ids of the new tokens, or refuses them."""
        source = Path(job.model.info.path)
        tables, code = _tables(job, source), _code(job, source)
        stage(job.report, "writing the tokenizer")
        exported = exported_tokenizer(
            job.prompts, job.model.tokenizer, job.tag, job.settings.system
        )
        opened = hf_files.write_tokenizer(source, folder, exported)
        check_rendering(job.prompts, opened, job.tag)
        names = [token_names(job.tag, p.name, len(p.rows_PD)) for p in job.prompts]
        ids = [opened.convert_tokens_to_ids(list(prompt)) for prompt in names]
        new = [i for prompt in ids for i in prompt]

        stage(job.report, "searching the least likely output row")
        guard = guard_row(job)
        rows_ND = _rows_ND(job)
        changes = tables.changes(rows_ND, new[0], guard.row, code)
        table = changes[tables.table]
        stage(job.report, "writing the weights")
        linked = tables.files.write(folder, changes, tables.table, link=_links(job))
        size, dtype = table.shape[0], NAMES.get(code, "")
        hf_files.write_config(source, folder, vocabulary=size, lm_head=tables.layer, dtype=dtype)
        unspoken = [*range(job.model.info.vocabulary, new[0]), *new]
        generation = job.model.model.generation_config
        left_out = hf_files.write_generation_config(source, folder, generation, unspoken)
        for pattern in TERMS:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)

        dtype, quantized = NAMES[table.dtype], hf_files.quantization_of(source)
        rounded_ND = rows_ND.to(DTYPES[table.dtype]).float()
        norms_N = rows_ND.norm(dim=1).clamp(min=1e-30)
        return {
            "prompts": [
                {"name": p.name, "tokens": list(tokens), "first_id": first[0]}
                for p, tokens, first in zip(job.prompts, names, ids, strict=True)
            ],
            "vocabulary": size,
            "rows_dtype": dtype,
            "rounding": float(((rounded_ND - rows_ND).norm(dim=1) / norms_N).max()),
            "quantized": quantized,
            "untied": job.model.info.tied,
            "embedding_scale": job.model.info.embedding_scale,
            "guard": guard.record(job.model.tokenizer.convert_ids_to_tokens(guard.row)),
            "linked": linked,
            "vllm": not (job.model.info.tied and job.model.info.architecture.startswith("Gemma")),
            "notes": [*_notes(job, linked, dtype, quantized), *hf_files.unused(left_out)],
        }

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        path = shlex.quote(str(folder))
        lines = [f"transformers serve {path}"]
        if written["vllm"]:  # vLLM ties Gemma's embeddings
            lines.append(f"vllm serve {path}")
        return [*lines, f"python -m sglang.launch_server --model-path {path}"]


def _tables(job: Job, source: Path) -> Tables:
    return Tables.find(WeightFiles.read(source), job.model.model, job.model.info)


def _rows_ND(job: Job) -> Tensor:
    """Rows of all prompts in table space: the model scales what it looks up."""
    return torch.cat([p.rows_PD.cpu() for p in job.prompts]) / job.model.info.embedding_scale


def _links(job: Job) -> bool:
    return job.settings.weights == "link"


def _code(job: Job, source: Path) -> str:
    """The precision to round all weights to; "": keep them."""
    if job.settings.dtype == "model":
        return ""
    quantized = hf_files.quantization_of(source)
    if quantized:
        raise ExportError(
            f"export.dtype: {job.settings.dtype}, but the base model's weights are quantized "
            f"({quantized}); expected model"
        )
    return next(code for code, name in NAMES.items() if name == job.settings.dtype)


def _notes(job: Job, linked: Sequence[str], dtype: str, quantized: str) -> list[str]:
    notes = []
    if job.model.info.tied:
        notes.append("the output layer shared the embedding table, and is now a separate copy")
    if _links(job) and not linked:
        notes.append("no file could be linked: each holds a tensor that changes")
    if dtype != "float32":
        notes.append(f"refined rows are rounded to {dtype}, the precision of the table")
    if quantized:
        notes.append(f"the base model is quantized ({quantized}); new rows are not")
    return notes
