"""Laws about the code itself: rooms and the direction of imports, size, safety, import cost."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from class_laws import broken_laws

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "embedgrad"
FILES = sorted(SOURCE.rglob("*.py"))

# Bottom to top: a room imports only rooms before it. `__init__` shows the public names.
ORDER = (
    "errors",
    "events",
    "environment",
    "formatting",
    "atomic_files",
    "data",
    "prompt",
    "report",
    "model",
    "parts",
    "evaluation",
    "training",
    "recipe",
    "inference",
    "deploy",
    "experiments",
    "cli",
    "__main__",
)
LONGEST_FILE = 400
MOST_LEVELS = 12
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
    """`("data", "splits")` for `src/embedgrad/data/splits.py`; `()` for the package."""
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


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that its files import."""
    found: dict[str, set[str]] = {room: set() for room in ORDER}
    for path in FILES:
        if module_parts(path):
            room = module_parts(path)[0]
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[room] |= {other for _, other in imported_rooms(tree, path)} - {room}
    return found


def levels(rooms: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms lie below each on the longest way down, itself counted; for `ORDER` alone."""
    level: dict[str, int] = {}
    for room in ORDER:
        level[room] = 1 + max((level[other] for other in rooms[room]), default=0)
    return level


def test_the_rooms_are_those_of_the_order(record_property: Callable[[str, object], None]) -> None:
    rooms = {module_parts(path)[0] for path in FILES if module_parts(path)}
    assert rooms == set(ORDER)
    assert len(ORDER) == len(set(ORDER)) == 18
    found = arrows()
    back = [
        f"{room} -> {other}"
        for room, others in found.items()
        for other in others
        if other not in ORDER[: ORDER.index(room)]
    ]
    assert back == [], "a room imports one that is not before it"
    level = levels(found)
    count = sum(map(len, found.values()))
    house = f"{len(found)} rooms on {max(level.values())} levels, {count} arrows, 0 back"
    record_property("summary", house)  # shown at the end of the run: see conftest.py
    assert max(level.values()) <= MOST_LEVELS, level


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_keeps_the_laws(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert not module_parts(path) or wrong_imports(code, path) == []
    assert unsafe_uses(code) == []
    lines = len(code.splitlines())
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines; a file is one idea"


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("from embedgrad.errors import DataError", False),
        ("from .sequence import Target\nfrom . import template", False),
        ("from ..data import examples\nfrom .. import errors", False),
        ("from ..training.loop import optimize\nfrom .. import recipe", True),
        ("import embedgrad.cli", True),
        ("from embedgrad import optimize", True),
        ("import embedgrad", True),
        ("def late():\n    from embedgrad.model import packing", True),
        ("import torch\nfrom pathlib import Path", False),
    ],
)
def test_a_wrong_import_is_found(code: str, wrong: bool) -> None:
    assert bool(wrong_imports(code, SOURCE / "prompt" / "span.py")) is wrong


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


def test_a_class_is_abstract_or_final() -> None:
    codes = {
        ".".join(("embedgrad", *module_parts(path))): path.read_text(encoding="utf-8")
        for path in FILES
    }
    assert broken_laws(codes) == []


FINAL = "from typing import final\n"
ABSTRACT = (
    "from abc import ABC, abstractmethod\n"
    "class Part(ABC):\n    @abstractmethod\n    def use(self): ...\n"
)


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        ("class A: ...", ["A: nothing inherits from it, so it must be @final"]),
        (FINAL + "@final\nclass A: ...", []),
        ("import typing\n@typing.final\nclass A: ...", []),
        (
            FINAL + "class A: ...\n@final\nclass B(A): ...",
            ["A: is inherited from, so it must be abstract"],
        ),
        (ABSTRACT + FINAL + "@final\nclass B(Part):\n    def use(self): ...", []),
        (ABSTRACT, []),  # without a subclass yet
        (
            ABSTRACT.replace("class", FINAL + "@final\nclass"),
            ["Part: is abstract, so it cannot be final"],
        ),
        (  # what is in the middle is abstract as long as a method is missing
            ABSTRACT + FINAL + "class B(Part):\n    x = 1\n"
            "@final\nclass C(B):\n    def use(self): ...",
            [],
        ),
        (
            ABSTRACT + FINAL + "class B(Part):\n    def use(self): ...\n@final\nclass C(B): ...",
            ["B: is inherited from, so it must be abstract"],
        ),
        (  # a class in another file, by way of a third
            FINAL + "from other import Whole\n@final\nclass B(Whole): ...",
            [
                "other.far.Whole: is inherited from, so it must be abstract",
                "other.far.Whole: is inherited from, so it cannot be final",
            ],
        ),
        (FINAL + "class E(Exception): ...\n@final\nclass F(E): ...\nraise F", []),
        (
            FINAL + "class E(Exception): ...\n@final\nclass F(E): ...\nraise E('why')",
            ["E: is inherited from, so it must be abstract"],
        ),
        ("from typing import Protocol\nclass P(Protocol):\n    x: int", []),
        (
            "def make():\n    class Local: ...",
            ["make.Local: nothing inherits from it, so it must be @final"],
        ),
    ],
)
def test_a_class_that_is_neither_is_found(code: str, broken: list[str]) -> None:
    far = ABSTRACT + FINAL + "@final\nclass Whole(Part):\n    def use(self): ...\n"
    found = broken_laws({"m": code, "other": "from other.far import Whole", "other.far": far})
    assert [line.removeprefix("m.") for line in found] == broken


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("embedgrad", {"torch", "transformers", "pydantic", "rich", "numpy"}),
        ("embedgrad.cli", {"torch", "transformers", "datasets", "pandas"}),
        ("embedgrad.errors", {"torch", "transformers"}),
        ("embedgrad.evaluation.significance", {"torch", "transformers"}),
        ("embedgrad.data.examples", {"torch", "transformers", "datasets", "pyarrow"}),
        ("embedgrad.prompt.template", {"torch", "transformers"}),
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
