"""The guard of `conftest.py` over all tests."""

from __future__ import annotations

import os
import pickle
import socket

import pytest

import guard


def connect(host: str) -> None:
    with socket.socket() as made:
        made.connect((host, 9))


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.invalid"])
def test_another_machine_is_not_asked(host: str) -> None:
    with pytest.raises(OSError, match=f"guard refuses it: the address of {host}|to {host}"):
        socket.create_connection((host, 9), timeout=1)
    assert host in guard.refused()


def test_this_machine_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()
        socket.create_connection(server.getsockname()).close()


def test_a_fork_is_watched_too() -> None:
    if not (child := os.fork()):
        try:
            connect("192.0.2.1")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert guard.refused() == "a connection to 192.0.2.1\n"


def test_nothing_is_unpickled_below_our_code() -> None:
    packed = pickle.dumps(os.path.join)
    assert pickle.loads(packed) is os.path.join
    code = compile("import pickle; pickle.loads(packed)", f"{guard.SOURCE}/x.py", "exec")
    with pytest.raises(OSError, match=r"guard refuses it: \w+\.join is unpickled"):
        exec(code, {"packed": packed})
    assert guard.refused()
