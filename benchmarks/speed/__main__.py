"""Measure how fast embedgrad is beside its peers, into `benchmarks/results/speed.json`.

    python -m benchmarks.speed [NAME ...] [--quick] [--fresh] [--data FOLDER]

Names are the workloads A to I, growth and loading. Without names everything is measured: two to
three hours on 2 cores. An interrupted run resumes when started again; after a finished run, with
`--fresh` or on another machine it starts over. With names, only these are measured and the other
rows stay. `--quick` measures A to G, with one pair each, against one peer.

`--data` is a folder with sst2/ and imdb/ (train and dev.jsonl each, with `text` and `label_text`)
to use instead of the Hub. Where neither can be read, D, H and I are left out, and the run is not
finished.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.speed import loading, scoring, steps, whole
from benchmarks.speed.bench import Bench
from benchmarks.speed.results import Results
from benchmarks.speed.workloads import MODEL
from embedgrad import EmbedgradError, load_model

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed.json"
QUICK = tuple("ABCDEFG")
NAMES = ("loading", *QUICK, "growth", "H", "I")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="A to G, with one pair of each")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an interrupted run")
    parser.add_argument("--data", type=Path, help="folder of local data instead of the Hub")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another results file")
    parser.add_argument(
        "--python", default=sys.executable, help="loading with another installation's interpreter"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    full = not arguments.names and not arguments.quick
    try:
        results = Results(arguments.out)
    except EmbedgradError as error:
        parser.error(str(error))
    if full or arguments.fresh:
        results.begin(fresh=arguments.fresh)
    model = load_model(MODEL, dtype="float32", device="cpu")
    bench = Bench(
        model, results, arguments.quick, kept=full, data=arguments.data, python=arguments.python
    )
    names = arguments.names or (QUICK if arguments.quick else NAMES)
    measured = [run(bench, name) for name in names]
    if full and all(measured):
        results.finish()


def run(bench: Bench, name: str) -> bool:
    """Measure one workload; without its data, leave it out and say so."""
    bench.model.prefix_cache.clear()
    try:
        if name in "ABC":
            steps.synthetic_rows(bench, name)
        elif name == "D":
            steps.real_rows(bench)
        elif name in "EF":
            scoring.scores(bench, name)
        elif name == "G":
            scoring.generation(bench)
        elif name in "HI":
            whole.measure(bench, name)
        elif name == "growth":
            steps.growth(bench)
        else:
            loading.measure(bench)
    except EmbedgradError as error:
        print(f"{name}: left out: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
