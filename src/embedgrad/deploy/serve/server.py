"""`embedgrad serve`: export, start the server, wait for it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import final

from embedgrad.deploy.choices import Choices
from embedgrad.deploy.folder import read_export
from embedgrad.deploy.requests import example_requests
from embedgrad.deploy.serve.cached_export import export_once
from embedgrad.deploy.serve.describe import describe
from embedgrad.deploy.serve.engines import find_engine
from embedgrad.events import Report, quiet, say, stage
from embedgrad.model.llamacpp.process import ServerProcess, free_port

LONGEST_START = 900.0  # seconds: a large model takes long to read from disk
LOOPBACK = ("127.", "localhost", "::1")


@final
class Served:
    """A server that runs until the `with` block ends, or until `stop`.

    `url` is the base of its OpenAI-compatible API; clients call the model by `model`. `examples`
    are requests, in shell and in Python; `facts` and `warnings` say what is served.
    """

    def __init__(
        self,
        url: str,
        model: str,
        examples: Sequence[str],
        described: tuple[Sequence[str], Sequence[str]],
        process: ServerProcess,
        stack: ExitStack,
    ):
        self.url = url
        self.model = model
        self.examples = examples
        self.facts, self.warnings = described
        self._process = process
        self._stack = stack

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

    def __enter__(self) -> Served:
        return self

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
    export, name = export_once(Path(folder), chosen.destination, overrides, report)
    command = chosen.command(export, name, host, free_port(host, port))
    root = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    url, model = f"{root}/v1", name if chosen.knows_names else str(export)
    entries = read_export(export)
    first, *_ = entries["prompts"].values()  # the one that answers by default
    examples = example_requests(engine, url, model, Choices.read(first))
    described = describe(export, entries, limits=chosen.limits)
    if not host.startswith(LOOPBACK):
        say(report, [f"other machines can reach {host}, and the server asks for no password"])
    with ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedgrad-serve-"))
        stage(report, f"starting {engine}")
        process = ServerProcess(engine, command, Path(logs) / "server.log")
        stack.callback(process.stop)
        process.wait_until_ready(f"{root}/health", LONGEST_START)
        return Served(url, model, examples, described, process, stack.pop_all())
