"""The frozen model itself: embeddings in, logits out, one pass at a time.

Masks and positions are made here, by position and branch, so padding anywhere, ragged stored keys
and sliding windows are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from embedgrad.capabilities import attention_windows, no_reuse, rope_limit
from embedgrad.cutting import Ids
from embedgrad.loading import LoadedModel


class FrozenModel:
    """A frozen causal language model that takes rows of an embedding table.

    `reuse_off` says why stored keys and values cannot be used with it ("": they can),
    `longest_reuse` up to which length they can (None: any).
    """

    def __init__(self, loaded: LoadedModel):
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.info = loaded.info
        self.device = loaded.model.device
        self.dtype = loaded.model.dtype
        self._table: Any = loaded.model.get_input_embeddings()
        config = loaded.model.config.get_text_config(decoder=True)
        self._windows = attention_windows(config)
        self.longest_reuse = rope_limit(config)
        self.reuse_off = no_reuse(loaded.model, config)

    @property
    def end_ids(self) -> Ids:
        """Tokens that end an answer, by the model's generation settings and its tokenizer."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return tuple({int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None})

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows of tokens, shape [T, D], in the space that `inputs_embeds` takes.

        fp32, whatever the model's precision; float64 for a float64 model.
        """
        rows = self._embed(torch.tensor(ids, dtype=torch.long, device=self.device))
        return rows if rows.dtype == torch.float64 else rows.float()

    def vocabulary_rows(self) -> Tensor:
        """Rows of every token, shape [V, D], as `embed` gives them."""
        return self.embed(range(self._table.num_embeddings))

    def splice(self, ids_BT: Tensor, prompt_at: Tensor, rows_PD: Tensor) -> Tensor:
        """Embeddings [B, T, D] in the model's dtype, the rows at flat positions `prompt_at`."""
        with torch.no_grad():
            embeds = self._embed(ids_BT)
        if not len(prompt_at):
            return embeds
        rows = rows_PD.to(embeds).repeat(len(ids_BT), 1)
        return embeds.flatten(0, 1).index_copy(0, prompt_at, rows).view_as(embeds)

    def forward(
        self,
        embeds_BTD: Tensor,
        positions_BT: Tensor,
        branches_BT: Tensor,
        past: DynamicCache | None,
        past_keys: tuple[Tensor, Tensor],
        keep_BT: Tensor,
    ) -> Tensor:
        """Logits [N, V] at the N kept positions; adds this pass's keys and values to `past`.

        Branches are -1 on padding, 0 on the trunk, and c for the c-th target. `past_keys` holds
        positions and branches of the keys in `past`, shape [B, K] each.
        """
        key_positions = torch.cat([past_keys[0], positions_BT], dim=1)
        key_branches = torch.cat([past_keys[1], branches_BT], dim=1)
        self.forget_longest_pass()
        output = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=self._masks(positions_BT, branches_BT, key_positions, key_branches),
            position_ids=positions_BT,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=keep_BT,
        )
        logits: Tensor = output.logits
        return logits

    def full_pass(self, embeds_BTD: Tensor, mask_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Logits [N, V] at the N kept positions, by the model's own masks; padding on the right."""
        self.forget_longest_pass()
        output = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            use_cache=False,
            logits_to_keep=keep_BT,
        )
        logits: Tensor = output.logits
        return logits

    def _masks(
        self,
        positions_BT: Tensor,
        branches_BT: Tensor,
        key_positions_BK: Tensor,
        key_branches_BK: Tensor,
    ) -> Any:
        query, branch = positions_BT[:, :, None], branches_BT[:, :, None]
        key, key_branch = key_positions_BK[:, None, :], key_branches_BK[:, None, :]
        seen = (key <= query) & ((key_branch == 0) | ((key_branch == branch) & (branch > 0)))
        # Padding sees itself, because a softmax over nothing is NaN.
        length, slots = positions_BT.shape[1], key_positions_BK.shape[1]
        itself = torch.eye(length, slots, dtype=torch.bool, device=self.device).roll(
            slots - length, dims=1
        )
        padding = itself & (branch < 0)
        masks = {}
        for kind, window in self._windows.items():
            near = seen if window is None else seen & (key > query - window)
            hidden = ~(near | padding)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            masks[kind] = mask.masked_fill(hidden, torch.finfo(self.dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def forget_longest_pass(self) -> None:
        """Dynamic rotary scaling would carry its longest pass over into shorter ones."""
        if self.longest_reuse is not None:
            module: Any
            for module in self.model.modules():
                if hasattr(module, "max_seq_len_cached"):
                    module.max_seq_len_cached = 0

    def _embed(self, ids: Tensor) -> Tensor:
        embeds = self._table(ids)
        assert isinstance(embeds, Tensor)
        return embeds
