"""What functions return has the keys and types that their annotations promise."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pytest

import embedgrad as eg
from embedgrad.experiments.interpolation import InterpolationResult, interpolate

pytest_plugins = ["tiny_runs"]


def differences(value: object, kind: Any, where: str = "result") -> list[str]:
    """Where a value is not of a type: a line each."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return []
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no dict"]
        hints = get_type_hints(kind, include_extras=True)
        needed = {
            name
            for name, hint in hints.items()
            if get_origin(hint) is Required
            or (kind.__total__ and get_origin(hint) is not NotRequired)
        }
        wrong = [f"{where}: no {name}" for name in needed - value.keys()]
        wrong += [f"{where}: unknown {name}" for name in value.keys() - hints.keys()]
        for name, hint in get_type_hints(kind).items():
            if name in value:
                wrong += differences(value[name], hint, f"{where}.{name}")
        return wrong
    if origin in (Union, types.UnionType):
        tried = [differences(value, one, where) for one in inner]
        return [] if [] in tried else tried[0]
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no dict"]
        return [d for k, v in value.items() for d in differences(v, inner[1], f"{where}[{k!r}]")]
    if origin in (list, Sequence):
        if not isinstance(value, list | tuple):
            return [f"{where}: {value!r} is no list"]
        return [d for v in value for d in differences(v, inner[0], f"{where}[]")]
    fits = isinstance(value, int | float if kind is float else kind)
    return [] if fits else [f"{where}: {value!r} is no {kind}"]


@pytest.fixture
def returned(
    finished: tuple[Path, Any], recipe: Callable[..., Path], tmp_path: Path
) -> Callable[[str], Any]:
    run, out = finished[0], tmp_path / "out"
    calls: dict[str, Callable[[eg.Recipe], Any]] = {
        "run": lambda made: eg.run(made, out),
        "run without test rows": lambda made: eg.run(made, out, should_stop=lambda: True),
        "compare": lambda made: eg.compare(made, out),
        "plan": lambda made: eg.plan(made),
        "plan without a measurement": lambda made: eg.plan(made, measure=False),
        "export": lambda made: eg.export(run, "safetensors", out),
        "verify": lambda made: eg.verify(
            eg.export(run, "safetensors", out, verify=False)["folder"]
        ),
        "interpolate": lambda made: interpolate(run, 3),
    }
    settings = ["compare.methods=['text', 'embedgrad']", "compare.seeds=[0]"]
    return lambda name: calls[name](eg.Recipe.read(recipe(), settings))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run", eg.RunResult),
        ("run without test rows", eg.RunResult),
        ("compare", eg.CompareResult),
        ("plan", eg.PlanResult),
        ("plan without a measurement", eg.PlanResult),
        ("export", eg.ExportResult),
        ("verify", eg.CheckResult),
        ("interpolate", InterpolationResult),
    ],
)
def test_a_result_is_of_its_type(name: str, kind: Any, returned: Callable[[str], Any]) -> None:
    assert differences(returned(name), kind) == []


def test_the_check_itself_finds_what_is_wrong() -> None:
    right = {"steps": 1, "best_step": 0, "seconds": 1.0, "ended": "finished"}
    kind = get_type_hints(eg.RunResult)["train"]
    assert differences(right, kind) == []
    assert differences({**right, "steps": "1", "more": 1}, kind) == [
        "result: unknown more",
        "result.steps: '1' is no <class 'int'>",
    ]
