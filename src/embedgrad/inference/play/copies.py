"""A query of the page as a command, as Python and as a request of curl."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from embedgrad.inference.play.player import Query


def copies(folder: Path, query: Query, url: str) -> dict[str, str]:
    """The same query to the run in a folder, to paste elsewhere; `url` is the page's own door."""
    run, place, columns = str(folder), query.place, dict(query.columns)
    flags = "" if place == 1 else f" --at {place:g}" if place else " --text-prompt"
    command = f"embedgrad generate {shlex.quote(run)}{flags}"
    text = next(iter(columns.values()), "-")
    if len(columns) > 1 or text.startswith("-"):
        line = shlex.quote(json.dumps(columns, ensure_ascii=False))
        command = f"printf '%s\\n' {line} | {command}"
    else:
        command += f" {shlex.quote(text)}"
    moved = f"\nprompt = prompt.with_rows(prompt.rows_at({place:g}))" if place != 1 else ""
    load = f"import embedgrad as eg\n\nprompt = eg.load({run!r}){moved}\n"
    body = shlex.quote(json.dumps(asdict(query), ensure_ascii=False))
    return {
        "command": command,
        "Python": f"{load}print(prompt.generate({columns!r}))",
        "curl": f"curl -N {url} -d {body}",
    }
