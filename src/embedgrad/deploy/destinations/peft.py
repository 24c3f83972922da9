"""A PEFT prompt-tuning adapter.

PEFT puts its virtual tokens before everything else, so all that stands before the span is folded in
as further rows, and queries leave it out. The folder's format is that of PEFT 0.21
(`PromptTuningConfig`, `PeftModel.save_pretrained`): one tensor, `prompt_embeddings`, and a JSON.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    Base,
    base_of,
    chat_template_file,
    example_source,
    only_prompt,
    quoted,
    usage,
)
from embedgrad.deploy.job import Destination, Exported, Job
from embedgrad.deploy.rules import exportability, facts_of
from embedgrad.errors import DataError, ExportError, TemplateError
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids

CONFIG_FILE, ROWS_FILE = "adapter_config.json", "adapter_model.safetensors"

PROGRAM = '''\
"""Answer through the adapter in this folder; needs peft, torch and transformers.

{usage}

Queries go one at a time: PEFT pads between its virtual tokens and a shorter query.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {model}
MARK = "{mark}"  # stands where the rows were trained
tokenizer = AutoTokenizer.from_pretrained({base})
tokenizer.add_tokens([MARK], special_tokens=True)


{token_ids}


def answer(model, columns, max_new_tokens={max_new_tokens}):
    _, suffix = token_ids(columns)  # what stands before it is among the adapter's rows
    ids = torch.tensor([suffix])
    mask = torch.ones_like(ids)  # else a padding token in a query would go unread
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    return tokenizer.decode(new[0, len(suffix) :], skip_special_tokens=True)


if __name__ == "__main__":
    base = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype})
    model = PeftModel.from_pretrained(base, Path(__file__).parent).eval()
    print(answer(model, {columns}))
'''


class PeftAdapter(Destination):
    """A folder for `PeftModel.from_pretrained`."""

    name = "peft"

    def bytes_needed(self, job: Job) -> int:
        longest = max((len(s.prefix) for s in job.prompts[0].sequences), default=0)
        return (longest + len(job.prompts[0].rows_PD)) * job.model.info.width * 4 + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        base, dtype = base_of(job), job.model.info.dtype
        prefix = prefix_of(exported, job.model)
        write_adapter(folder, adapter_rows(prefix, exported.rows_PD, job.model), base, job.model)
        write_file(folder / EXAMPLE_FILE, example_source(PROGRAM, exported, base, dtype).encode())
        for name, content in chat_template_file(exported.sequencer).items():
            write_file(folder / name, content)
        notes = ["queries go one at a time: PEFT pads between its virtual tokens and a query"]
        if prefix:
            notes.append(f"a query is what stands behind the span, as {EXAMPLE_FILE} tokenizes it")
        return {
            "model": base.model,
            "revision": base.revision,
            "dtype": dtype,
            "columns": list(exported.prompt.template.columns),
            "folded": len(prefix),
            "virtual_tokens": len(prefix) + len(exported.rows_PD),
            "notes": notes,
        }

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        return [
            f"model = PeftModel.from_pretrained(base_model, {quoted(str(folder))})",
            usage(shlex.quote(f"{folder}/{EXAMPLE_FILE}"), written["columns"]),
        ]


def prefix_of(exported: Exported, model: LanguageModel) -> Ids:
    """The tokens before the span. Raises `ExportError` where rows differ in them."""
    try:
        facts = facts_of(exported, model, exported.sequences)
    except (DataError, TemplateError) as error:
        raise ExportError(f"--to peft: the template takes no other text ({error})") from error
    found = next(f for f in exportability(facts) if f["destination"] == "peft")
    if not found["possible"]:
        raise ExportError(f"--to peft: {'; '.join(found['remarks'])}")
    (prefix,) = facts.prefixes
    return prefix


def adapter_rows(prefix: Ids, rows_PD: Tensor, model: LanguageModel) -> Tensor:
    """All rows that stand first, fp32: those of the prefix's tokens, then the refined ones."""
    rows_PD = rows_PD.detach().float().cpu()
    return torch.cat([model.embed(prefix).float().cpu(), rows_PD]) if prefix else rows_PD


def write_adapter(folder: Path, rows_PD: Tensor, base: Base, model: LanguageModel) -> None:
    """Write what `PeftModel.from_pretrained` reads."""
    config = model.model.config.get_text_config(decoder=True)
    count, width = rows_PD.shape
    described = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base.model,
        "revision": base.revision,
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        # The rows are all there: PEFT needs no tokenizer and no text to make them from.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    tensors = {"prompt_embeddings": rows_PD.contiguous()}
    write_file(folder / ROWS_FILE, tensors_to_bytes(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG_FILE, f"{json.dumps(described, indent=2)}\n".encode())
