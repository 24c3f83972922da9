"""Free answers: decoding from a refined prompt, on top of stored prefixes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from embedgrad.errors import ModelError
from embedgrad.model.backbone import Prompt, joined
from embedgrad.model.decoding import NOT_FINITE, Decoding, Draft
from embedgrad.model.kv_cache import GrowingKVCache, TokenLayout
from embedgrad.model.packing import Packing
from embedgrad.model.prefixes import CachedContext
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

if TYPE_CHECKING:
    from embedgrad.model.language_model import LanguageModel

LEFT_OUT = 0.25  # share of a batch's answers that is over when its keys and values are copied


class Reply(NamedTuple):
    """A free answer; `cut` says that it did not end by itself."""

    text: str
    cut: bool


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
    progress: Callable[[int], None] | None = None,
) -> list[tuple[Reply, ...]]:
    """Answers, `decoding.samples` per sequence, without the end token and other special tokens.

    Rows of a batch may have any lengths: padding changes nothing. Greedy answers have the tokens
    that greedy `transformers` `generate` gives for each row alone. What is drawn for a sample
    depends on the seed, the sequence's number (unset: its place) and the sample's, and on nothing
    else. `batch_size` counts answers; `progress` gets the number of sequences done.
    """
    rows_PD = joined(prompt)
    made: dict[int, tuple[Reply, ...]] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prefix))
    samples = decoding.samples if decoding.temperature else 1  # greedy ones are all alike
    size = max(1, batch_size // samples)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        drafts = {
            i: [
                _draft(
                    model,
                    rows_PD,
                    sequences[i],
                    decoding,
                    end_ids,
                    (i if numbers is None else numbers[i], sample),
                )
                for sample in range(samples)
            ]
            for i in batch
        }
        _decode(model, rows_PD, [(sequences[i], drafts[i]) for i in batch], batch_size)
        for i in batch:
            made[i] = tuple(map(_reply, drafts[i])) * (decoding.samples // samples)
        if progress is not None:
            progress(len(made))
    return [made[i] for i in range(len(sequences))]


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Prompt | Tensor,
    sequence: TokenSequence,
    decoding: Decoding = Decoding(),
    *,
    end_ids: Ids,
) -> Generator[str, None, Reply]:
    """The first answer in pieces, each as soon as nothing can change it; returns the `Reply`.

    Joined they are the text that `replies` gives.
    """
    rows_PD = joined(prompt)
    draft = _draft(model, rows_PD, sequence, decoding, end_ids, (0, 0), watched=True)
    if model.one_by_one:
        steps = _steps_in_full(model, rows_PD, sequence, draft)
    else:
        steps = _steps(model, model.context_of(rows_PD, [sequence]), [sequence], [draft])
    sent = 0
    with closing(steps):
        for _ in steps:
            piece = draft.certain[sent:]
            if piece:
                sent += len(piece)
                yield piece
    reply = _reply(draft)
    if reply.text[sent:]:
        yield reply.text[sent:]
    return reply


def _draft(
    model: LanguageModel,
    rows_PD: Tensor,
    sequence: TokenSequence,
    decoding: Decoding,
    end_ids: Ids,
    number: tuple[int, int],
    *,
    watched: bool = False,
) -> Draft:
    length = len(sequence.prefix) + len(rows_PD) + len(sequence.suffix)
    context = model.info.context
    most = decoding.max_new_tokens
    # A row that is too long already was let through on purpose.
    if length <= context:
        most = min(most, context - length + 1)  # the last token need not be read again
    return Draft(
        model.tokenizer, decoding, end_ids=end_ids, most=most, number=number, watched=watched
    )


def _reply(draft: Draft) -> Reply:
    return Reply(draft.text, not draft.ended)


def _decode(
    model: LanguageModel,
    rows_PD: Tensor,
    batch: Sequence[tuple[TokenSequence, Sequence[Draft]]],
    batch_size: int,
) -> None:
    """Bring every draft of a batch to its end."""
    if model.one_by_one:
        for sequence, drafts in batch:
            for draft in drafts:
                _decode_in_full(model, rows_PD, sequence, draft)
        return
    sequences = [sequence for sequence, _ in batch]
    ahead = model.context_of(rows_PD, sequences)
    for first in range(0, len(batch[0][1]), batch_size):
        some = [draft for _, drafts in batch for draft in drafts[first : first + batch_size]]
        for _ in _steps(model, ahead, sequences, some):
            pass


@torch.inference_mode()
def _steps(
    model: LanguageModel,
    ahead: CachedContext,
    sequences: Sequence[TokenSequence],
    drafts: Sequence[Draft],
) -> Generator[None, None, None]:
    """Decode a batch, a token at a time; the drafts of a sequence stand next to each other.

    Answers that are over are left out of the passes once they are many enough to be worth a copy.

    `ahead` is made outside, not in inference mode: prefixes are stored, and training goes through
    them.
    """
    layout = Packing(len(ahead.rows_PD), 0)
    for before, sequence in zip(ahead.before, sequences, strict=True):
        layout.add(before, sequence.suffix, ())
    everyone = range(len(sequences))
    batch = layout.tensors(everyone, model.device)
    past = GrowingKVCache(ahead.cached(everyone), len(sequences))
    embeds = model.splice(batch.ids_BT, batch.prompt_at, ahead.rows_PD)
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    logits = model.logits(embeds, batch.slots, past, last)
    positions = batch.slots.positions[:, -1:]
    samples = len(drafts) // len(sequences)
    going = torch.arange(len(sequences), device=model.device).repeat_interleave(samples)
    if samples > 1:
        past, logits, positions = past.rows(going), logits[going], positions[going]
    last = torch.ones_like(positions, dtype=torch.bool)
    while True:
        token = _chosen(logits, drafts)
        for draft, new in zip(drafts, token.tolist(), strict=True):
            draft.add(new)
        yield
        left = [i for i, draft in enumerate(drafts) if not draft.over]
        if not left:
            return
        if len(drafts) - len(left) >= LEFT_OUT * len(drafts):
            drafts, going = [drafts[i] for i in left], torch.tensor(left, device=model.device)
            past, token = past.rows(going), token[going]
            positions, last = positions[going], last[going]
        # A row that is over goes along where it is: there may be no position behind it.
        moving = torch.tensor([not draft.over for draft in drafts], device=model.device)
        positions = positions + moving[:, None].long()
        embeds = model.splice(token[:, None], torch.empty(0), ahead.rows_PD)
        logits = model.logits(embeds, TokenLayout.trunk(positions), past, last)


def _chosen(logits_NV: Tensor, drafts: Sequence[Draft]) -> Tensor:
    """The next token [N] of every draft; any where a draft is over."""
    if not drafts[0].decoding.temperature:
        highest_N, chosen_N = logits_NV.max(dim=1)  # NaN where any logit of a row is
        if not all(d.over or h for d, h in zip(drafts, highest_N.isfinite().tolist(), strict=True)):
            raise ModelError(NOT_FINITE)
        return chosen_N
    rows = logits_NV.cpu()
    chosen = [0 if d.over else d.choose(row_V) for d, row_V in zip(drafts, rows, strict=True)]
    return torch.tensor(chosen, device=logits_NV.device)


# -- models without (full) prefix reuse ------------------------------------------------------------


@torch.no_grad()
def _decode_in_full(
    model: LanguageModel,
    rows_PD: Tensor,
    sequence: TokenSequence,
    draft: Draft,
    told: Callable[[], None] = lambda: None,
) -> None:
    """One answer by `transformers` `generate`, which gets its tokens from the draft."""

    def choose(_: Tensor, scores: Tensor) -> Tensor:
        if draft.over:
            return scores
        token = _chosen(scores, [draft])
        draft.add(int(token))
        told()
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)

    def over(_: Tensor, scores: object, **__: object) -> Tensor:
        return torch.tensor([draft.over], device=model.device)

    ids = torch.tensor([sequence.prefix + (0,) * len(rows_PD) + sequence.suffix])
    at = torch.arange(len(rows_PD)) + len(sequence.prefix)
    embeds = model.splice(ids.to(model.device), at.to(model.device), rows_PD)
    model.forget_longest_pass()
    model.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=draft.most,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=list(draft.end_ids) or None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([choose]),
        stopping_criteria=StoppingCriteriaList([over]),
    )


def _steps_in_full(
    model: LanguageModel, rows_PD: Tensor, sequence: TokenSequence, draft: Draft
) -> Generator[None, None, None]:
    """The same, a token at a time: `generate` runs in a thread, as it tells nothing sooner."""
    told: SimpleQueue[bool] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_decode_in_full, model, rows_PD, sequence, draft, lambda: told.put(True))
        work.add_done_callback(lambda _: told.put(False))
        try:
            while told.get():
                yield
            work.result()
        finally:
            draft.over = True  # nobody may want the rest
