"""Forward pass of the frozen model: embeddings to log-probabilities.

Positions, masks and attention over stored keys are ours (`kv_cache`, `attention`); the layers are
the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from embedgrad.errors import ModelError
from embedgrad.model.attention import attend_to
from embedgrad.model.capabilities import attention_windows, rope_limit, why_not_reusable
from embedgrad.model.deep import NOT_DEEP, Deep, DeepLayers, layer_list
from embedgrad.model.kv_cache import CachedContext, FixedKVCache, KVCache, TokenLayout
from embedgrad.model.loading import LoadedModel
from embedgrad.model.loading.spread import Offloaded
from embedgrad.model.lockstep import Lockstep
from embedgrad.model.packing import (
    PackedBatch,
    Packing,
    Scored,
    cells_of,
    full_context,
    group_by_length,
    table,
)
from embedgrad.model.token_logprobs import hidden_logprobs, token_logprobs
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import DROPPED, MEAN, TokenSequence


@final
class ForwardPass:
    """Passes through a frozen causal language model that takes rows of its embedding table.

    `why_not_reusable` says why stored keys and values cannot be used with it (None: they can),
    `longest_reuse` up to which length they can (None: any).
    """

    def __init__(self, loaded: LoadedModel):
        self.model: Any = loaded.model
        self.vocabulary = loaded.info.vocabulary
        self.device = loaded.model.device
        self.dtype = loaded.model.dtype
        self._table: Any = loaded.model.get_input_embeddings()
        self._config: Any = loaded.model.config.get_text_config(decoder=True)
        self._windows = attention_windows(self._config)
        # The kind of each layer; empty where all are of one kind.
        self._kinds = list(getattr(self._config, "layer_types", None) or ())
        self.longest_reuse = rope_limit(self._config)
        self.why_not_reusable = why_not_reusable(loaded.model, self._config)
        self._lock = threading.RLock()
        # `capabilities.try_reuse` and `try_generate` find these out.
        self.joins_keys = False
        self.can_generate = True
        self.linear_lm_head = False
        layers = getattr(self._config, "num_hidden_layers", 0)
        self.feed_forward = last_feed_forward(loaded.model, layers)
        self.layers = DeepLayers(loaded.model, layers)
        self._offloaded = Offloaded(loaded.model)
        self.lockstep = Lockstep(loaded.model, loaded.info.width)

    @property
    def one_by_one(self) -> bool:
        """Whether free answers are computed alone, as padded or stored passes may differ."""
        # Where reuse is limited: rotary scaling by length would change under a growing answer.
        return self.why_not_reusable is not None or self.longest_reuse is not None

    def can_reuse(self, sequence: TokenSequence, prompt: int, targets: Sequence[Ids]) -> bool:
        """Whether a sequence can be computed on its stored prefix, with each of its targets."""
        if self.why_not_reusable is not None or self.longest_reuse is None:
            return self.why_not_reusable is None
        length = sequence.length(prompt) + max(len(ids) for ids in targets)
        return length <= self.longest_reuse

    def widen(self, rows_PD: Tensor) -> Tensor:
        """Rows for every layer that begin as the text's. Raises `ModelError`."""
        if self.one_by_one or not self.layers.count:
            why = self.why_not_reusable or "its rotary scaling changes by length"
            raise ModelError(NOT_DEEP.format(f"this model ({why})"))
        return self.layers.widen(rows_PD)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids in the model's dtype."""
        embeds: Tensor = self._table(ids)
        return embeds

    @functools.cached_property
    def _mean_D(self) -> Tensor:
        """Mean of the embedding table's rows."""
        ids = torch.arange(self._table.num_embeddings, device=self.device)
        precise = torch.promote_types(self.dtype, torch.float32)
        sums = [self.embed(part).sum(0, dtype=precise) for part in torch.split(ids, 4096)]
        mean_D: Tensor = torch.stack(sums).sum(0) / len(ids)
        return mean_D.to(self.dtype)

    def splice(self, ids_BT: Tensor, prompt_at: Tensor, prompt_PD: Tensor) -> Tensor:
        """Embeddings [B, T, D] in the model's dtype, the rows at flat positions `prompt_at`.

        What rows for every layer [P, L D] add to later layers goes along to `fill` and `logits`.
        """
        with torch.no_grad():
            embeds = self.embed(ids_BT.clamp(min=0))
            if (ids_BT < 0).any():  # no tokens
                embeds = embeds.masked_fill((ids_BT < 0)[..., None], 0)
                embeds = torch.where((ids_BT == MEAN)[..., None], self._mean_D, embeds)
        if not len(prompt_at):
            return embeds
        rows = prompt_PD.to(embeds).repeat(len(ids_BT), 1)
        own, later = rows[:, : embeds.shape[2]], rows[:, embeds.shape[2] :]
        spliced = embeds.flatten(0, 1).index_copy(0, prompt_at, own).view_as(embeds)
        if later.numel():
            spliced.deep = Deep(prompt_at, self.layers.split(later))  # type: ignore[attr-defined]
        return spliced

    def on_prefixes(
        self, context: CachedContext, scored: Scored, width: int, more: int = 0
    ) -> Tensor:
        """Log-probabilities [B, width + more], on stored keys and values.

        Those of targets are sums; behind them are up to `more` tokens that are read for themselves.
        """
        packing = Packing.behind(context, scored, width, more)
        groups = group_by_length(packing.lengths)
        parts = []
        for group in groups:
            batch = packing.tensors(group, self.device)
            embeds = self.splice(batch.ids_BT, batch.prompt_at, context.prompt_PD)
            logprobs_W = self._logprobs(embeds, batch, FixedKVCache(context.collect(group)))
            parts.append(table(logprobs_W, batch.cells, batch.shape))
        return in_order(parts, [i for group in groups for i in group])

    def fill(self, embeds_BTD: Tensor, layout: TokenLayout, cache: KVCache) -> None:
        """Run the layers only: the cache then holds the keys and values of these tokens."""
        nowhere = torch.zeros_like(layout.positions, dtype=torch.bool)
        self._pass(self.model.base_model, embeds_BTD, layout, cache, nowhere)

    def logits(
        self, embeds_BTD: Tensor, layout: TokenLayout, cache: KVCache, keep_BT: Tensor
    ) -> Tensor:
        """Logits [N, V] at the N kept places."""
        return _select(self._pass(self.model, embeds_BTD, layout, cache, keep_BT).logits, keep_BT)

    def _logprobs(self, embeds_BTD: Tensor, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Log-probabilities [W] of the batch's target tokens."""
        if not self.linear_lm_head:
            logits = self.logits(embeds_BTD, batch.layout, cache, batch.keep_BT)
            return token_logprobs(logits, batch.places, batch.tokens)
        output = self._pass(self.model.base_model, embeds_BTD, batch.layout, cache, batch.keep_BT)
        lm_head = self.model.get_output_embeddings()
        hidden_ND = output.last_hidden_state[batch.keep_BT]
        bias = getattr(lm_head, "bias", None)
        return hidden_logprobs(hidden_ND, lm_head.weight, bias, batch.places, batch.tokens)

    def _pass(
        self, model: Any, embeds_BTD: Tensor, layout: TokenLayout, cache: KVCache, keep_BT: Tensor
    ) -> Any:
        self.forget_longest_pass()
        cache.joined, cache.kinds = self.joins_keys, self._kinds
        cache.see(layout, self._windows, self.dtype)
        masks = {kind: cache.joint_mask(kind) for kind in self._windows}
        arguments = {
            "inputs_embeds": embeds_BTD,
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": layout.positions.clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
        } | ({"logits_to_keep": keep_BT} if model is self.model else {})
        own = contextlib.nullcontext() if self.joins_keys else attend_to(self._config, cache)
        # Attention and hooks belong to the model, so only one pass runs at a time.
        deep = self.layers.adding(getattr(embeds_BTD, "deep", None))
        kept = only_at(self.feed_forward, keep_BT)
        self.lockstep.begin()
        with self._lock, own, deep, kept, self._offloaded.reloading():
            output = model(**arguments)
        if not self.joins_keys and cache.attended != set(range(len(cache.own_keys))):
            raise NotImplementedError("a layer with an attention of its own")
        return output

    def in_full(self, prompt_PD: Tensor, scored: Scored, width: int, more: int = 0) -> Tensor:
        """As `on_prefixes`, each target in a pass over the whole.

        A target that begins another is read in the other's pass.
        """
        self.layers.refuse(prompt_PD)
        if self.longest_reuse is not None and (len(scored), width) != (1, 1):
            # Rotary scaling by length sees the longest line of a batch, so each goes alone.
            return torch.cat([self._alone(prompt_PD, *one, width, more) for one in scored])
        lines = [
            (*full_context(s, len(prompt_PD)), ids, s.inputs_of(ids), begun)
            for b, (s, targets, _) in enumerate(scored)
            for ids, begun in _join_begun(s, targets, b * (width + more))
        ]
        wanted = {
            b * (width + more) + (s.gold if len(targets) > 1 else 0): (b, read)
            for b, (s, targets, read) in enumerate(scored)
        }
        longest = max(len(context) + len(ids) - 1 for context, _, ids, *_ in lines)
        ids_BT = torch.zeros(len(lines), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        prompt_at, read_at = list[int](), list[int]()
        tokens, cells, kept = list[int](), list[int](), 0
        for i, (context, places, ids, inputs, begun) in enumerate(lines):
            full = context + inputs[:-1]
            ids_BT[i, : len(full)] = torch.tensor(full)
            mask_BT[i, : len(full)] = (ids_BT[i, : len(full)] != DROPPED).long()
            keep_BT[i, len(context) - 1 : len(full)] = True
            prompt_at += [i * longest + place for place in places]
            for cell, length in begun:
                tokens += ids[:length]
                cells += [cell] * length
                read_at += range(kept, kept + length)
                b, read = wanted.get(cell, (0, ()))
                for place, token, behind in cells_of(read, b * (width + more) + width):
                    read_at.append(kept + place)
                    tokens.append(token)
                    cells.append(behind)
            kept += len(ids)
        embeds = self.splice(ids_BT.to(self.device), self._indices(prompt_at), prompt_PD)
        logits = self.full_pass(embeds, mask_BT.to(self.device), keep_BT.to(self.device))
        logprobs_W = token_logprobs(logits, self._indices(read_at), self._indices(tokens))
        return table(logprobs_W, self._indices(cells), (len(scored), width + more))

    def _alone(
        self,
        prompt_PD: Tensor,
        sequence: TokenSequence,
        targets: Sequence[Ids],
        read: Sequence[Ids],
        width: int,
        more: int,
    ) -> Tensor:
        """As `in_full` for one sequence [1, width + more], each target in a pass of its own."""
        right = sequence.gold if len(targets) > 1 else 0
        sums, behind = [], prompt_PD.new_zeros(more)
        for c, ids in enumerate(targets):
            wanted = read if c == right else ()
            row = self.in_full(prompt_PD, [(sequence, (ids,), wanted)], 1, more)[0]
            sums.append(row[:1])
            behind = row[1:] if c == right else behind
        missing = prompt_PD.new_zeros(width - len(sums))
        return torch.cat([*sums, missing, behind])[None]

    def embed_in_full(self, prompt_PD: Tensor, sequence: TokenSequence) -> Tensor:
        """Embeddings [1, T, D] of prefix, prompt and suffix."""
        self.layers.refuse(prompt_PD)
        ids, places = full_context(sequence, len(prompt_PD))
        return self.splice(self._indices([ids]), self._indices(places), prompt_PD)

    def _indices(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def full_pass(self, embeds: Tensor, mask_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Logits [N, V] at the N kept places, by the model's own masks; padding on the right."""
        self.forget_longest_pass()
        self.lockstep.begin()
        with self._lock, self._offloaded.reloading():
            more = {"attention_mask": mask_BT, "use_cache": False, "logits_to_keep": keep_BT}
            return _select(self.model(inputs_embeds=embeds, **more).logits, keep_BT)

    def last_logits(self, embeds_1TD: Tensor) -> Tensor:
        """Logits [1, V] behind one sequence, in a full pass."""
        mask_1T = torch.ones(embeds_1TD.shape[:2], dtype=torch.long, device=self.device)
        return self.full_pass(embeds_1TD, mask_1T, mask_1T.cumsum(1) == embeds_1TD.shape[1])

    def forget_longest_pass(self) -> None:
        """Dynamic rotary scaling would carry its longest pass over into shorter ones."""
        if self.longest_reuse is not None:
            for module in self.model.modules():
                if hasattr(module, "max_seq_len_cached"):
                    module.max_seq_len_cached = 0


def _select(logits: Tensor, keep_BT: Tensor) -> Tensor:
    """Logits [N, V], also of a model that gives them in all places (xLSTM)."""
    return logits[keep_BT] if logits.dim() == 3 else logits


def _join_begun(
    sequence: TokenSequence, targets: Sequence[Ids], cell: int
) -> list[tuple[Ids, list[tuple[int, int]]]]:
    """The targets that begin no other, each with the cell and length of all that begin it.

    `cell` is the first target's.
    """
    joined: list[tuple[Ids, list[tuple[int, int]]]] = []
    for c in sorted(range(len(targets)), key=lambda c: -len(targets[c])):
        ids, read = targets[c], sequence.inputs_of(targets[c])[:-1]
        for longer, begun in joined:
            same = sequence.inputs_of(longer)[: len(read)] == read
            if longer[: len(ids)] == ids and same:
                begun.append((cell + c, len(ids)))
                break
        else:
            joined.append((ids, [(cell + c, len(ids))]))
    return sorted(joined, key=lambda line: line[1][0])


def in_order(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Join parts whose lines have the given indices, in the order of the indices."""
    joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if list(order) == sorted(order):
        return joined
    return joined[torch.tensor(order, device=joined.device).argsort()]


def last_feed_forward(model: Any, layers: int) -> nn.Module | None:
    """The `mlp` of the last of the model's layers, where most models have it."""
    found = layer_list(model, layers)
    mlp = getattr(found[-1], "mlp", None) if found else None
    return mlp if isinstance(mlp, nn.Module) else None


@contextlib.contextmanager
def only_at(feed_forward: nn.Module | None, keep_BT: Tensor) -> Iterator[None]:
    """Within the block the module computes kept places only, and gives zeros elsewhere."""
    if feed_forward is None:
        yield
        return

    def gather(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BTD,) = inputs
        return (hidden_BTD[keep_BT.to(hidden_BTD.device)][None],)

    def scatter(_: nn.Module, __: tuple[Tensor], output_1ND: Tensor) -> Tensor:
        zeros = output_1ND.new_zeros(*keep_BT.shape, output_1ND.shape[-1])
        return torch.index_put(zeros, (keep_BT.to(zeros.device),), output_1ND[0])

    before = feed_forward.register_forward_pre_hook(gather)
    with before, feed_forward.register_forward_hook(scatter):  # a handle removes its hook
        yield
