"""Render a run or comparison as one HTML page, autoescaped.

Whatever text a page shows goes through `readable` and the template engine's escaping; rows are JSON
in an inert script element, which the page's one script puts on the page as text. A policy in the
page itself allows that script, by its digest, and nothing from anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar, final

from embedgrad.errors import EmbedgradError, RunError, border
from embedgrad.formatting import duration, percent, size
from embedgrad.report.expectation import describe
from embedgrad.report.figures import comparison as comparison_figures
from embedgrad.report.figures import run as figures
from embedgrad.report.figures.calibration import calibration, confidences
from embedgrad.report.figures.comparison import TEXT
from embedgrad.report.figures.series import is_number
from embedgrad.report.figures.theme import SIGNS, css_variables, inline_svg
from embedgrad.report.page.facts import (
    describe_classes,
    describe_drift,
    describe_groups,
    describe_learning,
    describe_verdict,
    headline,
    provenance,
    recipe_columns,
    subject,
    without_path,
)
from embedgrad.report.page.predictions import PageRows, comparison_rows, run_rows
from embedgrad.report.page.run_files import RunFiles
from embedgrad.report.page.safe_text import readable, without_home
from embedgrad.report.terminal.tables import verdict_word
from embedgrad.report.terminal.tasks_table import rows_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

T = TypeVar("T")

_TITLES = re.compile(r'<section id="(\w+)" aria-labelledby="[\w-]+">\s*<h2 [^>]*>([^<]*)</h2>')

# What a screen reader says instead of a figure; the numbers are in a table below it.
LABELS = {
    "cost": "Accuracy by training time, method by method",
    "curves": "Training loss and dev score by step",
    "front": "The first objective against the second, trial by trial",
    "history": "Score by trial, and the best score so far",
    "settings": "Score by each setting that was tuned",
    "forest": "Difference to the text prompt with its interval, method by method",
    "reliability": "Accuracy by confidence, for both prompts",
    "continual": "Accuracy on each task after each training",
    "interpolation": "Accuracy and log-loss from the text rows to the refined rows and beyond",
}
# Keys of a comparison's results that are shown elsewhere.
NOT_PROVENANCE = ("rows", "recipe", "methods", "skipped", "failed", "interrupted")
# What reading damaged values raises; anything else is our own mistake.
DAMAGE = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EmbedgradError),
    RecursionError,  # objects in objects in objects
)


@border("the files of the run", RunError)
def run_page(
    run: RunFiles, name: str, notes: Sequence[str] = (), classes: Mapping[str, Any] | None = None
) -> str:
    """The page of a run, with a note for each part that could not be made.

    `classes` are what `evaluation.per_class` finds in its rows.
    """

    def learning() -> dict[str, Any]:
        drawn = draw("curves", figures.curves(run.events))
        return {"learned": describe_learning(run), "drawn": drawn, "word": word}

    def interpolation() -> dict[str, Any]:
        drawn = draw("interpolation", figures.interpolation_figure(run.interpolation))
        return {**run.interpolation, "drawn": drawn, "word": word}

    def reliability() -> dict[str, Any]:
        bins = {name: calibration(confidences(survey, name)) for name in ("text", "refined")}
        return {"bins": bins, "drawn": draw("reliability", figures.reliability(survey))}

    def continual() -> dict[str, Any]:
        drawn = draw("continual", figures.continual_figure(chain))
        return {**chain, "drawn": drawn, "rows": rows_of(chain)}

    def tasks() -> dict[str, Any] | None:
        scored = any("difference" in task for task in run.result.get("tasks", {}).values())
        return run.result if scored else None

    page = Page([*run.notes, *notes])
    chain: dict[str, Any] = run.result.get("continual") or {}
    survey = [row for _, row in run.survey]
    sure = any(row["text"]["probabilities"] for row in survey)
    origin: dict[str, Any] = page.value("provenance", lambda: provenance(run), {})
    facts = {"name": name, "provenance": origin, "test_rows": run.result.get("test_rows")}
    difference = run.result.get("difference")
    word = page.value("verdict", lambda: verdict_word(difference) if difference else "", "")
    top = page.part("run_top", lambda: facts)
    before = run.elicitation
    parts = [
        page.part("elicitation", lambda: {"lines": [*describe(before)]} if before else None),
        page.part("scores", lambda: headline(run)) or page.render("scores", {}),
        page.part("continual", lambda: continual() if chain else None),
        page.part("tasks", tasks),
        page.part("groups", lambda: describe_groups(run.result)),
        page.part("classes", lambda: describe_classes(classes or {})),
        page.part("words", lambda: describe_drift(run)),
        page.part(
            "meaning", lambda: {"replies": r} if (r := run.interpolation.get("replies")) else None
        ),
        '<div class="figures">',
        page.part("learning", lambda: learning() if run.events else None),
        page.part("interpolation", lambda: interpolation() if run.interpolation else None),
        page.part("reliability", lambda: reliability() if sure else None),
        "</div>",
        page.part("provenance", lambda: without_home({"provenance": origin, "recipe": run.recipe})),
    ]
    return page.whole(
        name,
        top,
        parts,
        lambda taken: run_rows(run, recipe_columns(run), taken),
        "changed",
        " prompt",
    )


@border("the files of the comparison", RunError)
def comparison_page(
    results: Mapping[str, Any],
    name: str,
    rows: Sequence[tuple[int, Mapping[str, Any]]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page of a comparison of methods, with a note for each part that is left out.

    `rows` are those of its `predictions.jsonl`, each with its line.
    """
    page = Page([*notes])
    for kind in ("skipped", "failed"):
        for method, reason in results.get(kind, {}).items():
            page.notes.append(f"{method} {kind}: {reason}")
    if results.get("interrupted"):
        page.notes.append(
            f"The comparison was interrupted: of {results.get('planned')} trainings "
            f"{results.get('scored')} are scored. The same command continues it."
        )
    text = [entry for entry in results["methods"] if entry["method"] == TEXT]
    methods = [*text, *comparison_figures.rank_methods(results)]
    facts = without_path({k: v for k, v in results.items() if k not in NOT_PROVENANCE})
    recipe = results.get("recipe")
    parts = [
        page.part("verdict", lambda: describe_verdict(results)),
        '<div class="figures">',
        page.part(
            "differences", lambda: {"drawn": draw("forest", comparison_figures.forest(results))}
        ),
        page.part(
            "cost",
            lambda: {"drawn": draw("cost", comparison_figures.accuracy_against_cost(results))},
        ),
        "</div>",
        page.part("groups", lambda: describe_groups(results)),
        page.part("methods", lambda: {"methods": methods, "seeds": results["rows"]}),
        page.part("provenance", lambda: without_home({"provenance": facts, "recipe": recipe})),
    ]
    top = page.render("comparison_top", {"name": name, "methods": methods})
    about = page.value("subject", lambda: subject(results), TEXT)
    return page.whole(
        name, top, parts, lambda taken: comparison_rows(rows, about, taken), "disagree", ""
    )


