"""Export to vLLM: request bodies with prompt embeddings.

    /v1/completions        the whole prompt as embeddings; always exact
    /v1/chat/completions   text parts as they are, the rows of every span as a part

Formats: vLLM 0.33, docs/features/prompt_embeds and `vllm/renderers/embed_utils.py`. The chat route
is not always exact (see `vllm_chat`); if it is not, the client does not offer it.
"""

from __future__ import annotations

import base64
import io
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.deploy.base_model import Base
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.destinations.client_code import (
    TEMPLATE_FILE,
    frozen_template,
    max_new_tokens,
    usage,
)
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE, Bodies
from embedgrad.deploy.destinations.vllm_chat import chat_problem, messages_source, server_prompt
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.requests import vllm_limit
from embedgrad.errors import EngineError


@final
class VllmBodies(Bodies):
    """Rows, a client, and example bodies for `vllm serve --enable-prompt-embeds`."""

    name = "vllm"
    server = "vLLM"
    url = "http://127.0.0.1:8000"
    notes = ("vLLM's speculative decoding is wrong with prompt embeddings; leave it off",)

    def facts(self, exported: ExportedPrompt, job: Job, base: Base) -> dict[str, Any]:
        facts = super().facts(exported, job, base)
        problem = chat_problem(exported)
        if problem:
            facts["notes"].append(f"for /v1/completions only: {problem}")
        chat_template = frozen_template(exported.sequencer) is not None
        return {**facts, "chat": not problem, "chat_template": chat_template}

    def values(self, exported: ExportedPrompt, facts: Mapping[str, Any]) -> dict[str, Any]:
        choices = Choices.of(exported)
        limits = vllm_limit(choices) if choices else {}
        return {
            "salt": facts["rows"],
            "model": facts["model"],
            "most": limits.pop("max_tokens", max_new_tokens(exported)),
            "limits": limits,
            "chat": facts["chat"],
            "chat_messages": messages_source(exported.prompt.template) if facts["chat"] else "",
        }

    def bodies(self, client: Any, columns: Mapping[str, str]) -> dict[str, Any]:
        bodies = {"completions.json": client.completion(columns)}
        if hasattr(client, "chat"):
            bodies["chat.json"] = client.chat(columns)
        return bodies

    def decode(self, client: Any, columns: Mapping[str, str], exported: ExportedPrompt) -> Tensor:
        whole_TD = read_payload(client.completion(columns)["prompt_embeds"], client.rows)
        if hasattr(client, "chat"):
            ids, payloads = server_prompt(client.chat(columns), exported.sequencer)
            spans = iter([read_payload(data, client.rows) for data in payloads])
            parts = [next(spans) if i is None else client.embed(torch.tensor([i])) for i in ids]
            if not torch.equal(torch.cat(parts), whole_TD):
                raise EngineError(
                    f"{CLIENT_FILE}: its two kinds of bodies hold different prompts for the same "
                    "query; export again"
                )
        return whole_TD

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        base = Base(written["model"], written["revision"], written["public"])
        serve = f"vllm serve {base.serving} --runner generate"
        if not base.public:
            serve += f" --served-model-name {shlex.quote(base.model)}"
        # Else the server takes penalties and lengths from the base model's own file.
        serve += f" --generation-config vllm --enable-prompt-embeds --dtype {written['dtype']}"
        if written["chat"]:
            serve += " --chat-template-content-format string"
            if written["chat_template"]:
                serve += f" --chat-template {shlex.quote(f'{folder}/{TEMPLATE_FILE}')}"
        return [
            serve,
            usage(shlex.quote(f"{folder}/{CLIENT_FILE}"), written["columns"]),
            "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
            f"-d @{shlex.quote(f'{folder}/completions.json')}",
        ]


def read_payload(data: str, like: Tensor) -> Tensor:
    """The tensor [T, D] in a payload, in the precision and width of `like`, without unpickling."""
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(data, validate=True))) as archive:
        (numbers,) = (archive.read(n) for n in archive.namelist() if n.endswith("/data/0"))
    return torch.frombuffer(bytearray(numbers), dtype=like.dtype).view(-1, like.shape[1])
