"""A matplotlib figure that notebooks show in light or in dark colors."""

from __future__ import annotations

from typing import final

from matplotlib.figure import Figure

from embedgrad.report.figures.theme import css_variables, inline_svg

OWN = "embedgrad-figure"
RULES = "--sans: sans-serif; background: var(--paper); max-width: 100%; height: auto;"


@final
class NotebookFigure(Figure):
    """Shown as SVG in the reader's colors."""

    def _repr_svg_(self) -> str:
        names = (axes.get_title("left") or axes.get_xlabel() for axes in self.axes)
        titles = "; ".join(filter(None, names))
        svg = inline_svg(self, "notebook", titles or "figure")
        opening, rest = svg.replace('class="figure"', f'class="{OWN}"', 1).split(">", 1)
        space = 'width="512" xmlns="http://www.w3.org/2000/svg"'  # it may stand alone, as an image
        rules = f"<style>{css_variables(f'.{OWN}')}.{OWN} {{ {RULES} }}</style>"
        return f"{opening} {space}>{rules}{rest}"
