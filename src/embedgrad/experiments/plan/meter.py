"""Time and memory while something is done, on its device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from embedgrad.environment import peak_memory

INTERVAL = 0.002  # seconds between two looks at the process's memory


@dataclass
class Reading:
    """Seconds that a block took, and the most bytes that were in use within it."""

    seconds: float = 0.0
    peak: int = 0


class Meter:
    """Reads the clock and the memory of a device: of a GPU its own, else this process's."""

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def on_gpu(self) -> bool:
        """Whether memory is the GPU's."""
        return self.device.type == "cuda"

    def now(self) -> int:
        """Bytes in use."""
        if self.on_gpu:
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def most(self) -> int:
        """The most bytes in use so far."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Measure a block; the reading is filled in at its end."""
        found = Reading()
        self._wait()
        before = self.most()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(found, done), daemon=True)
        if not self.on_gpu:
            watch.start()
        began = time.perf_counter()
        try:
            yield found
        finally:
            self._wait()
            found.seconds = time.perf_counter() - began
            done.set()
            if self.on_gpu:
                found.peak = self.most()
            else:
                watch.join()
                # A peak between two looks is seen where it is the highest so far.
                found.peak = max(found.peak, self.now(), self.most() if self.most() > before else 0)

    def _watch(self, found: Reading, done: threading.Event) -> None:
        process = psutil.Process()
        while not done.wait(INTERVAL):
            found.peak = max(found.peak, int(process.memory_info().rss))

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
