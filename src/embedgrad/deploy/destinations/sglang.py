"""Request bodies for SGLang: the whole prompt as `input_embeds` of `/generate`.

Format: SGLang's native API, `GenerateReqInput` in `srt/managers/io_struct.py`: plain JSON floats,
tokens x width. The server refuses them unless its radix cache, which knows token ids only, is off.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.deploy.destinations.client_code import EXAMPLE_TEXT, Base, usage
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE, Bodies
from embedgrad.deploy.job import Exported, Job

_FUNCTIONS = '''\
def generation(columns, **more):
    """The body for /generate: the whole prompt as embeddings, in floats."""
    sampling = {{"max_new_tokens": {most}, "temperature": 0}}
    embeds = embeddings(columns).float().tolist()
    return {{"input_embeds": embeds, "sampling_params": sampling, **more}}


def path_of(body):
    return "/generate"


if __name__ == "__main__":
    print(send(generation({columns}))["text"])
'''


class SglangBodies(Bodies):
    """Rows, a client, and an example body for an SGLang server without radix cache."""

    name = "sglang"
    server = "SGLang"
    url = "http://127.0.0.1:30000"
    imports = ""

    def facts(self, exported: Exported, job: Job, base: Base) -> dict[str, Any]:
        notes = [
            "SGLang takes a prompt's embeddings at /generate only, not at its OpenAI API",
            "every number travels as text, so bodies are large",
            "checked against a stand-in that enforces SGLang's documented contract; SGLang itself "
            "was not run",
        ]
        return {**super().facts(exported, job, base), "notes": notes}

    def functions(self, exported: Exported, facts: Mapping[str, Any]) -> str:
        return _FUNCTIONS.format(most=self.most(exported), columns=self.command_line(facts))

    def examples(self, client: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"generate.json": client.generation(dict.fromkeys(facts["columns"], EXAMPLE_TEXT))}

    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        base = Base(written["model"], written["revision"])
        return [
            f"python -m sglang.launch_server --model-path {shlex.quote(base.model)}{base.flags} "
            f"--disable-radix-cache --dtype {written['dtype']}",
            usage(shlex.quote(f"{folder}/{CLIENT_FILE}"), written["columns"]),
            "curl http://127.0.0.1:30000/generate -H 'Content-Type: application/json' "
            f"-d @{shlex.quote(f'{folder}/generate.json')}",
        ]
