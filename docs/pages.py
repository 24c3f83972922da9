"""Lay out the pages of the documentation's site in a folder, for MkDocs.

    python docs/pages.py FOLDER

The pages keep their places, so that their links hold; beside them come a page with the public
names (docs/api.md), the tutorial's notebook as a page (docs/tutorial.md) and llms.txt, the list of
pages for language models.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import embedgrad

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *(
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "docs/*.md",
        "docs/*.svg",
    ),
    *("benchmarks/LOG.md", "benchmarks/results/*.json", "recipes/*.toml"),
)


def lay_out(folder: Path) -> None:
    """Copy the pages into `folder`, which is emptied first, and write those that are made."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            to = folder / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    (folder / "docs" / "api.md").write_text(api(), encoding="utf-8")
    (folder / "docs" / "tutorial.md").write_text(tutorial(), encoding="utf-8")
    for path in folder.rglob("*.md"):
        text = path.read_text("utf-8")
        path.write_text(re.sub(r"\((\.\./|)tutorial\.ipynb\)", _to_tutorial, text), "utf-8")
    pages = sorted(folder.rglob("*.md"))
    (folder / "llms.txt").write_text(llms(folder, pages), encoding="utf-8")


def api() -> str:
    """A page with every public name and its docstring."""
    named = (f"\n::: embedgrad.{name}\n" for name in embedgrad.__all__)
    return "".join(["# Public names\n\n[From Python](python.md) shows them at work.\n", *named])


def tutorial() -> str:
    """The notebook as Markdown, with what its cells showed."""
    parts = []
    for cell in json.loads((ROOT / "tutorial.ipynb").read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace("](docs/", "]("))
        else:
            parts += [f"```python\n{text}\n```", *map(_output, cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    kinds = output.get("data", {"text/plain": output.get("text", "")})
    shown = ["".join(kinds[kind]) for kind in ("image/svg+xml", "text/html") if kind in kinds]
    text = shown[0] if shown else f"<pre>{escape(''.join(kinds['text/plain']))}</pre>"
    lines = (line for line in text.splitlines() if line.strip())  # a blank one ends HTML
    return "\n".join(['<div class="output" style="overflow-x:auto">', *lines, "</div>"])


def _to_tutorial(link: re.Match[str]) -> str:
    return "(tutorial.md)" if link[1] else "(docs/tutorial.md)"


def llms(folder: Path, pages: list[Path]) -> str:
    """The list of pages as https://llmstxt.org has it."""
    lines = ["# embedgrad", "", f"> {embedgrad.__doc__.splitlines()[0]}", "", "## Pages", ""]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
        at = page.relative_to(folder).with_suffix(".html").as_posix()
        lines.append(f"- [{title}]({'index.html' if at == 'README.html' else at})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    lay_out(parser.parse_args().folder)
