"""Workers of `embedgrad map` as actors of a Ray cluster."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from embedgrad.errors import EngineError, OptionError, one_line
from embedgrad.experiments.map import join
from embedgrad.experiments.map_workers import Worker


@final
class _Actor:
    """Does `work` in a process of the cluster, which loads the model once."""

    def work(self, *arguments: Any) -> None:
        join(*arguments)


@final
class RayWorker(Worker):
    """An actor with a CPU, and a GPU where the cluster has any."""

    def __init__(self, *arguments: Any) -> None:
        import ray

        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        self.name = f"actor {uuid.uuid4().hex[:8]}"
        self._actor: Any = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus).remote()
        self._done: Any = self._actor.work.remote(*arguments, self.name)

    def ended(self) -> str | None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            ray.get(self._done, timeout=0)
        except RayTaskError as error:  # of the worker's own error's type too
            return f"failed ({one_line(error.cause)})"
        except GetTimeoutError:
            return None
        except RayError as error:
            said = str(error).strip().split("\n")[-1]
            said = said.partition("exit detail: ")[2] or said
            return f"died (Ray: {said.partition('. ')[0]})"
        return ""

    def stop(self) -> None:
        import ray

        ray.kill(self._actor)


@contextmanager
def ray_workers(
    address: str, recipe: Path, over: Path, out: Path, overrides: Sequence[str], retries: int
) -> Iterator[Callable[[], Worker]]:
    """What starts a worker on the cluster at `address`, all of whose machines see these files.

    "local" starts a cluster of this machine, "auto" finds the one that runs here. Raises
    `OptionError` without Ray, and `EngineError` where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        why = "Ray is not installed; pip install 'embedgrad[ray]'"
        raise OptionError(f"--ray: {why}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"--ray {address}: no cluster answers ({one_line(error)}); give its address, or "
            "'local' to start one on this machine"
        ) from error
    paths = [path.resolve() for path in (recipe, over, out)]
    try:
        yield lambda: RayWorker(*paths, list(overrides), retries)
    finally:
        ray.shutdown()
