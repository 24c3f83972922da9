"""Workers: the processes of one training, and what they tell each other.

    rows of a batch -> own rows -> log-probabilities, added up -> gradient, added up -> same step

Every worker runs the same program on the same rows of the prompt, and computes its own rows of
every batch. What leaves it are log-probabilities and the gradient of the trained numbers.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from embedgrad.environment import may_run, process_name
from embedgrad.errors import EngineError
from embedgrad.prompt.sequence import TokenSequence

PATIENCE = 5.0  # seconds for the others to say that they live
SILENCE = datetime.timedelta(minutes=30)  # after which a worker that does not answer is given up


@final
class Workers:
    """This process among `count` of them; alone it exchanges nothing.

    What fails because another one is gone raises `EngineError` with that one's name.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None):
        self.rank, self.count, self.store = rank, count, store
        self.waits = True  # for the others at the end; not where it was interrupted, maybe alone
        # Bytes since `begin_step`, and those of the last step.
        self.sent = self.step_sent = {"gradients": 0, "log-probabilities": 0}
        if store is not None:
            store.set(f"worker/{rank}", process_name())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def owner(self, sequence: TokenSequence) -> int | None:
        """Who stores a row's prefix, by its tokens; None: all have it, as it is the template's."""
        if len(sequence.prefix) <= sequence.shared:
            return None
        return zlib.crc32(repr(sequence.prefix).encode()) % self.count

    def share(self, batch: Sequence[TokenSequence]) -> list[int]:
        """The indices of this worker's rows: those of its prefixes, and some that are anyone's.

        A prefix that more rows have than one worker's fair share is every worker's.
        """
        if self.count == 1:
            return list(range(len(batch)))
        times = Counter(sequence.prefix for sequence in batch)
        owners = [
            self.owner(s) if times[s.prefix] * self.count <= len(batch) else None for s in batch
        ]
        loads = [owners.count(rank) for rank in range(self.count)]
        own = []
        for i, owner in enumerate(owners):
            rank = loads.index(min(loads)) if owner is None else owner
            loads[rank] += owner is None
            if rank == self.rank:
                own.append(i)
        return own

    def select_stored(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """The rows whose prefixes this worker stores."""
        if self.count == 1:
            return list(sequences)
        return [s for s in sequences if self.owner(s) in (None, self.rank)]

    def fill(self, lines: Tensor, own: Sequence[int], size: int) -> Tensor:
        """All lines [size, W] of a table of which this worker has some; only these have a graph."""
        if self.count == 1:
            return lines
        places = torch.tensor(own, dtype=torch.long, device=lines.device)
        whole = lines.new_zeros(size, lines.shape[1]).index_copy(0, places, lines.detach())
        self._add_up(whole, "log-probabilities")
        return whole.index_copy(0, places, lines)

    def add_up(self, gradients: Sequence[Tensor]) -> None:
        """Make gradients the sums of all workers', in place."""
        if self.count == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._add_up(flat, "gradients")
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, own: Mapping[int, Any]) -> dict[int, Any]:
        """Everybody's entries, which are plain JSON values."""
        if self.count == 1:
            return dict(own)
        text = torch.frombuffer(
            bytearray(json.dumps(list(own.items())).encode()), dtype=torch.uint8
        )
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
        self._exchange(lambda: dist.all_gather(lengths, torch.tensor([len(text)])))
        longest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(text, (0, longest - len(text)))
        found = [torch.empty_like(padded) for _ in range(self.count)]
        self._exchange(lambda: dist.all_gather(found, padded))
        whole: dict[int, Any] = {}
        for part, length in zip(found, lengths, strict=True):
            whole |= json.loads(bytes(part[: int(length)].tolist()))
        return whole

    def count_up(self, counts: Sequence[int]) -> list[int]:
        """The sums of all workers' counts."""
        values = torch.tensor(counts, dtype=torch.long)
        self._exchange(lambda: dist.all_reduce(values))
        return [int(value) for value in values]

    def wait(self) -> None:
        """Until every worker has come here."""
        if self.count > 1:
            self._exchange(dist.barrier)

    def leave(self) -> None:
        """End together: the first one, which may hold the store, last."""
        if self.waits:
            self.wait()
        with suppress(RuntimeError):
            if not self.is_first:
                self.store.set(f"left/{self.rank}", "")
            else:
                others = [f"left/{rank}" for rank in range(1, self.count)]
                self.store.wait(others, datetime.timedelta(seconds=PATIENCE))

    def begin_step(self) -> None:
        """Count what is sent from here on."""
        self.sent = dict.fromkeys(self.sent, 0)

    def end_step(self) -> dict[str, int]:
        """Figures of the step for people; none where nobody else is."""
        self.step_sent = dict(self.sent)
        return {} if self.count == 1 else {"bytes_sent": sum(self.sent.values())}

    @property
    def notes(self) -> list[str]:
        """What the user should know of the last step, a sentence each."""
        if self.count == 1:
            return []
        parts = " and ".join(f"{n:,} bytes of {what}" for what, n in self.step_sent.items())
        return [f"{self.count} workers; each sent {parts} in the last step"]

    def say_failure(self, error: str) -> None:
        """Leave the reason why this worker ends, for the others."""
        with suppress(RuntimeError):
            self.store.set(f"failed/{self.rank}", error)

    def dead(self, seconds: float = 0.0) -> dict[int, str]:
        """The workers that are gone, by name; others get `seconds` to say that they live."""
        if self.count == 1:
            return {}
        lost: dict[int, str] = {}
        limit = time.monotonic() + seconds
        with suppress(RuntimeError):  # where the store is gone too
            self.store.set(f"lives/{self.rank}", "")
            unknown = [rank for rank in range(self.count) if rank != self.rank]
            while unknown:
                for rank in list(unknown):
                    said = any(self.store.check([f"{what}/{rank}"]) for what in ("failed", "left"))
                    if said or not self._runs(rank):
                        lost[rank] = self._name(rank)
                    elif not self.store.check([f"lives/{rank}"]):
                        continue
                    unknown.remove(rank)
                if time.monotonic() > limit:
                    break
                time.sleep(0.05)
        return lost

    def failure(self, seconds: float = 0.0) -> EngineError | None:
        """The error that names the workers that are gone, if any; see `dead`."""
        lost = self.dead(seconds)
        return _failure("; ".join(lost.values())) if lost else None

    def explain(self, error: Exception) -> Exception:
        """What ended this worker: the end of another one, where an exchange of PyTorch's failed."""
        if self.count == 1 or not isinstance(error, RuntimeError):
            return error
        _outlive_launcher()
        return self.failure(PATIENCE) or error

    def speaks(self) -> bool:
        """Whether it is on this worker to say why all end: no earlier one lives, or has said it."""
        if self.is_first:
            return True
        silent = list[int]()
        with suppress(RuntimeError):  # where the store is gone too
            silent = [rank for rank in self.dead() if not self.store.check([f"failed/{rank}"])]
        return set(range(self.rank)) <= set(silent)

    def _runs(self, rank: int) -> bool:
        """Whether a worker's process runs, as far as can be told from here."""
        return may_run(self.store.get(f"worker/{rank}").decode())

    def _name(self, rank: int) -> str:
        host, pid = self.store.get(f"worker/{rank}").decode().split()
        why = ""
        if self.store.check([f"failed/{rank}"]):
            why = f" ({self.store.get(f'failed/{rank}').decode()})"
        return f"worker {rank} (process {pid} on {host}) ended{why}"

    def _add_up(self, values: Tensor, what: str) -> None:
        self.sent[what] += values.numel() * values.element_size()
        self._exchange(lambda: dist.all_reduce(values))

    def _exchange(self, speak: Callable[[], Any]) -> None:
        try:
            speak()
        except RuntimeError as error:
            _outlive_launcher()
            unknown = f"a worker does not answer ({_first_line(error)})"
            raise self.failure(PATIENCE) or _failure(unknown) from error


def _outlive_launcher() -> None:
    """Go on where the launcher of a worker that is gone ends us too: there is something to save."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _failure(why: str) -> EngineError:
    return EngineError(f"{why}; `embedgrad resume` continues the run, with fewer workers too")


_here = Workers()


def here() -> Workers:
    """This process among its workers; alone where nothing was joined."""
    return _here


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Find the other workers, where torchrun or `accelerate launch` started several.

    Raises `EngineError` where they do not find each other.
    """
    global _here
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield _here
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, count = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        why = f"the workers do not find each other ({_first_line(error)})"
        raise EngineError(f"{why}; start them with torchrun or `accelerate launch`") from error
    _here = Workers(rank, count, store)
    try:
        yield _here
        _here.leave()
    finally:
        _here = Workers()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
