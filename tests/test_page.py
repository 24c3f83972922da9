"""`embedgrad report`: what a page holds, how large it gets, and what it does with damage."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedgrad.errors import EmbedgradError
from embedgrad.evaluation.per_class import per_class
from embedgrad.evaluation.significance import macro_f1, wilson_interval
from embedgrad.report.figures.calibration import calibration
from embedgrad.report.figures.theme import COLORS
from embedgrad.report.page import page as page_module
from embedgrad.report.page.facts import provenance
from embedgrad.report.page.page import comparison_page, run_page
from embedgrad.report.page.predictions import run_rows
from embedgrad.report.page.run_files import RunFiles, read_comparison, read_run
from embedgrad.report.page.run_files import compared_rows as compared_rows_of
from embedgrad.report.page.safe_text import readable, script_json, shorten, without_home
from made_runs import (
    HOSTILE,
    WORDS,
    answered_rows,
    compared_rows,
    events,
    made_comparison,
    made_results,
    made_run,
)
from run_kit import Command, write_jsonl

pytest_plugins = ["tiny_runs"]


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def rows(self) -> Any:
        """The rows that the page's script would show."""
        return json.loads(self.scripts[0])


@pytest.fixture
def drawn() -> None:
    """For tests that need the figures themselves; the others go without, as they take long."""


@pytest.fixture(autouse=True)
def figures_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(page_module, "inline_svg", lambda *_: "<svg></svg>")


def written(folder: Path) -> str:
    run = read_run(folder)
    return run_page(run, "first", classes=per_class(row for _, row in run.survey))


def notes(html: str) -> str:
    """The part of a page that says what is not there."""
    return html.partition('<section id="notes"')[2].partition("</section>")[0]


