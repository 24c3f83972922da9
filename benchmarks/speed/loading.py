"""From the start of a process to its first training step, with a model that is cached already.

    python -m benchmarks.speed.loading MODEL

Reads a small file, loads the model, tokenizes, builds the prefixes of the first batch and makes one
step, as a user's script would.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # a user's script would not import it
    from benchmarks.speed.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
ROWS = 32


def measure(bench: Bench, starts: int = 3) -> None:
    """Medians over `starts` processes of the interpreter, after one that fills caches.

    What else is installed beside embedgrad counts: transformers imports some of it where it is.
    """
    if bench.kept and bench.results.has_section("loading"):
        return
    found = []
    for _ in range(starts + 1):
        done = subprocess.run(
            [bench.python, "-m", "benchmarks.speed.loading", bench.model.info.name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    names = ("loaded_seconds", "first_step_starts_seconds", "first_step_done_seconds")
    section = {name: statistics.median(f[name] for f in found[1:]) for name in names}
    bench.results.put_section(
        "loading", {"starts": starts, "extras": _extras(bench.python), **section}
    )
    print(f"loading: {section}", flush=True)


def _extras(python: str) -> bool:
    """Whether the interpreter has what only the extras of embedgrad bring."""
    find = "import importlib.util as u; print(int(u.find_spec('peft') is not None))"
    found = subprocess.run([python, "-c", find], stdout=subprocess.PIPE, text=True, check=True)
    return bool(int(found.stdout))


def main() -> None:
    """Start as a user would, and print the seconds since the process began."""
    began = psutil.Process().create_time()
    import embedgrad as eg

    name = sys.argv[1]
    template = eg.Template.chat(user="{text}\n\n[[Is this review positive or negative?]]")
    target = eg.Target(choices=("negative", "positive"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reviews.jsonl"
        lines = [
            {"text": f"A film about {n} people that nobody will forget.", "label": answer}
            for n, answer in zip(range(ROWS), target.choices * ROWS, strict=False)
        ]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        data = eg.read_splits(
            str(path), columns=template.columns, answer="label", choices=target.choices
        )
    model = eg.load_model(name, dtype="float32")
    loaded = time.time()
    sequencer = model.sequencer(template, target, data.train)
    events: list[dict[str, Any]] = []
    eg.optimize(
        model,
        sequencer,
        sequencer.build(data.train),
        training=eg.Training(steps=1),
        report=events.append,
    )
    done = time.time()
    (step,) = [event for event in events if event["event"] == "step"]
    print(
        json.dumps(
            {
                "loaded_seconds": loaded - began,
                "first_step_starts_seconds": done - step["seconds"] - began,
                "first_step_done_seconds": done - began,
            }
        )
    )


if __name__ == "__main__":
    main()
