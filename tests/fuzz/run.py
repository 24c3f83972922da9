"""Read changed files until one ends in anything but a value or an error of ours.

    PYTHONPATH=tests python -m fuzz.run [--cases 100000] [--seed 0] [PARSER ...]

Every case is a function of parser, seed and number. What goes wrong is written to
`runs/fuzz/PARSER-NUMBER/`; mended, it belongs into `tests/fuzz/found/`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from embedgrad.errors import EmbedgradError
from embedgrad.prompt import chat_rendering
from fuzz.mutations import Files, mutate
from fuzz.parsers import PARSERS, Parser, clean_up

SECONDS = 10.0
MEMORY = 512 * 2**20
FOUND = Path(__file__).with_name("found")


class TooLong(BaseException):
    """Nothing may catch it."""


@dataclass
class Tally:
    """What the cases of a parser came to; `wrong` maps a problem to its first case."""

    cases: int = 0
    values: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, Files] = field(default_factory=dict)
    slowest: float = 0.0


def fuzz(name: str, cases: int, seed: int = 0) -> Tally:
    """Try so many cases of a parser."""
    parser, tally = PARSERS[name], Tally()
    seeds = parser.seeds()
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as place, limits():
        for files in seeds:
            if problem := try_case(parser, files, Path(place), tally):
                raise AssertionError(f"{name}: a seed cannot be read: {problem}")
        assert not tally.errors, f"{name}: a seed is refused: {tally.errors}"
        for number in range(cases):
            draw = Random(f"{name} {seed} {number}")
            files = mutate(draw, seeds)
            if draw.random() < 0.5:
                files = parser.sign(files)
            if problem := try_case(parser, files, Path(place), tally):
                tally.wrong.setdefault(problem, files)
    return tally


def try_case(parser: Parser, files: Files, place: Path, tally: Tally) -> str | None:
    """Write a case and read it; what is wrong with the way it ended."""
    folder = place / "case"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before, started = _listing(folder), time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        parser.read(folder)
        tally.values += 1
    except EmbedgradError as error:
        tally.errors[type(error).__name__] += 1
    except TooLong:
        problem = "too long: " + _place()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"{type(error).__name__}: {_place()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.cases += 1
    tally.slowest = max(tally.slowest, time.perf_counter() - started)
    if 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) > MEMORY:
        problem = problem or "too much memory"
    if _listing(folder) != before:
        problem = problem or "it changed a file"
    shutil.rmtree(folder)
    return problem


@contextmanager
def limits() -> Iterator[None]:
    """A timer that ends a case, and less time for chat templates."""

    def stop(*_: object) -> None:
        raise TooLong

    before, seconds = signal.signal(signal.SIGALRM, stop), chat_rendering.SECONDS
    chat_rendering.SECONDS = 1.0
    try:
        yield
    finally:
        chat_rendering.SECONDS = seconds
        signal.signal(signal.SIGALRM, before)


def _place() -> str:
    """The innermost line of ours that an exception went through, and the innermost of all."""
    steps = traceback.extract_tb(sys.exc_info()[2])
    ours = [step for step in steps if f"{os.sep}embedgrad{os.sep}" in step.filename]
    ends = (ours[-1:] or steps[-1:]) + steps[-1:]
    return " < ".join(f"{Path(step.filename).name}:{step.name}" for step in ends)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in folder.rglob("*"):
        seen = path.stat()
        found.append((str(path), seen.st_mtime_ns, seen.st_size))
    return sorted(found)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    options.add_argument("--cases", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    wrong = 0
    for name in asked.parsers or PARSERS:
        started = time.perf_counter()
        tally = fuzz(name, asked.cases, asked.seed)
        seconds = time.perf_counter() - started
        refused = ", ".join(f"{count:,} {kind}" for kind, count in tally.errors.most_common())
        print(
            f"{name}: {tally.cases:,} cases in {seconds:.0f} s, the slowest {tally.slowest:.2f} s: "
            f"{tally.values:,} values, {refused or 'none refused'}; {len(tally.wrong)} wrong",
            flush=True,
        )
        for number, (problem, files) in enumerate(tally.wrong.items()):
            wrong += 1
            print(f"  {problem}", flush=True)
            for file, content in files.items():
                path = Path("runs", "fuzz", f"{name}-{number}", file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    clean_up()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
