"""The likeliest tokens in every place of given answers"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from embedgrad.model.kv_cache import FixedKVCache
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.packing import Packing
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

LOGIT_BYTES = 2**27  # of a pass
PASS_TOKENS = 4096  # before the answers, over all sequences of a pass


@final
class Likeliest(NamedTuple):
    """In each of T places the ids of the K likeliest tokens and their log-probabilities."""

    ids: tuple[Ids, ...]
    logprobs_TK: Tensor


@torch.no_grad()
def likeliest(
    model: LanguageModel, prompt_PD: Tensor, sequences: Sequence[TokenSequence], k: int
) -> Iterator[Likeliest]:
    """For each sequence, the tokens that it finds likeliest in the places of its right answer.

    The log-probabilities are those of a float32 softmax over the whole vocabulary.
    """
    k = min(k, model.info.vocabulary)
    for batch in _batches(sequences, len(prompt_PD), model.info.vocabulary):
        if model.why_not_reusable is None and model.forward.longest_reuse is None:
            yield from _on_prefixes(model, prompt_PD, batch, k)
            continue
        for sequence in batch:
            answer = sequence.targets[sequence.gold]
            embeds = model.forward.embed_in_full(prompt_PD, sequence)
            read = torch.tensor([sequence.inputs_of(answer)[:-1]], device=model.device).long()
            embeds = torch.cat([embeds, model.forward.embed(read)], dim=1)
            mask_BT = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
            keep_BT = mask_BT.cumsum(1) > embeds.shape[1] - len(answer)
            yield _top(model.forward.full_pass(embeds, mask_BT, keep_BT), k)


def _on_prefixes(
    model: LanguageModel, prompt_PD: Tensor, batch: Sequence[TokenSequence], k: int
) -> Iterator[Likeliest]:
    context = model.prefixes.context_of(prompt_PD, batch)
    packing = Packing(len(context.prompt_PD), 1)
    answers = [sequence.targets[sequence.gold] for sequence in batch]
    for before, sequence, answer in zip(context.before, batch, answers, strict=True):
        packing.add(before, sequence, (answer,))
    everyone = range(len(batch))
    packed = packing.tensors(everyone, model.device)
    embeds = model.forward.splice(packed.ids_BT, packed.prompt_at, context.prompt_PD)
    cache = FixedKVCache(context.collect(everyone))
    logits_NV = model.forward.logits(embeds, packed.layout, cache, packed.keep_BT)
    # One answer per sequence: its places are kept in order, those of the sequences one by one.
    for logits_TV in logits_NV.split([len(answer) for answer in answers]):
        yield _top(logits_TV, k)


def _top(logits_TV: Tensor, k: int) -> Likeliest:
    wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    logprobs_TK, ids_TK = torch.log_softmax(wide_TV, dim=1).topk(k, dim=1)
    return Likeliest(tuple(map(tuple, ids_TK.tolist())), logprobs_TK.cpu())


def _batches(
    sequences: Sequence[TokenSequence], prompt: int, vocabulary: int
) -> Iterator[list[TokenSequence]]:
    """Neighbors whose logits and keys do not take much memory together."""
    batch: list[TokenSequence] = []
    logits = tokens = 0
    for sequence in sequences:
        logits += 4 * vocabulary * len(sequence.targets[sequence.gold])
        tokens += sequence.length(prompt)
        if batch and (logits > LOGIT_BYTES or tokens > PASS_TOKENS):
            yield batch
            batch, logits = [], 4 * vocabulary * len(sequence.targets[sequence.gold])
            tokens = sequence.length(prompt)
        batch.append(sequence)
    if batch:
        yield batch
