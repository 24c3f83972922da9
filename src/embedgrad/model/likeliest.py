"""Find the likeliest tokens in every place of given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from embedgrad.model.kv_cache import FixedKVCache
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.packing import Packing
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

LOGIT_BYTES = 2**27  # of a pass
PASS_TOKENS = 4096


def likeliest_tokens(
    model: LanguageModel, prompt_PD: Tensor, sequences: Sequence[TokenSequence], k: int
) -> Iterator[tuple[Ids, ...]]:
    """For each sequence, in each place of its right answer, the k likeliest tokens, best first.

    `LanguageModel.outcome` reads their log-probabilities.
    """
    for batch in _batches(sequences, len(prompt_PD), model.info.vocabulary):
        for logits_TV in _logits(model, prompt_PD, batch):
            ids_TK = logits_TV.topk(min(k, logits_TV.shape[1]), dim=1).indices
            yield tuple(map(tuple, ids_TK.tolist()))


@torch.no_grad()
def _logits(
    model: LanguageModel, prompt_PD: Tensor, batch: Sequence[TokenSequence]
) -> list[Tensor]:
    """Logits [T, V] in the places of each sequence's right answer."""
    answers = [sequence.targets[sequence.gold] for sequence in batch]
    if model.forward.one_by_one:
        return [
            _logits_in_full(model, prompt_PD, sequence, answer)
            for sequence, answer in zip(batch, answers, strict=True)
        ]
    context = model.prefixes.context_of(prompt_PD, batch)
    scored = [(s, (answer,), ()) for s, answer in zip(batch, answers, strict=True)]
    packing = Packing.behind(context, scored, 1)
    everyone = range(len(batch))
    packed = packing.tensors(everyone, model.device)
    embeds = model.forward.splice(packed.ids_BT, packed.prompt_at, context.prompt_PD)
    cache = FixedKVCache(context.collect(everyone))
    logits_NV = model.forward.logits(embeds, packed.layout, cache, packed.keep_BT)
    return list(torch.split(logits_NV, [len(answer) for answer in answers]))


def _logits_in_full(
    model: LanguageModel, prompt_PD: Tensor, sequence: TokenSequence, answer: Ids
) -> Tensor:
    read = torch.tensor([sequence.inputs_of(answer)[:-1]], dtype=torch.long, device=model.device)
    before = model.forward.embed_in_full(prompt_PD, sequence)
    embeds = torch.cat([before, model.forward.embed(read)], dim=1)
    mask_BT = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    keep_BT = mask_BT.cumsum(1) > embeds.shape[1] - len(answer)
    return model.forward.full_pass(embeds, mask_BT, keep_BT)


def _batches(
    sequences: Sequence[TokenSequence], prompt: int, vocabulary: int
) -> Iterator[list[TokenSequence]]:
    """Neighbors whose logits and keys take little memory together."""
    batch: list[TokenSequence] = []
    room = logits = tokens = 0
    for sequence in sequences:
        room = len(sequence.targets[sequence.gold])
        logits, tokens = logits + 4 * vocabulary * room, tokens + sequence.length(prompt) + room
        if batch and (logits > LOGIT_BYTES or tokens > PASS_TOKENS):
            yield batch
            batch = []
            logits, tokens = 4 * vocabulary * room, sequence.length(prompt) + room
        batch.append(sequence)
    if batch:
        yield batch
