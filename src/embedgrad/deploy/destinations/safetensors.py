"""The artifact itself, and a short program that answers with it.

The program needs `transformers` and nothing of embedgrad: it looks the text before and behind the
rows up in the model's own embedding table, and gives all of it to the model as `inputs_embeds`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import write_file
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    base_of,
    chat_template_file,
    example_source,
    only_prompt,
    quoted,
    usage,
)
from embedgrad.deploy.job import Destination, Job
from embedgrad.prompt import artifact

PROGRAM = '''\
"""Answer with the refined prompt in this folder; needs torch and transformers only.

{usage}
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {model}
MARK = "{mark}"  # stands where the rows go
tokenizer = AutoTokenizer.from_pretrained({base})
tokenizer.add_tokens([MARK], special_tokens=True)
model = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype}).requires_grad_(False)
embed = model.get_input_embeddings()
rows = load_file(Path(__file__).parent / "prompt" / "prompt.safetensors")["rows"].to(model.dtype)


{token_ids}


def embeddings(columns):
    prefix, suffix = (embed(torch.tensor(ids, dtype=torch.long)) for ids in token_ids(columns))
    return torch.cat([prefix, rows, suffix])[None]


def answer(columns, max_new_tokens={max_new_tokens}):
    embeds = embeddings(columns)
    new = model.generate(inputs_embeds=embeds, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(new[0], skip_special_tokens=True)


if __name__ == "__main__":
    print(answer({columns}))
'''


class FilesOnly(Destination):
    """The artifact, for `embedgrad.load` and for the program beside it."""

    name = "safetensors"

    def bytes_needed(self, job: Job) -> int:
        return sum(2 * e.rows_PD.numel() * 4 for e in job.prompts) + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        base = base_of(job)
        dtype = job.model.info.dtype
        source = example_source(PROGRAM, exported, base, dtype)
        artifact.save(exported.prompt, folder / "prompt")
        write_file(folder / EXAMPLE_FILE, source.encode())
        for name, content in chat_template_file(exported.sequencer).items():
            write_file(folder / name, content)
        return {
            "model": base.model,
            "revision": base.revision,
            "dtype": dtype,
            "columns": list(exported.prompt.template.columns),
            "snippet": source,
        }

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        query = ", ".join(f'{quoted(name)}: "..."' for name in written["columns"])
        return [
            f"import embedgrad\nprint(embedgrad.load({quoted(str(folder))}).generate({{{query}}}))",
            usage(shlex.quote(f"{folder}/{EXAMPLE_FILE}"), written["columns"]),
        ]
