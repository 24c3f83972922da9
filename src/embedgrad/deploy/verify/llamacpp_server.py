"""llama.cpp's server as a child process: start, ask, stop; a dead one shows its last lines."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import selectors
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embedgrad.errors import EngineError

_LINES = 3
_STAMP = re.compile(r"^[\d.]+ [A-Z] ")


class LlamaCppServer(AbstractContextManager["LlamaCppServer"]):
    """A running llama.cpp server on a loopback port; `options` are those of `llamacpp_child`.

    Raises `EngineError` when xllamacpp is not installed, when the file does not load within
    `patience` seconds, and when the server refuses a request or stops.
    """

    def __init__(self, model: Path, *, patience: float = 600, **options: Any):
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineError(
                "llama.cpp is not installed; pip install 'embedgrad[llamacpp]' (package xllamacpp)"
            )
        self.model = model
        self._patience = patience
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "embedgrad.deploy.verify.llamacpp_child",
                json.dumps({"model": str(model), **options}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us; we then end it
        )
        try:
            self.address: str = self._first_words()["address"]
        except BaseException:
            self.close()
            raise

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON, get JSON."""
        place = urlsplit(self.address)
        assert place.hostname
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=self._patience)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineError(
                f"{self.model}: llama.cpp did not answer {path}: {self._end() or error}"
            ) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            said = content.get("error", content) if isinstance(content, dict) else content
            said = said.get("message", said) if isinstance(said, dict) else said
            raise EngineError(f"{self.model}: llama.cpp refused {path}: {_one_line(str(said))}")
        return content

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _first_words(self) -> Any:
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(self._patience)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            why = self._end(first=True) if ready else f"not ready after {self._patience:g} s"
            raise EngineError(f"{self.model}: llama.cpp does not open it: {why}")
        return json.loads(line)

    def _end(self, first: bool = False) -> str:
        """First or last lines of a server that has stopped; "" of one that runs."""
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return ""
        self._log.seek(0)
        lines = map(_one_line, self._log.read().decode("utf-8", "replace").split("\n"))
        said = [line for line in lines if line]
        shown = said[:_LINES] if first else said[-_LINES:]
        return "; ".join((*shown, f"it ended with status {self._process.returncode}"))


def _one_line(text: str) -> str:
    """Printable, and without the time that llama.cpp puts in front."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(_STAMP.sub("", printable).split())[:300]
