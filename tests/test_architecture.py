"""Laws about the code itself: direction of imports, size, safety, what an import costs."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "embedgrad"
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import the rooms before it. A folder is one room; `__init__` shows the public names.
ORDER = (
    "errors",
    "events",
    "statistics",
    "files",
    "versions",
    "tables",
    "markup",
    "examples",
    "duplicates",
    "splits",
    "template",
    "cutting",
    "span",
    "sequence",
    "loading",
    "head_cache",
    "past",
    "attention",
    "readout",
    "last_layer",
    "layout",
    "capabilities",
    "outcome",
    "frozen_model",
    "full_passes",
    "reuse",
    "language_model",
    "decoding",
    "generate",
    "prompt",
    "parameterizations",
    "objectives",
    "gradients",
    "optimizers",
    "state",
    "best",
    "training",
    "artifact",
    "scorers",
    "evaluation",
    "self_written",
    "drift",
    "optimization",
    "report",
    "parts",
    "settings",
    "recipe",
    "storage",
    "preparation",
    "provenance",
    "runs",
    "opened",
    "answer",
    "deployed",
    "walk",
    "exporting",
    "verifying",
    "deployment",
    "serving",
    "methods",
    "comparing",
    "planning",
    "catalog",
    "starter",
    "cli",
    "__main__",
)
LONGEST_FILE = 300
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "__import__"}

# Put together here, so that this file does not hold what it looks for.
FORBIDDEN_TEXT = {
    "a path of one machine": re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(("work", "tmp/x", "root", "home", "Users", "opt")) + r")/\w"
    ),
    "a package index": re.compile(
        "|".join(
            (r"pypi" + r"\.org", "files.python" + "hosted", "index" + "-url", "find" + "-links")
        )
    ),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_parts(path: Path) -> tuple[str, ...]:
    """`("objectives", "table")` for `src/embedgrad/objectives/table.py`; `()` for the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_rooms(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every room that a file imports, at the top or inside a function."""
    package = module_parts(path)
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = ("embedgrad", *package[: len(package) - node.level + 1], *base)
            names = [(*base, alias.name) for alias in node.names]
        for name in names:
            if name[0] == "embedgrad":
                yield node.lineno, name[1] if len(name) > 1 else "embedgrad"


def wrong_imports(code: str, path: Path) -> list[str]:
    room = module_parts(path)[0]
    assert room in ORDER, f"{relative(path)}: give {room} a place in ORDER"
    allowed = ORDER[: ORDER.index(room) + 1]
    return [
        f"{relative(path)}:{line}: {room} imports {other}, which does not stand before it"
        for line, other in imported_rooms(ast.parse(code), path)
        if other not in allowed
    ]


def unsafe_uses(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            used = {alias.name.partition(".")[0] for alias in node.names} & UNSAFE_MODULES
            found += [f"{node.lineno}: import {name}" for name in used]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in UNSAFE_MODULES:
                found.append(f"{node.lineno}: from {module} import")
            if module == "torch" and any(alias.name == "load" for alias in node.names):
                found.append(f"{node.lineno}: torch.load")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append(f"{node.lineno}: torch.load")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS:
                found.append(f"{node.lineno}: {node.func.id}()")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in {"trust_remote_code", "allow_pickle"} and not off:
                    found.append(f"{node.lineno}: {keyword.arg}")
    return found


def in_new_process(code: str) -> object:
    """Run code that prints JSON in a fresh interpreter, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {module_parts(path)[0] for path in FILES if module_parts(path)}
    assert rooms, "no source was found"
    assert rooms <= set(ORDER), f"give {sorted(rooms - set(ORDER))} a place in ORDER"


@pytest.mark.parametrize("path", [path for path in FILES if module_parts(path)], ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("from embedgrad.errors import DataError", False),
        ("from .errors import DataError\nfrom . import template", False),
        ("import embedgrad.cli", True),
        ("from embedgrad import optimize", True),
        ("from embedgrad import Prompt", True),
        ("import embedgrad", True),
        ("from . import recipe", True),
        ("def late():\n    from .optimize import run", True),
        ("import torch\nfrom pathlib import Path", False),
    ],
)
def test_a_wrong_import_is_found(code: str, wrong: bool) -> None:
    assert bool(wrong_imports(code, SOURCE / "sequence.py")) is wrong


