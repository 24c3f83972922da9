"""Choose device, precision and thread count."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from embedgrad.errors import ModelError

_DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES}


def choose_device(device: str) -> torch.device:
    """The named device; "auto" is CUDA, else MPS, else the CPU. Raises `ModelError`."""
    available = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device == "auto":
        return torch.device(available[0])
    if device not in available:
        raise ModelError(
            f"device {device!r} is not available here; available: {', '.join(available)}, or 'auto'"
        )
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named precision; "auto" is bfloat16 on CUDA where the GPU has it, else float32."""
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; known: auto, {', '.join(DTYPES)}")
    if dtype == "float64" and device.type == "mps":
        raise ModelError("dtype 'float64' does not exist on device 'mps'; use float32, or the cpu")
    return DTYPES[dtype]


def use_real_cores(processes: int = 1) -> None:
    """Limit torch to as many threads as this process has cores, of several that work side by side.

    Torch counts the machine's cores, also in a container that may use two of them; its threads then
    wait for each other. OMP_NUM_THREADS overrides this.
    """
    cores = max(1, real_cores() // processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def real_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use, by its affinity and by the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = (groups / "cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores
