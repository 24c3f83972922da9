"""The command line as a whole: verbs, options, help, streams, exit statuses, what it costs."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import embedgrad as eg
from embedgrad.cli import app, main
from run_kit import LIKE_THE_PROGRAM, Command, Done, get_command

pytest_plugins = ["tiny_runs"]

# Frozen: an option that is renamed or removed breaks what people wrote.
OPTIONS = {
    "plan": {
        "RECIPE.toml",
        "--memory",
        "--minutes",
        "--no-probe",
        "--elicit",
        "--set",
        "--model",
        "--json",
        "--quiet",
    },
    "optimize": {
        "RECIPE.toml",
        "--out",
        "--set",
        "--model",
        "--device",
        "--dtype",
        "--attention",
        "--require-gain",
        "--json",
        "--quiet",
    },
    "demo": {"--domain", "--seed", "--set", "--json", "--quiet"},
    "refine": {
        *("PROMPT", "DATA", "--model", "--place", "--text", "--answer", "--label", "--out"),
        *("--plain", "--set", "--require-gain", "--json", "--quiet"),
    },
    "resume": {"RUN", "--trust-scorer", "--set", "--require-gain", "--json", "--quiet"},
    "rerun": {"RUN", "--out", "--trust-scorer", "--json", "--quiet"},
    "evaluate": {
        *("RUN", "--split", "--policy", "--trust-scorer", "--set", "--require-gain"),
        *("--json", "--quiet"),
    },
    "inspect": {"RUN", "--rows", "--trust-scorer", "--set", "--json", "--quiet"},
    "continue": {*("RUN", "--on", "--out", "--separate", "--set", "--model", "--json", "--quiet")},
    "clean": {
        *("RECIPE.toml", "OUT", "--drop", "--by", "--rounds", "--passes", "--set", "--model"),
        *("--json", "--quiet"),
    },
    "tune": {
        *("RECIPE.toml", "--over", "--out", "--trials", "--seed", "--set", "--model", "--json"),
        *("--objective", "--storage", "--quiet"),
    },
    "map": {
        *("RECIPE.toml", "--over", "--out", "--workers", "--retries", "--set", "--model"),
        *("--ray", "--json", "--quiet"),
    },
    "compress": {
        *("LONG_PROMPT.txt", "--queries", "--tokens", "--column", "--model", "--out", "--margin"),
        *("--set", "--json", "--quiet"),
    },
    "compare": {
        "RECIPE.toml",
        "--out",
        "--methods",
        "--seeds",
        "--set",
        "--model",
        "--require-gain",
        "--json",
        "--quiet",
    },
    "report": {
        "RUN",
        "--out",
        "--rows",
        "--no-model",
        "--format",
        "--figure",
        "--set",
        "--json",
        "--quiet",
    },
    "generate": {
        "RUN",
        "--policy",
        "QUERY",
        "--text-prompt",
        "--at",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--samples",
        "--stop",
        "--seed",
        "--stream",
        "--set",
        "--json",
        "--quiet",
    },
    "play": {"RUN...", "--port", "--open", "--set", "--quiet"},
    "export": {
        *("RUN...", "--to", "--out", "--no-verify", "--weights", "--base-model", "--set"),
        *("--check-rows", "--json", "--quiet"),
    },
    "verify": {"DIR", "--run", "--check-rows", "--set", "--json", "--quiet"},
    "push": {"RUN", "OWNER/NAME", "--private", "--base-model", "--json"},
    "serve": {"RUN", "--engine", "--host", "--port", "--set", "--quiet"},
    "parts": {"KIND", "--json"},
    "new": {"DATA", "--out", "--model", "--plain", "--json"},
}
HEAVY = ("torch", "transformers", "pydantic", "rich", "numpy", "safetensors", "jinja2", "psutil")
VERBS = tuple(OPTIONS)
# Two go on until they are stopped; test_hub.py and test_refine.py have the others.
ENDING = tuple(verb for verb in VERBS if verb not in ("play", "serve", "push", "demo"))


def verbs() -> dict[str, Any]:
    group: Any = get_command(app)
    return dict(group.commands)


def names(verb: Any) -> set[str]:
    """Options as they are typed, arguments as the help calls them."""
    return {
        parameter.opts[0]
        if parameter.opts[0].startswith("-")
        else parameter.metavar or parameter.name.upper()
        for parameter in verb.params
    }


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def exported(finished: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was not checked."""
    from embedgrad import export

    folder = tmp_path_factory.mktemp("exports") / "out"
    export(finished[0], "safetensors", folder, verify=False)
    return folder


