"""Device, precision and threads: the words of a recipe -> torch's objects."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from embedgrad.errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ATTENTIONS = ("auto", "sdpa", "eager")


def choose_device(device: str) -> torch.device:
    """The named device; "auto" is CUDA, else MPS, else the CPU.

    Raises `ModelError` for a device that does not exist here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device == "auto":
        return torch.device(available[0])
    # "cuda" is the current CUDA device; "cuda:1" and the like are listed one by one.
    if device not in available:
        raise ModelError(
            f"device {device!r} is not available here; available: {', '.join(available)}, or 'auto'"
        )
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named precision; "auto" is bfloat16 on CUDA where the GPU has it, else float32.

    Raises `ModelError` for an unknown name, or for float64 on MPS, which has none.
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; known: auto, {', '.join(DTYPES)}")
    if dtype == "float64" and device.type == "mps":
        raise ModelError("dtype 'float64' does not exist on device 'mps'; use float32, or the cpu")
    return DTYPES[dtype]


def check_attention(attention: str) -> None:
    """Raise `ModelError` for an attention backend other than "auto", "sdpa" (fast) and "eager".

    "auto" is sdpa where the model has it (Gemma 2 has not). Only eager attention can be
    differentiated twice. Passes over stored prefixes have an attention of their own.
    """
    if attention not in ATTENTIONS:
        raise ModelError(f"attention {attention!r} is not known; known: {', '.join(ATTENTIONS)}")


def use_real_cores() -> None:
    """Limit torch to as many threads as this process has cores.

    Torch counts the machine's cores, also in a container that may use two of them; its threads then
    wait for each other. OMP_NUM_THREADS overrides this.
    """
    cores = real_cores()
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
