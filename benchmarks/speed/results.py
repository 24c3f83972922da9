"""The results file: written after every row, so that an interrupted run resumes.

A full run that was interrupted (`finished` is false) keeps the rows that it measured, if they were
measured with the code that is there now (`code`: a digest of all sources) and with as
many pairs as it would make. A run of some workloads only, or a quick one, replaces their rows and
leaves the others. Machine and versions stand once at the top, so on another machine, or with other
versions, the file starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

import embedgrad
from benchmarks.speed.reached import reached
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.errors import RunError

Row = dict[str, Any]
KEY = ("workload", "prefixes", "peer")


class Results:
    """What is in the file, and what of it counts."""

    def __init__(self, path: Path, model: str | None = None):
        self.path, self.model = path, model
        self.code = code_digest()
        self.values: dict[str, Any] = {"finished": False, "rows": []}
        if path.exists():
            self.values = _read(path)
        here = {"machine": machine(), "versions": versions("peft")}
        if any(self.values.get(name) not in (None, value) for name, value in here.items()):
            print(f"{path.name}: from another machine or other versions, so it starts over")
            self.values = {"finished": False, "rows": []}
        self.values = {**here, **self.values}

    def begin(self, *, fresh: bool) -> None:
        """Start a full run: go on with an interrupted one, else with nothing."""
        if fresh or self.values["finished"]:
            self.values = {name: self.values[name] for name in ("machine", "versions")}
            self.values |= {"finished": False, "rows": []}

    def finish(self) -> None:
        """A full run is at its end."""
        self.values["finished"] = True
        self.write()

    def has(self, key: tuple[str, str | None, str], pairs: int) -> bool:
        """Whether a row of (workload, prefixes, peer) counts for an interrupted full run."""
        return any(
            tuple(row[name] for name in KEY) == key
            and row.get("model") == self.model
            and row["pairs"] >= pairs
            and row["code"] == self.code
            for row in self.values["rows"]
        )

    def put(self, row: Row) -> None:
        """Add a row, in the place of the one with its key, and write the file."""
        of_model = {} if self.model is None else {"model": self.model}
        row = {**of_model, **row, "code": self.code}
        names = ("model", *KEY)
        rows = [r for r in self.values["rows"] if any(r.get(n) != row.get(n) for n in names)]
        self.values["rows"] = sorted(
            [*rows, row], key=lambda r: tuple(r.get(name) or "" for name in names)
        )
        self.write()

    def has_section(self, name: str) -> bool:
        """As `has`, for what is no row."""
        return name in self.values and self.values[name].get("code") == self.code

    def put_section(self, name: str, values: dict[str, Any]) -> None:
        """As `put`, for what is no row."""
        self.values[name] = {**values, "code": self.code}
        self.write()

    def write(self) -> None:
        """Write the file; of the one model that has targets with what was reached by now."""
        first = ["machine", "versions", "finished"]
        if self.model is None:
            self.values["reached"] = reached(self.values)
            first.append("reached")
        order = [*first, *sorted(set(self.values) - {*first, "rows"}), "rows"]
        write_json(self.path, {name: self.values[name] for name in order})


def code_digest() -> str:
    """A digest of the sources of the package and of this benchmark."""
    digest = hashlib.sha256()
    for root in (Path(embedgrad.__file__).parent, Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values.get("rows"), list):
            raise ValueError("it has no rows")
    except (AttributeError, ValueError) as error:
        raise RunError(
            f"{path}: is no results file ({error}); restore it, or delete it to measure again"
        ) from error
    return values


def machine() -> dict[str, Any]:
    """Where it is timed."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # A start of the same machine may find some bytes more or less.
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
