"""What exports to servers of prompt embeddings have in common."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save as tensors_to_bytes

from embedgrad.atomic_files import write_file
from embedgrad.deploy.destinations.client_code import (
    Base,
    base_of,
    chat_template_file,
    check_token_ids,
    command_line,
    max_new_tokens,
    only_prompt,
    quoted,
    run_written,
    token_ids_source,
    usage,
)
from embedgrad.deploy.job import Destination, Exported, Job
from embedgrad.errors import ExportError
from embedgrad.prompt.template import SPAN_MARK

CLIENT_FILE, ROWS_FILE = "client.py", "prompt.safetensors"
SERVED = ("float32", "bfloat16", "float16")  # what vLLM takes as a prompt's embeddings

_OPENING = '''\
"""Ask a {server} server with the refined prompt in this folder; needs torch and transformers only.

{usage}

It looks the text around the refined rows up in the model's own embedding table, which it loads
once. The server must run as README.md says.
"""

{imports}
import json
import sys
import urllib.request
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {model}
MARK = "{mark}"  # stands where the rows go
rows = load_file(Path(__file__).with_name("prompt.safetensors"))["rows"]
tokenizer = AutoTokenizer.from_pretrained({base})
tokenizer.add_tokens([MARK], special_tokens=True)


{token_ids}


@cache
def embedding():
    """The model's embedding table, in the precision of the rows."""
    model = AutoModelForCausalLM.from_pretrained({base}, dtype=rows.dtype)
    return model.get_input_embeddings()


@torch.no_grad()
def embeddings(columns):
    """The whole prompt, tokens x width."""
    parts = (torch.tensor(ids, dtype=torch.long) for ids in token_ids(columns))
    prefix, suffix = (embedding()(ids).to(rows) for ids in parts)
    return torch.cat([prefix, rows, suffix])


def send(body, url="{url}"):
    """The server's answer to a body."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        url + path_of(body), data, {{"Content-Type": "application/json"}}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


'''


class Bodies(Destination):
    """Rows, a client, and example bodies for a server that takes prompt embeddings.

    A subclass says what the client does besides making embeddings: functions that return bodies,
    and `path_of(body)`.
    """

    server: ClassVar[str]
    url: ClassVar[str]
    imports: ClassVar[str]

    @abstractmethod
    def functions(self, exported: Exported, facts: Mapping[str, Any]) -> str:
        """The client's own part, as Python."""

    @abstractmethod
    def examples(self, client: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Example bodies by file name."""

    def facts(self, exported: Exported, job: Job, base: Base) -> dict[str, Any]:
        """What decides of the client's text, as plain JSON values."""
        return {
            "model": base.model,
            "revision": base.revision,
            "dtype": served_dtype(job),
            "rows": "sha256:" + _digest(exported),
            "columns": list(exported.prompt.template.columns),
        }

    def bytes_needed(self, job: Job) -> int:
        rows, width = job.prompts[0].rows_PD.shape
        tokens = max((len(s.prefix) + len(s.suffix) for s in job.prompts[0].sequences), default=0)
        return (24 * (tokens + 1000) + 4 * rows) * width + 2**20  # the example, in digits, and rows

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        exported = only_prompt(job, self.name)
        base = base_of(job)
        facts = self.facts(exported, job, base)
        rows_PD = exported.rows_PD.detach().cpu().to(getattr(torch, facts["dtype"]))
        if not torch.isfinite(rows_PD).all():
            raise ExportError(
                f"--to {self.name}: the rows are not finite in {facts['dtype']}; set export.dtype "
                "to float32 or bfloat16"
            )
        # The dtype first, then a tensor of exactly this shape that shares no memory.
        content = tensors_to_bytes({"rows": rows_PD.contiguous().clone()})
        write_file(folder / ROWS_FILE, content)
        for name, text in chat_template_file(exported.sequencer).items():
            write_file(folder / name, text)
        source = self.source(exported, base, facts)
        path = folder / CLIENT_FILE
        write_file(path, source.encode())
        client = run_written(path, source)
        check_token_ids(path, client, exported)
        # The model is loaded already.
        client.embedding = lambda: lambda ids: job.model.embed(ids.tolist())
        for name, body in self.examples(client, facts).items():
            write_file(folder / name, f"{json.dumps(body)}\n".encode())
        return facts

    def source(self, exported: Exported, base: Base, facts: Mapping[str, Any]) -> str:
        """The text of `client.py`."""
        opening = _OPENING.format(
            server=self.server,
            usage=usage(CLIENT_FILE, facts["columns"]),
            imports=self.imports,
            mark=SPAN_MARK,
            model=quoted(base.model),
            base=base.arguments,
            token_ids=token_ids_source(exported.sequencer),
            url=self.url,
        )
        return opening + self.functions(exported, facts)

    def command_line(self, facts: Mapping[str, Any]) -> str:
        """The columns from the client's command line."""
        return command_line(facts["columns"])

    def most(self, exported: Exported) -> int:
        """Longest answer that a body asks for."""
        return max_new_tokens(exported)


def served_dtype(job: Job) -> str:
    """The precision that the server computes in: that of the checkpoint, or as the recipe says."""
    asked = job.settings.dtype
    dtype = checkpoint_dtype(job) if asked == "model" else asked
    return dtype if dtype in SERVED else "float32"


def checkpoint_dtype(job: Job) -> str:
    """The precision that the model's own files name, else the one it was loaded in."""
    try:
        config = json.loads((Path(job.model.info.path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return job.model.info.dtype
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else job.model.info.dtype


def _digest(exported: Exported) -> str:
    rows = exported.rows_PD.detach().float().cpu().contiguous()
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
