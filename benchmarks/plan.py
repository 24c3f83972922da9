"""How near `embedgrad plan` comes to the run, on three recipes: `benchmarks/results/plan.json`.

    python -m benchmarks.plan --data FOLDER [NAME ...]

Every pair is one plan and one run, each in a process of its own, one straight after the other, so
that both see the same machine. `--data` is a folder with sst2/, imdb/ and svamp/ (train, dev and
test.jsonl each). Pairs that the results hold already are kept; delete the file to measure all of
them again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "plan.json"

SENTIMENT = "[[Is this review positive or negative? Answer with one word:]]"
# A recipe, and settings that make it short; {data} is the folder of local data.
PAIRS: dict[str, tuple[str, list[str]]] = {
    "sst2": (
        "sst2.toml",
        [
            'data.answer="label_text"',
            f'template={{user="{{text}}\\n\\n{SENTIMENT}"}}',
            "data.limit={train=128, dev=64, test=100}",
            "training.epochs=2",
        ],
    ),
    "imdb": (
        "imdb.toml",
        [
            'data.answer="label_text"',
            "data.labels={}",
            "data.limit={train=16, dev=8, test=8}",
            "training={epochs=2, batch_size=8}",
        ],
    ),
    "svamp": (
        "svamp.toml",
        [
            'data.answer="answer"',
            'template.user="{question}\\n\\n[[Give the answer as a number only:]]"',
            'solutions.source="answer"',
            "data.limit={train=64, dev=16, test=32}",
            "training.epochs=2",
            "evaluation.max_new_tokens=64",
        ],
    ),
}
WITHIN = {"memory": 0.20, "seconds": 0.30}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAIRS))
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--out", type=Path, default=RESULT, help="the results file")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(PAIRS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PAIRS)}")
    results = read_results(arguments.out, {"rows": {}})
    for name in arguments.names or PAIRS:
        if name in results["rows"]:
            continue
        results["rows"][name] = pair(name, arguments.data.resolve())
        results |= {
            "within": WITHIN,
            "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
            "versions": versions(),
        }
        write_json(arguments.out, results)
        print(name, json.dumps(results["rows"][name]["ratios"]), flush=True)


def pair(name: str, data: Path) -> dict[str, Any]:
    """One plan and one run of the same recipe, and how they differ."""
    recipe, settings = PAIRS[name]
    folder = data / name
    files = [f'data.{split}="{folder}/{split}.jsonl"' for split in ("train", "dev", "test")]
    sets = [part for setting in (*files, *settings) for part in ("--set", setting)]
    path = str(ROOT / "recipes" / recipe)
    planned = json.loads(command(["plan", path, "--json", "--quiet", *sets])[0])
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        _, seconds = command(["optimize", path, "--out", str(out), "--quiet", *sets])
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    ratios = {
        "seconds": planned["seconds"]["all"] / seconds,
        "train_seconds": planned["seconds"]["train"] / result["train"]["seconds"],
        "memory": planned["memory"]["peak"] / result["peak_memory_bytes"],
        "prefixes": planned["prefixes"]["bytes"] / max(result["prefix_cache"]["bytes"], 1),
    }
    return {
        "recipe": f"recipes/{recipe}",
        "settings": settings,
        "planned": {
            key: planned[key]
            for key in ("seconds", "memory", "prefixes", "replies", "tokens", "flops")
        },
        "run": {
            "seconds": seconds,
            "train_seconds": result["train"]["seconds"],
            "steps": result["train"]["steps"],
            "peak_memory_bytes": result["peak_memory_bytes"],
            "prefix_cache_bytes": result["prefix_cache"]["bytes"],
            "cut": [result[prompt]["cut"] for prompt in ("text", "refined")],
        },
        "ratios": ratios,
        "held": all(abs(ratios[key] - 1) <= most for key, most in WITHIN.items()),
    }


def command(arguments: list[str]) -> tuple[str, float]:
    """What `embedgrad` printed, and the seconds of its whole process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "embedgrad", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout, time.perf_counter() - began


if __name__ == "__main__":
    main()
