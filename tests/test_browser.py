"""Pages in a real browser: no request, no error, the right numbers, hostile text as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, Page
from embedgrad.evaluation.per_class import per_class
from embedgrad.report.page.page import comparison_page, run_page
from embedgrad.report.page.run_files import compared_rows, read_comparison, read_run
from made_runs import HOSTILE, answered_rows, made_comparison, made_run

pytestmark = pytest.mark.slow

PHONE = 375  # pixels
FIRST_ROWS_WITHIN = 2_000  # milliseconds
TEXT = ".row > .column > .foreign"
Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """`opened(html, width=375, dark=True)` shows a page."""
    pages = []

    def show(html: str, **options: Any) -> Page:
        file = tmp_path / f"page{len(pages)}.html"
        file.write_text(html, encoding="utf-8")
        pages.append(browser.open(file, **options))
        return pages[-1]

    yield show
    for page in pages:
        page.close()


def written(folder: Path, name: str = "first") -> str:
    run = read_run(folder)
    return run_page(run, name, classes=per_class(row for _, row in run.survey))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("ordinary"), answered_rows(60))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which everything that is foreign is hostile."""
    texts = list(HOSTILE.values())
    rows = answered_rows(len(texts), texts=texts, free=True)
    for row, text in zip(rows, texts, strict=True):
        row["source"] = text
        row["refined"]["predicted"] = text
        row["columns"][text] = text
    return made_run(
        tmp_path_factory.mktemp("hostile"),
        rows,
        words=[text for name, text in HOSTILE.items() if name != "surrogate"],
        model={"name": HOSTILE["script"], HOSTILE["end of data"]: HOSTILE["direction"]},
        licenses={name: text for name, text in HOSTILE.items() if name != "surrogate"},
    )


# -- what a page needs and says --------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1200])
def test_a_page_asks_for_nothing_and_has_no_errors(
    ordinary: Path, opened: Open, width: int, dark: bool
) -> None:
    page = opened(written(ordinary), width=width, dark=dark)
    assert page.texts("h1") == ["first"]
    assert page.value("document.querySelectorAll('svg.figure').length") == 3
    assert page.requests == []
    assert page.complaints == []


def test_the_browser_tells_requests_and_errors(opened: Open) -> None:
    """What the tests above look for is seen where it is."""
    page = opened("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>throw 7</script>")
    assert page.requests == ["http://127.0.0.1:9/x.png"]
    assert any("Uncaught" in json.dumps(told) for told in page.complaints)


def test_the_numbers_are_those_of_the_result(ordinary: Path, opened: Open) -> None:
    page = opened(written(ordinary))
    result = json.loads((ordinary / "result.json").read_text())
    for name in ("text", "refined"):
        for part, value in (
            ("accuracy", result[name]["accuracy"]),
            ("low", result[name]["interval"][0]),
            ("high", result[name]["interval"][1]),
        ):
            shown = page.value(f"document.getElementById('{name}-{part}')")
            assert shown is not None
            told = page.value(f"document.getElementById('{name}-{part}').value")
            text = page.value(f"document.getElementById('{name}-{part}').textContent")
            assert float(told) == value
            assert float(text.removesuffix(" %")) == pytest.approx(100 * value, abs=0.051)
    (verdict,) = page.texts("#verdict")
    assert f"{result['difference']['fixed']} fixed, {result['difference']['broken']} b" in verdict
    counts = dict(zip(["fixed", "broken", "changed", "all"], page.texts(".count"), strict=True))
    assert counts["fixed"] == str(result["difference"]["fixed"])
    assert counts["all"] == str(result["test_rows"])


def test_figures_follow_the_theme(ordinary: Path, opened: Open) -> None:
    color = "getComputedStyle(document.querySelector('svg.figure text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(written(ordinary), dark=dark) for dark in (False, True))
    assert light.value(color) != dark.value(color)
    assert light.value(paper) != dark.value(paper)


# -- rows ------------------------------------------------------------------------------------------


