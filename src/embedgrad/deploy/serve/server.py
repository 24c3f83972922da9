"""`embedgrad serve`: export once per run, start the server, wait for it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

from embedgrad.atomic_files import scratch_folder
from embedgrad.data.bounded_reads import file_digest
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.export import export
from embedgrad.deploy.folder import FILE, VERSION, read_export
from embedgrad.deploy.requests import example_requests
from embedgrad.deploy.serve.describe import describe
from embedgrad.deploy.serve.engines import find_engine
from embedgrad.errors import ExportError, RunError
from embedgrad.events import Report, quiet, say, stage
from embedgrad.model.llamacpp.process import ServerProcess, free_port
from embedgrad.prompt import artifact
from embedgrad.recipe.paths import RECIPE, find_run, prompt_folder

LONGEST_START = 900.0  # seconds: a large model takes long to read from disk
FOLDER = "served"  # of exports, inside a run
LOOPBACK = ("127.", "localhost", "::1")


@final
@dataclass
class Served(AbstractContextManager["Served"]):
    """A server that runs until the `with` block ends, or until `stop`.

    `url` is the base of its OpenAI-compatible API; clients call the model by `model`. `examples`
    are requests, in shell and in Python; `facts` and `warnings` say what is served.
    """

    url: str
    model: str
    examples: Sequence[str]
    facts: Sequence[str]
    warnings: Sequence[str]
    _process: ServerProcess
    _stack: ExitStack

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait(self) -> None:
        """Block until the server ends, then raise `EngineError` with its last lines."""
        self._process.wait()

    def stop(self) -> None:
        """End the server; a second call does nothing."""
        self._stack.close()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def serve(
    folder: str | Path,
    engine: str = "llamacpp",
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    overrides: Sequence[str] = (),
    report: Report = quiet,
) -> Served:
    """Start a server on a run or on an export, and return when it answers.

    The export of a run is made once and kept inside it. Port 0 means any free one; `overrides`
    change the run's recipe. Raises `EngineError` if the engine is not installed, the port is taken
    or the server ends, and what `export` raises.
    """
    chosen = find_engine(engine)
    port = free_port(host, port)  # before an export, which takes longer
    exported, name = export_once(Path(folder), chosen.destination, overrides, report)
    command = chosen.command(exported, name, host, free_port(host, port))
    root = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    url, model = f"{root}/v1", name if chosen.knows_names else str(exported)
    entries = read_export(exported)
    first, *_ = entries["prompts"].values()  # the one that answers by default
    examples = example_requests(engine, url, model, Choices.read(first))
    described = describe(exported, entries, limits=chosen.limits)
    if not host.startswith(LOOPBACK):
        say(report, [f"other machines can reach {host}, and the server asks for no password"])
    with ExitStack() as stack:
        logs = stack.enter_context(scratch_folder(Path(tempfile.gettempdir()), "embedgrad-serve"))
        stage(report, f"starting {engine}")
        process = ServerProcess(engine, command, logs / "server.log")
        stack.callback(process.stop)
        process.wait_until_ready(f"{root}/health", LONGEST_START)
        return Served(url, model, examples, *described, process, stack.pop_all())


def export_once(
    folder: Path, destination: str, overrides: Sequence[str], report: Report
) -> tuple[Path, str]:
    """An export to `destination`, and the name that clients call its model by.

    `folder` is such an export, a run, or a prompt alone. The export of the last two is stored
    inside and used again as long as prompt, recipe and overrides are the same. Raises
    `EmbedgradError`.
    """
    folder = find_run(folder) or folder
    name = folder.resolve().name
    if (folder / FILE).is_file():
        if overrides:
            raise ExportError(f"{folder}: is an export, which --set cannot change; give its run")
        to = read_export(folder)["destination"]
        if to != destination:
            raise ExportError(
                f"{folder}: is an export to {to}, but this engine opens {destination}; give the "
                "run, or another --engine"
            )
        return folder, name
    out = folder / FOLDER / f"{destination}-{_digest(folder, overrides)}"
    if out.is_dir():
        read_export(out)
        stage(report, f"opening {out}")
    else:
        stage(report, f"exporting to {destination}, once")
        export(folder, destination, out, overrides=overrides, report=report)
    return out, name


def _digest(folder: Path, overrides: Sequence[str]) -> str:
    """Digest of everything that determines an export, the format's version included."""
    prompt, recipe = prompt_folder(folder), folder / RECIPE
    inputs = [prompt / artifact.JSON_FILE, prompt / artifact.ROWS_FILE]
    inputs += [recipe] if recipe.is_file() else []
    try:
        parts = [str(VERSION), *map(file_digest, inputs), *overrides]
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be read ({error.strerror}); give a folder that "
            "`optimize` or `export` wrote"
        ) from error
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
