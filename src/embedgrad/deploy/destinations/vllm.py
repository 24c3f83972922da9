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

from embedgrad.deploy.base_model import Base, to_source
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.destinations.client_code import (
    TEMPLATE_FILE,
    command_line,
    frozen_template,
    max_new_tokens,
    usage,
)
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE, Bodies
from embedgrad.deploy.destinations.vllm_chat import chat_problem, messages_source, server_prompt
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.requests import vllm_limit
from embedgrad.errors import EngineError

_COMPLETION = '''\
def payload(embeds):
    """Base64 of torch.save, which the server decodes. A view would carry its whole storage."""
    file = io.BytesIO()
    torch.save(embeds.to(rows.dtype).cpu().contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def settings(more):
    """Fields of every body. The salt keeps the prefix cache from mixing up two prompts."""
    return {{
        "model": {model},
        "cache_salt": {salt},
        "max_tokens": {max_new_tokens},
        "temperature": 0,{limit}
        **more,
    }}


def completion(columns, **more):
    """The body for /v1/completions: the whole prompt as embeddings."""
    return {{"prompt_embeds": payload(embeddings(columns)), **settings(more)}}
'''

_CHAT = '''

def chat(columns, **more):
    """The body for /v1/chat/completions: the server renders the text around the rows."""
    spans = [{{"type": "prompt_embeds", "data": payload(span)}} for span in rows.split({lengths})]
    messages = {messages}
    return {{"messages": messages, {options}**settings(more)}}
'''

_CLOSING = """

def path_of(body):
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


if __name__ == "__main__":
    choice = send({route}({columns}))["choices"][0]
    print(choice["message"]["content"] if "message" in choice else choice["text"])
"""


@final
class VllmBodies(Bodies):
    """Rows, a client, and example bodies for `vllm serve --enable-prompt-embeds`."""

    name = "vllm"
    server = "vLLM"
    url = "http://127.0.0.1:8000"
    imports = "import base64\nimport io"
    notes = ("vLLM's speculative decoding is wrong with prompt embeddings; leave it off",)

    def facts(self, exported: ExportedPrompt, job: Job, base: Base) -> dict[str, Any]:
        facts = super().facts(exported, job, base)
        problem = chat_problem(exported)
        if problem:
            facts["notes"].append(f"for /v1/completions only: {problem}")
        chat_template = frozen_template(exported.sequencer) is not None
        return {**facts, "chat": not problem, "chat_template": chat_template}

    def functions(self, exported: ExportedPrompt, facts: Mapping[str, Any]) -> str:
        choices = Choices.of(exported)
        limits = vllm_limit(choices) if choices else {}
        most = limits.pop("max_tokens", max_new_tokens(exported))
        limit = "".join(f'\n        "{name}": {to_source(v)},' for name, v in limits.items())
        text = _COMPLETION.format(
            salt=to_source(facts["rows"]),
            max_new_tokens=most,
            limit=limit,
            model=to_source(facts["model"]),
        )
        if facts["chat"]:
            template = exported.prompt.template
            options = f'"chat_template_kwargs": {dict(template.variables)!r}, '
            text += _CHAT.format(
                messages=messages_source(template),
                lengths=[len(span.ids) for span in exported.spans],
                options=options if template.variables else "",
            )
        route = "chat" if facts["chat"] else "completion"
        return text + _CLOSING.format(route=route, columns=command_line(facts["columns"]))

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
