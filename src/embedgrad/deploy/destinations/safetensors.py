"""Export the artifact with a short program that uses it.

The program needs `transformers` but not embedgrad: it looks up the text around the refined rows in
the model's embedding table, and passes everything to the model as `inputs_embeds`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, final

from embedgrad.deploy.base_model import to_source
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    only_prompt,
    usage,
    with_answer,
    write_example,
)
from embedgrad.deploy.job import Destination, ExportedPrompt, Job
from embedgrad.prompt import artifact

PROGRAM = '''\
"""Answer with the refined prompt in this folder; needs torch and transformers only.

{usage}
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

{opening}model = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype}).requires_grad_(False)
embed = model.get_input_embeddings()
rows = load_file(Path(__file__).parent / "prompt" / "prompt.safetensors")["rows"].to(model.dtype)
# The settings of the model's folder, such as a repetition penalty, are not those of training.
model.generation_config = GenerationConfig(
    eos_token_id=model.generation_config.eos_token_id, pad_token_id=0
)


{token_ids}


{embeddings}

{answer}

if __name__ == "__main__":
    print(answer({columns}))
'''
_FREE = """\
def answer(columns, max_new_tokens=MOST):
    embeds = embeddings(columns)[None]
    new = model.generate(inputs_embeds=embeds, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(new[0], skip_special_tokens=True)
"""
_LOGITS = """\
def logits(columns, ids):
    embeds = torch.cat([embeddings(columns), embed(ids[:-1])])
    return model(inputs_embeds=embeds[None]).logits[0, -len(ids) :]


"""


def program(exported: ExportedPrompt) -> str:
    """The program with the function that answers, for `program_source`."""
    return with_answer(PROGRAM, exported, free=_FREE, logits=_LOGITS, arguments="columns")


@final
class FilesOnly(Destination):
    """The artifact, for `embedgrad.load` and for the program beside it."""

    name = "safetensors"

    def bytes_needed(self, job: Job) -> int:
        return sum(2 * e.rows_PD.numel() * 4 for e in job.prompts) + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        artifact.save(exported.prompt, folder / "prompt")
        written = write_example(program(exported), folder, job, exported)
        return {**written, "snippet": (folder / EXAMPLE_FILE).read_text("utf-8")}

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        query = ", ".join(f'{to_source(name)}: "..."' for name in written["columns"])
        return [
            "import embedgrad\n"
            f"print(embedgrad.load({to_source(str(folder))}).generate({{{query}}}))",
            usage(shlex.quote(f"{folder}/{EXAMPLE_FILE}"), written["columns"]),
        ]
