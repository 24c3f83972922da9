"""What every measurement needs: model, results, number of pairs, and what to skip."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.speed.measure import Pairs, Side, alternate, voided
from benchmarks.speed.results import Results
from embedgrad import LanguageModel
from embedgrad.prompt.sequence import TokenSequence

UNMEASURED = (
    *("same_gradient", "same_result"),
    *("loss_difference", "gradient_difference", "result_difference"),
    *("memory_ratio", "resident_ratio", "activations_ratio", "matmul_fraction"),
)
WARM_UP = 2  # rows

T = TypeVar("T")
Sides = Callable[[list[TokenSequence]], tuple[Mapping[str, Side[T]], Side[T]]]


@dataclass
class Bench:
    """One run of the benchmark.

    `quick` makes one pair of each. `kept` keeps rows that were measured already, as in an
    interrupted full run. `data` is a folder of real rows; None: the Hub. `python` is
    the interpreter whose start is measured. `shared`: peers run on our weights, which are large.
    """

    model: LanguageModel
    results: Results
    quick: bool = False
    kept: bool = False
    data: Path | None = None
    python: str = sys.executable
    shared: bool = False

    @property
    def source(self) -> Any:
        """What a peer is made from: the folder that it loads, or the model itself."""
        return self.model.model if self.shared else self.model.info.path

    @property
    def half(self) -> bool:
        """Whether the weights have 16 bits."""
        return self.model.info.dtype != "float32"

    def pairs(self, count: int) -> int:
        """Number of pairs to measure where a full run measures `count`."""
        return 1 if self.quick else count

    def skips(self, letter: str, peer: str, prefixes: Sequence[str], pairs: int) -> bool:
        """Whether these rows are measured already."""
        return self.kept and all(self.results.has((letter, h, peer), pairs) for h in prefixes)

    def timed(
        self, sides: Sides[T], sequences: list[TokenSequence], pairs: int
    ) -> dict[str, Pairs[T]]:
        """Warm up all sides on two rows, then time them on all."""
        ours, peer = sides(sequences[:WARM_UP])
        for side in (*ours.values(), peer):
            side.timed()
        ours, peer = sides(sequences)
        return alternate(ours, peer, pairs)

    def put(
        self, letter: str, title: str, prefixes: str, peer: str, row: Mapping[str, Any]
    ) -> None:
        """Write a row and print it; fields that it lacks were not measured."""
        whole = voided(
            {
                **{"workload": letter, "title": title, "prefixes": prefixes, "peer": peer},
                **dict.fromkeys(UNMEASURED),
                "note": "",
                **row,
            }
        )
        self.results.put(whole)
        said = f"ours {whole['our_seconds']:.2f} s, {peer} {whole['peer_seconds']:.2f} s"
        if whole["ratio"] is not None:
            low, high = whole["ratio_low"], whole["ratio_high"]
            said = f"{whole['ratio']:.2f} times ({low:.2f} to {high:.2f}), {said}"
        note = f"; {whole['note']}" if whole["note"] else ""
        print(f"{letter}, prefixes {prefixes}: {said}{note}", flush=True)
