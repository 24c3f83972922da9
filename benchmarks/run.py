"""Measure what README and docs report, into `benchmarks/results/*.json`.

    python -m benchmarks.run [NAME ...] [--data FOLDER] [--row ROW] [--methods A,B] [--seeds 0,1]

`benchmarks/measurements.py` says what each NAME measures. Every row is one `embedgrad optimize` in
its own process, except for `causal-judgement`, whose rows share one process and the stored prefixes
of its long questions. Rows that a results file already has are not measured again, so the same
command resumes an interrupted run; `--row "seed 0"` measures one row again. Names that begin with
`compare-` run `embedgrad compare`, which keeps its trainings in runs/NAME, and `--methods` and
`--seeds` measure only some of their rows. Other rows in the results file are kept; if anything but
the rows differs, the file is left as it is and the program names the differences.
`--data` is a folder with sst2/, imdb/, svamp/, gsm8k/, bbh_causal_judgement/ and
bbh_causal_judgement_grouped/ (train, dev and test.jsonl each). All results except `demo` and
`compare-demo-smollm2-135m` need it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import embedgrad
from benchmarks.measurements import COMPARISONS, MEASUREMENTS, OTHERS, Compared, Measurement
from embedgrad import LanguageModel, Recipe, load_model
from embedgrad.atomic_files import write_json
from embedgrad.experiments.compare.folder import Part, sort_parts
from embedgrad.experiments.compare.recipe_diff import differences, flatten, shared_settings
from embedgrad.experiments.compare.results import methods_of, recipe_of_parts, seeds_of
from embedgrad.prompt import artifact

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OF_TEST = ("text", "refined", "difference", "groups", "test_rows")
OF_RUN = (
    *("drift", "cosine", "nearest_tokens_unchanged", "train", "threads"),
    *("peak_memory_bytes", "prefix_cache"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = [*MEASUREMENTS, *COMPARISONS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--data", type=Path, help="folder of local data instead of the Hub")
    parser.add_argument("--row", help="measure this row again, as in 'seed 0'")
    parser.add_argument("--methods", help="only these rows of comparisons, as in text,embedgrad")
    parser.add_argument("--seeds", help="only these rows of comparisons, as in 0,1")
    arguments = parser.parse_args()
    names, data = arguments.names or known, arguments.data
    for name in names:
        if name in OTHERS:
            program, options = OTHERS[name]
            parser.error(f"{name}: is written by python -m {program} {options}".rstrip())
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.row:
        rows = MEASUREMENTS[names[0]].rows if names[0] in MEASUREMENTS else {}
        if len(names) != 1 or arguments.row not in rows:
            parser.error(
                f"--row {arguments.row}: name one of {', '.join(MEASUREMENTS)} and its row"
            )
    for name in names:
        measurement = MEASUREMENTS.get(name) or COMPARISONS[name]
        problem = data_problem(measurement, data)
        if problem and arguments.names:
            parser.error(f"{name}: {problem}")
        if problem:
            print(f"{name} is left out: {problem}", flush=True)
            continue
        if isinstance(measurement, Measurement):
            measure(name, measurement, data, arguments.row)
        else:
            only = {"--methods": arguments.methods, "--seeds": arguments.seeds}
            measure_comparison(name, measurement, data, only)


def data_problem(measurement: Measurement | Compared, data: Path | None) -> str | None:
    """Which local files are missing; None if none are."""
    if data is None:
        needed = "needs --data FOLDER: its rows are not on the Hub as they were measured"
        return needed if measurement.local else None
    for setting in measurement.local:
        below = re.search(r"\{data\}/([^\"]+)", setting)
        if below and not (data / below[1]).is_file():
            return f"{data / below[1]}: is not there"
    return None


def measure(
    name: str, measurement: Measurement, data: Path | None, again: str | None = None
) -> None:
    """Measure the rows that a results file lacks; with `again`, that row only, measured or not."""
    path = RESULTS / f"{name}.json"
    results = read_results(path, {"recipe": f"recipes/{measurement.recipe}", "rows": {}})
    local = local_settings(measurement, data) if data else []
    shown = placeless(local, data)
    model: LanguageModel | None = None
    for row, settings in measurement.rows.items():
        if row != again if again else row in results["rows"]:
            continue
        print(f"{name}: {row}", flush=True)
        if measurement.one_process and model is None:
            model = load_model(read(measurement.recipe, []).model.name, dtype="float32")
        result = run(measurement.recipe, [*settings, *local], model)
        if measurement.dev_only:
            result = {key: value for key, value in result.items() if key not in OF_TEST}
        results["rows"][row] = {"settings": [*settings, *shown], **result}
        results["machine"] = {"cores": os.cpu_count(), "machine": platform.machine()}
        write_json(path, results)


def measure_comparison(
    name: str, compared: Compared, data: Path | None, only: dict[str, str | None]
) -> None:
    """Measure the rows of a comparison that are missing, and keep its results."""
    out = ROOT / "runs" / name
    if data and compared.prepare:
        data = compared.prepare(data)
    local = local_settings(compared, data) if data else []
    command = [sys.executable, "-m", "embedgrad", "compare", f"recipes/{compared.recipe}"]
    command += ["--out", str(out)]
    command += [part for setting in (*compared.settings, *local) for part in ("--set", setting)]
    command += [part for flag, value in only.items() if value for part in (flag, value)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results = placeless(results, data)
    path = RESULTS / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        phrases = differing(before, results)
        if phrases:
            more = [f"and {len(phrases) - 3} more"] if len(phrases) > 3 else []
            kept = path.relative_to(ROOT)
            sys.exit(
                f"{kept} has other rows: {'; '.join([*phrases[:3], *more])}; the new results "
                f"are in {out.relative_to(ROOT)}; deleting {kept} makes place for them"
            )
        results = merge_results(before, results, groups_in(out / "predictions.jsonl"))
    write_json(path, results)


def read_results(path: Path, beginning: dict[str, Any]) -> dict[str, Any]:
    """What a results file holds, or how a new one begins."""
    if not path.exists():
        return beginning
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def kept_rows(
    folder: Path, train: Callable[[], embedgrad.Refinement]
) -> tuple[Tensor, dict[str, Any]]:
    """The refined rows kept in a folder, else those of a training, which keeps them; its facts."""
    if folder.exists():
        return artifact.load(folder).rows, {}
    began = time.perf_counter()
    refinement = train()
    embedgrad.save(refinement.prompt, folder)
    facts = {"best_step": refinement.best.step, "seconds": time.perf_counter() - began}
    return refinement.prompt.rows, facts


def slug(row: str) -> str:
    """A row's name as that of a folder."""
    return row.replace(", ", "-").replace(" ", "-")