@pytest.fixture
def examples(
    finished: tuple[Path, Any],
    exported: Path,
    recipe: Any,
    tmp_path: Path,
    data: Path,
    model_folder: Path,
) -> dict[str, Any]:
    """A call of every verb that works and ends."""
    run, long = finished[0], tmp_path / "long.txt"
    long.write_text("Say of each review whether its writer liked the film, and why.\n")
    one_row = tmp_path / "rows.csv"
    one_row.write_text("name\none\n")
    compress = ("compress", long, "--queries", data / "train.jsonl", "--column", "review")
    return {
        "plan": ("plan", recipe(), "--no-probe"),
        "refine": (
            *("refine", "Good or bad?", data / "train.jsonl", "--out", tmp_path / "refined"),
            *("--model", model_folder, "--set", "training.steps=2"),
        ),
        "report": ("report", run, "--out", tmp_path / "page.html", "--no-model"),
        "optimize": ("optimize", recipe(), "--out", tmp_path / "run"),
        "resume": ("resume", run),
        "rerun": ("rerun", run, "--out", tmp_path / "again"),
        "continue": (
            *("continue", run, "--on", recipe(), "--out", tmp_path / "next", "--no-separate"),
            *("--set", "training.steps=2"),
        ),
        "compress": (
            *(*compress, "--model", model_folder, "--tokens", "4", "--out", tmp_path / "short"),
            *("--set", "training.steps=2", "--set", 'target.choices=["negative", "positive"]'),
        ),
        "tune": (
            *("tune", recipe(), "--over", "training.batch_size=[4, 8]", "--trials", "1"),
            *("--out", tmp_path / "study"),
        ),
        "map": (
            *("map", recipe(), "--over", one_row, "--out", tmp_path / "mapped", "--workers", "0"),
            *("--set", "training.steps=1"),
        ),
        "clean": ("clean", recipe(), tmp_path / "clean", "--passes", "2"),
        "compare": ("compare", recipe(), "--out", tmp_path / "cmp", "--methods", "text"),
        "evaluate": ("evaluate", run, "--split", "dev"),
        "inspect": ("inspect", run, "--rows", "4"),
        "generate": ("generate", run, "The film was great."),
        "export": ("export", run, "--to", "safetensors", "--out", tmp_path / "out"),
        "verify": ("verify", exported),
        "parts": ("parts", "optimizer"),
        "new": ("new", data / "train.jsonl", "--out", tmp_path / "new.toml"),
    }


# -- options and help ------------------------------------------------------------------------------


def test_the_verbs_and_their_options_are_these() -> None:
    assert {verb: names(command) for verb, command in verbs().items()} == OPTIONS


def test_options_that_say_the_same_are_called_the_same_in_the_recipe() -> None:
    from embedgrad.recipe.catalog import catalog

    settings = {option["name"] for option in catalog("model")["model"]["options"]}
    assert {"device", "dtype", "attention"} <= settings


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_parses(verb: str, embedgrad: Command) -> None:
    done = embedgrad(verb, "--help")
    assert (done.code, done.err) == (0, "")
    ((example,),) = [re.findall(r"Example:  (.*)", done.out)]
    program, called, *rest = shlex.split(example)
    assert (program, called) == ("embedgrad", verb)
    assert names(verbs()[verb]) >= {word for word in rest if word.startswith("--")}
    verbs()[verb].make_context("embedgrad", rest, **LIKE_THE_PROGRAM)


def test_every_option_has_help() -> None:
    for verb, command in verbs().items():
        for parameter in command.params:
            assert parameter.help, f"{verb} {parameter.opts}"


def test_help_cuts_no_sentence(embedgrad: Command) -> None:
    done = embedgrad("--help")
    assert done.code == 0
    assert [verb for verb in VERBS if verb in done.out] == list(VERBS)
    assert "..." not in done.out.partition("Commands:")[2]


def test_the_command_line_runs_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    ends = list[object]()

    def run() -> None:
        try:
            main(["--version"])
        except SystemExit as end:
            ends.append(end.code)

    thread = threading.Thread(target=run)  # where Python lets nobody handle signals
    thread.start()
    thread.join()
    assert ends == [0]
    assert capsys.readouterr().out.startswith("embedgrad ")


