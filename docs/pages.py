"""Lay out the pages of the documentation's site in a folder, for MkDocs.

    python docs/pages.py FOLDER

The pages keep their places, so that their links hold; beside them come a page with the public names
(docs/api.md) and llms.txt, the list of pages for language models.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

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
    pages = sorted(folder.rglob("*.md"))
    (folder / "llms.txt").write_text(llms(folder, pages), encoding="utf-8")


def api() -> str:
    """A page with every public name and its docstring."""
    named = (f"\n::: embedgrad.{name}\n" for name in embedgrad.__all__)
    return "".join(["# Public names\n\n[From Python](python.md) shows them at work.\n", *named])


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
