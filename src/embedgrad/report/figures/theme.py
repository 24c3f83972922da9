"""Colors and fonts shared by pages and figures."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name: (light, dark). The light ones differ from each other, as figures are drawn in them and every
# color is then replaced by its variable. Text has a contrast of at least 4.5 to the paper. Green
# and red mean right and wrong, better and worse, and nothing else; a sign stands beside them.
COLORS = {
    "paper": ("#fdfdfb", "#15161a"),
    "panel": ("#f4f3ee", "#1d1f24"),
    "ink": ("#1f2024", "#ecebe6"),
    "muted": ("#5f616b", "#a0a2ab"),
    "line": ("#dcdad2", "#34363e"),
    "text": ("#565e70", "#b3bac9"),
    "refined": ("#1d55c4", "#8fb6ff"),
    "right": ("#0b7564", "#58cdb5"),
    "wrong": ("#b8391f", "#ff9075"),
    "heat": ("#e8842f", "#d9772a"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}
DPI = 220  # of a PNG
UNIT = 1 / 72  # inches: figures are laid out in SVG's own units, which a page shows as pixels

NO_GAIN = "no reliable gain"
SIGNS = {"improved": "\u25b2", "worse": "\u25bc", NO_GAIN: "\u2248"}  # of verdicts
MARKERS = {"text": "s", "refined": "o"}  # a prompt's shape, for who cannot tell its color

_INKS = {
    "text.color": "ink",
    "figure.facecolor": "paper",
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "muted"),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), "line"),
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_COLOR = re.compile(r"#[0-9a-f]{6}")


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures as a page shows them, without the user's own settings."""
    import matplotlib.style

    form = files("embedgrad.report") / "assets" / "figure.mplstyle"
    inks = {name: LIGHT[ink] for name, ink in _INKS.items()}
    with matplotlib.style.context(["default", str(form), inks]), warnings.catch_warnings():
        # A script that the font lacks: browsers have it, and boxes in a PNG harm nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in SVG units; inside `style()`."""
    from embedgrad.report.figures.notebook import NotebookFigure

    return NotebookFigure(figsize=(width * UNIT, height * UNIT), layout="constrained")


def image(figure: Figure, form: str) -> bytes:
    """A figure as a file of its own: "png" or "svg", in light colors on paper."""
    content = io.BytesIO()
    metadata = _NO_METADATA if form == "svg" else {"Software": None}
    with style():
        figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
    return content.getvalue()


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an element of a page that follows the page's colors and type.

    `name` keeps the ids of one figure apart from another's; `label` is what a screen reader says.
    """
    import matplotlib

    content = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata=_NO_METADATA, facecolor="none")
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', opening)
    assert box is not None
    # Rules of its own would hold for the whole page, and so would the names of its groups.
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = rest.replace("xlink:href", "href")
    # Weight and slant may stay; the family is the page's.
    rest = re.sub(r"font-family: [^;\"]*;?", "", rest)
    rest = re.sub(r"(font: [^;\"]*?px)[^;\"]*", r"\1 var(--sans)", rest)
    rest = _COLOR.sub(lambda m: _VARIABLES.get(m[0], m[0]), rest)
    return f'<svg class="figure" {box[0]} role="img" aria-label="{html.escape(label)}">{rest}'


_VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}


def css_variables(of: str = ":root") -> str:
    """The colors as custom properties of `of`: light, and dark where the reader prefers it."""

    def block(index: int) -> str:
        return " ".join(f"--{name}: {pair[index]};" for name, pair in COLORS.items())

    dark = f"@media (prefers-color-scheme: dark) {{ {of} {{ {block(1)} }} }}"
    return f"{of} {{ {block(0)} }}\n{dark}\n"
