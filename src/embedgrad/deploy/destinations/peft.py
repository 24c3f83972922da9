"""Export to a PEFT prompt-tuning adapter (a soft prompt).

The text before the span becomes further rows of the adapter, and queries leave it out. The folder
has the format of PEFT 0.21 (`PromptTuningConfig`, `PeftModel.save_pretrained`): one tensor,
`prompt_embeddings`, and a JSON file.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_file, write_json
from embedgrad.deploy.base_model import Base
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    only_prompt,
    usage,
    write_example,
)
from embedgrad.deploy.job import Destination, ExportedPrompt, Job
from embedgrad.deploy.programs import to_source
from embedgrad.deploy.rules import exportability, gather_facts
from embedgrad.errors import DataError, ExportError, TemplateError
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids

CONFIG_FILE, ROWS_FILE = "adapter_config.json", "adapter_model.safetensors"


@final
class PeftAdapter(Destination):
    """A folder for `PeftModel.from_pretrained`."""

    name = "peft"

    def bytes_needed(self, job: Job) -> int:
        longest = max((len(s.prefix) for s in job.prompts[0].sequences), default=0)
        return (longest + len(job.prompts[0].rows_PD)) * job.model.info.width * 4 + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        prefix = common_prefix(exported, job.model)
        rows_PD = adapter_rows(prefix, exported.rows_PD, job.model)
        write_adapter(folder, rows_PD, job.base, job.model)
        notes = ["queries go one at a time: PEFT pads between its virtual tokens and a query"]
        if prefix:
            notes.append(f"a query is the text after the span, as {EXAMPLE_FILE} tokenizes it")
        written = write_example(self.name, folder, job, exported)
        return {
            **written,
            "folded": len(prefix),
            "virtual_tokens": len(prefix) + len(exported.rows_PD),
            "notes": [*notes, *written["notes"]],
        }

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        return [
            f"model = PeftModel.from_pretrained(base_model, {to_source(str(folder))})",
            usage(shlex.quote(f"{folder}/{EXAMPLE_FILE}"), written["columns"]),
        ]


def common_prefix(exported: ExportedPrompt, model: LanguageModel) -> Ids:
    """The tokens before the span. Raises `ExportError` if they are not the same for all queries."""
    try:
        facts = gather_facts(exported, model)
    except (DataError, TemplateError) as error:
        raise ExportError(f"--to peft: the template takes no other text ({error})") from error
    entry = next(e for e in exportability(facts) if e["destination"] == "peft")
    if not entry["possible"]:
        raise ExportError(f"--to peft: {'; '.join(entry['remarks'])}")
    (prefix,) = facts.prefixes
    return prefix


def adapter_rows(prefix: Ids, rows_PD: Tensor, model: LanguageModel) -> Tensor:
    """All virtual tokens, fp32: the rows of the prefix's tokens, then the refined ones."""
    rows_PD = rows_PD.detach().float().cpu()
    return torch.cat([model.embed(prefix).float().cpu(), rows_PD]) if prefix else rows_PD


def write_adapter(folder: Path, rows_PD: Tensor, base: Base, model: LanguageModel) -> None:
    """Write the files that `PeftModel.from_pretrained` reads."""
    config = model.model.config.get_text_config(decoder=True)
    count, width = rows_PD.shape
    adapter = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base.model if base.public else None,
        "revision": base.revision,
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        # PEFT reads the rows, and needs no text to initialize them from.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    tensors = {"prompt_embeddings": rows_PD.contiguous()}
    write_file(folder / ROWS_FILE, tensors_to_bytes(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, adapter)
