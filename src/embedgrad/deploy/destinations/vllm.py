"""Request bodies for vLLM's prompt embeddings.

    /v1/completions        the whole prompt as embeddings; always exact
    /v1/chat/completions   text parts as they are, the rows as a part of their own

Formats: vLLM 0.33, docs/features/prompt_embeds and `vllm/renderers/embed_utils.py`. The second way
is not always exact (see `vllm_chat`); then it is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_TEXT,
    TEMPLATE_FILE,
    Base,
    frozen_template,
    quoted,
    usage,
)
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE, Bodies
from embedgrad.deploy.destinations.vllm_chat import chat_off, parts_source
from embedgrad.deploy.job import Exported, Job

PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}

_COMPLETION = '''\
def payload(embeds):
    """Base64 of torch.save, which the server decodes. A view would carry its whole storage."""
    file = io.BytesIO()
    torch.save(embeds.to(rows.dtype).cpu().contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def settings(more):
    """Of every body. The salt keeps other prompts of this length out of the prefix cache."""
    return {{
        "model": MODEL,
        "cache_salt": {salt},
        "max_tokens": {most},
        "temperature": 0,
        **more,
    }}


def completion(columns, **more):
    """The body for /v1/completions: the whole prompt as embeddings."""
    return {{"prompt_embeds": payload(embeddings(columns)), **settings(more)}}
'''

_CHAT = '''

def chat(columns, **more):
    """The body for /v1/chat/completions: the server renders the text around the rows."""
    span = {{"type": "prompt_embeds", "data": payload(rows)}}
    messages = {messages}
    return {{"messages": messages, {options}**settings(more)}}
'''

_CLOSING = """

def path_of(body):
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


if __name__ == "__main__":
    choice = send({asks}({columns}))["choices"][0]
    print(choice["message"]["content"] if "message" in choice else choice["text"])
"""


class VllmBodies(Bodies):
    """Rows, a client, and example bodies for `vllm serve --enable-prompt-embeds`."""

    name = "vllm"
    server = "vLLM"
    url = "http://127.0.0.1:8000"
    imports = "import base64\nimport io"

    def facts(self, exported: Exported, job: Job, base: Base) -> dict[str, Any]:
        facts = super().facts(exported, job, base)
        off = chat_off(exported)
        notes = [
            "checked against a stand-in that enforces vLLM's documented contract; vLLM itself was "
            "not run",
            "speculative decoding goes wrong with prompt embeddings; leave it off",
        ]
        if off:
            notes.append(f"for /v1/completions only: {off}")
        chat_template = frozen_template(exported.sequencer) is not None
        return {**facts, "chat": not off, "chat_template": chat_template, "notes": notes}

    def functions(self, exported: Exported, facts: Mapping[str, Any]) -> str:
        text = _COMPLETION.format(salt=quoted(facts["rows"]), most=self.most(exported))
        if facts["chat"]:
            template = exported.prompt.template
            options = f'"chat_template_kwargs": {dict(template.options)!r}, '
            text += _CHAT.format(
                messages=parts_source(template), options=options if template.options else ""
            )
        asks = "chat" if facts["chat"] else "completion"
        return text + _CLOSING.format(asks=asks, columns=self.command_line(facts))

    def examples(self, client: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        columns = dict.fromkeys(facts["columns"], EXAMPLE_TEXT)
        bodies = {"completions.json": client.completion(columns)}
        if facts["chat"]:
            bodies["chat.json"] = client.chat(columns)
        return bodies

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        base = Base(written["model"], written["revision"])
        serve = f"vllm serve {shlex.quote(base.model)}{base.flags} --runner generate"
        serve += f" --enable-prompt-embeds --dtype {written['dtype']}"
        if written["chat"]:
            serve += " --chat-template-content-format string"
            if written["chat_template"]:
                serve += f" --chat-template {shlex.quote(f'{folder}/{TEMPLATE_FILE}')}"
        ask = "curl http://127.0.0.1:8000{} -H 'Content-Type: application/json' -d @{}"
        return [
            serve,
            usage(shlex.quote(f"{folder}/{CLIENT_FILE}"), written["columns"]),
            ask.format(PATHS["completion"], shlex.quote(f"{folder}/completions.json")),
        ]
