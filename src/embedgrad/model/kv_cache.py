"""What the tokens of a pass attend to: cached of stored keys and values, and each other.

Every token has a slot: its position in the sequence, and an interval of branches. A token sees what
stands no later than itself and whose interval holds its own beginning, so that padding anywhere,
ragged prefixes, choices side by side and sliding windows are one rule.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from embedgrad.model.prefix_cache import CachedPrefix

TRUNK = 2**31 - 1  # where the trunk's interval ends


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Positions and intervals of tokens, shape [B, T] each; B may be 1 for all rows alike.

    The trunk is [0, TRUNK); a branch is [enter, leave), and holds the branches that go on from it;
    padding is [-1, -1), which nothing sees.
    """

    positions: Tensor
    enter: Tensor
    leave: Tensor

    @classmethod
    def trunk(cls, positions_BT: Tensor) -> TokenLayout:
        """TokenLayout of tokens that all later ones see; padding where a position is negative."""
        real = positions_BT >= 0
        return cls(positions_BT, torch.where(real, 0, -1), torch.where(real, TRUNK, -1))

    def __add__(self, other: TokenLayout) -> TokenLayout:
        pairs = (
            (self.positions, other.positions),
            (self.enter, other.enter),
            (self.leave, other.leave),
        )
        return TokenLayout(*(torch.cat(pair, dim=1) for pair in pairs))

    def expand(self, rows: int) -> TokenLayout:
        """The same slots for so many rows."""
        return TokenLayout(
            *(part.expand(rows, -1) for part in (self.positions, self.enter, self.leave))
        )

    def rows(self, picked: Tensor) -> TokenLayout:
        """The slots of the rows of these numbers."""
        parts = (self.positions, self.enter, self.leave)
        return TokenLayout(*(part.index_select(0, picked) for part in parts))

    def see(self, keys: TokenLayout, window: int | None) -> Tensor:
        """Which keys each token sees, within a sliding window if there is one: bool [B, T, K]."""
        at, enter = self.positions[:, :, None], self.enter[:, :, None]
        key = keys.positions[:, None]
        seen = (key <= at) & (keys.enter[:, None] <= enter) & (enter < keys.leave[:, None])
        return seen if window is None else seen & (key > at - window)


@dataclass(frozen=True, slots=True)
class CachedKV:
    """Keys and values of tokens before a pass: per layer [B or 1, key-value heads, K, size].

    `plain` says that every token of the pass sees all of them, sliding windows aside.
    """

    keys: Sequence[Tensor] | Tensor
    values: Sequence[Tensor] | Tensor
    slots: TokenLayout
    plain: bool

    @property
    def length(self) -> int:
        """Tokens, with padding."""
        return self.slots.positions.shape[1]


