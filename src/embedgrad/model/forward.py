"""The frozen model itself: embeddings in, log-probabilities out, one pass at a time.

Positions, masks and attention over stored keys are ours (`past`, `attention`), the layers are the
model's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedgrad.model.attention import attending
from embedgrad.model.capabilities import attention_windows, layer_kinds, no_reuse, rope_limit
from embedgrad.model.kv_cache import KVCache, TokenLayout
from embedgrad.model.loading import LoadedModel
from embedgrad.model.packing import Batch
from embedgrad.model.token_logprobs import hidden_logprobs, token_logprobs
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Sequencer


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
        self._config: Any = loaded.model.config.get_text_config(decoder=True)
        self._windows = attention_windows(self._config)
        self._kinds = layer_kinds(self._config)
        self.longest_reuse = rope_limit(self._config)
        self.reuse_off = no_reuse(loaded.model, self._config)
        self._lock = threading.RLock()
        # What `LanguageModel` finds out by trying.
        self.joins_keys = False
        self.linear_lm_head = False
        self.feed_forward = last_feed_forward(
            loaded.model, getattr(self._config, "num_hidden_layers", 0)
        )

    @property
    def one_by_one(self) -> bool:
        """Whether each row is computed by itself, as padded or stored passes may differ."""
        # Where reuse is limited: rotary scaling by length would change under a growing answer.
        return bool(self.reuse_off) or self.longest_reuse is not None

    @property
    def end_ids(self) -> Ids:
        """Tokens that end an answer, by the model's generation settings and its tokenizer."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return tuple({int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None})

    def ends_of(self, sequencer: Sequencer) -> Ids:
        """Tokens that end an answer to a template: the model's own, and its end of a turn."""
        return tuple({*sequencer.end_ids, *self.end_ids})

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

    # -- with stored keys ----------------------------------------------------------------------

    def read(self, embeds_BTD: Tensor, slots: TokenLayout, past: KVCache) -> None:
        """Run the layers only: what comes out are the keys and values that `past` then holds."""
        nowhere = torch.zeros_like(slots.positions, dtype=torch.bool)
        self._pass(self.model.base_model, embeds_BTD, slots, past, nowhere)

    def logits(
        self, embeds_BTD: Tensor, slots: TokenLayout, past: KVCache, keep_BT: Tensor
    ) -> Tensor:
        """Logits [N, V] at the N kept places."""
        output = self._pass(self.model, embeds_BTD, slots, past, keep_BT, logits_to_keep=keep_BT)
        logits: Tensor = output.logits
        return logits

    def logprobs(self, embeds_BTD: Tensor, batch: Batch, past: KVCache) -> Tensor:
        """Log-probabilities [W] of what the batch reads off."""
        if not self.linear_lm_head:
            logits = self.logits(embeds_BTD, batch.slots, past, batch.keep_BT)
            return token_logprobs(logits, batch.rows, batch.tokens)
        output = self._pass(self.model.base_model, embeds_BTD, batch.slots, past, batch.keep_BT)
        lm_head = self.model.get_output_embeddings()
        hidden_ND = output.last_hidden_state[batch.keep_BT]
        bias = getattr(lm_head, "bias", None)
        return hidden_logprobs(hidden_ND, lm_head.weight, bias, batch.rows, batch.tokens)

    def _pass(
        self,
        model: Any,
        embeds_BTD: Tensor,
        slots: TokenLayout,
        past: KVCache,
        keep_BT: Tensor,
        **more: Any,
    ) -> Any:
        self.forget_longest_pass()
        past.joined = self.joins_keys
        past.see(slots, self._windows, self._kinds, self.dtype)
        masks = {kind: past.joint_mask(kind) for kind in self._windows}
        arguments = dict(
            inputs_embeds=embeds_BTD,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=slots.positions.clamp(min=0),
            past_key_values=past,
            use_cache=True,
            **more,
        )
        own = contextlib.nullcontext() if self.joins_keys else attending(self._config, past)
        # Attention and hooks belong to the model, so its passes go one after the other.
        with self._lock, own, only_at(self.feed_forward, keep_BT):
            output = model(**arguments)
        if not self.joins_keys and past.attended != set(range(len(past.own_keys))):
            raise NotImplementedError("a layer with an attention of its own")
        return output

    # -- without -------------------------------------------------------------------------------

    def full_pass(self, embeds_BTD: Tensor, mask_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Logits [N, V] at the N kept places, by the model's own masks; padding on the right."""
        self.forget_longest_pass()
        with self._lock:
            output = self.model(
                inputs_embeds=embeds_BTD,
                attention_mask=mask_BT,
                use_cache=False,
                logits_to_keep=keep_BT,
            )
        logits: Tensor = output.logits
        return logits

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


def last_feed_forward(model: Any, layers: int) -> nn.Module | None:
    """The `mlp` of the last of so many layers, where most models have it."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            found = getattr(module[-1], "mlp", None)
            return found if isinstance(found, nn.Module) else None
    return None


@contextlib.contextmanager
def only_at(feed_forward: nn.Module | None, keep_BT: Tensor) -> Iterator[None]:
    """Within the block the module computes kept places only, and gives zeros elsewhere."""
    if feed_forward is None:
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BTD,) = inputs
        return (hidden_BTD[keep_BT][None],)

    def put(_: nn.Module, __: tuple[Tensor], output_1ND: Tensor) -> Tensor:
        zeros = output_1ND.new_zeros(*keep_BT.shape, output_1ND.shape[-1])
        return torch.index_put(zeros, (keep_BT,), output_1ND[0])

    hooks = (
        feed_forward.register_forward_pre_hook(pick),
        feed_forward.register_forward_hook(put),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
