"""KV cache of one forward pass, and the masks over it.

Every token has a position in its sequence and an interval of branches. A token sees those that are
no later than itself and whose interval holds its own beginning, so that padding anywhere, ragged
prefixes, choices side by side and sliding windows are one rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from transformers import DynamicCache

from embedgrad.model.prefix_cache import CachedPrefix

TRUNK = 2**31 - 1  # where the trunk's interval ends


@final
class TokenLayout(NamedTuple):
    """Positions and intervals of tokens, shape [B, T] each; B may be 1 for a whole batch.

    The trunk is [0, TRUNK); a branch is [enter, leave) and holds the branches behind it; padding is
    [-1, -1), which nothing sees.
    """

    positions: Tensor
    enter: Tensor
    leave: Tensor

    @classmethod
    def trunk(cls, positions_BT: Tensor) -> TokenLayout:
        """Tokens that all later ones see; padding where a position is negative."""
        real = positions_BT >= 0
        return cls(positions_BT, torch.where(real, 0, -1), torch.where(real, TRUNK, -1))

    def see(self, keys: TokenLayout, window: int | None) -> Tensor:
        """Which keys each token sees, within a sliding window if there is one: bool [B, T, K]."""
        at, enter = self.positions[:, :, None], self.enter[:, :, None]
        key = keys.positions[:, None]
        seen = (key <= at) & (keys.enter[:, None] <= enter) & (enter < keys.leave[:, None])
        return seen if window is None else seen & (key > at - window)


@final
class CachedKV(NamedTuple):
    """Keys and values of tokens before a pass: per layer [B or 1, key-value heads, K, size].

    `plain`: every token of the pass sees all of them, sliding windows aside.
    """

    keys: Sequence[Tensor] | Tensor
    values: Sequence[Tensor] | Tensor
    layout: TokenLayout
    plain: bool

    @property
    def length(self) -> int:
        """Tokens, with padding."""
        return self.layout.positions.shape[1]


@final
class CachedContext(NamedTuple):
    """What a batch's own tokens attend to: each sequence's prefix, and a prompt run once for all.

    `before` counts the tokens before each sequence's own; `prompt_PD` are the refined rows still to
    be placed among those. `begun` counts the tokens of every suffix that the prompt holds.
    """

    prefixes: list[CachedPrefix]
    prompt: CachedKV | None
    before: list[int]
    prompt_PD: Tensor
    begun: int = 0

    def collect(self, group: Sequence[int]) -> list[CachedKV]:
        """Keys and values for the given sequences of the batch."""
        stacked = stack_prefixes([self.prefixes[i] for i in group], self.prompt_PD.device)
        return stacked if self.prompt is None else [*stacked, self.prompt]


class KVCache(DynamicCache, ABC):
    """The cache that `transformers` gets for a pass, with the masks over its keys.

    `update` keeps a layer's new keys and values and returns those that the model computes with.
    `joined` is for a model with attention code of its own, which gets all keys in one piece.
    """

    def __init__(self, cached: Sequence[CachedKV] = ()):
        super().__init__()
        self.cached = tuple(cached)
        self.joined = False
        self.attended: set[int] = set()  # layers whose attention was ours
        self.kinds: Sequence[str] = ()  # of every layer; empty where all are of one kind
        self.masks: dict[str, list[Tensor | None]] = {}
        self.own_keys: list[Tensor] = []
        self.own_values: list[Tensor] = []

    def see(
        self, layout: TokenLayout, windows: Mapping[str, int | None], dtype: torch.dtype
    ) -> None:
        """Make masks for each kind of layer, one per cached piece and one for the pass's tokens."""
        own = self.own_layout(layout)
        # Padding sees itself, because a softmax over nothing is NaN.
        tokens, count = layout.positions.shape[1], own.positions.shape[1]
        itself = torch.eye(tokens, count, dtype=torch.bool, device=layout.positions.device)
        itself = itself.roll(count - tokens, dims=1) & (layout.enter < 0)[:, :, None]
        for kind, window in windows.items():
            masks = [
                None
                if piece.plain and window is None
                else _additive(layout.see(piece.layout, window), dtype)
                for piece in self.cached
            ]
            self.masks[kind] = [*masks, _additive(layout.see(own, window) | itself, dtype)]

    @abstractmethod
    def own_layout(self, layout: TokenLayout) -> TokenLayout:
        """Layout of the keys that `update` returns besides the cached ones; called once a pass."""

    def joint_mask(self, kind: str) -> Tensor:
        """The mask [B, 1, T, K] for the model: over all keys if it joins them, else its own.

        `transformers` takes a mask of four dimensions as it is.
        """
        *stored, own = self.masks[kind]
        assert own is not None
        if not self.joined:
            return own
        shape = own.shape[:3]
        parts = [
            own.new_zeros(*shape, piece.length) if mask is None else mask.expand(*shape, -1)
            for mask, piece in zip(stored, self.cached, strict=True)
        ]
        return torch.cat([*parts, own], dim=3)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(piece.length for piece in self.cached)


