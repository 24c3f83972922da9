"""Write the generated parts of the docs, or say with --check which of them are stale.

    python docs/generate.py [--check]

    docs/cli.md      the help of every verb
    docs/parts.md    every setting and every part that a recipe may name
    docs/gains.svg   the README's picture of measured gains
    docs/elicit.svg  what there was to elicit against what was gained
    docs/quality.svg the picture of training time to a dev score
    docs/few-rows.svg the picture of accuracy by training rows
    docs/gallery-*.svg a figure for each task of docs/gallery.md
    src/embedgrad/cli/completion.txt    kinds and settings that the shell completes
    <!-- generated: NAME --> ... <!-- end -->    in README.md and docs/*.md, by REGIONS

Measured numbers come from `benchmarks/results/*.json` and from nowhere else.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import elicited
import few_rows
import gains
import gallery
import measured
import quality
import related
import served
import speeds
import tomli_w
from typer.testing import CliRunner

import embedgrad
from embedgrad import errors
from embedgrad.cli import app
from embedgrad.inference.policy import PolicySettings
from embedgrad.parts.registry import LISTS, options_of
from embedgrad.recipe.catalog import catalog

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->)", re.S)
WIDTH = 80  # columns of the help pages
HEADER = (
    "Written by `docs/generate.py` from the program itself: change the program, not this page.\n"
)
COMPLETION = (
    "`--install-completion` lets the shell complete commands, options and values: a "
    "destination\nof `--to`, a method of `--methods`, a setting of `--set`, a kind of `parts`. It "
    "works in bash, zsh, fish\nand PowerShell, from the next shell on.\n"
)
PLACES = {
    "augmentations": 'a list, applied in order: `augmentations = [{ name = "masked_thought" }]`',
    "transforms": 'a list, applied in order: `transforms = [{ name = "clip" }]`',
    "scorer": 'in `[evaluation]`: `scorer = { name = "exact" }`',
}
WORDS = ("required", "unset")  # instead of a default


def main() -> None:
    """Write what changed; with --check write nothing and exit with 1 if anything would change."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name stale files")
    check = parser.parse_args().check
    stale = stale_files(ROOT)
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'stale; run `make docs`' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if check and stale else 0)