def test_without_arguments_there_is_help(embedgrad: Command) -> None:
    assert embedgrad() == embedgrad("--help")


# -- what it costs ---------------------------------------------------------------------------------


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a new process, the best of three."""
    best = 60.0
    for _ in range(3):
        before = os.times()
        done = python(*arguments)
        after = os.times()
        assert done.returncode == 0, done.stderr
        spent = after.children_user + after.children_system
        best = min(best, spent - before.children_user - before.children_system)
    return best


@pytest.mark.parametrize("verb", [[], ["optimize"]])
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    done = python("-X", "importtime", "-m", "embedgrad", *verb, "--help")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "embedgrad.cli" in imported
    # typer itself takes pydantic for a verb that has arguments.
    assert imported & set(HEAVY) <= ({"pydantic"} if verb else set())


def test_help_takes_under_a_third_of_a_second() -> None:
    assert cpu_seconds("-m", "embedgrad", "--help") < 0.3


def test_importing_takes_under_a_fifth_of_a_second() -> None:
    assert cpu_seconds("-c", "import embedgrad") < 0.2


# -- version, completion, what to do next ----------------------------------------------------------


def test_the_version_is_that_of_the_package(embedgrad: Command) -> None:
    version = importlib.metadata.version("embedgrad")
    assert eg.__version__ == version
    assert embedgrad("--version") == Done(0, f"embedgrad {version}\n", "")


@pytest.mark.parametrize("verb", [(), ("optimize",), ("parts",)])
def test_h_is_short_for_help(verb: tuple[str, ...], embedgrad: Command) -> None:
    assert embedgrad(*verb, "-h") == embedgrad(*verb, "--help")


def test_what_the_shell_completes_is_what_there_is() -> None:
    from embedgrad.cli import completion
    from embedgrad.data.splits import NAMES
    from embedgrad.deploy.job import DESTINATIONS
    from embedgrad.deploy.serve.engines import ENGINES
    from embedgrad.experiments.baselines import METHODS
    from embedgrad.report.figures.comparison import FIGURES_OF_COMPARISONS
    from embedgrad.report.figures.run import FIGURES_OF_RUNS
    from embedgrad.report.figures.study import FIGURES_OF_STUDIES

    assert tuple(DESTINATIONS) == completion.DESTINATIONS
    assert tuple(ENGINES) == completion.ENGINES
    figures = (*FIGURES_OF_RUNS, *FIGURES_OF_COMPARISONS, *FIGURES_OF_STUDIES)
    assert figures == completion.FIGURES
    assert tuple(METHODS) == completion.METHODS
    assert completion.SPLITS == NAMES


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("export run --to v", ["vocabulary", "vllm"]),
        ("export run --weights ", ["copy", "link"]),
        ("serve run --engine l", ["llamacpp"]),
        ("evaluate run --split d", ["dev"]),
        ("report run --format p", ["png"]),
        ("report run --figure d", ["drift"]),
        ("compare a.toml --methods text,peft-l", ["text,peft-lora"]),
        ("optimize a.toml --set evaluation.scorer.name=n", ["evaluation.scorer.name=number"]),
        ("plan a.toml --set training.ep", ["training.epochs="]),
        ("parts trus", ["trust_region"]),
    ],
)
def test_the_shell_completes_values(typed: str, completed: list[str]) -> None:
    words = f"embedgrad {typed}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "from embedgrad.cli import main; main()"],
        env={**os.environ, **asked, "_EMBEDGRAD_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == completed, done.stderr


def test_new_says_what_to_run_next(
    examples: dict[str, Any], tmp_path: Path, embedgrad: Command
) -> None:
    recipe = tmp_path / "a recipe.toml"
    done = embedgrad(*examples["new"][:-1], recipe)
    commands = [shlex.split(line) for line in done.out.partition("\nnext:\n")[2].splitlines()]
    assert [words[1] for words in commands] == ["plan", "optimize", "report"]
    assert commands[1][2:] == [str(recipe), "--out", str(Path("runs", "a recipe"))]
    for _, verb, *rest in commands:
        verbs()[verb].make_context("embedgrad", rest, **LIKE_THE_PROGRAM)


# -- the screen ------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A stream that is a terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        """Its lines without colors."""
        self.flush()
        text = self.buffer.getvalue().decode()  # type: ignore[attr-defined]
        return re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


def on_screen(columns: int, arguments: Sequence[object], patch: pytest.MonkeyPatch) -> list[str]:
    out, err = Terminal(), Terminal()
    with patch.context() as context:
        context.setenv("COLUMNS", str(columns))
        context.setattr(sys, "stdout", out)
        context.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
    return [*err.shown, *out.shown]


SCREENS = {
    "parts": ("parts",),
    "an error": ("optimize", "a folder/a recipe.toml", "--out", "out"),
    "an unknown option": ("optimize", "recipe.toml", "--an-option-that-is-very-long-and-unknown"),
    **dict.fromkeys(("plan", "evaluate", "inspect", "verify", "new", "optimize"), ()),
    "compare": (),
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_of_80_columns_breaks_no_word(
    name: str, examples: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = list(SCREENS[name] or examples[name])
    if verbs()[arguments[0]].name not in ("parts", "new"):
        arguments.append("--quiet")
    if "--out" in arguments and name != "new":  # a path longer than a line stays whole
        at = arguments.index("--out") + 1
        arguments[at] = Path(f"{arguments[at]}-{'x' * 80}")
    narrow = on_screen(80, arguments, monkeypatch)
    for pattern in ("run*", "cmp*", "new.toml"):  # to be written again
        for path in tmp_path.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    wide = on_screen(4000, arguments, monkeypatch)
    assert narrow
    # A command to copy and a path stay whole.
    long = [line for line in narrow if len(line) > 80 and not line.startswith("  embedgrad ")]
    assert [line for line in long if " " in line.strip()] == []
    words = re.compile(r"(?<!\S)[A-Za-z][a-z'-]+[.,:;]?(?!\S)")  # times differ, cells may be cut
    assert set(words.findall("\n".join(narrow))) <= set(words.findall("\n".join(wide)))


@pytest.mark.parametrize("verb", ["optimize", "evaluate", "compare"])
def test_the_verdict_is_the_last_thing_on_the_screen(
    verb: str, examples: dict[str, Any], embedgrad: Command
) -> None:
    arguments = list(examples[verb])
    if verb == "compare":
        arguments[-1] = "text,embedgrad"
        arguments += ["--seeds", "0"]
    done = embedgrad(*arguments, "--quiet")
    assert re.search(r"gain|improved|worse|loss: ", done.out.splitlines()[-1]), done.out
    assert done.err == ""


# -- streams ---------------------------------------------------------------------------------------


def check_plain(text: str) -> None:
    bad = [c for c in text if not c.isprintable() and c != "\n"]
    assert not bad, f"{bad!r} in {text!r}"


@pytest.mark.parametrize("verb", ENDING)
def test_a_verb_works_and_prints_plain_lines(
    verb: str, examples: dict[str, Any], embedgrad: Command
) -> None:
    done = embedgrad(*examples[verb])
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    check_plain(done.out)
    check_plain(done.err)


@pytest.mark.parametrize("verb", ENDING)
def test_json_is_one_document(verb: str, examples: dict[str, Any], embedgrad: Command) -> None:
    done = embedgrad(*examples[verb], "--json")
    assert done.code == 0, done.err
    assert isinstance(done.json, dict)
    assert done.out.count("\n") == 1


@pytest.mark.parametrize(
    "verb", ["optimize", "evaluate", "inspect", "generate", "export", "verify"]
)
def test_quiet_says_nothing_but_the_result(
    verb: str, examples: dict[str, Any], embedgrad: Command
) -> None:
    done = embedgrad(*examples[verb], "--quiet")
    assert done.code == 0
    assert done.err == ""
    assert done.out != ""


def test_the_tables_say_what_the_result_says(examples: dict[str, Any], embedgrad: Command) -> None:
    done = embedgrad(*examples["optimize"])
    result = json.loads((Path(examples["optimize"][3]) / "result.json").read_text("utf-8"))
    for name in ("text", "refined"):
        share = f"{100 * result[name]['accuracy']:.1f} %"
        assert re.search(rf"{name} prompt +{re.escape(share)}", done.out), done.out
    assert f"refined prompt saved in {examples['optimize'][3]}/{result['artifact']}" in done.out
    assert "Is the review positive" in embedgrad(*examples["inspect"]).out


def test_progress_says_how_it_goes_and_what_was_found(
    examples: dict[str, Any], embedgrad: Command
) -> None:
    err = embedgrad(*examples["optimize"]).err
    assert "24 train rows (" in err
    assert re.search(r"step 6/6, dev accuracy .* best .* text prompt .* to .*, 100 % done", err)
    assert "all steps done: 6 steps in" in err


def test_evaluate_shows_the_rows_that_changed(
    examples: dict[str, Any], embedgrad: Command, finished: tuple[Path, Any]
) -> None:
    found = embedgrad("evaluate", finished[0], "--split", "train", "--json").json
    for change in ("fixed", "broken"):
        rows = [row for row in found["changed"] if row["change"] == change]
        assert len(rows) == found["difference"][change]
    assert {row["change"] for row in found["changed"]} <= {"fixed", "broken"}
    shown = embedgrad("evaluate", finished[0], "--split", "train").out
    assert "rows fixed" in shown or "row fixed" in shown


def test_inspect_measures_on_as_many_rows_as_there_are(
    embedgrad: Command, finished: tuple[Path, Any]
) -> None:
    run = finished[0]
    found = embedgrad("inspect", run, "--json").json
    assert found["measured_on_rows"] == 8
    assert all({"accuracy", "log_loss"} == token["worth"].keys() for token in found["tokens"])
    assert found["scores"]["test_rows"] == 12
    unmeasured = embedgrad("inspect", run, "--rows", "0", "--json").json
    assert unmeasured["measured_on_rows"] == 0
    assert not any("worth" in token for token in unmeasured["tokens"])
    for with_, without in zip(found["tokens"], unmeasured["tokens"], strict=True):
        assert {**without, "worth": with_["worth"]} == with_


def test_short_options_are_settings(examples: dict[str, Any], embedgrad: Command) -> None:
    *call, out = examples["optimize"]
    done = embedgrad(
        *call, out, "--set", "model.dtype=float64", "--dtype", "float32", "--attention", "eager"
    )
    assert done.code == 0, done.err
    settings = (Path(out) / "recipe.toml").read_text("utf-8")
    assert 'dtype = "float32"\nattention = "eager"' in settings


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "embedgrad", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding_of_the_output_will_do(
    encoding: str, finished: tuple[Path, Any], embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
        done = embedgrad("generate", finished[0], "--json", "Gr\u00fc\u00dfe")
        assert done.code == 0, done.err
        assert embedgrad("parts", "target").code == 0
        answer, described = output.getvalue().decode(encoding).split("\n", 1)
    assert json.loads(answer)["columns"] == {"review": "Gr\u00fc\u00dfe"}
    assert ("\u00fc" in answer) is (encoding == "utf-8")
    assert described.startswith("[target]")


def test_an_output_without_an_encoding_holds_everything(
    finished: tuple[Path, Any], embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()  # as where a notebook captures what is printed
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        done = embedgrad("generate", finished[0], "Gr\u00fc\u00dfe")
        assert done.code == 0, done.err
        assert embedgrad("evaluate", finished[0], "--json", "--quiet").code == 0
    answer, scores = output.getvalue().splitlines()
    assert answer.startswith(("positive", "negative"))
    assert json.loads(scores)["split"] == "test"


# -- exit statuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["optimize", "r.toml"], "'--out'"),
        (["optimize", "--out", "x"], "RECIPE.toml"),
        (["parts", "--jsn"], "--jsn"),
        (["inspect", "x", "--rows", "-1"], "'--rows'"),
        (["inspect", "x", "--rows", "many"], "'--rows'"),
        (["generate", "x", "a", "b"], "extra argument"),
        (["--verson"], "--verson"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], told: str, embedgrad: Command) -> None:
    done = embedgrad(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert len(done.lines) == 1
    assert done.err.startswith("error: ")
    assert told in done.err
    assert re.search(r"; see `embedgrad( \w+)? --help`$", done.lines[0])


def test_running_out_of_memory_is_one_line_that_says_what_to_make_smaller(
    recipe: Any, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("embedgrad.experiments.run.optimize", fail)
    done = embedgrad("optimize", recipe(), "--out", tmp_path / "run", "--quiet")
    assert done == Done(
        2,
        "",
        "error: CUDA out of memory; make training.batch_size, evaluation.batch_size or "
        "prefix_cache.budget smaller, or training.accumulate larger\n",
    )


def test_our_own_mistakes_keep_their_traceback(
    recipe: Any, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("embedgrad.experiments.run.optimize", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        embedgrad("optimize", recipe(), "--out", tmp_path / "run", "--quiet")
