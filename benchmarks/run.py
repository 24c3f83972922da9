"""Measure what README and docs report, into `benchmarks/results/*.json`.

    python benchmarks/run.py [NAME ...] [--data FOLDER] [--row ROW] [--methods A,B] [--seeds 0,1]

Every row is one `embedgrad optimize` in a process of its own, but for `causal-judgement`, whose
rows share one process and the prefixes of its long questions. Rows that a results file holds
already are not run again, so an interrupted run goes on where it stopped; `--row "seed 0"` measures
one again, whatever the file holds. Names that begin with `compare-` are comparisons of methods by
`embedgrad compare`, which keeps its trainings in runs/NAME; `--methods` and `--seeds` measure only
some of their rows. Rows that the results file has besides are kept; where anything else differs,
the file stays as it is and what differs is told.
`--data` is a folder with sst2/, imdb/, svamp/, gsm8k/, bbh_causal_judgement/ and
bbh_causal_judgement_grouped/ (train, dev and test.jsonl each). All results but `demo`, `loss-over`
and `compare-demo-smollm2-135m` need it: their rows, splits or columns are not on the Hub as they
were measured.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embedgrad
from embedgrad import LanguageModel, Recipe, load_model
from embedgrad.atomic_files import write_json
from embedgrad.experiments.compare.folder import Part, in_order
from embedgrad.experiments.compare.recipe_diff import dotted, shared_settings, unlike
from embedgrad.experiments.compare.results import as_compared, methods_of, seeds_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OF_TEST = ("text", "refined", "difference", "test_rows")
OF_RUN = (
    *("drift", "cosine", "nearest_tokens_unchanged", "train", "threads"),
    *("peak_memory_bytes", "prefix_cache"),
)


@dataclass(frozen=True)
class Measurement:
    """One results file: a recipe, and the settings of each of its rows."""

    recipe: str
    rows: dict[str, list[str]]
    local: list[str] = field(default_factory=list)
    """Settings that replace the Hub's data by files below --data; without it there are no rows."""
    one_process: bool = False
    """Whether the rows share one loaded model, and with it the stored prefixes."""
    dev_only: bool = False
    """Whether only the scores on dev count; then nothing of test is kept."""


