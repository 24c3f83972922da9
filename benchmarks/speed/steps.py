"""A to D, and growth: training steps, with the prefixes stored."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

from benchmarks.speed import memory
from benchmarks.speed.bench import WARM_UP, Bench
from benchmarks.speed.measure import Side, compare_steps
from benchmarks.speed.ours import Ours, Step
from benchmarks.speed.peers import TRAINING, InputsEmbeds, Kind, prompt_first
from benchmarks.speed.work import matmul_rate, operations
from benchmarks.speed.workloads import (
    D_BATCH,
    ROWS,
    SHAPES,
    Ids,
    examples,
    prompt_ids,
    synthetic,
)
from embedgrad import LanguageModel
from embedgrad.prompt.sequence import TokenSequence

WITH_MATMUL = ("B", "C")
WITH_MEMORY = ("A", "C")
QUERIES = (100, 200, 400, 800)
STEPS = 5


@dataclass
class Workload:
    """A batch to step on, and what is the same beside every peer."""

    letter: str
    title: str
    model: LanguageModel
    prompt: Ids
    sequences: list[TokenSequence]

    @cached_property
    def ours(self) -> Ours:
        """Our side, with the prefixes stored."""
        ours = Ours(self.model, self.prompt)
        ours.build_prefixes(self.sequences)
        return ours

    @cached_property
    def work(self) -> int:
        """Floating-point operations of our step."""
        return operations(lambda: self.ours.step(self.sequences))

    @cached_property
    def prompt_first(self) -> Step:
        """Our step on the rows in PEFT's order."""
        self.ours.reset()
        return self.ours.step([prompt_first(sequence) for sequence in self.sequences])

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes of our step."""
        return memory.of_step(Ours.name, self.model, self.prompt, self.sequences)


def synthetic_rows(bench: Bench, letter: str) -> None:
    """A, B or C, against every peer; quickly, against the plain loop."""
    shape, pairs, model = SHAPES[letter], bench.pairs(5), bench.model
    prompt, sequences = prompt_ids(model, shape.prompt), synthetic(model, shape)
    workload = Workload(letter, shape.title, model, prompt, sequences)
    for kind in (InputsEmbeds,) if bench.quick else TRAINING:
        if not bench.skips(letter, kind.name, ["stored"], pairs):
            against(bench, workload, kind, pairs)


def real_rows(bench: Bench) -> None:
    """D, against the plain loop: PEFT runs the same pass with more around it."""
    rows, pairs = ROWS["D"], bench.pairs(3)
    if not bench.skips("D", InputsEmbeds.name, ["stored"], pairs):
        sequencer, sequences, _ = examples(bench.model, rows, bench.data, D_BATCH, 1)
        workload = Workload("D", rows.title, bench.model, sequencer.prompt_ids, sequences)
        against(bench, workload, InputsEmbeds, pairs)


def against(bench: Bench, workload: Workload, kind: Kind, pairs: int) -> None:
    """One row: our step and a peer's in turns, and whether both agree in the same token order."""
    letter, model, sequences = workload.letter, workload.model, workload.sequences
    ours, peer = workload.ours, kind(bench.source, workload.prompt)

    def sides(rows: list[TokenSequence]) -> tuple[dict[str, Side[Step]], Side[Step]]:
        theirs = [peer.layout(row) for row in rows]
        short = letter != "D" and not bench.quick
        side = settled if short else Side[Step]
        our_side = side(lambda: ours.step(rows), ours.reset)
        return {"stored": our_side}, side(lambda: peer.step(theirs), peer.reset)

    weights = model.model.get_output_embeddings().weight
    rate = [matmul_rate(weights)] if letter in WITH_MATMUL else []
    found = bench.timed(sides, sequences, pairs)["stored"]
    row = {**found.summary(), "note": peer.note}
    if rate:  # the machine's speed changes as others use it
        rate.append(matmul_rate(weights))
        row["matmul_fraction"] = workload.work / row["our_seconds"] / statistics.mean(rate)
    same_layout = peer.layout(sequences[0]) == sequences[0]
    own = found.ours if same_layout else workload.prompt_first
    row |= compare_steps(own, found.peer, half=bench.half)
    if weights.is_cuda:
        theirs = [peer.layout(sequence) for sequence in sequences]
        steps = (lambda: ours.step(sequences)), (lambda: peer.step(theirs))
        row["memory_ratio"] = memory.on_gpu(steps[0]) / memory.on_gpu(steps[1])
    elif letter in WITH_MEMORY and not (bench.shared or (bench.quick and kind is not InputsEmbeds)):
        peers = memory.of_step(kind.name, model, workload.prompt, sequences)
        row |= memory.ratios(workload.memory, peers)
    bench.put(letter, workload.title, "stored", kind.name, row)


def settled(step: Callable[[], Step], reset: Callable[[], None]) -> Side[Step]:
    """A step as in training: after one of its own side, not after the other side's.

    Memory that the other side freed went back to the system, which hands it out page by page; only
    short steps notice.
    """

    def prepare() -> None:
        step()
        reset()

    return Side(step, prepare)


def growth(bench: Bench) -> None:
    """How a step of A's shape grows with the query, and how the plain loop's does."""
    if bench.kept and bench.results.has_section("growth"):
        return
    prompt = prompt_ids(bench.model, SHAPES["A"].prompt)
    ours, peer = Ours(bench.model, prompt), InputsEmbeds(bench.model.info.path, prompt)
    our_seconds, peer_seconds = [], []
    for query in QUERIES:
        rows = synthetic(bench.model, replace(SHAPES["A"], query=query))
        bench.model.prefix_cache.clear()
        ours.build_prefixes(rows)
        ours.step(rows)
        our_side = Side(partial(ours.step, rows), ours.reset)
        our_seconds.append(statistics.median(our_side.timed()[0] for _ in range(STEPS)))
        peer.step(rows[:WARM_UP])
        peer_seconds.append(Side(partial(peer.step, rows), peer.reset).timed()[0])
        said = f"ours {our_seconds[-1]:.2f} s, {peer.name} {peer_seconds[-1]:.2f} s"
        print(f"growth, query of {query} tokens: {said}", flush=True)
    bench.results.put_section(
        "growth",
        {
            "peer": peer.name,
            "queries": QUERIES,
            "our_seconds": our_seconds,
            "peer_seconds": peer_seconds,
            "our_growth": our_seconds[-1] / our_seconds[0],
            "peer_growth": peer_seconds[-1] / peer_seconds[0],
        },
    )
