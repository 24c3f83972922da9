"""Peak memory of a training step, each side in a separate process.

resident      largest resident set while stepping, above that of the loaded model. Stored prefixes
              count as ours: they are built after the model's size is taken.
activations   bytes that the step's graph saves for its backward, counted by storage, without the
              weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.speed.ours import Ours
from benchmarks.speed.peers import TRAINING
from benchmarks.speed.workloads import Ids
from embedgrad import Example, LanguageModel, load_model
from embedgrad.prompt.sequence import TokenSequence

ROOT = Path(__file__).resolve().parents[2]
_CLEAR = Path("/proc/self/clear_refs")


def of_step(
    side: str, model: LanguageModel, prompt_ids: Ids, sequences: Sequence[TokenSequence]
) -> dict[str, int]:
    """Bytes of `side` ("embedgrad" or a peer's name), measured in a new process."""
    spec = {
        "side": side,
        "model": model.info.name,
        "folder": model.info.path,
        "prompt": prompt_ids,
        "rows": [[s.prefix, s.suffix, s.targets[s.gold]] for s in sequences],
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.memory"],
        cwd=ROOT,
        input=json.dumps(spec),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(ours: dict[str, int], peer: dict[str, int]) -> dict[str, float]:
    """Ours over the peer's; `memory_ratio` is the worse of both."""
    found = {f"{name}_ratio": ours[name] / peer[name] for name in ("resident", "activations")}
    return {"memory_ratio": max(found.values()), **found}


def on_gpu(step: Callable[[], object]) -> int:
    """The most that a step allocates on the GPU beyond what it finds there, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure one side as standard input says; the result is the last line of standard output."""
    spec = json.load(sys.stdin)
    sequences = [
        TokenSequence(
            tuple(prefix), tuple(suffix), (tuple(target),), 0, None, Example({}, "", "row")
        )
        for prefix, suffix, target in spec["rows"]
    ]
    side: Any
    if spec["side"] == Ours.name:
        model = load_model(spec["model"], dtype="float32")
        side = Ours(model, spec["prompt"])
        frozen = model.model
    else:
        (kind,) = [kind for kind in TRAINING if kind.name == spec["side"]]
        side = kind(spec["folder"], spec["prompt"])
        frozen = side.model
    weights = [p for p in frozen.parameters() if not p.requires_grad]
    with torch.no_grad():  # weights of a mapped file are resident only once they were read
        for weight in weights:
            weight.sum()
    side.step(sequences[:1])  # a first pass allocates more than a step
    if spec["side"] == Ours.name:
        model.prefix_cache.clear()
    before = _settled()
    if spec["side"] == Ours.name:
        side.build_prefixes(sequences)
    with peak() as found:
        side.step(sequences)
    activations = saved(lambda: side.step(sequences), weights)
    print(json.dumps({"resident": found[0] - before, "activations": activations}))


def saved(step: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of all storages that a step saves for its backward, but for the weights'."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


@contextmanager
def peak() -> Iterator[list[int]]:
    """The largest resident set within, in bytes; in the list at the end."""
    found = [0]
    try:
        _CLEAR.write_text("5")  # resets the kernel's own peak
    except OSError:
        with _sampled(found):
            yield found
        return
    yield found
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    found[0] = int(line.split()[1]) * 1024


@contextmanager
def _sampled(found: list[int]) -> Iterator[None]:
    process, over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _settled() -> int:
    """Resident bytes, after what is free went back to the system where it can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