def stale_files(root: Path) -> dict[Path, str]:
    """Every file whose generated text is out of date, with its current text."""
    pages = {root / "docs" / "cli.md": cli_page(), root / "docs" / "parts.md": parts_page()}
    completion = root / "src" / "embedgrad" / "cli" / "completion.txt"
    if completion.parent.is_dir():
        pages[completion] = completed()
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path not in pages:
            up = "" if path.parent == root else "../"
            pages[path] = filled(path.read_text(encoding="utf-8"), path, root, up)
    for drawn in (gains, elicited, quality, few_rows):
        picture = drawn.drawing(root)
        if picture is not None:
            pages[root / drawn.PLACE] = picture
    pages |= gallery.drawings(root)
    return {
        path: text
        for path, text in pages.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def filled(text: str, path: Path, root: Path, up: str) -> str:
    """The text with every region written again; `up` leads from its folder to the root."""
    found = REGION.findall(text)
    if len(found) != text.count("<!-- generated:") or len(found) != text.count("<!-- end -->"):
        sys.exit(f"{path}: a generated region lacks its start or its end")

    def made(match: re.Match[str]) -> str:
        name, _, argument = match[2].partition(" ")
        if name not in REGIONS:
            sys.exit(f"{path}: unknown region {name!r}; known: {', '.join(REGIONS)}")
        return f"{match[1]}\n{REGIONS[name](root, up, argument).strip()}\n\n{match[4]}"

    return REGION.sub(made, text)


# -- pages -----------------------------------------------------------------------------------------


def command_name(command: Any) -> str:
    """The name of a command: its own, or its function's."""
    return str(command.name or command.callback.__name__)


def cli_page() -> str:
    """The help of the program and of every verb."""
    runner, verbs = CliRunner(), [command_name(command) for command in app.registered_commands]
    parts = ["# Command line\n", HEADER, COMPLETION]
    for verb in ("", *verbs):
        shown = runner.invoke(
            app, [*verb.split(), "--help"], prog_name="embedgrad", terminal_width=WIDTH, color=False
        )
        assert shown.exit_code == 0, shown.output
        lines = [line.rstrip() for line in shown.output.strip().splitlines()]
        parts.append(f"## {f'embedgrad {verb}'.strip()}\n")
        parts.append("\n".join(["```text", *lines, "```", ""]))
    return "\n".join(parts)


def completed() -> str:
    """Kinds, then settings with their "=", and parts as values, a line each."""
    found: set[str] = set()
    for name, entry in catalog().items():
        if name in LISTS:
            continue
        section = "evaluation.scorer" if name == "scorer" else name
        parts = entry.get("parts", {})
        found |= {f"{section}.name={part}" for part in parts}
        for owner in (entry, *parts.values()):
            found |= {f"{section}.{option['name']}=" for option in owner.get("options", ())}
    return "".join(f"{line}\n" for line in (*catalog(), *sorted(found)))


def parts_page() -> str:
    """Every setting of every section, then every part by kind."""
    parts = ["# Settings and parts\n", HEADER]
    parts.append("`embedgrad parts` prints the same; [recipes.md](recipes.md) explains it.\n")
    for name, entry in catalog().items():
        if "parts" not in entry:
            parts += [f"## [{name}]\n", f"{entry['summary']}\n", _options(entry["options"])]
            continue
        default = entry["default"]
        place = PLACES.get(name, f'`{name} = {{ name = "{default}" }}`')
        default = "none" if default is None else f"`{default}`"
        which = "Any" if name in LISTS else "One"
        choice = f"{which} of the following, {place}; the default is {default}.\n"
        parts += [f"## {name}\n", choice if entry["parts"] else "None in this version.\n"]
        for part, described in entry["parts"].items():
            parts += [f"### {part}\n", f"{described['summary']}\n", _options(described["options"])]
    return "\n".join(part for part in parts if part)


def _options(options: list[dict[str, str]]) -> str:
    if not options:
        return ""
    lines = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for option in options:
        default = option["default"] if option["default"] in WORDS else f"`{option['default']}`"
        cells = (f"`{option['name']}`", f"`{option['type']}`", default, option["help"])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


# -- regions ---------------------------------------------------------------------------------------


def defaults(section: str) -> str:
    """A section's defaults as TOML; required and unset options are comments."""
    (entry,) = catalog(section).values()
    options = entry["options"] if "parts" not in entry else []
    lines = [f"[{section}]"]
    for option in options:
        if option["default"] in WORDS:
            lines.append(f"# {option['name']}: {option['default']}")
        else:
            value = {option["name"]: json.loads(option["default"])}
            lines.append(_toml(value))
    return "\n".join(["```toml", *lines, "```"])


def policy_options() -> str:
    """The settings of a policy's file."""
    rows = [("setting", "default", "what it says")]
    for option in options_of(PolicySettings):
        rows.append((f"`{option.name}`", f"`{option.default}`", option.help))
    return measured.markdown(rows)


def _toml(value: Mapping[str, Any]) -> str:
    (name, held), *_ = value.items()
    return f"{name} = {{}}" if held == {} else tomli_w.dumps(value).strip()


def file(root: Path, name: str) -> str:
    """A file of the repository, whole."""
    kind = Path(name).suffix.removeprefix(".")
    return f"```{kind}\n{(root / name).read_text(encoding='utf-8').strip()}\n```"


def error_tree() -> str:
    """The drawing at the top of errors.py."""
    drawing = inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]
    return f"```text\n{inspect.cleandoc(drawing)}\n```"


def public_names() -> str:
    """Every public name with the first line of its docstring."""
    lines = ["| name | what it is |", "| --- | --- |"]
    for name in embedgrad.__all__:
        summary = (inspect.getdoc(getattr(embedgrad, name)) or "").partition("\n")[0]
        lines.append(f"| `{name}` | {summary} |")
    return "\n".join(lines)


def tree(root: Path) -> str:
    """Every file of the package; rooms in the order in which they may import each other."""
    return _drawing(
        "src/embedgrad/", entries=list(_tree(root / "src" / "embedgrad", _order(root), ""))
    )