def seeds(*numbers: int, settings: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {f"seed {n}": [f"training.seed={n}", *settings] for n in numbers}


def files(folder: str) -> list[str]:
    names = ("train", "dev", "test")
    # The files hold no duplicates, and were measured before the recipes dropped those of the Hub.
    drop = "data.drop_duplicates=false"
    return [*(f'data.{name}="{{data}}/{folder}/{name}.jsonl"' for name in names), drop]


def losses(numbers: tuple[int, ...], settings: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Both losses of the same recipe, on 256 training rows; test is not looked at but for a row."""
    return {
        f"{over}, seed {seed}": [
            f"objective={{name='cross_entropy', over='{over}'}}",
            f"training={{epochs=4, seed={seed}}}",
            "trust_region.radius=0.3",
            "data.limit={train=256, dev=150, test=1}",
            *settings,
        ]
        for over in ("answer", "choices")
        for seed in numbers
    }


@dataclass(frozen=True)
class Compared:
    """One results file of `embedgrad compare`."""

    recipe: str
    settings: list[str]
    local: list[str] = field(default_factory=list)
    """Settings that replace the Hub's data by files below --data; without it there are no rows."""
    prepare: Callable[[Path], Path] | None = None
    """Makes of --data the folder that the local settings mean."""


def svamp_equations(data: Path) -> Path:
    """SVAMP with equations as people write them, in a folder of its own; test stays as it is."""
    folder = ROOT / "runs" / "data"
    (folder / "svamp").mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        text = (data / "svamp" / f"{split}.jsonl").read_text(encoding="utf-8")
        if split != "test":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = [{**row, "equation": plain_equation(row["equation"])} for row in rows]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "svamp" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def plain_equation(equation: str) -> str:
    """ "( ( 16.0 - 11.0 ) + 12.0 )" as "(16 - 11) + 12"."""
    text = re.sub(r"(\d)\.0\b", r"\1", equation.strip())
    text = re.sub(r"\( +| +\)", lambda match: match[0].strip(), text)
    inside = text[1:-1]
    depths = [inside[:end].count("(") - inside[:end].count(")") for end in range(len(inside) + 1)]
    return inside if text.startswith("(") and text.endswith(")") and min(depths) >= 0 else text


PROMPTS = """compare.prompts=[
    "Sentiment, positive or negative:",
    "Would you say that the writer liked it? Reply with positive or negative:",
    "Classify the review as positive or negative. The class is",
]"""
LONGER = (
    'template={user="{text}\\n\\n[[Is this review positive or negative? A review is positive if '
    "its writer liked the film and would tell others to see it, and negative if its writer was "
    'bored, annoyed or disappointed. Answer with one word, positive or negative:]]"}'
)
AFTER = (
    'template={user="{text}\\n\\n[[Is this review positive or negative? Answer with one word:]]"}'
)
CAUSAL = ['data.answer="label"', "template.user={template}"]
COMPARISONS = {
    "compare-demo-smollm2-135m": Compared("demo.toml", []),
    "compare-sst2-smollm2-135m": Compared("sst2-smollm2-135m.toml", [PROMPTS], files("sst2")),
    # The same words after the query.
    "compare-sst2-after-smollm2-135m": Compared(
        "sst2-smollm2-135m.toml", [AFTER, PROMPTS], files("sst2")
    ),
    "compare-imdb-smollm2-135m": Compared(
        "imdb-smollm2-135m.toml",
        ['compare.methods=["text", "embedgrad", "peft-prompt-tuning-text"]', "compare.seeds=[0]"],
        [*files("imdb"), 'data.answer="label_text"', "data.labels={}"],
    ),
    "compare-causal-judgement-smollm2-135m": Compared(
        "causal-judgement-smollm2-135m.toml",
        ["compare.seeds=[0, 1, 2, 3, 4]"],
        [*files("bbh_causal_judgement_grouped"), 'data.group="group"', *CAUSAL],
    ),
    "compare-causal-judgement-random-split-smollm2-135m": Compared(
        "causal-judgement-smollm2-135m.toml",
        ["compare.seeds=[0, 1, 2, 3, 4]"],
        [*files("bbh_causal_judgement"), *CAUSAL],
    ),
    "compare-gsm8k-qwen2.5-coder-0.5b": Compared(
        "gsm8k-qwen2.5-0.5b.toml",
        [
            'model={name="qwen.gguf", dtype="bfloat16"}',
            'solutions.source="column"',
            "data.limit={train=192, dev=32, test=400}",
            "evaluation.max_new_tokens=320",
            "compare.seeds=[0]",
        ],
        [*files("gsm8k"), 'data.solution="solution"'],
    ),
    # LoRA is trained on the same solutions.
    "compare-gsm8k-self-written-qwen2.5-coder-0.5b": Compared(
        "gsm8k-qwen2.5-0.5b.toml",
        [
            'model={name="qwen.gguf", dtype="bfloat16"}',
            "solutions.samples=2",
            "data.limit={train=192, dev=64, test=200}",
            "training={steps=24, evaluate_every=12}",
            "evaluation.max_new_tokens=320",
            "compare.seeds=[0]",
        ],
        files("gsm8k"),
    ),
    "compare-svamp-smollm2-135m": Compared(
        "svamp-smollm2-135m.toml",
        # The model solves too few by itself to write what it could be trained on.
        ['solutions.source="answer"', "compare.seeds=[0, 1, 2]"],
        [*files("svamp"), 'data.answer="answer"', "template.user={template}"],
    ),
    # The recipe with half its samples: the model writes the solutions.
    "compare-svamp-self-written-smollm2-135m": Compared(
        "svamp-smollm2-135m.toml",
        ["solutions.samples=4", "compare.seeds=[0, 1, 2]"],
        [*files("svamp"), 'data.answer="answer"', "template.user={template}"],
    ),
    # The equation that the data holds is the solution: "(16 - 11) + 12 = 17".
    "compare-svamp-equations-smollm2-135m": Compared(
        "svamp-smollm2-135m.toml",
        [
            'solutions.source="column"',
            "data.limit={train=499, dev=100}",
            "training.epochs=3",
            "compare.seeds=[0, 1, 2]",
        ],
        [
            *files("svamp"),
            'data.answer="answer"',
            'data.solution="{equation} = {answer}"',
            "template.user={template}",
        ],
        svamp_equations,
    ),
}
MEASUREMENTS = {
    "demo": Measurement("demo.toml", seeds(0, 1, 2)),
    "loss-over": Measurement("demo.toml", losses((0, 1, 2)), dev_only=True),
    "loss-over-sst2": Measurement(
        "sst2-smollm2-135m.toml", losses((0, 1, 2), (AFTER,)), files("sst2"), dev_only=True
    ),
    "sst2": Measurement("sst2-smollm2-135m.toml", seeds(0), files("sst2")),
    "sst2-radius-0.3": Measurement(
        "sst2-smollm2-135m.toml",
        seeds(0, settings=(AFTER, "trust_region.radius=0.3")),
        files("sst2"),
    ),
    "sst2-span": Measurement(
        "sst2-smollm2-135m.toml",
        {
            f"{words} words, seed 0": [*settings, "data.limit={train=1000, dev=872, test=1}"]
            for words, settings in (("few", [AFTER]), ("many", [LONGER]))
        },
        files("sst2"),
        dev_only=True,
    ),
    "causal-judgement": Measurement(
        "causal-judgement-smollm2-135m.toml",
        seeds(0, 1, 2, 3, 4),
        [
            *files("bbh_causal_judgement_grouped"),
            'data.answer="label"',
            'data.group="group"',
            "template.user={template}",
        ],
        one_process=True,
    ),
}
# What other programs write: the program, and what it must be told.
OTHERS = {
    "speed": ("benchmarks.speed", ""),
    "causal-curves": ("benchmarks.causal", "--data FOLDER"),
    "plan": ("benchmarks.plan", "--data FOLDER"),
    "parity": ("benchmarks.parity", "NAME=RUN"),
    "serving": ("benchmarks.serving", "RUN"),
}


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
            program, told = OTHERS[name]
            parser.error(f"{name}: is written by python -m {program} {told}".rstrip())
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
        found = MEASUREMENTS.get(name) or COMPARISONS[name]
        lacking = missing_files(found, data)
        if lacking and arguments.names:
            parser.error(f"{name}: {lacking}")
        if lacking:
            print(f"{name} is left out: {lacking}", flush=True)
            continue
        if isinstance(found, Measurement):
            measure(name, found, data, arguments.row)
        else:
            only = {"--methods": arguments.methods, "--seeds": arguments.seeds}
            compare(name, found, data, only)


def missing_files(measurement: Measurement | Compared, data: Path | None) -> str:
    """Which local files are needed and not there, "" if none."""
    if data is None:
        needed = "needs --data FOLDER: its rows are not on the Hub as they were measured"
        return needed if measurement.local else ""
    for setting in measurement.local:
        below = re.search(r"\{data\}/([^\"]+)", setting)
        if below and not (data / below[1]).is_file():
            return f"{data / below[1]}: is not there"
    return ""


def measure(
    name: str, measurement: Measurement, data: Path | None, again: str | None = None
) -> None:
    """Run the rows of one results file that it does not hold yet, or one that it may hold again."""
    path = RESULTS / f"{name}.json"
    results: dict[str, Any] = {"recipe": f"recipes/{measurement.recipe}", "rows": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    local = local_settings(measurement, data) if data else []
    said = placeless(local, data)
    model: LanguageModel | None = None
    for row, settings in measurement.rows.items():
        if row != again if again else row in results["rows"]:
            continue
        print(f"{name}: {row}", flush=True)
        if measurement.one_process and model is None:
            model = load_model(read(measurement.recipe, []).model.name, dtype="float32")
        found = run(measurement.recipe, [*settings, *local], model)
        if measurement.dev_only:
            found = {key: value for key, value in found.items() if key not in OF_TEST}
        results["rows"][row] = {"settings": [*settings, *said], **found}
        results["machine"] = {"cores": os.cpu_count(), "machine": platform.machine()}
        write_json(path, results)


def compare(name: str, compared: Compared, data: Path | None, only: dict[str, str | None]) -> None:
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
        told = differing(before, results)
        if told:
            told = [*told[:3], f"and {len(told) - 3} more"] if len(told) > 3 else told
            kept = path.relative_to(ROOT)
            sys.exit(
                f"{kept} has other rows: {'; '.join(told)}; the new results are in "
                f"{out.relative_to(ROOT)}; deleting {kept} makes place for them"
            )
        results = joined(before, results)
    write_json(path, results)


def placeless(value: Any, data: Path | None) -> Any:
    """The value with DATA and ~ for the places that only this machine has, where paths begin."""
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


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A comparison with the rows that an earlier one, from which nothing differs, has besides."""
    for row in before["rows"]:
        row["versions"] = row.get("versions") or before["versions"]
    rows = {Part(row["method"], row["seed"]): row for row in (*before["rows"], *now["rows"])}
    parts = in_order(rows)
    found = [rows[part] for part in parts]
    recipe = as_compared(now["recipe"], parts)
    joint = {"rows": found, "methods": methods_of(found), "seeds": seeds_of(parts)}
    return {**now, **joint, "recipe": recipe}


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why the rows of two comparisons cannot stand in one file, a phrase each.

    The text prompt is in both, and must have answered every row alike.
    """
    methods = {row["method"] for row in (*before["rows"], *now["rows"])}
    free = () if "best-of-n" in methods else ("compare.prompts",)
    told = unlike(shared_settings(before["recipe"]), shared_settings(now["recipe"]), free)
    # Where solutions lie, and how many were sampled in that session, says nothing about them.
    of_session = ("solutions.file", "solutions.sampled_questions")
    # An older file does not say what its parts share besides.
    known = ("shared",) if "shared" in before and "shared" in now else ()
    for name in ("data", "model", "solutions", *known):
        told += unlike(dotted(before[name], name), dotted(now[name], name), of_session)
    texts = [[r["correct"] for r in x["rows"] if r["method"] == "text"] for x in (before, now)]
    return told if texts[0] == texts[1] else [*told, "the text prompt answers otherwise"]


def local_settings(measurement: Measurement | Compared, data: Path) -> list[str]:
    """The settings that name local files; the grouped rows call their columns otherwise."""
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
    """One run, without a model in a process of its own; what is kept names no place here."""
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
