"""The page of `embedgrad play`: its files, served from one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.report.figures.theme import css_variables
from embedgrad.report.page.page import asset, environment
from embedgrad.report.page.safe_text import script_json


def play_page(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Content and media type by name; "" is the page itself, about these runs."""
    html: str = environment().get_template("play.html").render(runs=runs, data=script_json(runs))
    return {
        "": (html, "text/html"),
        "play.css": (css_variables() + asset("page.css") + asset("play.css"), "text/css"),
        "play.js": (asset("shared.js") + asset("play.js"), "text/javascript"),
        "icon.svg": (asset("icon.svg"), "image/svg+xml"),
    }
