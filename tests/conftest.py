"""Settings of every test; also puts this folder on the path for the tests in folders below."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch is imported: a worker on each core, and what the command line sets itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import psutil
import pytest
from hypothesis import HealthCheck, settings

import guard
from browser import Browser, find_browser

# Times of one example say nothing on a busy machine; the first one also builds models.
settings.register_profile(
    "steady", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

MEMORY_OF_A_WORKER = 3 * 2**30
SUMMARY = "summary"  # a property of a test whose value is shown at the end of the run


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker on each core, as far as memory allows; none for a single file."""
    if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, psutil.virtual_memory().total // MEMORY_OF_A_WORKER))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == SUMMARY:
                terminalreporter.write_line(value)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "network":
        guard.watch()


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    """Fails a test that asks another machine or unpickles, whatever came of it."""
    yield
    assert guard.refused() == ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the path (Debian's package: chromium)")
    started = Browser(path, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