def placeless(value: Any, data: Path | None) -> Any:
    """The value with this machine's paths replaced: the data folder by DATA, the home by ~."""
    if isinstance(value, dict):
        return {name: placeless(inner, data) for name, inner in value.items()}
    if isinstance(value, list):
        return [placeless(inner, data) for inner in value]
    if not isinstance(value, str):
        return value
    places = {data.resolve(): "DATA"} if data else {}
    for place, name in {**places, Path.home(): "~"}.items():
        if place != place.parent:  # a root stands for nothing
            path = rf"(?<![\w./~-]){re.escape(str(place))}(?![\w.-])"
            value = re.sub(path, name, value)
    return value


def groups_in(predictions: Path) -> list[str]:
    """The group of every test row of a comparison; none where it compares no groups."""
    lines = predictions.read_text(encoding="utf-8").split("\n")
    return [row["group"] for line in lines if line and "group" in (row := json.loads(line))]


def merge_results(
    before: dict[str, Any], now: dict[str, Any], groups: Sequence[str]
) -> dict[str, Any]:
    """A comparison with the other rows of an earlier one, from which nothing else differs."""
    for row in before["rows"]:
        row["versions"] = row.get("versions") or before["versions"]
    rows = {Part(row["method"], row["seed"]): row for row in (*before["rows"], *now["rows"])}
    parts = sort_parts(rows)
    ordered = [rows[part] for part in parts]
    recipe = recipe_of_parts(now["recipe"], parts)
    joint = {"rows": ordered, "methods": methods_of(ordered, groups), "seeds": seeds_of(parts)}
    return {**now, **joint, "recipe": recipe}


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why the rows of two comparisons cannot share a file, a phrase each.

    The text prompt is in both, and must have given every row the same answer.
    """
    methods = {row["method"] for row in (*before["rows"], *now["rows"])}
    free = () if "best-of-n" in methods else ("compare.prompts",)
    phrases = differences(shared_settings(before["recipe"]), shared_settings(now["recipe"]), free)
    # Where data and solutions are kept and how many that session sampled does not change them.
    of_session = (
        *("solutions.file", "solutions.sampled_questions"),
        *("data.train.source", "data.dev.source", "data.test.source"),
    )
    # An older file does not say what else its parts share.
    known = ("shared",) if "shared" in before and "shared" in now else ()
    for name in ("data", "model", "solutions", *known):
        phrases += differences(flatten(before[name], name), flatten(now[name], name), of_session)
    texts = [[r["correct"] for r in x["rows"] if r["method"] == "text"] for x in (before, now)]
    changed = [] if texts[0] == texts[1] else ["the text prompt answers otherwise"]
    return phrases + changed


def local_settings(measurement: Measurement | Compared, data: Path) -> list[str]:
    """The settings that name local files, whose question column has another name."""
    prompt = (ROOT / "recipes" / measurement.recipe).read_text(encoding="utf-8")
    user = next(line for line in prompt.splitlines() if line.startswith("user = "))
    template = user.removeprefix("user = ")
    for theirs in ("{input}", "{question_concat}"):
        template = template.replace(theirs, "{question}")
    return [
        setting.replace("{data}", str(data.resolve())).replace("{template}", template)
        for setting in measurement.local
    ]


def read(recipe: str, settings: list[str]) -> Recipe:
    return Recipe.read(ROOT / "recipes" / recipe, settings)


def run(recipe: str, settings: list[str], model: LanguageModel | None) -> dict[str, Any]:
    """One run, in its own process unless a model is given; the result holds no path."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if model is not None:
            embedgrad.run(read(recipe, settings), out, model=model)
        else:
            sets = [part for setting in settings for part in ("--set", setting)]
            command = ["optimize", f"recipes/{recipe}", "--out", str(out), *sets]
            command = [sys.executable, "-m", "embedgrad", *command]
            done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(done.returncode)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        prompt = json.loads((out / "prompt" / "prompt.json").read_text(encoding="utf-8"))
    recipe_text = (ROOT / "recipes" / recipe).read_bytes()
    return {
        **{key: result[key] for key in (*OF_TEST, *OF_RUN) if key in result},
        "dev_history": prompt["training"]["dev_history"],
        "data": {
            split: {"rows": entry["rows"], "sha256": entry["sha256"]}
            for split, entry in prompt["data"].items()
        },
        "recipe_sha256": hashlib.sha256(recipe_text).hexdigest(),
        "versions": prompt["versions"],
    }


if __name__ == "__main__":
    main()
