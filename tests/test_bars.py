"""What a function shows in a script or a notebook while it runs, and how it is made quiet."""

from __future__ import annotations

import inspect
import io
import re
import sys
import types
from typing import Any

import pytest

import embedgrad as eg
from embedgrad.inference.refined_prompt import RefinedPrompt
from embedgrad.report.terminal.bars import Bars, show

EVENTS: tuple[dict[str, Any], ...] = (
    {"event": "stage", "text": "loading mod\x1b[31mel"},
    {"event": "note", "text": "a note"},
    {
        "event": "evaluation",
        "step": 0,
        "total": 4,
        "metric": "accuracy",
        "accuracy": 0.6,
        "interval": (0.31, 0.83),
        "best": {"accuracy": 0.6, "interval": (0.31, 0.83)},
        "text": {"accuracy": 0.6},
    },
    {
        "event": "step",
        "step": 1,
        "total": 4,
        "loss": 0.41234,
        "seconds": 0.1,
        "prefix_cache_bytes": 0,
        "prefix_cache_hits": 0,
    },
    {"event": "end", "ended": "stopped", "steps": 1, "seconds": 2.0},
    {"event": "scoring", "which": "text prompt", "done": 1, "total": 2},
    {"event": "scoring", "which": "text prompt", "done": 2, "total": 2},
)


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_script_shows_loss_score_step_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("embedgrad.report.terminal.bars.DELAY", 0)
    bars = Bars()
    for event in EVENTS:
        bars(event)
    text = stream.getvalue()
    assert "loading mod\\x1b[31mel\n" in text
    assert "a note\n" in text
    assert "1/4 [" in text
    assert "dev 60.0 % (31 to 83), best 60.0 % (31 to 83), loss 0.412" in text
    assert "text prompt:   0%|" in text
    assert text.endswith(" \r"), "a bar of scoring is gone at the end"


def test_a_notebook_has_one_output_per_cell_which_is_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs: list[list[str]] = []  # each with what it showed, in order

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        shown = [data["text/html"]]
        outputs.append(shown)
        update = lambda new, raw: shown.append(new["text/html"])  # noqa: E731
        return types.SimpleNamespace(update=update)

    kernel = types.SimpleNamespace(execution_count=7, kernel=object())
    modules = {
        "ipykernel": {},
        "IPython": {"get_ipython": lambda: kernel},
        "IPython.display": {"display": display},
    }
    for name, held in modules.items():
        module = types.ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("embedgrad.report.terminal.bars.DELAY", 0)
    bars = Bars()
    for event in EVENTS:
        bars(event)
    (shown,) = outputs
    assert any(re.search(r"text prompt:   0%\|[^\n]*<", html) for html in shown)
    lines = re.fullmatch(r'<pre style="margin:0;white-space:pre-wrap">(.*)</pre>', shown[-1], re.S)
    assert lines is not None
    first, second, bar = lines[1].split("\n")
    assert (first, second) == ("loading mod\\x1b[31mel", "a note")
    assert re.search(r"1/4 \[.*dev 60.0 % \(31 to 83\), best .*, loss 0.412", bar)
    assert stream.getvalue() == ""
    kernel.execution_count = 8
    bars({"event": "note", "text": "<b>"})
    assert len(outputs) == 2
    assert outputs[1][-1] == '<pre style="margin:0;white-space:pre-wrap">&lt;b&gt;</pre>'


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace(execution_count=1)])
def test_a_script_that_imports_ipython_is_no_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: Any
) -> None:
    module = types.ModuleType("IPython")
    vars(module)["get_ipython"] = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    Bars()({"event": "note", "text": "a note"})
    assert "a note" in capsys.readouterr().err


def test_a_log_gets_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    for event in EVENTS:
        bars(event)
    assert capsys.readouterr().err.splitlines() == [
        "loading mod\\x1b[31mel",
        "a note",
        "step 0/4, dev accuracy 60.0 % (31 to 83) with the text prompt, 0 % done",
        "stopped as asked: 1 step in 2 s",
    ]


SLOW = ("load_model", "optimize", "evaluate", "replies", "run", "plan", "compare", "export")


@pytest.mark.parametrize("name", [*SLOW, "verify", "generate"])
def test_what_takes_long_shows_progress_unless_told_otherwise(name: str) -> None:
    function = RefinedPrompt.generate if name == "generate" else getattr(eg, name)
    assert inspect.signature(function).parameters["report"].default is show


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for event in EVENTS:
        eg.quiet(event)
    assert capsys.readouterr() == ("", "")
