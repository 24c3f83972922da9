"""Free answers: decoding from a refined prompt, on top of stored heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedgrad.cutting import Ids
from embedgrad.language_model import LanguageModel
from embedgrad.layout import Layout
from embedgrad.past import Growing, Slots
from embedgrad.reuse import Ahead
from embedgrad.sequence import TokenSequence


class Reply(NamedTuple):
    """A free answer; `cut` says that it did not end by itself."""

    text: str
    cut: bool


@torch.no_grad()
def replies(
    model: LanguageModel,
    rows_PD: Tensor,
    sequences: Sequence[TokenSequence],
    *,
    max_new_tokens: int,
    end_ids: Ids,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Reply]:
    """Greedy answers, one per sequence, without the end token and other special tokens.

    Rows of a batch may have any lengths: padding changes nothing. `progress` gets the number of
    rows done. The same tokens as greedy `transformers` `generate` gives for each row alone.
    """
    answers: dict[int, Reply] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].head))
    # Rotary scaling by length would change under the stored keys of a growing answer.
    alone = bool(model.reuse_off) or model.longest_reuse is not None
    decode = _decode_in_full if alone else _decode
    size = 1 if alone else batch_size
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        rows = [sequences[i] for i in batch]
        made = decode(model, rows_PD, rows, max_new_tokens, end_ids)
        for i, (ids, cut) in zip(batch, made, strict=True):
            answers[i] = Reply(model.tokenizer.decode(ids, skip_special_tokens=True), cut)
        if progress is not None:
            progress(len(answers))
    return [answers[i] for i in range(len(sequences))]


def _decode(
    model: LanguageModel,
    rows_PD: Tensor,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    end_ids: Ids,
) -> list[tuple[list[int], bool]]:
    # Not in inference mode: heads are stored, and training goes through them.
    ahead = model.past_of(rows_PD, sequences)
    with torch.inference_mode():
        return _decode_behind(model, ahead, sequences, max_new_tokens, end_ids)


def _decode_behind(
    model: LanguageModel,
    ahead: Ahead,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    end_ids: Ids,
) -> list[tuple[list[int], bool]]:
    layout = Layout(len(ahead.rows_PD), 0)
    for before, sequence in zip(ahead.before, sequences, strict=True):
        layout.add(before, sequence.tail, ())
    everyone = range(len(sequences))
    batch = layout.tensors(everyone, model.device)
    past = Growing(ahead.stretches(everyone), len(sequences))
    embeds = model.splice(batch.ids_BT, batch.prompt_at, ahead.rows_PD)
    slots = batch.slots
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    ended = torch.zeros(len(sequences), dtype=torch.bool, device=model.device)
    stopped = ended.clone()  # by an end token, not for want of room
    ends = torch.tensor(end_ids, dtype=torch.long, device=model.device)
    answers: list[list[int]] = [[] for _ in sequences]
    room = [_room(model, length) for length in (slots.positions[:, -1] + 1).tolist()]
    for made in range(max_new_tokens):
        token = model.logits(embeds, slots, past, last).argmax(dim=1)
        stopped |= ~ended & torch.isin(token, ends)
        ended |= stopped
        for answer, new, over in zip(answers, token.tolist(), ended.tolist(), strict=True):
            if not over:
                answer.append(new)
        ended |= torch.tensor([made + 1 >= most for most in room], device=model.device)
        if ended.all():
            break
        embeds = model.splice(token[:, None], torch.empty(0), ahead.rows_PD)
        # A row that has ended goes along where it is: there may be no position behind it.
        slots = Slots.trunk(slots.positions[:, -1:] + (~ended[:, None]).long())
        last = torch.ones_like(last[:, -1:])
    return [(ids, not done) for ids, done in zip(answers, stopped.tolist(), strict=True)]


def _room(model: LanguageModel, length: int) -> int:
    """Tokens that can be answered after so many: the last one need not be read again."""
    context = model.info.context
    # A row that is too long already was let through on purpose.
    return context - length + 1 if length <= context else 2**31


def _decode_in_full(
    model: LanguageModel,
    rows_PD: Tensor,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    end_ids: Ids,
) -> list[tuple[list[int], bool]]:
    """One row at a time through `transformers`, for models without (full) head reuse."""
    answers = []
    for sequence in sequences:
        ids = torch.tensor([sequence.head + (0,) * len(rows_PD) + sequence.tail])
        at = torch.arange(len(rows_PD)) + len(sequence.head)
        embeds = model.splice(ids.to(model.device), at.to(model.device), rows_PD)
        model.forget_longest_pass()
        new = model.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=min(max_new_tokens, _room(model, ids.shape[1])),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(end_ids) or None,
            pad_token_id=0,
        )[0].tolist()
        end = next((i for i, token in enumerate(new) if token in end_ids), len(new))
        answers.append((new[:end], end == len(new)))
    return answers