def rooms(root: Path) -> str:
    """A line for each room, in the order in which they may import each other."""
    package = root / "src" / "embedgrad"
    folders = [package / name for name in _order(root) if (package / name).is_dir()]
    return _drawing(entries=[(f"{path.name}/", _about(path / "__init__.py")) for path in folders])


def _drawing(*top: str, entries: list[tuple[str, str]]) -> str:
    width = max(len(drawn) for drawn, _ in entries)
    lines = [f"{drawn:{width}}  {about}" for drawn, about in entries]
    return "\n".join(["```text", *top, *lines, "```"])


def _tree(folder: Path, order: list[str], indent: str) -> Iterator[tuple[str, str]]:
    def place(path: Path) -> tuple[int, str]:
        return order.index(path.stem) if path.stem in order else len(order), path.name

    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    entries = sorted([*files, *(init.parent for init in folder.glob("*/__init__.py"))], key=place)
    for path in entries:
        last = path == entries[-1]
        drawn = f"{indent}{'└── ' if last else '├── '}{path.name}"
        if path.suffix == ".py":
            yield drawn, _about(path)
        else:
            # The docstring of __init__.py describes its folder.
            yield f"{drawn}/", _about(path / "__init__.py")
            yield from _tree(path, ["base"], indent + ("    " if last else "│   "))


def _order(root: Path) -> list[str]:
    """ORDER of the test that enforces it."""
    code = (root / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            return re.findall(r"'(\w+)'", ast.unparse(node.value))
    raise AssertionError("tests/test_architecture.py holds no ORDER")


def _about(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


REGIONS: dict[str, Callable[[Path, str, str], str]] = {
    "results": lambda root, up, _: measured.main_table(root, up),
    "objective": lambda root, up, _: measured.objectives(root, up),
    "fairness": lambda root, up, _: related.fairness(root, up),
    "triage": lambda root, up, _: related.triage(root, up),
    "compress": lambda root, up, _: measured.compressed(root, up),
    "tasks": lambda root, up, _: related.tasks(root, up),
    "continual": lambda root, up, _: related.continual(root, up),
    "vision": lambda root, up, _: related.vision(root, up),
    "part-cost": lambda root, up, _: related.part_cost(root, up),
    "masked-thought": lambda root, up, _: related.masked_thought(root, up),
    "clean": lambda root, up, _: related.clean(root, up),
    "context": lambda root, up, _: related.context(root, up),
    "policy": lambda root, up, _: related.policy(root, up),
    "policy-options": lambda _root, _up, _: policy_options(),
    "large-batch": lambda root, up, _: related.large_batch(root, up),
    "curves": lambda root, up, _: measured.curves(root, up),
    "models": lambda root, up, _: measured.models(root, up),
    "spans": lambda root, up, _: measured.spans(root, up),
    "elicited": lambda root, up, _: elicited.table(root, up),
    "planned": lambda root, up, _: measured.planned(root, up),
    "serving": lambda root, up, _: served.cost(root, up),
    "parity": lambda root, up, _: served.parity(root, up),
    "compared": lambda root, up, _: measured.compared(root, up),
    "compared-short": lambda root, up, _: measured.compared_short(root, up),
    "quality": lambda root, _up, _: quality.table(root),
    "few-rows": lambda root, _up, _: few_rows.table(root),
    "step-study": lambda root, _up, _: quality.study(root),
    "speed": lambda root, up, _: speeds.summary(root, up),
    "workers": lambda root, up, _: speeds.workers(root, up),
    "speed-rows": lambda root, _up, _: speeds.rows(root),
    "speed-reached": lambda root, _up, _: speeds.reached(root),
    "speed-growth": lambda root, _up, _: speeds.growth(root),
    "demo-output": lambda root, _up, _: measured.demo_output(root),
    "defaults": lambda _root, _up, section: defaults(section),
    "file": lambda root, _up, name: file(root, name),
    "errors": lambda _root, _up, _: error_tree(),
    "names": lambda _root, _up, _: public_names(),
    "tree": lambda root, _up, _: tree(root),
    "rooms": lambda root, _up, _: rooms(root),
}

if __name__ == "__main__":
    main()