class KVCache(DynamicCache):
    """The cache that a model is given for one pass.

    The cached stay where they are: the model gets back the pass's own keys and values only, and
    `attention.attend` looks at the cached. With `joined`, for a model that has its own attention
    code, it gets all of them in one piece.
    """

    def __init__(self, cached: Sequence[CachedKV] = ()):
        super().__init__()
        self.cached = tuple(cached)
        self.joined = False
        self.attended: set[int] = set()  # layers that looked at the cached
        self.kinds: Sequence[str] = ()
        self.masks: dict[str, list[Tensor | None]] = {}
        self.own_keys: list[Tensor] = []
        self.own_values: list[Tensor] = []

    def see(
        self,
        slots: TokenLayout,
        windows: Mapping[str, int | None],
        kinds: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        """Make the masks of a pass: for each kind of layer one per piece, and its own.

        `kinds` names the kind of every layer; empty: there is but one.
        """
        self.kinds = kinds
        own = self._own_slots(slots)
        for kind, window in windows.items():
            masks = [
                None
                if piece.plain and window is None
                else _additive(slots.see(piece.slots, window), dtype)
                for piece in self.cached
            ]
            self.masks[kind] = [*masks, _own_mask(slots, own, window, dtype)]

    def _own_slots(self, slots: TokenLayout) -> TokenLayout:
        """Layout of the keys that `update` returns besides the cached ones; called once a pass."""
        return slots

    def joint_mask(self, kind: str) -> Tensor:
        """The mask [B, 1, T, K] that the model is told: over all keys if it joins them, else own.

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

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember a layer's own keys and values; see the class for what comes back."""
        assert layer_idx == len(self.own_keys), "a layer was left out, or shares another's keys"
        self.own_keys.append(key_states)
        self.own_values.append(value_states)
        if not self.joined:
            return key_states, value_states
        rows = len(key_states)
        keys = [s.keys[layer_idx].expand(rows, -1, -1, -1) for s in self.cached]
        values = [s.values[layer_idx].expand(rows, -1, -1, -1) for s in self.cached]
        return torch.cat([*keys, key_states], dim=2), torch.cat([*values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(piece.length for piece in self.cached)

    def as_cached(self, slots: TokenLayout) -> CachedKV:
        """What a pass without padding or branches made, for the next one to look at."""
        return CachedKV(self.own_keys, self.own_values, slots, plain=True)


class GrowingKVCache(KVCache):
    """A past that its own passes add to, for decoding token by token.

    All keys of a layer lie in one piece, new ones behind it; the room doubles when it is full.
    """

    def __init__(self, cached: Sequence[CachedKV], rows: int):
        super().__init__()
        self._before = tuple(cached)
        self._slots = [piece.slots.expand(rows) for piece in cached]

    def _own_slots(self, slots: TokenLayout) -> TokenLayout:
        self._slots = [functools.reduce(operator.add, [*self._slots, slots])]
        return self._slots[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; gives back all that were written."""
        end = self._slots[0].positions.shape[1]
        start = end - key_states.shape[2]
        grown = []
        for name, stored, new in (
            ("keys", self.own_keys, key_states),
            ("values", self.own_values, value_states),
        ):
            if layer_idx == len(stored):
                stored.append(_room(new, end))
                at = 0
                for piece in self._before:
                    old = getattr(piece, name)[layer_idx]
                    stored[layer_idx][:, :, at : at + piece.length] = old
                    at += piece.length
            elif stored[layer_idx].shape[2] < end:
                more = _room(new, end)
                more[:, :, :start] = stored[layer_idx][:, :, :start]
                stored[layer_idx] = more
            stored[layer_idx][:, :, start:end] = new
            grown.append(stored[layer_idx][:, :, :end])
        key, value = grown
        return key, value

    def rows(self, picked: Tensor) -> GrowingKVCache:
        """A past of its own for the rows of these numbers [N], in their order, also repeated."""
        taken = GrowingKVCache((), 0)
        taken._slots = [slots.rows(picked) for slots in self._slots]
        taken.own_keys = [keys.index_select(0, picked) for keys in self.own_keys]
        taken.own_values = [values.index_select(0, picked) for values in self.own_values]
        return taken


def _room(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty(*like.shape[:2], 2 * tokens, like.shape[3])


def stack_prefixes(prefixes: Sequence[CachedPrefix], device: torch.device) -> list[CachedKV]:
    """Prefixes of a batch as one piece, padded on the left; one shared prefix is not copied."""
    longest = max(prefix.length for prefix in prefixes)
    if not longest:
        return []
    first = prefixes[0]
    if all(prefix is first for prefix in prefixes):
        keys, values = first.keys[:, None], first.values[:, None]
        lengths = [first.length]
    else:
        some = next(prefix for prefix in prefixes if prefix.length)
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
        lengths = [prefix.length for prefix in prefixes]
    positions = torch.arange(longest)[None] - longest + torch.tensor(lengths)[:, None]
    slots = TokenLayout.trunk(positions.to(device))
    return [CachedKV(keys, values, slots, plain=min(lengths) == longest)]


def _own_mask(
    slots: TokenLayout, keys: TokenLayout, window: int | None, dtype: torch.dtype
) -> Tensor:
    """The mask over keys that end with the tokens' own."""
    seen = slots.see(keys, window)
    # Padding sees itself, because a softmax over nothing is NaN.
    tokens, count = seen.shape[1:]
    itself = torch.eye(tokens, count, dtype=torch.bool, device=seen.device)
    itself = itself.roll(count - tokens, dims=1)
    return _additive(seen | (itself & (slots.enter < 0)[:, :, None]), dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores, shape [B, 1, T, K]; boolean ones mean different things to models."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
