"""A second backbone: one set of rows per layer, by plain `transformers` and hooks on its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.backbone import Prompt
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import Reply
from embedgrad.model.loading import LoadedModel
from embedgrad.model.outcome import Outcome
from embedgrad.prompt.sequence import TokenSequence
from kit import spliced


class DeepBackbone:
    """Takes {"deep": [layers, P, D]}: each layer's input has its own rows in the prompt's place."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.model: Any = loaded.model

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(ids))
        return rows

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
    ) -> Outcome:
        assert not isinstance(prompt, Tensor)
        logprobs, counts = [], []
        for s in batch:
            targets = s.targets if choices else (s.targets[s.gold],)
            logprobs.append(torch.stack([self._logprob(prompt["deep"], s, t) for t in targets]))
            counts.append([len(t) for t in targets])
        return Outcome(
            torch.stack(logprobs),
            torch.tensor(counts),
            torch.tensor([s.gold if choices else 0 for s in batch]),
            tuple(s.example.group for s in batch),
            normalize,
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        decoding: Decoding,
        *,
        end_ids: tuple[int, ...],
        batch_size: int = 16,
        numbers: Sequence[int] | None = None,
    ) -> list[tuple[Reply, ...]]:
        assert not isinstance(prompt, Tensor)
        answers = []
        for s in batch:
            ids: list[int] = []
            while len(ids) < decoding.max_new_tokens and ids[-1:] not in [[e] for e in end_ids]:
                ids.append(int(self._logits(prompt["deep"], s, ids)[-1].argmax()))
            text = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append((Reply(str(text), ids[-1] not in end_ids),) * decoding.samples)
        return answers

    def _logprob(self, deep: Tensor, sequence: TokenSequence, target: Sequence[int]) -> Tensor:
        logits = self._logits(deep, sequence, target[:-1])[-len(target) :]
        return torch.log_softmax(logits, dim=1)[range(len(target)), list(target)].sum()

    def _logits(self, deep: Tensor, sequence: TokenSequence, answer: Sequence[int]) -> Tensor:
        start = len(sequence.prefix)
        with self._replaced(deep[1:], slice(start, start + deep.shape[1])):
            embeds = spliced(self.loaded, deep[0], sequence, answer)
            logits: Tensor = self.model(inputs_embeds=embeds, use_cache=False).logits[0]
        return logits

    @contextlib.contextmanager
    def _replaced(self, deep: Tensor, place: slice) -> Iterator[None]:
        """Within the block every layer but the first gets its rows in place of its own input."""

        def hook(rows: Tensor) -> Any:
            def replace(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                hidden = inputs[0].clone()
                hidden[:, place] = rows.to(hidden)
                return (hidden, *inputs[1:])

            return replace

        layers = self.model.base_model.layers[1:]
        hooks = [
            layer.register_forward_pre_hook(hook(rows))
            for layer, rows in zip(layers, deep, strict=True)
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
