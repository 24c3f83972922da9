"""Token sequences -> passes -> operations and bytes, exactly.

    one pass: rows x tokens, each token with its own weights, attention over what it sees, and
    logits where answers are read off

The passes are those that `LanguageModel` makes, padding included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.model.attention import BLOCK
from embedgrad.model.packing import PASS_COST, group_by_length
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


class Pass(NamedTuple):
    """One forward pass over `rows` of `tokens` each, made so many `times`.

    Every token attends to `stored` keys (prefixes, without gradient) and `shared` ones (a prompt
    that was run before); `pairs` counts a row's query-key pairs among its own tokens. Logits are
    computed at `read` places, the last layer's feed-forward part at `last` ones. `copied` keys are
    put together for the pass.
    """

    rows: int
    tokens: int
    read: int
    last: int
    stored: float = 0
    shared: int = 0
    pairs: int = 0
    copied: int = 0
    times: float = 1


class Reuse(NamedTuple):
    """Whether a model reuses prefixes, and up to which length (None: any)."""

    on: bool = True
    longest: int | None = None

    def takes(self, sequence: TokenSequence, prompt: int, targets: Sequence[Ids]) -> bool:
        """Whether this row is computed on top of its stored prefix."""
        whole = len(sequence.prefix) + prompt + len(sequence.suffix) + max(map(len, targets))
        return self.on and (self.longest is None or whole <= self.longest)


class Work(NamedTuple):
    """Floating-point operations, and the same as time goes: with a price for every pass."""

    flops: float = 0
    effort: float = 0

    def times(self, factor: float) -> Work:
        """So much of it."""
        return Work(self.flops * factor, self.effort * factor)


def total(parts: Iterable[Work]) -> Work:
    """All of it together."""
    listed = list(parts)
    return Work(sum(w.flops for w in listed), sum(w.effort for w in listed))


def work(shape: Shape, made: Iterable[Pass], *, backward: bool = False) -> Work:
    """What some passes take."""
    flops = effort = 0.0
    for one in made:
        count = flops_of(shape, one, backward=backward)
        flops += one.times * count
        price = (2 if backward else 1) * PASS_COST * 2 * shape.weights
        effort += one.times * (count + price)
    return Work(flops, effort)


def flops_of(shape: Shape, one: Pass, *, backward: bool = False) -> float:
    """Operations of a pass: 2 x multiplied weights x tokens, attention, logits.

    Backward is the same again, as the weights are frozen and only activations get a gradient;
    attention among tokens that get one counts twice, keys of prefixes get none.
    """
    linear = (shape.weights - shape.last) * one.rows * one.tokens + shape.last * one.last
    logits = shape.vocabulary * shape.width * one.read
    per_pair = 4 * shape.layers * shape.heads * shape.head_size
    own = one.rows * (one.tokens * one.shared + one.pairs)
    forward = 2 * (linear + logits) + per_pair * (one.rows * one.tokens * one.stored + own)
    return 2 * forward + per_pair * own if backward else forward


def answer_passes(
    batch: Sequence[TokenSequence], prompt: int, reuse: Reuse, *, choices: bool
) -> list[Pass]:
    """The passes of `LanguageModel.outcome` for a batch, with its prefixes stored."""
    targets = [s.targets if choices else (s.targets[s.gold],) for s in batch]
    reused = [i for i, s in enumerate(batch) if reuse.takes(s, prompt, targets[i])]
    others = [i for i in range(len(batch)) if i not in set(reused)]
    made = []
    if reused:
        made += _from_prefixes([batch[i] for i in reused], [targets[i] for i in reused], prompt)
    if others:
        made += _in_full([batch[i] for i in others], [targets[i] for i in others], prompt, reuse)
    return made


def _from_prefixes(
    batch: Sequence[TokenSequence], targets: Sequence[Sequence[Ids]], prompt: int
) -> list[Pass]:
    made, shared = [], 0
    if prompt_is_shared(batch, prompt):
        made.append(Pass(1, prompt, 0, 0, stored=len(batch[0].prefix), pairs=causal(prompt)))
        shared = prompt
    trees = [tree(tuple(t)) for t in targets]
    lengths = [
        prompt - shared + len(s.suffix) + more for s, (more, _) in zip(batch, trees, strict=True)
    ]
    for group in group_by_length(lengths):
        longest, read = max(lengths[i] for i in group), sum(trees[i][1] for i in group)
        stored = max(len(batch[i].prefix) for i in group)
        alike = len({batch[i].prefix for i in group}) == 1
        made.append(
            Pass(
                rows=len(group),
                tokens=longest,
                read=read,
                last=read,
                stored=stored,
                shared=shared,
                pairs=causal(longest),
                copied=0 if alike else len(group) * stored,
            )
        )
    return made


def _in_full(
    batch: Sequence[TokenSequence],
    targets: Sequence[Sequence[Ids]],
    prompt: int,
    reuse: Reuse,
) -> list[Pass]:
    lines = [
        (len(s.prefix) + prompt + len(s.suffix) + len(ids) - 1, len(ids))
        for s, own in zip(batch, targets, strict=True)
        for ids in own
    ]
    groups = [lines] if reuse.longest is None else [[line] for line in lines]
    made = []
    for group in groups:
        longest = max(length for length, _ in group)
        read, rows = sum(read for _, read in group), len(group)
        made.append(Pass(rows, longest, read, rows * longest, pairs=longest**2))
    return made


def decoding_passes(
    batch: Sequence[TokenSequence], prompt: int, reuse: Reuse, longest_reply: int, samples: int = 1
) -> list[Pass]:
    """The passes that answer a batch freely; all rows go on until the longest reply has ended."""
    if not reuse.on or reuse.longest is not None:
        made = []
        for s in batch:
            whole = len(s.prefix) + prompt + len(s.suffix)
            alone = [Pass(1, whole, 1, whole, pairs=whole**2), *_steps(1, whole, longest_reply)]
            made += alone * samples
        return made
    made, shared = [], 0
    if prompt_is_shared(batch, prompt):
        made.append(Pass(1, prompt, 0, 0, stored=len(batch[0].prefix), pairs=causal(prompt)))
        shared = prompt
    rows, stored = len(batch), max(len(s.prefix) for s in batch) + shared
    own = prompt - shared + max(len(s.suffix) for s in batch)
    copied = 2 * rows * (stored + own)
    made.append(Pass(rows, own, rows, rows, stored=stored, pairs=causal(own), copied=copied))
    return made + _steps(rows * samples, stored + own, longest_reply)


def _steps(rows: int, before: int, longest_reply: int) -> list[Pass]:
    """One token after the other; the first comes from the pass before."""
    times = longest_reply - 1
    if times < 1:
        return []
    room = 2 * before  # the keys' one piece grows to twice what it holds
    while room < before + times:
        room = 2 * (room + 1)
    mean = before + (times + 1) / 2
    return [Pass(rows, 1, rows, rows, stored=mean, copied=rows * room, times=times)]


def prefix_passes(lengths: Iterable[tuple[int, int]], together: int, few: int) -> list[Pass]:
    """The passes that build prefixes: (tokens, of them an opening that is there) of each prefix."""
    groups: dict[tuple[int, int], int] = {}
    for length, opening in lengths:
        groups[length, opening] = groups.get((length, opening), 0) + 1
    made = []
    for (length, opening), count in groups.items():
        new = length - opening
        if not new:
            continue
        size = max(1, together // new)
        for start in range(0, count, size):
            rows = max(min(size, count - start), -(-few // new))
            made.append(Pass(rows, new, 0, 0, stored=opening, pairs=causal(new)))
    return made


def prompt_is_shared(batch: Sequence[TokenSequence], prompt: int) -> bool:
    """Whether the prompt is run once for the whole batch; see `PrefixStore.context_of`."""
    first = batch[0].prefix
    return len(batch) > 1 and prompt > 0 and all(s.suffix and s.prefix == first for s in batch)


@functools.lru_cache(maxsize=4096)
def tree(targets: tuple[Ids, ...]) -> tuple[int, int]:
    """Tokens that the tree of targets adds to a row, and places where it is read off."""
    inner = {ids[:depth] for ids in targets for depth in range(len(ids))}
    return len(inner - {()}), len(inner)


def causal(tokens: int) -> int:
    """Query-key pairs that are multiplied among so many tokens; later keys by whole blocks."""
    if not tokens:
        return 0
    block = math.ceil(tokens / math.ceil(tokens / BLOCK))
    starts = range(0, tokens, block)
    return sum((min(s + block, tokens) - s) * min(s + block, tokens) for s in starts)


def activation_bytes(shape: Shape, made: Iterable[Pass], *, backward: bool) -> float:
    """Bytes that passes hold at their peak, by what a layer of today's models keeps.

    With a gradient every layer's activations of all passes stay; without, one layer's of one pass.
    A measured step says by how much this is off.
    """
    per_token = 4 * shape.width + 3 * shape.inner
    per_token += 2 * (shape.heads + shape.kv_heads) * shape.head_size
    sizes = []
    for one in made:
        tokens = one.rows * one.tokens
        pairs = tokens * (one.stored + one.shared) + one.rows * one.pairs
        layer = (tokens * per_token + shape.heads * pairs) * shape.itemsize
        keys = (one.copied + tokens) * shape.token_bytes()
        sizes.append(keys + layer * (shape.layers if backward else 1))
    return sum(sizes) if backward else max(sizes, default=0.0)