@final
class Page:
    """Makes a page part by part; damage costs the part that it is in, and gets a note."""

    def __init__(self, notes: list[str]):
        self.notes = notes

    def value(self, what: str, make: Callable[[], T], otherwise: T) -> T:
        """What `make` returns, or `otherwise` where its sources are damaged."""
        try:
            return make()
        except DAMAGE as error:
            why = str(error) if isinstance(error, EmbedgradError) else f"damaged: {error!r}"
            self.notes.append(f"Left out: {what} ({why}).")
            return otherwise

    def part(self, name: str, values: Callable[[], Mapping[str, Any] | None]) -> str:
        """A part of the page with these values; nothing where there are none."""

        def make() -> str:
            variables = values()
            return "" if variables is None else self.render(name, variables)

        return self.value(name, make, "")

    def render(self, name: str, values: Mapping[str, Any]) -> str:
        """A part's HTML."""
        part: str = environment().get_template(f"parts/{name}.html").render(values)
        return part

    def whole(
        self,
        name: str,
        top: str,
        parts: list[str],
        make: Callable[[int], PageRows | None],
        first: str,
        suffix: str,
    ) -> str:
        """The page with rows before its last part, and the one script that its policy allows.

        `make` gets the bytes that the other parts take. Rows of the kind `first` are shown at
        first; `suffix` follows the name of an answer's giver.
        """
        taken = sum(len(part.encode()) for part in parts)
        rows = self.value("rows", lambda: make(taken), None)
        if rows:
            self.notes += rows.notes
            shown = {"rows": rows, "first": first, "suffix": suffix}
            parts.insert(-1, self.part("answers", lambda: shown))
        script, main = asset("shared.js") + asset("page.js"), "\n".join(filter(None, parts))
        values = {
            "name": name,
            "top": top,
            "parts": main,
            "contents": _TITLES.findall(main),
            "data": rows.json if rows else "",
            "notes": self.notes,
            "script": script,
            "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "css": css_variables() + asset("page.css"),
        }
        page: str = environment().get_template("page.html").render(values)
        return page


def draw(name: str, figure: Figure) -> str:
    """A figure as an element of the page, with its label."""
    return inline_svg(figure, name, LABELS[name])


def asset(name: str) -> str:
    """The text of a file in `report/assets`."""
    return files("embedgrad.report").joinpath("assets", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates in `report/assets`, autoescaped, with texts made `readable`."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    def make_readable(value: Any) -> Any:
        """Escape every text that no template calls safe."""
        foreign = isinstance(value, str) and not hasattr(value, "__html__")
        return readable(value) if foreign else value

    def decimal(value: object, digits: int = 3) -> str:
        return f"{value:.{digits}f}" if is_number(value) else "-"

    environment = Environment(
        loader=PackageLoader("embedgrad.report", "assets"),
        autoescape=True,
        finalize=make_readable,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: percent(share) if is_number(share) else "-",
        points=lambda share: f"{100 * share:+.1f}" if is_number(share) else "-",
        decimal=decimal,
        duration=lambda seconds: duration(seconds) if is_number(seconds) else "-",
        size=lambda count: size(count) if is_number(count) else "-",
        chance=lambda p: "< 0.001" if is_number(p) and p < 0.001 else decimal(p),
        count=lambda value: f"{value:,}" if is_number(value) else "-",
        interval=lambda edges: (
            " to ".join(decimal(100 * edge, 1) for edge in edges) if edges else "-"
        ),
        sign=lambda word: SIGNS.get(word, ""),
        verdict_word=verdict_word,
        kind=lambda word: word if word in ("improved", "worse") else "none",
    )
    return environment
