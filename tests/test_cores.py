"""How many threads torch gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from embedgrad.model.loading import device
from embedgrad.model.loading.device import real_cores, use_real_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("3200000 100000\n", 8),
        ("max 100000\n", 8),
        ("", 8),
        (None, 8),
    ],
)
def test_a_container_has_what_its_quota_says(tmp_path: Path, quota: str | None, cores: int) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert real_cores(tmp_path) == cores


def test_without_affinity_the_machine_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert real_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("user", "cores", "processes", "threads"),
    [(None, 1, 1, 1), ("4", 1, 1, 2), (None, 4, 2, 2), (None, 3, 2, 1), (None, 2, 5, 1)],
)
def test_threads_are_no_more_than_cores(
    monkeypatch: pytest.MonkeyPatch, user: str | None, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", user)
    monkeypatch.setattr(device, "real_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        use_real_cores(processes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
