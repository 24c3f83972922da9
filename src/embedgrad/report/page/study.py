"""The page of a study of `embedgrad tune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.data.bounded_reads import read_json
from embedgrad.errors import RunError, border
from embedgrad.report.figures.study import FIGURES_OF_STUDIES
from embedgrad.report.page.page import DAMAGE, Page, draw

TRIALS = "trials.json"


def read_study(folder: Path) -> dict[str, Any] | None:
    """The content of a study's `trials.json`; None where a folder holds none. Raises `RunError`."""
    if not (folder / TRIALS).is_file():
        return None
    try:
        values: dict[str, Any] = read_json(folder / TRIALS)
        for trial in values["trials"]:
            _ = trial["trial"] + 1, trial["pruned"], trial["values"].items()
        _ = values["objectives"][0], values["lower"], values["settings"].items()
    except (OSError, *DAMAGE) as error:
        why = f"{folder / TRIALS}: is no file of `embedgrad tune` ({error}); run it again"
        raise RunError(why) from error
    return values


@border("the files of the study", RunError)
def study_page(study: Mapping[str, Any], name: str) -> str:
    """The page of a study: how its trials went, what each setting did, and all of them."""
    page = Page([])
    several = len(study["objectives"]) > 1

    def figure(which: str) -> str:
        make = FIGURES_OF_STUDIES[which]
        return page.part(f"study_{which}", lambda: {"drawn": draw(which, make(study))})

    parts = [
        '<div class="figures">',
        figure("history"),
        figure("front") if several else "",
        figure("settings"),
        "</div>",
        page.part("study_trials", lambda: study),
    ]
    top = page.render("study_top", {**study, "name": name})
    return page.whole(name, top, parts, lambda taken: None, "", "")
