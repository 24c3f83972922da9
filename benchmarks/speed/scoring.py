"""E, F and G: scores and replies, prefix building included; E and F also with the prefixes stored.

Nothing is trained here, so what must agree are log-probabilities, or the replies.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.speed.bench import Bench
from benchmarks.speed.measure import Side, compare_scores
from benchmarks.speed.ours import Ours
from benchmarks.speed.peers import Generate, InputsEmbeds
from benchmarks.speed.workloads import CANDIDATES, NEW_TOKENS, SHAPES, prompt_ids, synthetic
from embedgrad.prompt.sequence import TokenSequence

PREFIXES = ("built", "stored")


def scores(bench: Bench, letter: str) -> None:
    """E (every choice) or F (every candidate prompt), against the plain loop."""
    shape, pairs = SHAPES[letter], bench.pairs(3)
    if bench.skips(letter, InputsEmbeds.name, PREFIXES, pairs):
        return
    model = bench.model
    prompt = prompt_ids(model, shape.prompt)
    ours, peer = Ours(model, prompt), InputsEmbeds(model.info.path, prompt)
    prompts = [model.embed(prompt_ids(model, shape.prompt, skip=k)) for k in range(CANDIDATES)]

    def scored(side: Ours | InputsEmbeds, rows: list[TokenSequence]) -> Tensor:
        return side.choices(rows) if letter == "E" else side.candidates(prompts, rows)

    def sides(rows: list[TokenSequence]) -> tuple[dict[str, Side[Tensor]], Side[Tensor]]:
        return {
            "built": Side(lambda: scored(ours, rows), model.prefix_cache.clear),
            "stored": Side(lambda: scored(ours, rows)),  # the one before has built them
        }, Side(lambda: scored(peer, rows))

    found = bench.timed(sides, synthetic(model, shape), pairs)
    for prefixes, timed in found.items():
        row = timed.summary() | compare_scores(timed.ours, timed.peer)
        bench.put(letter, shape.title, prefixes, peer.name, row)


def generation(bench: Bench) -> None:
    """G, against `transformers` `generate`."""
    shape, pairs = SHAPES["G"], bench.pairs(5)
    if bench.skips("G", Generate.name, ["built"], pairs):
        return
    model = bench.model
    prompt = prompt_ids(model, shape.prompt)
    ours, peer = Ours(model, prompt), Generate(bench.source, prompt)

    def replied(rows: list[TokenSequence]) -> list[str]:
        tokens = peer.tokens(rows, NEW_TOKENS).tolist()
        return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    def sides(rows: list[TokenSequence]) -> tuple[dict[str, Side[list[str]]], Side[list[str]]]:
        our_side = Side(lambda: ours.generate(rows, NEW_TOKENS), model.prefix_cache.clear)
        return {"built": our_side}, Side(lambda: replied(rows))

    timed = bench.timed(sides, synthetic(model, shape), pairs)["built"]
    alike = sum(a == b for a, b in zip(timed.ours, timed.peer, strict=True))
    row = timed.summary() | {"same_result": alike == len(timed.peer)}
    if bench.half:  # where rounding decides between two tokens, replies part
        row = timed.summary() | {"note": f"{alike} of {len(timed.peer)} replies are the same"}
    bench.put("G", shape.title, "built", peer.name, row)
