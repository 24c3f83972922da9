"""What a function shows in a script or a notebook while it runs, and how it is made quiet."""

from __future__ import annotations

import inspect
import io
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


@pytest.mark.parametrize("place", ["terminal", "notebook"])
def test_a_script_and_a_notebook_show_loss_score_step_and_time(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if place == "terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    if place == "notebook":  # its standard error is no terminal
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
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


def test_a_log_gets_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    for event in EVENTS:
        bars(event)
    assert capsys.readouterr().err.splitlines() == [
        "loading mod\\x1b[31mel",
        "a note",
        "step 0/4, dev accuracy 60.0 % (31 to 83) with the text prompt, 0 % done",
        "stopped as asked: 1 steps in 2 s",
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