def test_filters_show_their_rows(ordinary: Path, opened: Open) -> None:
    page = opened(written(ordinary))
    lines = (ordinary / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for kind in ("fixed", "broken"):
        page.click(f"[data-kind={kind}]")
        expected = [row["source"] for row in rows if row["change"] == kind]
        assert page.texts(".row header > span:nth-child(2)") == expected[:20]
        assert set(page.texts(".badge")) == {kind}
        assert page.texts("[aria-pressed=true]") == [f"{kind} {len(expected)}"]
    page.click("[data-kind=all]")
    assert len(page.texts(".row")) == 20
    assert page.texts("#status") == ["20 of 60 rows shown"]
    page.click("#more")
    page.click("#more")
    assert len(page.texts(".row")) == 60
    assert page.value("document.getElementById('more').hidden") is True
    assert page.complaints == []


def test_scores_between_right_and_wrong_are_no_ticks(tmp_path: Path, opened: Open) -> None:
    rows = answered_rows(3, free=True)
    scores = [(0.25, 1.0, "fixed"), (0.5, 0.125, "broken"), (0.5, 0.5, "same")]
    for row, (text, refined, change) in zip(rows, scores, strict=True):
        row["text"]["correct"], row["refined"]["correct"], row["change"] = text, refined, change
    page = opened(written(made_run(tmp_path, rows)))
    page.click("[data-kind=all]")
    assert page.texts(".badge") == ["fixed", "worse", "same score"]
    told = ["score 0.25", "\u2713 right", "score 0.5", "score 0.125", "score 0.5", "score 0.5"]
    assert page.texts(".reply .label > span:first-child > span") == told
    assert page.complaints == []


def test_colors_mean_right_and_wrong_whichever_prompt_says_it(tmp_path: Path, opened: Open) -> None:
    rows = answered_rows(40)
    page = opened(written(made_run(tmp_path, rows)))
    page.click("[data-kind=all]")
    border = "getComputedStyle(e).borderLeftColor"
    shown = page.value(
        f"[...document.querySelectorAll('.reply')].map(e => [{border}, e.textContent])"
    )
    colors = {"\u2713 right": set(), "\u2717 wrong": set()}  # type: dict[str, set[str]]
    for (color, text), row_reply in zip(
        shown, ((row, name) for row in rows for name in ("text", "refined")), strict=False
    ):
        row, name = row_reply
        words = "\u2713 right" if row[name]["correct"] else "\u2717 wrong"
        assert f"{name} prompt: {words}" in text
        colors[words].add(color)
    right, wrong = (
        page.value(
            f"(() => {{ const e = document.createElement('i'); e.style.color = 'var(--{name})';"
            "document.body.append(e); return getComputedStyle(e).color; })()"
        )
        for name in ("right", "wrong")
    )
    assert list(colors.values()) == [{right}, {wrong}]
    assert page.value("document.querySelectorAll('del, ins, s').length") == 0


def test_search_finds_words_anywhere_in_a_row(ordinary: Path, opened: Open) -> None:
    page = opened(written(ordinary))
    page.click("[data-kind=all]")
    page.type("#search", "FILM test.jsonl:18")
    assert [text[:7] for text in page.texts(TEXT)] == ["Row 17 "]
    assert page.texts("#status") == ["1 of 1 row shown"]
    page.type("#search", "no row has this")
    assert page.texts("#status") == ["no such rows"]
    page.type("#search", "")
    assert page.texts("#status") == ["20 of 60 rows shown"]


def test_words_that_differ_are_marked(tmp_path: Path, opened: Open) -> None:
    rows = answered_rows(2, free=True)
    rows[0]["text"]["predicted"] = "the answer is five of them"
    rows[0]["refined"]["predicted"] = "the answer is surely six of them"
    rows[1]["text"]["predicted"] = rows[1]["refined"]["predicted"] = "the same"
    page = opened(written(made_run(tmp_path, rows)))
    page.click("[data-kind=all]")
    assert [text.strip() for text in page.texts("mark")] == ["five", "surely six"]
    assert page.texts(".reply .foreign")[0] == "the answer is five of them"


def test_differences_of_long_replies_are_bounded(tmp_path: Path, opened: Open) -> None:
    rows = answered_rows(20, free=True)
    for row in rows:
        row["text"]["predicted"] = " ".join(f"a{i}" for i in range(3000))
        row["refined"]["predicted"] = " ".join(f"b{i}" for i in range(3000))
    page = opened(written(made_run(tmp_path, rows)))
    assert len(page.texts(".row")) == 20
    assert page.value("performance.getEntriesByName('rows shown')[0].startTime") < 2_000


def test_long_texts_open_on_demand_and_say_what_is_left_out(tmp_path: Path, opened: Open) -> None:
    text = " ".join(str(i) for i in range(30_000))
    page = opened(written(made_run(tmp_path, answered_rows(40, texts=[text]))))
    page.click("[data-kind=all]")
    before = page.texts(TEXT)[0]
    page.click(".column button")
    after = page.texts(TEXT)[0]
    assert len(before) < 1_200 < 10_000 < len(after)
    shown, _, told = after.partition(" \u2026 ")
    assert text.startswith(shown)
    left = f"{len(text) - len(shown):,} more characters in line 1 of predictions.jsonl"
    assert told == left


def test_ten_thousand_rows_show_the_first_within_two_seconds(tmp_path: Path, opened: Open) -> None:
    text = "A film that goes on and on, with \u00e9motions and <b>more</b>. " * 40
    html = written(made_run(tmp_path, answered_rows(10_000, texts=[text])))
    assert len(html.encode()) <= 20_000_000
    page = opened(html)
    assert len(page.texts(".row")) == 20
    first = page.value("performance.getEntriesByName('rows shown')[0].startTime")
    assert 0 < first < FIRST_ROWS_WITHIN


# -- hostile text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [PHONE, 1200])
def test_hostile_text_is_text(hostile: Path, opened: Open, width: int) -> None:
    page = opened(written(hostile, HOSTILE["script"]), width=width)
    page.click("[data-kind=all]")
    assert page.requests == []
    assert page.complaints == []
    assert page.value("typeof window.hacked") == "undefined"
    assert page.value("document.querySelectorAll('img, iframe, object, embed, form').length") == 0
    assert page.value("document.querySelectorAll('script').length") == 2
    shown = "\n".join(page.texts(".row"))
    for name in ("script", "end of data", "comment", "image", "attribute", "template", "math"):
        assert HOSTILE[name] in shown, name
    assert "\\u202eright to left\\u2066 \u05e9" in shown
    assert "a\\x00b\\x1b[31mred\\x07\\x7f\\u2028line\\u2029end\\ufeff" in shown
    assert "half \\ud800 and \\udfff" in shown
    assert HOSTILE["emoji"] in shown
    assert page.texts("h1") == [HOSTILE["script"]]


@pytest.mark.parametrize("width", [PHONE, 768, 1200])
def test_nothing_is_wider_than_the_window(hostile: Path, opened: Open, width: int) -> None:
    for html in (written(hostile), comparison_page(*_hostile_comparison())):
        page = opened(html, width=width)
        if page.value("!!document.querySelector('[data-kind]')"):
            page.click("[data-kind=all]")
        page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.value("document.documentElement.scrollWidth") <= width


def test_right_to_left_text_turns_only_itself(tmp_path: Path, opened: Open) -> None:
    rows = answered_rows(4, texts=["\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd 12 !"])
    for row in rows:
        row["source"] = row["answer"] = "\u05e9\u05dc\u05d5\u05dd 1"
    page = opened(written(made_run(tmp_path, rows)))
    page.click("[data-kind=all]")
    assert page.value("getComputedStyle(document.querySelector('.row')).direction") == "ltr"
    foreign = f"document.querySelector('{TEXT}')"
    assert page.value(f"getComputedStyle({foreign}).direction") == "rtl"
    # The badge, the source and the answer stand in this order from left to right.
    lefts = page.value(
        "[...document.querySelector('.row header').children]"
        ".map(e => e.getBoundingClientRect().left)"
    )
    assert lefts == sorted(lefts)


# -- comparisons, and what a keyboard and a screen reader meet -------------------------------------


def test_the_page_of_a_comparison(tmp_path: Path, opened: Open) -> None:
    results = read_comparison(made_comparison(tmp_path))
    assert results is not None
    rows = compared_rows(tmp_path, [])
    page = opened(comparison_page(results, "sst2", rows), width=PHONE)
    assert page.complaints == []
    assert page.requests == []
    assert page.value("document.querySelectorAll('svg.figure').length") == 2
    shown = page.value(
        "[...document.querySelectorAll('tr[data-method]')].map("
        "row => [row.dataset.method, Number(row.querySelector('data').value)])"
    )
    accuracies = {entry["method"]: entry["accuracy"] for entry in results["methods"]}
    assert dict(shown) == accuracies
    assert page.texts("main > section h2")[0] == "Verdict"
    assert page.texts("[aria-pressed=true]")[0].startswith("disagree ")
    assert len(page.texts(".row")) > 10
    assert len(page.texts(".row:first-child .reply")) == len(accuracies)
    page.click("[data-kind=fixed]")
    assert set(page.texts(".badge")) == {"fixed by embedgrad"}
    assert "peft-cpt skipped: the package peft is missing" in page.texts("#notes li")


def test_everything_has_a_name_and_a_place(ordinary: Path, opened: Open) -> None:
    page = opened(written(ordinary))
    levels = [int(tag[1]) for tag in page.value("[...document.querySelectorAll('h1, h2, h3')]"
                                                ".map(e => e.tagName)")]  # fmt: skip
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = page.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    for role in ("image", "button", "searchbox", "region", "table", "list", "heading"):
        nodes = [node for node in tree if node.get("role", {}).get("value") == role]
        assert nodes, role
        if role != "table":  # they stand in what names them
            assert all(node.get("name", {}).get("value") for node in nodes), role


def test_without_scripts_a_page_says_where_the_rows_are(ordinary: Path, opened: Open) -> None:
    html = written(ordinary)
    page = opened(html.replace("<script>", "<script type='off'>"))
    assert "predictions.jsonl" in page.texts("noscript")[0]
    assert page.value("document.getElementById('controls').hidden") is True


def _hostile_comparison() -> tuple[dict[str, Any], str, list[tuple[int, dict[str, Any]]]]:
    from made_runs import compared_rows, made_results

    results = made_results()
    for entry, text in zip(results["methods"][1:], HOSTILE.values(), strict=False):
        for row in results["rows"]:
            if row["method"] == entry["method"]:
                row["method"] = text
        entry["method"] = text
    results["model"] = dict(HOSTILE)
    rows = compared_rows(20, free=True)
    for row, text in zip(rows, HOSTILE.values(), strict=False):
        row["columns"][text] = row["source"] = text
        for answer in row["answers"]:
            answer["method"] = answer["predicted"] = text
    return results, "W" * 400, list(enumerate(rows, 1))