def test_several_spans_have_a_heading_each(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "one", answered_rows(3))
    assert "<h3>Span" not in written(folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for i, token in enumerate(result["tokens"]):
        token["span"] = 1 + (i > 2)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    html = written(folder)
    strips = re.split(r"<h3>Span \d</h3>", html)
    assert [strip.count('role="listitem"') for strip in strips] == [0, 3, len(WORDS) - 3]
    assert 'aria-label="Every token of span 2"' in html
    # Without a result the saved prompt tells the same.
    (folder / "result.json").unlink()
    prompt = folder / "prompt" / "prompt.json"
    values = json.loads(prompt.read_text(encoding="utf-8"))
    values["spans"] *= 2
    prompt.write_text(json.dumps(values), encoding="utf-8")
    assert written(folder).count('role="listitem"') == 2 * len(WORDS)
    assert "<h3>Span 2</h3>" in written(folder)


# -- one file, nothing else ------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_a_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    pages = [written(made_run(tmp_path / "run", answered_rows(30)))]
    pages.append(comparison_page(made_results(), "sst2"))
    for html in pages:
        elements = Elements(html).found
        for tag, attributes in elements:
            assert tag not in {"img", "iframe", "object", "embed", "base", "form", "video", "use-"}
            for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
        assert not re.search(r"https?:|@import|url\((?!#)", html)
        policy = dict(elements[2:4])["meta"]["content"]
        assert policy is not None
        assert policy.startswith("default-src 'none'; ")
        assert "script-src 'sha256-" in policy


def test_the_policy_names_the_one_script(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = written(made_run(tmp_path, answered_rows(3)))
    script = Elements(html).scripts[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in html


@pytest.mark.usefixtures("drawn")
def test_ids_of_figures_do_not_collide_and_colors_follow_the_theme(tmp_path: Path) -> None:
    html = written(made_run(tmp_path, answered_rows(30)))
    ids = [a["id"] for _, a in Elements(html).found if "id" in a]
    assert len(ids) == len(set(ids))
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", figure)
        used = set(re.findall(r"var\(--(\w+)\)", figure)) - {"sans"}
        assert {"muted", "line", "refined"} <= used <= set(COLORS)
        references = re.findall(r'(?:href="|url\()#([^")]+)', figure)
        assert set(references) <= set(ids)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_of_text_can_be_read(scheme: int) -> None:
    """Contrast to paper and panel as WCAG 2.2 (1.4.3) asks for."""

    def luminance(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for back in ("paper", "panel"):
        for name in ("ink", "muted", "text", "refined", "right", "wrong"):
            one, other = (luminance(COLORS[n][scheme]) + 0.05 for n in (back, name))
            assert max(one, other) / min(one, other) >= 4.5, (name, back)


# Viewing with one kind of cones missing, on linear RGB (Machado, Oliveira and Fernandes 2009).
COLOR_BLIND = {
    "protanopia": [
        *([0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]),
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        *([0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]),
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        *([1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602]),
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("eyes", COLOR_BLIND)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("pair", [("right", "wrong"), ("text", "refined")])
def test_colors_that_are_a_pair_differ_for_the_color_blind(
    pair: tuple[str, str], scheme: int, eyes: str
) -> None:
    """By a distance in CIELAB of 20, where 2 can just be seen."""
    import numpy as np

    def lab(color: str) -> Any:
        s = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(COLOR_BLIND[eyes]) @ linear, 0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = np.array(to_xyz) @ seen / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    one, other = (lab(COLORS[name][scheme]) for name in pair)
    assert np.linalg.norm(one - other) >= 20


# -- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_value", "gain", "word"),
    [(0.51, 0.125, "no reliable gain"), (0.01, 0.125, "improved"), (0.01, -0.125, "worse")],
)
def test_every_part_with_a_score_says_the_verdict(
    p_value: float, gain: float, word: str, tmp_path: Path
) -> None:
    folder = made_run(tmp_path, answered_rows(8))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result["difference"] |= {"p_value": p_value, "accuracy": gain}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    html = written(folder)
    for part in ("scores", "learning", "interpolation"):
        text = html.partition(f'<section id="{part}"')[2].partition("</section>")[0]
        judged = set(re.findall(r'<strong class="judged \w+"><span[^>]*>.</span> ([^<]+)', text))
        assert judged == {word}, part
        assert "95 % interval" in text, part
    assert "reads as" not in html  # what the nearest tokens are says nothing of how it reads


@pytest.mark.parametrize(
    ("share", "warned"), [(None, False), (1.0, False), (0.9, False), (0.875, True), (0.0, True)]
)
def test_greedy_replies_that_are_no_choice_are_warned_of(
    share: float | None, warned: bool, tmp_path: Path
) -> None:
    folder = made_run(tmp_path, answered_rows(8))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if share is not None:
        result["refined"]["greedy_is_choice"] = share
        result["text"]["greedy_is_choice"] = 0.25
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    html = written(folder)
    said = [] if share is None else ["25.0 %", f"{100 * share:.1f} %"]
    assert re.findall(r">greedy reply is a choice in ([\d.]+ %) of rows<", html) == said
    assert ('id="greedy"' in html) == ("objective.over" in html) == warned


# -- classes -------------------------------------------------------------------------------------


def class_rows(golds: str, texts: str, refined: str) -> list[dict[str, Any]]:
    """A row for each letter: the right answer, and what both prompts chose."""
    rows = answered_rows(len(golds))
    for row, gold, *said in zip(rows, golds, texts, refined, strict=True):
        row["answer"] = gold
        for name, choice in zip(("text", "refined"), said, strict=True):
            row[name] |= {"predicted": choice, "correct": float(choice == gold)}
    return rows


def test_classes_by_hand() -> None:
    found = per_class(class_rows("aaab", "abba", "aaab"))
    assert found["confusion"]["text"] == {("a", "a"): 1, ("a", "b"): 2, ("b", "a"): 1}
    assert found["confusion"]["refined"] == {("a", "a"): 3, ("b", "b"): 1}
    first, second = found["classes"]
    assert (first["label"], first["rows"], second["label"], second["rows"]) == ("a", 3, "b", 1)
    assert first["text"]["recall"] == pytest.approx(1 / 3)
    assert first["text"]["precision"] == 1 / 2
    assert first["text"]["f1"] == pytest.approx(2 / 5)
    assert first["text"]["interval"] == list(wilson_interval(1, 3))
    assert first["verdict"] == second["verdict"] == "no reliable gain"
    assert per_class(answered_rows(4, free=True)) == {}


def test_a_class_is_judged_among_all_classes() -> None:
    better = per_class(class_rows("a" * 6 + "b", "b" * 7, "a" * 6 + "b"))["classes"]
    assert [one["verdict"] for one in better] == ["no reliable gain"] * 2  # 2 / 2**6, twice
    better = per_class(class_rows("a" * 7 + "b", "b" * 8, "a" * 7 + "b"))["classes"]
    assert [one["verdict"] for one in better] == ["improved", "no reliable gain"]
    worse = per_class(class_rows("a" * 7 + "b", "a" * 7 + "b", "b" * 8))["classes"]
    assert worse[0]["verdict"] == "worse"


@given(st.lists(st.tuples(*[st.sampled_from("abcd")] * 3), min_size=1, max_size=40))
def test_classes_make_up_the_whole(rows: list[tuple[str, str, str]]) -> None:
    golds, texts, refined = (list(column) for column in zip(*rows, strict=True))
    found = per_class(class_rows("".join(golds), "".join(texts), "".join(refined)))
    for name, said in (("text", texts), ("refined", refined)):
        scores = [one[name]["f1"] for one in found["classes"] if one[name]["f1"] is not None]
        assert sum(scores) / len(scores) == pytest.approx(macro_f1(golds, said, "abcd"))
        right = sum(g == p for g, p in zip(golds, said, strict=True))
        held = [one for one in found["classes"] if one["rows"]]
        assert sum(o["rows"] * o[name]["recall"] for o in held) == pytest.approx(right)
        assert sum(found["confusion"][name].values()) == len(rows)


def test_a_page_has_a_confusion_matrix_and_scores_of_each_class(tmp_path: Path) -> None:
    html = written(made_run(tmp_path / "few", class_rows("aaab", "abba", "aaab")))
    matrices = re.findall(r'<table class="confusion">.*?</table>', html, flags=re.DOTALL)
    cells = [re.findall(r'<td class="number (\w*)"[^>]*>(\d+)', part) for part in matrices]
    assert cells == [
        [("right", "1"), ("wrong", "2"), ("wrong", "1"), ("", "0")],
        [("right", "3"), ("", "0"), ("", "0"), ("right", "1")],
    ]
    assert html.count('<caption class="label') == 2
    assert 'id="classes"' not in written(made_run(tmp_path / "free", answered_rows(4, free=True)))


def test_of_many_classes_a_page_has_the_usual_confusions(tmp_path: Path) -> None:
    labels = "".join(chr(0x4E00 + i) for i in range(300))
    rows = class_rows(labels + "ab", labels[1:] + labels[:1] + "bb", labels + "bb")
    html = written(made_run(tmp_path, rows))
    assert '<table class="confusion">' not in html
    part = html.partition("The most frequent confusions")[2].partition("</table>")[0]
    lines = re.findall(r"<tr><td>(.)</td><td>(.)</td>.*?>(\d+)<.*?>(\d+)<", part)
    assert len(lines) == 20
    assert lines[0] == ("a", "b", "1", "1")
    assert "102 more classes are left out" in html


# -- comparisons ---------------------------------------------------------------------------------


def numbered(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(rows, 1))


@pytest.mark.parametrize(
    ("methods", "subject"),
    [(None, "embedgrad"), (("text", "peft-lora", "best-of-n"), "peft-lora"), (("text",), None)],
)
def test_a_comparison_begins_with_its_verdict(
    methods: tuple[str, ...] | None, subject: str | None
) -> None:
    results = made_results()
    if methods:
        results["methods"] = [e for e in results["methods"] if e["method"] in methods]
    html = comparison_page(results, "sst2", numbered(compared_rows(9)))
    main = html.partition('<main id="main">')[2]
    if subject is None:
        assert 'id="verdict"' not in main
        return
    first = main.partition("</section>")[0]
    assert '<section id="verdict"' in first
    assert f"<b>{subject}</b>: " in first
    for entry in results["methods"][1:]:
        assert f"<b>{entry['method']}</b>" in first
        group = first.partition(f"<b>{entry['method']}</b> ")[0].rpartition('<div class="score')[2]
        assert f"</span> {entry['verdict']}</strong>" in group


def test_rows_that_methods_answer_differently_come_first_and_by_themselves() -> None:
    rows = compared_rows(60)
    html = comparison_page(made_results(), "sst2", numbered(rows))
    shown = Elements(html).rows
    assert len(shown) == 60
    expected = {"disagree": 0, "fixed": 0, "broken": 0, "all": 60}
    for row, page_row in zip(rows, shown, strict=True):
        scores: dict[str, list[float]] = {}
        for answer in row["answers"]:
            scores.setdefault(answer["method"], []).append(answer["correct"])
        means = {name: sum(own) / len(own) for name, own in scores.items()}
        kinds = ["disagree"] * (len(set(means.values())) > 1)
        kinds += ["fixed"] * (means["embedgrad"] > means["text"])
        kinds += ["broken"] * (means["embedgrad"] < means["text"])
        assert page_row["kinds"] == kinds
        for name, mean in means.items():
            answer = page_row["answers"][name]
            assert answer["right"] == (mean == 1)
            partly = f"right in {round(3 * mean)} of 3 seeds" if 0 < mean < 1 else None
            assert answer.get("score") == partly
        for kind in kinds:
            expected[kind] += 1
    found = re.findall(r'data-kind="(\w+)".*?<span class="count">(\d+)', html)
    assert {kind: int(count) for kind, count in found} == expected
    assert min(expected.values()) > 0
    assert 'data-first="disagree"' in html


@pytest.mark.usefixtures("drawn")
def test_a_comparison_of_long_answers_takes_two_megabytes_at_most() -> None:
    rows = compared_rows(500, free=True)
    for row in rows:
        for answer in row["answers"]:
            answer["predicted"] *= 100
    assert len(comparison_page(made_results(), "sst2", numbered(rows)).encode()) <= 2_000_000


def test_rows_of_a_comparison_that_are_missing_or_damaged_get_a_note(tmp_path: Path) -> None:
    folder = made_comparison(tmp_path)
    told: list[str] = []
    assert len(compared_rows_of(folder, told)) == 30
    assert told == []
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for damage in ('{"source": 5}', "[]", lines[0].replace('"method"', '"m"'), lines[0][:50]):
        told.clear()
        (folder / "predictions.jsonl").write_text(f"{damage}\n{lines[1]}\n", encoding="utf-8")
        assert [number for number, _ in compared_rows_of(folder, told)] == [2]
        assert told == ["predictions.jsonl has damaged lines, left out: 1 of 2."]
    (folder / "predictions.jsonl").unlink()
    told.clear()
    assert compared_rows_of(folder, told) == []
    assert "There is no predictions.jsonl" in told[0]


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_five_hundred_examples_take_two_megabytes_at_most(tmp_path: Path) -> None:
    texts = [text * (6_000 // len(text) + 1) for text in HOSTILE.values()]
    rows = answered_rows(500, texts=texts, free=True)
    rows[7]["columns"]["text"] = "<" * 1_000_000
    rows[8]["refined"]["predicted"] = "\u202e" * 1_000_000
    html = written(made_run(tmp_path, rows))
    assert len(html.encode()) <= 2_000_000
    assert len(Elements(html).rows) == 500
    assert "In 500 rows texts are shortened" in notes(html)


@pytest.mark.usefixtures("drawn")
def test_a_long_prompt_and_many_evaluations_leave_rows_less_room(tmp_path: Path) -> None:
    texts = ["A long review sentence with many words. " * 200]
    words = [f"\u00b7word{i}" for i in range(1_000)]
    folder = made_run(tmp_path, answered_rows(500, texts=texts), words=words)
    write_jsonl(folder / "events.jsonl", events(8 * 5_000))
    html = written(folder)
    assert len(html.encode()) <= 2_000_000
    assert len(Elements(html).rows) == 500
    assert "1 in 13 of 5,001 evaluations, with the last and that of the rows" in html
    steps = [int(step) for step in re.findall(r'<tr><td class="number">(\d+)</td><td', html)]
    learned = steps[steps.index(0) :][:387]
    assert (learned[:4], learned[-2:]) == ([0, 24, 104, 208], [39_936, 40_000])
    assert "evaluations, with the last" not in written(made_run(tmp_path, answered_rows(3)))


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_ten_thousand_examples_take_twenty_megabytes_at_most(tmp_path: Path) -> None:
    texts = [text * (3_000 // len(text) + 1) for text in HOSTILE.values()]
    rows = answered_rows(10_000, texts=texts, free=True)
    html = written(made_run(tmp_path, rows))
    assert len(html.encode()) <= 20_000_000
    assert len(Elements(html).rows) == 10_000


def test_more_rows_than_a_page_holds_leave_unchanged_ones_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedgrad.report.page.predictions.MOST_ROWS", 30)
    rows = answered_rows(60)
    changed = {row["source"] for row in rows if row["change"] != "same"}
    assert 10 < len(changed) < 30
    found = run_rows(read_run(made_run(tmp_path, rows)))
    assert found is not None
    shown = json.loads(found.json)
    assert len(shown) == 30
    assert changed <= {row["source"] for row in shown}
    assert (found.kinds[-1].name, found.kinds[-1].count) == ("all", 60)
    assert any(note.startswith("30 of 60 rows are on this page") for note in found.notes)


def test_many_columns_do_not_make_a_row_large(tmp_path: Path) -> None:
    rows = answered_rows(3)
    rows[0]["columns"] |= {f"column {i}": "x" * 500 for i in range(1_000)}
    found = run_rows(read_run(made_run(tmp_path, rows)), ("text",))
    assert found is not None
    first, second, _ = json.loads(found.json)
    assert first["more"] == 1_002 - 12
    assert [name for name, _ in first["columns"]][:2] == ["text", "label"]
    assert (first["main"], second["main"]) == (1, 1)
    assert "more" not in second


@given(st.lists(st.text(max_size=300), max_size=8), st.integers(0, 1_000))
@example(["<" * 100, "\ud800" * 100], 300)
@example(["\x00" * 5, "short"], 12)
def test_texts_are_shortened_to_their_budget_and_say_so(texts: list[str], budget: int) -> None:
    shown = shorten(texts, budget)
    taken = 0
    for text, part in zip(texts, shown, strict=True):
        kept, left = (part, 0) if isinstance(part, str) else part
        assert left >= 0
        assert kept == readable(text[: len(text) - left])
        taken += len(script_json(kept).encode()) - 2
    assert taken <= budget
    if sum(len(script_json(readable(text)).encode()) - 2 for text in texts) <= budget:
        assert all(isinstance(part, str) for part in shown)


def test_short_texts_stay_whole_beside_a_long_one() -> None:
    short, long = shorten(["short", "long" * 1_000], 100)
    assert short == "short"
    assert long == [("long" * 1_000)[:95], 3_905]


# -- scores between right and wrong ----------------------------------------------------------------


def test_graded_scores_are_shown_as_they_are(tmp_path: Path) -> None:
    rows = answered_rows(3, free=True)
    scores = [(0.25, 1.0, "fixed"), (0.5, 0.125, "broken"), (0.0, 0.0, "same")]
    for row, (text, refined, change) in zip(rows, scores, strict=True):
        row["text"]["correct"], row["refined"]["correct"], row["change"] = text, refined, change
    html = written(made_run(tmp_path, rows))
    shown = [
        [(reply["right"], reply.get("score")) for reply in row["answers"].values()]
        for row in Elements(html).rows
    ]
    assert shown == [
        [(False, "score 0.25"), (True, None)],
        [(False, "score 0.5"), (False, "score 0.125")],
        [(False, None), (False, None)],
    ]
    assert 'title="the refined prompt scores higher"' in html
    assert 'title="only the refined prompt is right"' in written(
        made_run(tmp_path / "right", answered_rows(3))
    )


# -- hostile text ----------------------------------------------------------------------------------


@given(st.text())
@example("</script><!--\u2028\ud800\x00")
def test_embedded_text_cannot_leave_its_script(text: str) -> None:
    content = script_json([readable(text)])
    assert "<" not in content
    content.encode()
    assert json.loads(content) == [readable(text)]


@given(st.text())
def test_readable_text_has_no_control_characters(text: str) -> None:
    shown = readable(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown
    )
    assert readable(shown) == shown


def test_readable_text_keeps_what_is_harmless() -> None:
    kept = "lines\n\ttabs  \u00a0\u3000 \u0645\u06cc\u200c\u062e\u0648 \U0001f469\u200d\U0001f52c"
    assert readable(kept) == kept
    assert readable("a\r\nb\rc") == "a\nb\\rc"


def test_foreign_text_outside_the_rows_is_text(tmp_path: Path) -> None:
    hostile = HOSTILE["end of data"]
    folder = made_run(
        tmp_path,
        answered_rows(2),
        words=[hostile, HOSTILE["control"]],
        model={"name": hostile, hostile: HOSTILE["direction"]},
    )
    (folder / "recipe.toml").write_text(f"# {hostile}\u202e\n", encoding="utf-8")
    html = run_page(read_run(folder), hostile, (hostile,))
    assert html.count("<script") == 2
    assert html.count("</script>") == 2
    assert "\u202e" not in html
    assert "\x00" not in html


@pytest.mark.parametrize("home", ["/srv/ann", "/srv/ann/"])
def test_a_recipe_is_shown_without_the_home_directory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    folder = made_run(tmp_path, answered_rows(2))
    text = 'train = "/srv/ann/data/a.jsonl"\ndev = "/srv/anna/b.jsonl"\nfile = "~/c"\n'
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    html = run_page(read_run(folder), "run")
    for shown in ("&#34;~/data/a.jsonl&#34;", "&#34;/srv/anna/b.jsonl&#34;", "&#34;~/c&#34;"):
        assert shown in html
    assert "/srv/ann/" not in html
    results = {**made_results(), "recipe": {"data": {"train": "/srv/ann/data/a.jsonl"}}}
    html = comparison_page(results, "comparison")
    assert "~/data/a.jsonl" in html
    assert "/srv/ann/" not in html
    monkeypatch.setenv("HOME", "/")
    assert without_home(["/a", {"b": "/"}]) == ["/a", {"b": "/"}]


# -- what is missing or damaged --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "lost"),
    [
        ("result.json", "There is no result.json", 'id="text-accuracy"'),
        ("events.jsonl", "There is no events.jsonl: the curves are left out.", 'id="learning"'),
        ("predictions.jsonl", "There is no predictions.jsonl", 'id="answers"'),
        ("recipe.toml", "There is no recipe.toml", "The recipe, every setting"),
        ("prompt/prompt.json", "There is no prompt/prompt.json", "apache-2.0"),
        ("interpolation.json", "", 'id="interpolation"'),
    ],
)
def test_a_page_is_made_of_what_is_there(name: str, said: str, lost: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(20))
    assert lost in written(folder)
    (folder / name).unlink()
    html = written(folder)
    assert lost not in html
    assert said in notes(html)
    assert html.rstrip().endswith("</html>")


def test_an_interrupted_run_has_a_page(tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(5))
    for name in ("result.json", "predictions.jsonl", "interpolation.json"):
        (folder / name).unlink()
    html = written(folder)
    assert "No test rows were scored." in html
    assert 'id="learning"' in html
    assert html.count('role="listitem"') == 5  # the words, from the saved prompt


def test_results_of_an_older_version_are_shown_with_a_note(
    embedgrad: Command, tmp_path: Path
) -> None:
    note = "was written by an older embedgrad (result version 1; this one reads 2)"
    folder = made_run(tmp_path / "run", answered_rows(5))
    assert note not in written(folder)
    result = json.loads((folder / "result.json").read_text())
    del result["version"]
    (folder / "result.json").write_text(json.dumps(result))
    html = written(folder)
    assert note in html
    assert 'id="text-accuracy"' in html
    results = tmp_path / "results.json"
    for values, count in ((made_results(), 0), (made_results() | {"version": 1}, 1)):
        results.write_text(json.dumps(values))
        done = embedgrad("report", results)
        assert (done.code, len(done.lines), done.err.count(note)) == (0, count, count)


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(20))
    bad = ["{", "[]", "null", '{"source": 3}', "\xff"]
    for name in ("predictions.jsonl", "events.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        (folder / name).write_bytes("\n".join([*bad[:4], *lines, bad[4]]).encode("latin-1"))
    html = written(folder)
    assert "predictions.jsonl has damaged lines, left out: 5 of 25." in notes(html)
    assert "events.jsonl has damaged lines, left out: 4 of " in notes(html)
    rows = Elements(html).rows
    assert [row["n"] for row in rows] == list(range(5, 25))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = list(enumerate(value))[:2]
    for name, inner in items:
        yield from leaves(inner, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


NONSENSE = (None, "x", [], {}, -1, 1e400, 10**400, [None], {"x": "y"})


@pytest.mark.parametrize("name", ["result.json", "prompt/prompt.json", "interpolation.json"])
def test_whatever_is_damaged_a_page_is_made(name: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(4))
    (folder / "events.jsonl").write_bytes(b"")
    whole = json.loads((folder / name).read_text(encoding="utf-8"))
    places = [path for path in leaves(whole) if path]
    draw = random.Random(0)
    for place in draw.sample(places, min(40, len(places))):
        new = draw.choice(NONSENSE)
        values = replaced(whole, place, new)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
        html = written(folder)
        assert html.rstrip().endswith("</html>"), (place, new)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"rows": []}', '{"rows": {}, "methods": 3}'])
def test_a_damaged_comparison_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(EmbedgradError, match=r"results\.json: is no results file of"):
        read_comparison(tmp_path)


def test_whatever_is_damaged_in_a_comparison_is_left_out_or_one_line(
    embedgrad: Command, tmp_path: Path
) -> None:
    whole = made_results(seeds=1)
    places = [path for path in leaves(whole) if path]
    draw = random.Random(0)
    chosen = [(place, draw.choice(NONSENSE)) for place in draw.sample(places, 12)]
    first = ("methods", 1)
    chosen += [((*first, "method"), 5), ((*first, "difference_interval"), 5), (("skipped",), "x")]
    chosen += [(first, {}), ((*first, "difference"), 10**400)]
    for place, new in chosen:
        values = replaced(whole, place, new)
        (tmp_path / "results.json").write_text(json.dumps(values), encoding="utf-8")
        for figure in ([], ["--figure", "forest"], ["--figure", "cost"]):
            form = ["--format", "svg"] if figure else []
            done = embedgrad("report", tmp_path, *figure, *form)
            assert (done.code, len(done.lines)) in ((0, 0), (2, 1)), (place, new, done.err)


@pytest.mark.parametrize("kept", [5, ["artifact"], {"artifact": 5}])
def test_an_interpolation_made_from_nonsense_is_left_out(
    kept: Any, embedgrad: Command, tmp_path: Path
) -> None:
    folder = made_run(tmp_path, answered_rows(3))
    (folder / "interpolation.json").write_text(json.dumps({"from": kept}))
    assert embedgrad("report", folder, "--no-model").code == 0
    assert "--no-model" in notes((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["versions", "model"])
def test_objects_in_objects_without_end_cost_their_part(name: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(3))
    deep = f'{{"{name}": {{"name": ' + '{"a":' * 900 + "1" + "}" * 902
    (folder / "prompt" / "prompt.json").write_text(deep, encoding="utf-8")
    html = written(folder)
    assert "prompt/prompt.json is damaged (it is nested too deeply)" in notes(html)
    assert 'id="answers"' in html


@pytest.mark.parametrize("p_value", ["NaN", "null"])
def test_a_p_value_that_is_no_number_shows_no_gain(p_value: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(200))
    assert '<p class="verdict improved" id="verdict">' in written(folder)
    path = folder / "result.json"
    damaged = re.sub(r'("p_value": )[^,]+', rf"\g<1>{p_value}", path.read_text(encoding="utf-8"))
    path.write_text(damaged, encoding="utf-8")
    html = written(folder)
    assert '<p class="verdict none" id="verdict">' in html
    assert "no reliable gain" in html
    assert "improved" not in html.partition('id="scores"')[2].partition("</section>")[0]


def test_numbers_too_large_to_draw_are_no_numbers(tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(3))
    for name in ("result.json", "predictions.jsonl", "events.jsonl"):
        text = (folder / name).read_text(encoding="utf-8")
        large = re.sub(r"(\"(?:accuracy|loss|correct)\": )[\d.]+", rf"\g<1>{10**400}", text)
        (folder / name).write_text(large, encoding="utf-8")
    assert "predictions.jsonl has damaged lines, left out: 3 of 3." in notes(written(folder))


def test_a_comparison_that_is_not_finished_says_so(embedgrad: Command, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    for name in ("recipe.toml", "events.jsonl", "work/comparison.json"):
        (tmp_path / name).write_text("")
    done = embedgrad("report", tmp_path)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert "a comparison without results yet" in done.err
    results = {**made_results(), "interrupted": True, "planned": 9, "scored": 4}
    told = notes(comparison_page(results, "sst2"))
    assert "The comparison was interrupted: of 9 trainings 4 are scored." in told
    assert "interrupted" not in notes(comparison_page(made_results(), "sst2"))


def test_a_comparison_says_what_its_results_say() -> None:
    results = made_results()
    results["rows"][2]["extra_tokens"] = 530 / 3
    html = comparison_page(results, "sst2")
    best = max(results["methods"], key=lambda entry: entry["difference"])
    row = re.search(rf'<tr data-method="{best["method"]}">.*?</tr>', html, flags=re.DOTALL)
    assert row is not None
    assert f'value="{best["accuracy"]}"' in row[0]
    assert f"{100 * best['difference']:+.1f}" in row[0]
    assert "improved" in row[0]
    seed = results["rows"][2]
    assert '<td class="number">177</td></tr>' in html  # never 176.66666666666666
    interval = "{:.1f} to {:.1f}".format(*(100 * edge for edge in seed["interval"]))
    assert f'<td class="number">{interval}</td>' in html
    assert "peft-cpt skipped: the package peft is missing" in notes(html)


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    found = calibration([(0.95, 1), (0.95, 0), (1.0, 1), (0.55, 1), (0.52, 0)])
    assert [b.count for b in found.bins] == [2, 3]
    assert found.bins[0].accuracy == 0.5
    assert found.bins[1].confidence == pytest.approx(2.9 / 3)
    assert found.ece == pytest.approx((2 * abs(0.5 - 0.535) + 3 * abs(2 / 3 - 2.9 / 3)) / 5)


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1))
def test_calibration_counts_every_row_once(pairs: list[tuple[float, float]]) -> None:
    found = calibration(pairs)
    assert sum(b.count for b in found.bins) == len(pairs)
    assert 0 <= found.ece <= 1
    # By the triangle inequality, one bin has the smallest error of all.
    whole = abs(sum(c for c, _ in pairs) - sum(r for _, r in pairs)) / len(pairs)
    assert found.ece >= whole - 1e-9


# -- the verb --------------------------------------------------------------------------------------


def test_report_writes_a_page_and_says_where(embedgrad: Command, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", answered_rows(5))
    done = embedgrad("report", folder)
    path = folder / "report.html"
    size = path.stat().st_size
    assert (done.code, done.err) == (0, "")
    assert done.out == f"wrote {path} ({size / 1000:.0f} kB)\n"
    assert embedgrad("report", folder, "--json").json == {
        "written": str(path),
        "bytes": size,
        "notes": [],
    }
    other = tmp_path / "new" / "page.html"
    assert embedgrad("report", folder, "--out", other).code == 0
    assert other.read_bytes() == path.read_bytes()


def test_a_kept_interpolation_needs_no_model(
    embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_run(tmp_path, answered_rows(5))
    monkeypatch.setattr(
        "embedgrad.experiments.interpolation.interpolate",
        lambda *_: pytest.fail("interpolated again"),
    )
    assert embedgrad("report", folder).code == 0
    assert 'id="interpolation"' in (folder / "report.html").read_text(encoding="utf-8")


def test_an_interpolation_of_other_rows_is_not_shown(embedgrad: Command, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(5))
    (folder / "prompt" / "prompt.safetensors").write_bytes(b"other rows")
    done = embedgrad("report", folder, "--no-model")
    assert done.code == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="interpolation"' not in html
    assert "--no-model" in notes(html)


def test_a_model_that_cannot_be_used_costs_only_its_parts(
    embedgrad: Command, tmp_path: Path
) -> None:
    folder = made_run(tmp_path, answered_rows(5))
    done = embedgrad("report", folder, "--rows", "7")
    assert done.code == 0
    assert len(done.lines) == 1
    assert done.err.startswith("Left out: everything that needs the model (")
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "Left out: everything that needs the model (" in notes(html)
    assert 'id="answers"' in html


@pytest.mark.parametrize("name", ["curves", "drift", "reliability", "interpolation"])
@pytest.mark.parametrize("form", ["png", "svg"])
def test_report_writes_single_figures(
    name: str, form: str, embedgrad: Command, tmp_path: Path
) -> None:
    folder = made_run(tmp_path, answered_rows(20))
    assert embedgrad("report", folder, "--format", form, "--figure", name).code == 0
    content = (folder / f"{name}.{form}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[form])


@pytest.mark.parametrize("name", ["forest", "cost"])
def test_report_writes_figures_of_a_comparison(
    name: str, embedgrad: Command, tmp_path: Path
) -> None:
    folder = made_comparison(tmp_path)
    assert embedgrad("report", folder, "--format", "svg", "--figure", name).code == 0
    assert b"peft-lora" in (folder / f"{name}.svg").read_bytes()
    file = folder / "results.json"
    assert embedgrad("report", file).code == 0
    assert (folder / "results-report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "pgn", "--figure", "interpolation"], "did you mean 'png'?"),
        (["--format", "png", "--figure", "curve"], "did you mean 'curves'?"),
        (
            ["--format", "png", "--figure", "forest"],
            "known: curves, drift, interpolation, reliability",
        ),
        (
            ["--format", "png"],
            "give --figure with it, one of curves, drift, reliability, interpolation",
        ),
        (["--figure", "interpolation"], "give --format png or svg with it"),
        (["--out", "result.json"], "does not end in .html"),
        (["--rows", "0"], "'--rows'"),
    ],
)
def test_wrong_wishes_are_one_line(
    arguments: list[str], told: str, embedgrad: Command, tmp_path: Path
) -> None:
    done = embedgrad("report", made_run(tmp_path, answered_rows(3)), *arguments)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert told in done.err


def test_a_figure_without_its_data_is_one_line(embedgrad: Command, tmp_path: Path) -> None:
    folder = made_run(tmp_path, answered_rows(3, free=True))
    (folder / "events.jsonl").unlink()
    unscored = made_run(tmp_path / "unscored", answered_rows(3))
    (unscored / "predictions.jsonl").unlink()
    done = embedgrad("report", unscored, "--format", "png", "--figure", "reliability")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "reliability: there are no scored rows to draw" in done.err
    for name, told in (
        ("reliability", "free answers have no probabilities"),
        ("curves", "the events hold no step and no evaluation"),
    ):
        done = embedgrad("report", folder, "--format", "png", "--figure", name)
        assert (done.code, len(done.lines)) == (2, 1)
        assert told in done.err


@pytest.mark.parametrize("kind", ["nothing", "folder", "file"])
def test_what_is_no_run_is_one_line(kind: str, embedgrad: Command, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("hello")
    done = embedgrad("report", path)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert str(path) in done.err
    assert "`compare` or `tune` wrote" in done.err or "run it again" in done.err


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        ("folder", "/a/tiny", "tiny"),
        ("gguf", "C:\\models\\tiny.gguf", "tiny.gguf"),
        ("hub", "owner/tiny", "owner/tiny"),
    ],
)
def test_a_local_model_is_shown_by_its_name(kind: str, name: str, shown: str) -> None:
    run = RunFiles(Path("run"), prompt={"model": {"kind": kind, "name": name, "layers": 2}})
    assert provenance(run) == {"model": {"kind": kind, "name": shown, "layers": 2}}
