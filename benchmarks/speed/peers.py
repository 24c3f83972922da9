"""The peers: PEFT's prompt tuning and CPT, and a plain loop over `inputs_embeds`.

Each loads the model itself, with plain `transformers`, or takes a loaded one, and runs the whole
sequence with full logits as its documentation does. A peer gets the same token sequences, pads them
on the right, and makes the same AdamW step.

PEFT puts the prompt before everything else, chat header included, and nowhere else. So its steps
run the nearest thing, `prompt_first`: as many tokens, in another order.
Sources: PEFT 0.21 `PeftModelForCausalLM.forward`, docs "Prompt tuning" and "CPT".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import (
    CPTConfig,
    PeftConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.speed.ours import LEARNING_RATE, Step
from benchmarks.speed.workloads import PROMPT, Ids
from embedgrad.prompt.sequence import TokenSequence


def prompt_first(sequence: TokenSequence) -> TokenSequence:
    """The row as PEFT can have it."""
    return replace(sequence, prefix=(), suffix=sequence.prefix + sequence.suffix)


@dataclass(frozen=True)
class Padded:
    """A padded batch, as a data loader would collate it."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    prompt_BT: Tensor


def pad(
    sequences: Sequence[TokenSequence],
    prompt: int,
    targets: Sequence[Ids] | None = None,
    *,
    left: bool = False,
    device: torch.device | None = None,
) -> Padded:
    """Rows with `prompt` places for the prompt and an answer each (unset: the right one)."""
    if targets is None:
        targets = [s.targets[s.gold] for s in sequences]
    lines = [
        s.prefix + (0,) * prompt + s.suffix + target
        for s, target in zip(sequences, targets, strict=True)
    ]
    longest = max(map(len, lines))
    shape = (len(lines), longest)
    ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, -100)
    prompt_BT = torch.zeros(shape, dtype=torch.bool)
    for row, (line, sequence, target) in enumerate(zip(lines, sequences, targets, strict=True)):
        start = longest - len(line) if left else 0
        end = start + len(line)
        ids_BT[row, start:end] = torch.tensor(line)
        mask_BT[row, start:end] = 1
        if target:
            labels_BT[row, end - len(target) : end] = torch.tensor(target)
        place = start + len(sequence.prefix)
        prompt_BT[row, place : place + prompt] = True
    return Padded(*(x.to(device) for x in (ids_BT, mask_BT, labels_BT, prompt_BT)))


