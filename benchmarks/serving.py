"""What a query costs in llama.cpp, refined against text: `benchmarks/results/serving.json`.

    python -m benchmarks.serving RUN [--pairs 100]

RUN is a finished run of a model that comes as a GGUF file, such as recipes/demo.toml's. The text
prompt is served from that file, the refined one from its export, each by a llama.cpp server of its
own with prompt caching off and the same settings. A pair asks the same question of both, in turns
first; a request is timed from outside, with one token to generate.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import write_json
from embedgrad.deploy.export import export
from embedgrad.deploy.query import plain_messages
from embedgrad.environment import versions
from embedgrad.evaluation.significance import bootstrap_mean
from embedgrad.model.llamacpp.server import LlamaCppServer
from embedgrad.model.loading.resolve import resolve
from embedgrad.prompt.template import Template
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import open_run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
BAND = (0.95, 1.05)  # of the ratio, that its interval must overlap
FEWEST_PAIRS = 50
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--pairs", type=int, default=100, help="number of queries")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=RESULT, help="the results file")
    arguments = parser.parse_args()
    if arguments.pairs < FEWEST_PAIRS:
        parser.error(f"--pairs: {arguments.pairs}; expected at least {FEWEST_PAIRS}")
    found = measure(arguments.run, arguments.pairs, arguments.threads)
    write_json(arguments.out, found)
    print(json.dumps({"ratio": found["ratio"], "held": found["held"]}))


def measure(folder: Path, pairs: int, threads: int) -> dict[str, Any]:
    """Both servers asked in turns, and the ratio of what they took."""
    run = open_run(folder)
    examples = read_data(run.recipe).dev[:pairs]
    refined = [plain_messages(run.prompt.template, e.columns) for e in examples]
    text = [[message(run.prompt.template, e.columns)] for e in examples]
    name = run.model.info.name
    file = resolve(name, revision=None, local_files_only=True).path
    del run
    options: dict[str, Any] = {"n_ctx": CONTEXT, "threads": threads, "cache_prompt": False}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "export"
        export(folder, "gguf", out, verify=False)
        (exported,) = out.glob("*.gguf")
        with LlamaCppServer(file, **options) as base, LlamaCppServer(exported, **options) as ours:
            for _ in range(3):  # the first requests load pages of the files
                ask(base, text[0]), ask(ours, refined[0])
            rows = [
                pair((base, asked), (ours, plain), first=i % 2)
                for i, (asked, plain) in enumerate(zip(text, refined, strict=True))
            ]
        sizes = {"text": file.stat().st_size, "refined": exported.stat().st_size}
    logs = [math.log(row["refined"]["seconds"] / row["text"]["seconds"]) for row in rows]
    low, high = (math.exp(end) for end in bootstrap_mean(logs))
    return {
        "model": file.name,
        "pairs": len(rows),
        "ratio": {"mean": math.exp(sum(logs) / len(logs)), "interval": [low, high]},
        "band": BAND,
        "held": low <= BAND[1] and high >= BAND[0],
        "seconds": {name: mean(rows, name, "seconds") for name in ("text", "refined")},
        "tokens": {name: mean(rows, name, "tokens") for name in ("text", "refined")},
        "engine_seconds": {name: mean(rows, name, "engine") for name in ("text", "refined")},
        "file_bytes": sizes,
        "threads": threads,
        "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {**versions(), "xllamacpp": importlib.metadata.version("xllamacpp")},
        "rows": rows,
    }


def message(template: Template, columns: Mapping[str, str]) -> dict[str, str]:
    """The user's message with the prompt's words in it, as without EmbedGrad."""
    (held,) = template.messages
    content = held.content.replace("[[", "").replace("]]", "")
    for name in template.columns:
        content = content.replace(f"{{{name}}}", columns[name])
    return {"role": "user", "content": content}


def pair(
    text: tuple[LlamaCppServer, Any], refined: tuple[LlamaCppServer, Any], first: int
) -> dict[str, Any]:
    """The same question of both servers; `first` says which is asked before the other."""
    asked = {"text": text, "refined": refined}
    order = ("text", "refined") if first == 0 else ("refined", "text")
    found = {name: ask(*asked[name]) for name in order}
    return {"first": order[0], **found}


def ask(server: LlamaCppServer, messages: list[dict[str, str]]) -> dict[str, float]:
    """Seconds of a request, seconds that the engine says it computed, tokens of the prompt."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 1}
    began = time.perf_counter()
    reply = server.ask("/v1/chat/completions", body)
    seconds = time.perf_counter() - began
    timings = reply["timings"]
    return {
        "seconds": seconds,
        "engine": (timings["prompt_ms"] + timings["predicted_ms"]) / 1000,
        "tokens": reply["usage"]["prompt_tokens"],
    }


def mean(rows: list[dict[str, Any]], name: str, what: str) -> float:
    return float(sum(row[name][what] for row in rows) / len(rows))


if __name__ == "__main__":
    main()
