"""Export the artifact with a short program that uses it.

The program needs `transformers` but not embedgrad: it looks up the text around the refined rows in
the model's embedding table, and passes everything to the model as `inputs_embeds`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, final

from embedgrad.data.bounded_reads import read_text
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    only_prompt,
    usage,
    write_example,
)
from embedgrad.deploy.job import Destination, Job
from embedgrad.deploy.programs import to_source
from embedgrad.prompt import artifact


@final
class FilesOnly(Destination):
    """The artifact, for `embedgrad.load` and for the program beside it."""

    name = "safetensors"

    def bytes_needed(self, job: Job) -> int:
        return sum(2 * e.rows_PD.numel() * 4 for e in job.prompts) + 2**20

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        artifact.save(exported.prompt, folder / "prompt")
        written = write_example(self.name, folder, job, exported)
        return {**written, "snippet": read_text(folder / EXAMPLE_FILE)}

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        query = ", ".join(f'{to_source(name)}: "..."' for name in written["columns"])
        return [
            "import embedgrad\n"
            f"print(embedgrad.load({to_source(str(folder))}).generate({{{query}}}))",
            usage(shlex.quote(f"{folder}/{EXAMPLE_FILE}"), written["columns"]),
        ]