class Peer:
    """A training loop that is not ours; `rows` is what it trains."""

    name: str
    note = ""
    model: Any
    rows: torch.nn.Parameter

    def _load(self, source: Any) -> Any:
        if not isinstance(source, str):
            return source
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.requires_grad_(False)

    def _begin(self) -> None:
        self.start = self.rows.detach().clone()
        self.optimizer = torch.optim.AdamW([self.rows], lr=LEARNING_RATE, weight_decay=0.0)

    def reset(self) -> None:
        """Put the rows back to where they began."""
        with torch.no_grad():
            self.rows.copy_(self.start)

    def layout(self, sequence: TokenSequence) -> TokenSequence:
        """The row as this peer runs it."""
        return sequence

    def step(self, sequences: Sequence[TokenSequence]) -> Step:
        """Loss of the labels (mean over tokens), gradient of the rows, AdamW."""
        # Answers of one length, so that the mean over tokens is the mean over rows.
        assert len({len(s.targets[s.gold]) for s in sequences}) == 1
        loss = self.loss(sequences)
        loss.backward()  # type: ignore[no-untyped-call]
        assert self.rows.grad is not None
        gradient = self.rows.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss.item(), gradient)

    def loss(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The loss that the model returns for labels."""
        raise NotImplementedError


class InputsEmbeds(Peer):
    """A plain loop: embeddings of the padded batch with the rows put in, labels, full logits."""

    name = "inputs_embeds"

    def __init__(self, source: Any, prompt_ids: Sequence[int]):
        self.model = self._load(source)
        self.table = self.model.get_input_embeddings()
        ids = torch.tensor(prompt_ids, device=self.table.weight.device)
        self.rows = torch.nn.Parameter(self.table(ids).clone())
        self._begin()

    def _embeds(self, batch: Padded, rows_PD: Tensor) -> Tensor:
        embeds: Tensor = self.table(batch.ids_BT)
        embeds[batch.prompt_BT] = rows_PD.repeat(len(embeds), 1)
        return embeds

    def loss(self, sequences: Sequence[TokenSequence], rows_PD: Tensor | None = None) -> Tensor:
        rows_PD = self.rows if rows_PD is None else rows_PD
        batch = pad(sequences, len(rows_PD), device=self.rows.device)
        loss: Tensor = self.model(
            inputs_embeds=self._embeds(batch, rows_PD),
            attention_mask=batch.mask_BT,
            labels=batch.labels_BT,
            use_cache=False,
        ).loss
        return loss

    @torch.no_grad()
    def logits(self, batch: Padded, rows_PD: Tensor) -> Tensor:
        """Full logits [B, T, V]."""
        logits: Tensor = self.model(
            inputs_embeds=self._embeds(batch, rows_PD),
            attention_mask=batch.mask_BT,
            use_cache=False,
        ).logits
        return logits

    def answers(
        self,
        sequences: Sequence[TokenSequence],
        rows_PD: Tensor,
        targets: Sequence[Ids] | None = None,
    ) -> Tensor:
        """Log-probabilities [B] of one answer per row, from one forward pass."""
        batch = pad(sequences, len(rows_PD), targets)
        logits = self.logits(batch, rows_PD)[:, :-1]
        labels = batch.labels_BT[:, 1:]
        row, place = (labels != -100).nonzero(as_tuple=True)
        picked = torch.log_softmax(logits[row, place], dim=1)
        found = picked.gather(1, labels[row, place][:, None]).squeeze(1)
        return torch.zeros(len(labels)).index_add(0, row, found)

    def choices(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probabilities [B, C], one forward pass of the batch per choice."""
        count = len(sequences[0].targets)
        rows = self.rows.detach()
        passes = ([s.targets[c] for s in sequences] for c in range(count))
        return torch.stack([self.answers(sequences, rows, ids) for ids in passes], dim=1)

    def candidates(self, prompts: Sequence[Tensor], sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probabilities [K, B] of the right answers, one forward pass per candidate."""
        return torch.stack([self.answers(sequences, rows) for rows in prompts])


class Generate(InputsEmbeds):
    """`transformers` `generate`, with the batch padded on the left."""

    name = "transformers-generate"

    def __init__(self, source: Any, prompt_ids: Sequence[int]):
        super().__init__(source, prompt_ids)
        self.model.generation_config.eos_token_id = None  # nobody may end early

    @torch.no_grad()
    def tokens(self, sequences: Sequence[TokenSequence], new_tokens: int) -> Tensor:
        """Greedy answers [B, T] of exactly this many tokens."""
        batch = pad(
            sequences, len(self.rows), [()] * len(sequences), left=True, device=self.rows.device
        )
        new: Tensor = self.model.generate(
            inputs_embeds=self._embeds(batch, self.rows.detach()),
            attention_mask=batch.mask_BT,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return new


class _Peft(Peer):
    """A PEFT model in a plain training loop: `loss = model(**batch).loss`."""

    note = "PEFT can only put the prompt first: the same number of tokens, in that order"

    def __init__(self, source: Any, prompt_ids: Sequence[int]):
        model = self._load(source)
        folder = getattr(source, "name_or_path", source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks for a renamed property
            self.model = get_peft_model(model, self._config(folder, prompt_ids))
        self.model.train()
        (self.rows,) = (p for p in self.model.parameters() if p.requires_grad)
        self._begin()

    def _config(self, folder: str, prompt_ids: Sequence[int]) -> PeftConfig:
        raise NotImplementedError

    def layout(self, sequence: TokenSequence) -> TokenSequence:
        return prompt_first(sequence)

    def loss(self, sequences: Sequence[TokenSequence]) -> Tensor:
        batch = pad(sequences, 0, device=self.rows.device)
        loss: Tensor = self.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            labels=batch.labels_BT,
            **self._more(batch),
        ).loss
        return loss

    def _more(self, batch: Padded) -> dict[str, Tensor]:
        return {}


class PeftPromptTuning(_Peft):
    """PEFT `PromptTuning` that starts at a text."""

    name = "peft-prompt-tuning"

    def _config(self, folder: str, prompt_ids: Sequence[int]) -> PeftConfig:
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=PROMPT,  # PEFT cuts it to that length
            num_virtual_tokens=len(prompt_ids),
            tokenizer_name_or_path=folder,
        )


class PeftCPT(_Peft):
    """PEFT `CPT`: a trained difference to the prompt's embeddings, kept short."""

    name = "peft-cpt"

    def _config(self, folder: str, prompt_ids: Sequence[int]) -> PeftConfig:
        return CPTConfig(
            task_type=TaskType.CAUSAL_LM,
            cpt_token_ids=list(prompt_ids),
            cpt_mask=[1] * len(prompt_ids),
            cpt_tokens_type_mask=[1] * len(prompt_ids),
        )

    def _more(self, batch: Padded) -> dict[str, Tensor]:
        # CPT adds the prompt's largest type, 1, to these, in place; a multiple of 4 is a label.
        return {"input_type_mask": torch.where(batch.labels_BT == -100, 1, 3) * batch.mask_BT}


Kind = type[InputsEmbeds] | type[PeftPromptTuning] | type[PeftCPT]
TRAINING: tuple[Kind, ...] = (InputsEmbeds, PeftPromptTuning, PeftCPT)
