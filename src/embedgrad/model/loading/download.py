"""Report how many bytes of a Hub download have come."""

from __future__ import annotations

import io
from threading import Lock
from typing import Any, final

from tqdm import tqdm

from embedgrad.events import Report


def bytes_bar(name: str, report: Report) -> Any:
    """A class for `tqdm_class` of huggingface_hub that shows nothing and reports "download" events.

    The Hub's client has several bars, of which two count bytes: those from the network and those on
    disk. The total grows as files begin. An event comes per percent.
    """
    lock, told = Lock(), [0, 0]

    @final
    class Bytes(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        """A bar that is not drawn."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                shown: bool | None = super().update(n)
                done, total = int(self.n), int(self.total or 0)
                if self.unit == "B" and done > told[0] and 100 * done // max(total, 1) != told[1]:
                    told[:] = done, 100 * done // max(total, 1)
                    report({"event": "download", "which": name, "done": done, "total": total})
            return shown

    return Bytes
