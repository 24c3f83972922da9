"""Generate free answers from a refined prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Steps
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from embedgrad.errors import ModelError
from embedgrad.events import Report, scoring
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.decoding import NOT_FINITE, Decoding, Generation
from embedgrad.model.kv_cache import CachedContext, GrowingKVCache, TokenLayout
from embedgrad.model.packing import Packing
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.report.terminal.bars import show

if TYPE_CHECKING:
    from embedgrad.model.language_model import LanguageModel

LEFT_OUT = 0.25  # share of a batch's answers that must be over before the others' keys are copied


@final
class Reply(NamedTuple):
    """A free answer; `cut`: it did not end by itself."""

    text: str
    cut: bool


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Let a `transformers` model `generate` as if its folder said nothing about generation.

    What a call leaves open is otherwise filled from `generation_config.json`: penalties, minimal
    lengths, forbidden tokens.
    """
    own, model.generation_config = model.generation_config, cast(Any, GenerationConfig)()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def replies(
    model: LanguageModel,
    prompt: Prompt | Tensor,
    sequences: Sequence[TokenSequence],
    decoding: Decoding = Decoding(),
    *,
    end_ids: Ids,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    report: Report = show,
) -> list[tuple[Reply, ...]]:
    """Answers, `decoding.samples` per sequence, without the end token and other special tokens.

    Sequences of a batch may have any lengths: padding changes nothing. Greedy answers have the
    tokens that greedy `transformers` `generate` gives for each sequence alone. What is drawn for a
    sample depends on the seed, the sequence's number (unset: its place) and the sample's, and on
    nothing else. `batch_size` counts answers; `report` gets the number of sequences done.
    """
    prompt_PD = join_spans(prompt)
    begin = functools.partial(_begin, model, prompt_PD, decoding, end_ids)
    answers: dict[int, tuple[Reply, ...]] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prefix))
    samples = decoding.samples if decoding.temperature else 1  # greedy ones are all alike
    size = max(1, batch_size // samples)
    for start in range(0, len(order), size):
        batch = {i: sequences[i] for i in order[start : start + size]}
        generations = {
            i: [begin(s, (i if numbers is None else numbers[i], n)) for n in range(samples)]
            for i, s in batch.items()
        }
        if model.forward.one_by_one:
            for i, sequence in batch.items():
                for generation in generations[i]:
                    _decode_in_full(model, prompt_PD, sequence, generation)
        else:
            context = model.prefixes.context_of(prompt_PD, list(batch.values()))
            for first in range(0, samples, batch_size):
                some = [g for i in batch for g in generations[i][first : first + batch_size]]
                for _ in _steps(model, context, list(batch.values()), some):
                    pass
        for i in batch:
            drawn = tuple(Reply(g.text, cut=not g.ended) for g in generations[i])
            answers[i] = drawn * (decoding.samples // samples)
        report(scoring("replies", len(answers), len(sequences)))
    return [answers[i] for i in range(len(sequences))]


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Prompt | Tensor,
    sequence: TokenSequence,
    decoding: Decoding = Decoding(),
    *,
    end_ids: Ids,
) -> Steps[str, None, Reply]:
    """The first answer in pieces, each as soon as nothing can change it; returns the `Reply`.

    Joined they are the text that `replies` gives.
    """
    prompt_PD = join_spans(prompt)
    generation = _begin(model, prompt_PD, decoding, end_ids, sequence, (0, 0), watched=True)
    if model.forward.one_by_one:
        steps = _steps_in_full(model, prompt_PD, sequence, generation)
    else:
        context = model.prefixes.context_of(prompt_PD, [sequence])
        steps = _steps(model, context, [sequence], [generation])
    sent = 0
    with closing(steps):
        for _ in steps:
            if piece := generation.certain[sent:]:
                sent += len(piece)
                yield piece
    text = generation.text
    if text[sent:]:
        yield text[sent:]
    return Reply(text, cut=not generation.ended)


@torch.no_grad()
def next_logits(
    model: LanguageModel, prompt_PD: Tensor, sequences: Sequence[TokenSequence]
) -> Tensor:
    """Logits [B, V] of the first token of each answer."""
    if not model.forward.one_by_one:
        return _read(model, model.prefixes.context_of(prompt_PD, sequences), sequences)[0]
    logits = []
    for embeds in (model.forward.embed_in_full(prompt_PD, s) for s in sequences):
        mask_BT = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
        keep_BT = mask_BT.cumsum(1) == embeds.shape[1]  # the last place
        logits.append(model.forward.full_pass(embeds, mask_BT, keep_BT))
    return torch.cat(logits)


def _begin(
    model: LanguageModel,
    prompt_PD: Tensor,
    decoding: Decoding,
    end_ids: Ids,
    sequence: TokenSequence,
    number: tuple[int, int],
    *,
    watched: bool = False,
) -> Generation:
    room = model.info.context - sequence.length(len(prompt_PD))
    most = decoding.max_new_tokens
    if room >= 0:  # a sequence that is too long already was let through on purpose
        most = min(most, room + 1)  # the last token need not be read again
    return Generation(
        model.tokenizer, decoding, end_ids=end_ids, most=most, number=number, watched=watched
    )


def _read(
    model: LanguageModel, context: CachedContext, sequences: Sequence[TokenSequence]
) -> tuple[Tensor, Tensor, GrowingKVCache]:
    """Logits [B, V] and positions [B, 1] of each sequence's last token, and the cache behind it."""
    packing = Packing(len(context.prompt_PD), 0, begun=context.begun)
    for before, sequence in zip(context.before, sequences, strict=True):
        packing.add(before, sequence, ())
    everyone = range(len(sequences))
    batch = packing.tensors(everyone, model.device)
    cache = GrowingKVCache(context.collect(everyone), len(sequences))
    embeds = model.forward.splice(batch.ids_BT, batch.prompt_at, context.prompt_PD)
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    logits = model.forward.logits(embeds, batch.layout, cache, last)
    return logits, batch.layout.positions[:, -1:], cache


@torch.inference_mode()
def _steps(
    model: LanguageModel,
    context: CachedContext,
    sequences: Sequence[TokenSequence],
    generations: Sequence[Generation],
) -> Steps[None, None, None]:
    """Decode a batch, a token at a time; the generations of a sequence are next to each other.

    Finished answers are left out of the passes once they are many enough to be worth a copy.
    `context` is made outside, not in inference mode: training goes through stored prefixes.
    """
    logits, positions, cache = _read(model, context, sequences)
    samples = len(generations) // len(sequences)
    kept = torch.arange(len(sequences), device=model.device).repeat_interleave(samples)
    if samples > 1:
        cache, logits, positions = cache.select(kept), logits[kept], positions[kept]
    last = torch.ones_like(positions, dtype=torch.bool)
    while True:
        token = _choose(logits, generations)
        for generation, new in zip(generations, token.tolist(), strict=True):
            generation.add(new)
        yield
        left = [i for i, generation in enumerate(generations) if not generation.over]
        if not left:
            return
        if len(generations) - len(left) >= LEFT_OUT * len(generations):
            generations = [generations[i] for i in left]
            kept = torch.tensor(left, device=model.device)
            cache, token = cache.select(kept), token[kept]
            positions, last = positions[kept], last[kept]
        # A finished one stays where it is: there may be no position behind it.
        moving = torch.tensor([not g.over for g in generations], device=model.device)
        positions = positions + moving[:, None].long()
        embeds = model.forward.embed(token[:, None])
        logits = model.forward.logits(embeds, TokenLayout.trunk(positions), cache, last)


def _choose(logits_NV: Tensor, generations: Sequence[Generation]) -> Tensor:
    """The next token [N] of every generation; any where one is over."""
    if not generations[0].decoding.temperature:
        highest_N, chosen_N = logits_NV.max(dim=1)  # NaN where any logit is
        finite = highest_N.isfinite().tolist()
        if not all(g.over or is_finite for g, is_finite in zip(generations, finite, strict=True)):
            raise ModelError(NOT_FINITE)
        return chosen_N
    chosen = [
        0 if generation.over else generation.choose(logits_V)
        for generation, logits_V in zip(generations, logits_NV.cpu(), strict=True)
    ]
    return torch.tensor(chosen, device=logits_NV.device)


@torch.no_grad()
def _decode_in_full(
    model: LanguageModel,
    prompt_PD: Tensor,
    sequence: TokenSequence,
    generation: Generation,
    after_token: Callable[[], None] = lambda: None,
) -> None:
    """One answer by `transformers` `generate`, which gets its tokens from `generation`."""

    def choose(_: Tensor, scores: Tensor) -> Tensor:
        if generation.over:
            return scores
        token = _choose(scores, [generation])
        generation.add(int(token))
        after_token()
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)

    def over(_: Tensor, scores: object, **__: object) -> Tensor:
        return torch.tensor([generation.over], device=model.device)

    embeds = model.forward.embed_in_full(prompt_PD, sequence)
    model.forward.forget_longest_pass()
    with neutral_generation(model.model):
        model.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=generation.most,
            do_sample=False,
            eos_token_id=list(generation.end_ids) or None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([over]),
        )


def _steps_in_full(
    model: LanguageModel, prompt_PD: Tensor, sequence: TokenSequence, generation: Generation
) -> Steps[None, None, None]:
    """The same, a token at a time: `generate` runs in a thread, as it has no other way to yield."""
    added: SimpleQueue[bool] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        answer = model, prompt_PD, sequence, generation
        work = pool.submit(_decode_in_full, *answer, lambda: added.put(True))
        work.add_done_callback(lambda _: added.put(False))
        try:
            while added.get():
                yield
            work.result()
        finally:
            generation.over = True  # nobody may read the rest
