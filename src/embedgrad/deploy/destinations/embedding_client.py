"""The base of exports whose client sends prompt embeddings."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import read_object
from embedgrad.deploy.base_model import Base
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_TEXT,
    chat_template_file,
    check_token_ids,
    only_prompt,
    program_source,
    run_generated,
)
from embedgrad.deploy.job import Destination, ExportedPrompt, Job
from embedgrad.errors import ExportError

CLIENT_FILE, ROWS_FILE = "client.py", "prompt.safetensors"
SERVED = ("float32", "bfloat16", "float16")  # the precisions of prompt embeddings in vLLM


class Bodies(Destination):
    """Rows, a client, and example bodies for a server that takes prompt embeddings.

    The client is the asset of the destination's name, whose functions return the bodies.
    """

    server: ClassVar[str]
    url: ClassVar[str]
    notes: ClassVar[Sequence[str]]

    @abstractmethod
    def values(self, exported: ExportedPrompt, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What the client has of its own."""

    @abstractmethod
    def bodies(self, client: Any, columns: Mapping[str, str]) -> dict[str, Any]:
        """The client's bodies for one query, by file name."""

    @abstractmethod
    def decode(self, client: Any, columns: Mapping[str, str], exported: ExportedPrompt) -> Tensor:
        """The prompt's embeddings [T, D] as the server reads them from the client's bodies.

        Raises `EngineError` if two bodies hold different prompts.
        """

    def facts(self, exported: ExportedPrompt, job: Job, base: Base) -> dict[str, Any]:
        """Plain JSON values that determine the client's text."""
        rows = exported.rows_PD.detach().float().cpu().contiguous()
        return {
            **base._asdict(),
            "dtype": served_dtype(job),
            "rows": "sha256:" + hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "columns": list(exported.prompt.template.columns),
            "notes": [
                f"the check decodes the request bodies; it does not ask {self.server} itself",
                *self.notes,
                *base.notes(job.model.info),
            ],
        }

    def bytes_needed(self, job: Job) -> int:
        rows, width = job.prompts[0].rows_PD.shape
        tokens = max((len(s.prefix) + len(s.suffix) for s in job.prompts[0].sequences), default=0)
        return (24 * (tokens + 1000) + 4 * rows) * width + 2**20  # the example, in digits, and rows

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported, base = only_prompt(job, self.name), job.base
        facts = self.facts(exported, job, base)
        rows_PD = exported.rows_PD.detach().cpu().to(getattr(torch, facts["dtype"]))
        if not torch.isfinite(rows_PD).all():
            raise ExportError(
                f"--to {self.name}: the rows are not finite in {facts['dtype']}; set export.dtype "
                "to float32 or bfloat16"
            )
        write_file(folder / ROWS_FILE, tensors_to_bytes({"rows": rows_PD.contiguous()}))
        for name, text in chat_template_file(exported.sequencer).items():
            write_file(folder / name, text)
        write_file(folder / CLIENT_FILE, self.source(exported, base, facts).encode())
        client = self.client(folder, job, exported, facts)
        check_token_ids(folder / CLIENT_FILE, client, exported)
        columns = dict.fromkeys(facts["columns"], EXAMPLE_TEXT)
        for name, body in self.bodies(client, columns).items():
            write_file(folder / name, f"{json.dumps(body)}\n".encode())
        return facts

    def source(self, exported: ExportedPrompt, base: Base, facts: Mapping[str, Any]) -> str:
        """The text of `client.py`."""
        more = {"server": self.server, "url": self.url, **self.values(exported, facts)}
        return program_source(self.name, CLIENT_FILE, exported, base, **more)

    def client(
        self, folder: Path, job: Job, exported: ExportedPrompt, facts: Mapping[str, Any]
    ) -> Any:
        """The exported client as a module, with the loaded model's embedding table.

        Raises `EngineError` for a file that differs from what `source` gives.
        """
        base = Base.read(facts, job.model.info, job.settings)
        source = self.source(exported, base, facts)
        client = run_generated(folder / CLIENT_FILE, source, job)
        client.embed = lambda ids: job.model.embed(ids.tolist()).to(client.rows)
        return client


def served_dtype(job: Job) -> str:
    """The precision that the server computes in: the checkpoint's, unless the recipe sets one."""
    dtype: Any = job.settings.dtype
    if dtype == "model":
        config = read_object(Path(job.model.info.path) / "config.json")
        dtype = config.get("dtype") or config.get("torch_dtype") or job.model.info.dtype
    return dtype if dtype in SERVED else "float32"