def test_relative_imports_inside_a_folder_are_understood() -> None:
    path = SOURCE / "objectives" / "cross_entropy.py"
    assert (
        wrong_imports("from .table import X\nfrom ..prompt import Y\nfrom .. import errors", path)
        == []
    )
    assert len(wrong_imports("from ..optimize import X\nfrom .. import recipe", path)) == 2


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_is_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_loads_code_from_data(path: Path) -> None:
    assert unsafe_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("torch.load(path)", True),
        ("read = torch.load", True),
        ("from torch import load", True),
        ("eval('1')", True),
        ("exec('x = 1')", True),
        ("from_pretrained(name, trust_remote_code=True)", True),
        ("from_pretrained(name, trust_remote_code=trust)", True),
        ("from_pretrained(name, trust_remote_code=False)", False),
        ("numpy.load(path, allow_pickle=True)", True),
        ("model.eval()\nsafetensors.torch.load_file(path)", False),
    ],
)
def test_unsafe_code_is_found(code: str, unsafe: bool) -> None:
    assert bool(unsafe_uses(code)) is unsafe


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("embedgrad", {"torch", "transformers", "pydantic", "rich", "numpy"}),
        ("embedgrad.cli", {"torch", "transformers", "datasets", "pandas"}),
        ("embedgrad.errors", {"torch", "transformers"}),
        ("embedgrad.statistics", {"torch", "transformers"}),
        ("embedgrad.examples", {"torch", "transformers", "datasets", "pyarrow"}),
        ("embedgrad.template", {"torch", "transformers"}),
    ],
)
def test_an_import_stays_light(module: str, heavy: set[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = in_new_process(code)
    assert isinstance(loaded, list)
    assert heavy.isdisjoint(loaded), f"{module} imports {sorted(heavy.intersection(loaded))}"


def test_the_public_names_are_exactly_all() -> None:
    """In a new process, after every name was used: submodules must not show through."""
    shown = in_new_process(
        "import json, embedgrad\n"
        "missing = [name for name in embedgrad.__all__ if not hasattr(embedgrad, name)]\n"
        "print(json.dumps([missing, list(embedgrad.__all__), dir(embedgrad)]))"
    )
    assert isinstance(shown, list)
    missing, public, visible = shown
    assert public, "embedgrad.__all__ is empty"
    assert missing == []
    assert {name for name in visible if not name.startswith("_")} == {
        name for name in public if not name.startswith("_")
    }


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import embedgrad

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = embedgrad.no_such_name


def committed_files() -> list[Path]:
    """Files under version control, and new ones that are not ignored."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_committed_text_names_a_machine() -> None:
    found = []
    for path in committed_files():
        raw = path.read_bytes()
        if b"\0" in raw:
            continue
        for number, line in enumerate(raw.decode("utf-8").splitlines(), start=1):
            found += [
                f"{relative(path)}:{number}: {what}"
                for what, pattern in FORBIDDEN_TEXT.items()
                if pattern.search(line)
            ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("/" + "work/main", True),
        ("see '/" + "home/ann/runs'", True),
        ("https://" + "pypi." + "org/simple", True),
        ("--extra-" + "index" + "-url", True),
        ("runs/demo, src/work/x and ~/work/x", False),
        ("PyPI", False),
    ],
)
def test_machine_names_are_found(text: str, forbidden: bool) -> None:
    assert any(pattern.search(text) for pattern in FORBIDDEN_TEXT.values()) is forbidden
