"""Start llama.cpp's server for a check and query it over HTTP."""

from __future__ import annotations

import http.client
import importlib.util
import json
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, final

from embedgrad.atomic_files import scratch_folder
from embedgrad.errors import EngineError
from embedgrad.formatting import one_line
from embedgrad.model.llamacpp.process import ServerProcess, free_port


@final
class LlamaCppServer(AbstractContextManager["LlamaCppServer"]):
    """A running llama.cpp server on a loopback port; `options` are those of `child`.

    Raises `EngineError` if xllamacpp is not installed, if the file does not load within `patience`
    seconds, and if the server refuses a request or stops.
    """

    def __init__(self, model: Path, *, patience: float = 600, **options: Any):
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineError(
                "llama.cpp is not installed; pip install 'embedgrad[llamacpp]' (package xllamacpp)"
            )
        self.model = model
        self._patience = patience
        self._stack = ExitStack()
        aside = scratch_folder(Path(tempfile.gettempdir()), "embedgrad-llamacpp")
        log = self._stack.enter_context(aside) / "log"
        port = free_port("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{port}"
        module = "embedgrad.model.llamacpp.child"
        options = {"model": str(model), "port": port, **options}
        command = [sys.executable, "-m", module, json.dumps(options)]
        self._process = ServerProcess("llama.cpp", command, log)
        try:
            self._process.wait_until_ready(f"{self.address}/health", patience)
        except BaseException as error:
            self.close()
            if isinstance(error, EngineError):
                raise EngineError(f"{model}: llama.cpp cannot open it: {one_line(error)}") from None
            raise

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON, get JSON."""
        place = self.address.removeprefix("http://")
        connection = http.client.HTTPConnection(place, timeout=self._patience)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause: Exception = error
            try:
                self._process.check_running(seconds=1)
            except EngineError as ended:
                cause = ended
            raise EngineError(
                f"{self.model}: llama.cpp did not answer {path}: {one_line(cause)}"
            ) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            reason = content.get("error", content) if isinstance(content, dict) else content
            reason = reason.get("message", reason) if isinstance(reason, dict) else reason
            raise EngineError(f"{self.model}: llama.cpp refused {path}: {one_line(reason)}")
        return content

    def close(self) -> None:
        """End the process."""
        self._process.stop()
        self._stack.close()

    def __exit__(self, *exception: object) -> None:
        self.close()
