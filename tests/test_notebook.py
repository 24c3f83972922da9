"""What a notebook shows of results, trainings and figures: what the terminal says, escaped."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import embedgrad as eg
from embedgrad.report.page.notebook import shown_as, table_html
from embedgrad.report.terminal.methods_table import methods_table
from embedgrad.report.terminal.plan_table import plan_and_problems, plan_table
from embedgrad.report.terminal.tables import comparison_table, drift_table, show, verdict
from embedgrad.report.terminal.tasks_table import tasks_table
from kit_loop import QUICK, small, train
from made_runs import made_comparison, made_results

pytest_plugins = ["tiny_runs"]


def compared() -> dict[str, Any]:
    results = made_results()
    rows = [{**row, "settings": {}} for row in results["rows"]]
    return {**results, "seeds": [0, 1, 2], "rows": rows}


def words(html: str) -> list[str]:
    """What a reader sees, in order."""
    return unescape(re.sub(r"<[^>]+>", " ", html)).split()


def terminal(shown: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show(shown)
    return re.sub("[─━]+", " ", capsys.readouterr().out).split()


def test_a_result_says_in_a_notebook_what_the_terminal_says(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    shown = result._repr_html_()  # type: ignore[attr-defined]
    assert words(shown) == terminal(comparison_table(result), capsys)
    assert f"<b>{verdict(result['difference'])}</b>" in shown
    assert 'text-align:right">' in shown
    again: Any = eg.run(eg.Recipe.read_run(folder), folder, eg.quiet, resume=True)
    assert again._repr_html_() == shown
    copied = copy.deepcopy(result)
    assert copied == result == {**result}
    assert json.loads(json.dumps(result))["test_rows"] == result["test_rows"]
    assert copied._repr_html_() == shown


def test_tables_hold_every_word_of_the_terminal(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = finished[1]
    whole = {"trained_numbers": 3, "train": found["train"], "tasks": {"a": found}, "mean": None}
    for table, values in (
        (methods_table, compared()),
        (tasks_table, whole),
        (drift_table, found["tokens"]),
    ):
        assert sorted(words(table_html(table(values)))) == sorted(terminal(table(values), capsys))


def test_a_plan_shows_its_problems(recipe: Callable[..., Path]) -> None:
    checked = eg.Recipe.read(recipe(data={"train": "nowhere.jsonl"}))
    plan: Any = eg.plan(checked, measure=False, report=eg.quiet)
    shown = plan._repr_html_()
    assert shown.startswith(f'<div style="padding-left:0ch"><b>{plan["problems"][0]}</b>')
    assert "<b>model</b>" in shown
    assert words(shown) == words(table_html(plan_and_problems(plan)))


def test_a_plan_names_tokens_as_people_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    span = {"ids": [1, 2], "tokens": ["\u010a", "\u0120Good"]}
    show(plan_table({"spans": [span], "merged": {"rows": 0, "first": None}}))
    assert "2 tokens: \u21b5 \u00b7Good\n" in capsys.readouterr().out


def test_foreign_text_is_shown_as_text_and_nothing_raises() -> None:
    results = compared()
    results["methods"][1] = {**results["methods"][1], "method": "<script>\u202e"}
    shown: Any = shown_as(methods_table, results)
    assert "<script" not in shown._repr_html_()
    assert "&lt;script&gt;\\u202e" in shown._repr_html_()
    del shown["methods"]
    assert shown._repr_html_() == "<pre>result</pre>"


def test_a_refinement_shows_its_training_and_its_prompt() -> None:
    found = train(small(), replace(QUICK, steps=2), report=eg.quiet)
    shown = found._repr_html_()
    assert " s (all steps done); dev accuracy " in shown
    assert f"at step {found.best.step}</div>" in shown
    assert shown.count("<tr>") == 1 + len(found.prompt.rows)
    assert replace(found, best=None)._repr_html_() == "<pre>Refinement</pre>"  # type: ignore[arg-type]


def test_figures_are_objects(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    curves: Any = eg.figure(finished[0], "curves")
    shown = curves._repr_svg_()
    assert re.search(r'aria-label="training loss, nats; dev \w', shown)
    assert "@media (prefers-color-scheme: dark) { .embedgrad-figure {" in shown
    assert ":root" not in shown, "the notebook's own colors stay"
    assert ElementTree.fromstring(shown).tag == "{http://www.w3.org/2000/svg}svg"
    curves.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    compared = made_comparison(tmp_path / "compared")
    assert len(eg.figure(compared, "forest").axes) == 1
    with pytest.raises(eg.OptionError, match=r"figure: 'curve' is unknown; .*forest"):
        eg.figure(compared, "curve")
    with pytest.raises(eg.RunError, match="nowhere"):
        eg.figure(tmp_path / "nowhere", "curves")
