"""Generate free answers from a refined prompt."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Steps
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from embedgrad.events import Report, quiet, scoring
from embedgrad.model.answer_batch import AnswerBatch, choose, read
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.kv_cache import CachedContext
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.report.terminal.bars import show

if TYPE_CHECKING:
    from embedgrad.model.language_model import LanguageModel

Waiting = Sequence[tuple[TokenSequence, Sequence[Generation]]]
"""Sequences with the answers that are to be written to each."""

LEFT_OUT = 0.25  # share of a batch's answers that must be over before the others' keys are copied


@final
class Reply(NamedTuple):
    """A free answer; `cut`: it did not end by itself. `ids` are its tokens without the end."""

    text: str
    cut: bool
    ids: Ids = ()


def reply(generation: Generation) -> Reply:
    """An answer's text, and whether it was cut."""
    return Reply(generation.text, cut=not generation.ended, ids=tuple(generation.ids))


def without_copies(decoding: Decoding) -> tuple[Decoding, int]:
    """What to decode, and how often it counts: without a temperature all samples are alike."""
    if decoding.temperature:
        return decoding, 1
    return replace(decoding, samples=1), decoding.samples


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

    See `generate`; greedy answers have the tokens that greedy `transformers` `generate` gives for
    each sequence alone.
    """
    decoding, copies = without_copies(decoding)
    found = generate(
        model,
        prompt,
        sequences,
        decoding,
        end_ids=end_ids,
        batch_size=batch_size,
        numbers=numbers,
        report=report,
    )
    return [tuple(map(reply, samples)) * copies for samples in found]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Prompt | Tensor,
    sequences: Sequence[TokenSequence],
    decoding: Decoding,
    *,
    end_ids: Ids,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    report: Report = quiet,
) -> list[list[Generation]]:
    """The tokens of `decoding.samples` free answers per sequence.

    Sequences of a batch may have any lengths: padding changes nothing. What is drawn for a
    sample depends on the seed, the sequence's number (unset: its place) and the sample's, and on
    nothing else. `batch_size` counts answers that are decoded together: where some are over, the
    next take their places. `report` gets the number of sequences done.
    """
    prompt_PD = join_spans(prompt)
    start = functools.partial(begin, model, prompt_PD, decoding, end_ids)
    made = [
        [start(s, (i if numbers is None else numbers[i], n)) for n in range(decoding.samples)]
        for i, s in enumerate(sequences)
    ]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prefix))
    waiting = [(sequences[i], made[i]) for i in order]
    reported = ended = 0
    for new in _ends(model, prompt_PD, waiting, batch_size):
        ended += new
        done = ended // decoding.samples
        if done > reported:
            reported = done
            report(scoring("replies", done, len(sequences)))
    return made


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
    generation = begin(model, prompt_PD, decoding, end_ids, sequence, (0, 0), watched=True)
    if model.forward.one_by_one:
        steps: Steps[int, None, None] = _steps_in_full(model, prompt_PD, sequence, generation)
    else:
        steps = _steps(model, prompt_PD, [(sequence, [generation])], 1)
    sent = 0
    with closing(steps):
        for _ in steps:
            if piece := generation.certain[sent:]:
                sent += len(piece)
                yield piece
    whole = reply(generation)
    if whole.text[sent:]:
        yield whole.text[sent:]
    return whole


@torch.no_grad()
def next_logits(
    model: LanguageModel, prompt_PD: Tensor, sequences: Sequence[TokenSequence]
) -> Tensor:
    """Logits [B, V] of the first token of each answer."""
    if not model.forward.one_by_one:
        return read(model, model.prefixes.context_of(prompt_PD, sequences), sequences)[0]
    contexts = (model.forward.embed_in_full(prompt_PD, s) for s in sequences)
    return torch.cat([model.forward.last_logits(embeds) for embeds in contexts])


def begin(
    model: LanguageModel,
    prompt_PD: Tensor,
    decoding: Decoding,
    end_ids: Ids,
    sequence: TokenSequence,
    number: tuple[int, int],
    *,
    watched: bool = False,
) -> Generation:
    """An answer of no tokens yet, as long as the context has room for."""
    room = model.info.context - sequence.length(len(prompt_PD))
    most = decoding.max_new_tokens
    if room >= 0:  # a sequence that is too long already was let through on purpose
        most = min(most, room + 1)  # the last token need not be read again
    return Generation(
        model.tokenizer, decoding, end_ids=end_ids, most=most, number=number, watched=watched
    )


def _ends(model: LanguageModel, prompt_PD: Tensor, waiting: Waiting, rows: int) -> Iterator[int]:
    """Decode everything; yields how many answers are over, whenever some are."""
    if not model.forward.one_by_one:
        yield from _steps(model, prompt_PD, waiting, rows)
        return
    for sequence, generations in waiting:
        for generation in generations:
            _decode_in_full(model, prompt_PD, sequence, generation)
            yield 1


@torch.inference_mode()
def _steps(
    model: LanguageModel, prompt_PD: Tensor, waiting: Waiting, rows: int
) -> Steps[int, None, None]:
    """Decode answers, up to `rows` at a time, a token of each; yields how many that ended.

    Answers that are over are left out once they are many enough to be worth a copy of the others'
    keys, and those that wait take their rows (continuous batching: Yu et al. 2022, Orca). Samples
    of a sequence share the pass over what is before them.
    """
    queue = deque(
        (sequence, generations[first : first + rows])
        for sequence, generations in waiting
        for first in range(0, len(generations), rows)
    )
    batch: AnswerBatch | None = None
    context: CachedContext | None = None
    sequences: list[TokenSequence] = []
    while queue or batch is not None:
        entering = list[tuple[TokenSequence, Sequence[Generation]]]()
        free = rows - (0 if batch is None else len(batch.generations))
        while queue and len(queue[0][1]) <= free:
            entering.append(queue.popleft())
            free -= len(entering[-1][1])
        if entering:
            before, sequences = sequences, [sequence for sequence, _ in entering]
            if context is None or len(sequences) > 1 or sequences[0] is not before[0]:
                # Not in inference mode: training goes through stored prefixes.
                with torch.inference_mode(False), torch.no_grad():
                    context = model.prefixes.context_of(prompt_PD, sequences)
            new = AnswerBatch.enter(model, context, entering)
            running = [new] if batch is None else [batch, new]
            yield new.over
        else:
            assert batch is not None
            yield batch.step(model)
            running = [batch]
        everyone = sum(len(part.generations) for part in running)
        over = sum(part.over for part in running)
        if over == everyone:
            batch = None
        elif len(running) > 1 or over >= LEFT_OUT * everyone:
            batch = AnswerBatch.join(running)
        else:
            (batch,) = running


@torch.no_grad()
def _decode_in_full(
    model: LanguageModel,
    prompt_PD: Tensor,
    sequence: TokenSequence,
    generation: Generation,
    after_token: Callable[[], None] = lambda: None,
) -> None:
    """One answer by `transformers` `generate`, which gets its tokens from `generation`."""
    if not model.forward.can_generate:
        _decode_without_cache(model, prompt_PD, sequence, generation, after_token)
        return

    def pick(_: Tensor, scores: Tensor) -> Tensor:
        if generation.over:
            return scores
        token = choose(scores, [generation])
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
            logits_processor=LogitsProcessorList([pick]),
            stopping_criteria=StoppingCriteriaList([over]),
        )


def _decode_without_cache(
    model: LanguageModel,
    prompt_PD: Tensor,
    sequence: TokenSequence,
    generation: Generation,
    after_token: Callable[[], None],
) -> None:
    """One answer, every token in a full pass over all before it."""
    embeds = model.forward.embed_in_full(prompt_PD, sequence)
    while not generation.over:
        token = choose(model.forward.last_logits(embeds), [generation])
        generation.add(int(token))
        after_token()
        embeds = torch.cat([embeds, model.forward.embed(token[None])], dim=1)


def _steps_in_full(
    model: LanguageModel, prompt_PD: Tensor, sequence: TokenSequence, generation: Generation
) -> Steps[int, None, None]:
    """The same, a token at a time: `generate` runs in a thread, as it has no other way to yield."""
    added: SimpleQueue[bool] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        answer = model, prompt_PD, sequence, generation
        work = pool.submit(_decode_in_full, *answer, lambda: added.put(True))
        work.add_done_callback(lambda _: added.put(False))
        try:
            while added.get():
                yield 0
            work.result()
        finally:
            generation.over = True  # nobody may read the rest
