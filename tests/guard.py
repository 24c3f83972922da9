"""A guard over all tests: what they run asks no other machine, and unpickles nothing.

It watches this process and its forks. What it refuses is also noted, as the caller may go on.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

SOURCE = str(Path(__file__).parents[1] / "src" / "embedgrad")
_HERE = {"", "localhost", socket.gethostname(), None}
_told = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, which forks write to as well


def watch() -> None:
    """Refuse from now on; nothing takes this back."""
    own = {one.address for each in psutil.net_if_addrs().values() for one in each}

    def is_here(host: Any) -> bool:
        host = host.decode() if isinstance(host, bytes) else host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host in _HERE
        return address.is_loopback or address.is_unspecified or host in own

    def refuse(what: str) -> None:
        _told.write(f"{what}\n".encode())
        raise OSError(f"the tests' guard refuses it: {what}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and not is_here(arguments[0]):
            refuse(f"the address of {arguments[0]} is asked for")
        elif event == "socket.connect":
            ours, address = arguments
            streams = ours.type == socket.SOCK_STREAM  # others send nothing here
            if streams and ours.family != socket.AF_UNIX and not is_here(address[0]):
                refuse(f"a connection to {address[0]}")
        elif event == "pickle.find_class":
            frame: Any = sys._getframe()
            while frame is not None:
                if frame.f_code.co_filename.startswith(SOURCE):
                    refuse(f"{'.'.join(arguments)} is unpickled")
                frame = frame.f_back

    sys.addaudithook(hook)


def refused() -> str:
    """What was refused since the last call."""
    _told.seek(0)
    found = _told.read().decode()
    _told.seek(0)
    _told.truncate()
    return found