@final
class FixedKVCache(KVCache):
    """A KV cache for a single pass; stored keys are not copied, `attention.attend` sees them."""

    def own_layout(self, layout: TokenLayout) -> TokenLayout:
        return layout

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        assert layer_idx == len(self.own_keys), "a layer was left out, or shares another's keys"
        self.own_keys.append(key_states)
        self.own_values.append(value_states)
        if not self.joined:
            return key_states, value_states
        batch = len(key_states)
        keys, values = (
            [part[layer_idx].to(key_states.device).expand(batch, -1, -1, -1) for part in parts]
            for parts in ([p.keys for p in self.cached], [p.values for p in self.cached])
        )
        return torch.cat([*keys, key_states], dim=2), torch.cat([*values, value_states], dim=2)


@final
class GrowingKVCache(KVCache):
    """A KV cache that every pass adds to, for decoding token by token.

    All keys of a layer lie in one piece, new ones behind it; the room doubles when it is full.
    """

    def __init__(self, cached: Sequence[CachedKV], batch: int):
        super().__init__()
        self._before = tuple(cached)
        self._layouts = [TokenLayout(*(p.expand(batch, -1) for p in c.layout)) for c in cached]

    def own_layout(self, layout: TokenLayout) -> TokenLayout:
        parts = zip(*self._layouts, layout, strict=True)
        self._layouts = [TokenLayout(*(torch.cat(part, dim=1) for part in parts))]
        return self._layouts[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        end = self._layouts[0].positions.shape[1]
        start = end - key_states.shape[2]
        grown = []
        for name, stored, new in (
            ("keys", self.own_keys, key_states),
            ("values", self.own_values, value_states),
        ):
            first = layer_idx == len(stored)
            if first or stored[layer_idx].shape[2] < end:
                room, at = new.new_empty(*new.shape[:2], 2 * end, new.shape[3]), 0
                old = [getattr(piece, name)[layer_idx] for piece in self._before]
                for keys in old if first else [stored[layer_idx][:, :, :start]]:
                    room[:, :, at : at + keys.shape[2]] = keys
                    at += keys.shape[2]
                stored[layer_idx : layer_idx + 1] = [room]
            stored[layer_idx][:, :, start:end] = new
            grown.append(stored[layer_idx][:, :, :end])
        key, value = grown
        return key, value

    @classmethod
    def join(cls, parts: Sequence[tuple[GrowingKVCache, Tensor]]) -> GrowingKVCache:
        """A copy of rows of several caches, also repeated, without padding that all of them have.

        Each cache comes with the indices [N] of its rows.
        """
        layouts = [
            [
                torch.cat([p.index_select(0, rows) for p in fields], dim=1)
                for fields in zip(*layout, strict=True)
            ]
            for layout, rows in ((cache._layouts, rows) for cache, rows in parts)
        ]
        reals = [enter >= 0 for _, enter, _ in layouts]
        longest = max(int(real.sum(dim=1).max()) for real in reals)
        columns = [real.long().argsort(dim=1, stable=True)[:, -longest:] for real in reals]
        copy = cls((), 0)
        fields = zip(*layouts, strict=True)
        pads = [longest - at.shape[1] for at in columns]
        copy._layouts = [
            TokenLayout(
                *(
                    torch.cat(
                        [
                            torch.nn.functional.pad(own.gather(1, at), (pad, 0), value=fill)
                            for own, at, pad in zip(field, columns, pads, strict=True)
                        ]
                    )
                    for field, fill in zip(fields, (0, -1, -1), strict=True)
                )
            )
        ]
        for name in ("own_keys", "own_values"):
            for stored in zip(*(getattr(cache, name) for cache, _ in parts), strict=True):
                total, first = sum(len(rows) for _, rows in parts), stored[0]
                room = first.new_empty(total, first.shape[1], 2 * longest, first.shape[3])
                start = 0
                for own, (_, rows), at, pad in zip(stored, parts, columns, pads, strict=True):
                    place = room[start : start + len(rows)]
                    place[:, :, :pad] = 0
                    index = at[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
                    some = own.index_select(0, rows.to(own.device))
                    place[:, :, pad:longest] = some.gather(2, index.to(own.device))
                    start += len(rows)
                getattr(copy, name).append(room)
        return copy


def stack_prefixes(prefixes: Sequence[CachedPrefix], device: torch.device) -> list[CachedKV]:
    """Prefixes of a batch as one piece, padded on the left; one shared prefix is not copied."""
    lengths = [prefix.length for prefix in prefixes]
    longest = max(lengths)
    if not longest:
        return []
    first = prefixes[0]
    if all(prefix is first for prefix in prefixes):
        keys, values, lengths = first.keys[:, None], first.values[:, None], [longest]
    else:
        some = prefixes[lengths.index(longest)]
        keys, values = (
            part.new_empty(part.shape[0], len(prefixes), part.shape[1], longest, part.shape[3])
            for part in (some.keys, some.values)
        )
        for b, prefix in enumerate(prefixes):
            padding = longest - prefix.length
            keys[:, b, :, :padding] = values[:, b, :, :padding] = 0
            if prefix.length:
                keys[:, b, :, padding:] = prefix.keys
                values[:, b, :, padding:] = prefix.values
    positions = torch.arange(longest)[None] - longest + torch.tensor(lengths)[:, None]
    layout = TokenLayout.trunk(positions.to(device))
    return [CachedKV(keys, values, layout, plain=min(lengths) == longest)]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores, shape [B, 1, T, K]; boolean ones mean different things to models."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
