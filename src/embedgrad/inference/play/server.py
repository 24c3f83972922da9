"""`embedgrad play`: open runs and serve their page on this machine."""

from __future__ import annotations

import importlib.util
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from embedgrad.errors import EngineError, OptionError
from embedgrad.events import Report, quiet
from embedgrad.model.llamacpp.process import listen

if TYPE_CHECKING:
    import uvicorn

HOST = "127.0.0.1"
GRACE = 1  # seconds for answers that are being written when the server ends


@final
@dataclass(frozen=True)
class Playing:
    """A page that is ready: `run` serves it at `url` until Ctrl-C, or until `stop`."""

    url: str
    _server: uvicorn.Server
    _socket: socket.socket

    def run(self) -> None:
        """Serve the page."""
        with self._socket:
            self._server.run([self._socket])

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.should_exit = True


def play(
    folders: Sequence[str | Path],
    *,
    port: int = 0,
    overrides: Sequence[str] = (),
    report: Report = quiet,
) -> Playing:
    """Open finished runs and prepare their page; port 0 means any free one.

    Only who knows the address, which holds a random token, gets answers. Raises `EngineError` if
    the port is taken or a package is missing, and what `open_run` raises.
    """
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise EngineError(
                f"play: needs the package {package}; install it: pip install 'embedgrad[ui]'"
            )
    if not folders:
        raise OptionError("play: no run to open; give at least one")
    import uvicorn

    from embedgrad.inference.play.app import build_app
    from embedgrad.inference.play.player import open_runs

    listening = listen(
        HOST, port, "another port with --port"
    )  # before the model, which takes longer
    try:
        token = secrets.token_urlsafe(24)
        app = build_app(open_runs([Path(folder) for folder in folders], overrides, report), token)
    except BaseException:
        listening.close()
        raise
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,  # its lines would hold the token
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    url = f"http://{HOST}:{listening.getsockname()[1]}/{token}/"
    return Playing(url, uvicorn.Server(config), listening)
