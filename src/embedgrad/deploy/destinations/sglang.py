"""Export to SGLang: request bodies with the prompt's embeddings.

Format: SGLang's native API, `GenerateReqInput` in `srt/managers/io_struct.py`: plain JSON floats,
tokens x width. The server refuses them unless its radix cache, which knows token ids only, is off.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.deploy.base_model import Base
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.destinations.client_code import (
    usage,
)
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE, Bodies
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.programs import to_source


@final
class SglangBodies(Bodies):
    """Rows, a client, and an example body for an SGLang server without radix cache."""

    name = "sglang"
    server = "SGLang"
    url = "http://127.0.0.1:30000"
    notes = (
        "SGLang takes a prompt's embeddings at /generate only, not at its OpenAI API",
        "every number travels as text, so bodies are large",
    )

    def values(self, exported: ExportedPrompt, facts: Mapping[str, Any]) -> dict[str, Any]:
        choices = Choices.of(exported)
        texts = " | ".join(map(to_source, choices.texts)) if choices else ""
        return {"grammar": texts and f"root ::= {texts}"}

    def bodies(self, client: Any, columns: Mapping[str, str]) -> dict[str, Any]:
        return {"generate.json": client.generation(columns)}

    def decode(self, client: Any, columns: Mapping[str, str], exported: ExportedPrompt) -> Tensor:
        body = json.loads(json.dumps(client.generation(columns)))
        return torch.tensor(body["input_embeds"]).to(client.rows)

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        base = Base(written["model"], written["revision"], written["public"])
        return [
            f"python -m sglang.launch_server --model-path {base.serving} "
            f"--disable-radix-cache --dtype {written['dtype']}",
            usage(shlex.quote(f"{folder}/{CLIENT_FILE}"), written["columns"]),
            "curl http://127.0.0.1:30000/generate -H 'Content-Type: application/json' "
            f"-d @{shlex.quote(f'{folder}/generate.json')}",
        ]
