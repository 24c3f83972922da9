"""The program beside an artifact, run as it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from embedgrad.deploy.destinations.client_code import EXAMPLE_FILE, example_source_of, run_written
from embedgrad.deploy.destinations.safetensors import PROGRAM
from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.verify.engine import Asked
from embedgrad.deploy.verify.local import LocalEngine
from embedgrad.prompt.boundaries import Ids


class SnippetEngine(LocalEngine):
    """`example.py`: its own model, its own tokens, the rows that it read.

    Raises `EngineError` for a program that is not the one that embedgrad writes.
    """

    def __init__(self, folder: Path, job: Job, exported: Exported, written: Mapping[str, Any]):
        super().__init__(job, exported)
        source = example_source_of(PROGRAM, exported, job, written)
        self.program = run_written(folder / EXAMPLE_FILE, source)
        self.model = self.program.model
        self.refined_PD = self.program.rows
        self.start_PD = exported.prompt.start_rows.to(self.refined_PD)

    def logits(self, row: Asked, answer: Ids, *, start: bool) -> Tensor:
        embeds = self._embeds(row, start=start)
        if answer:
            embeds = torch.cat([embeds, self._table(answer)], dim=1)
        logits: Tensor = self.model(inputs_embeds=embeds, use_cache=False).logits
        return logits

    def plain_logits(self, ids: Ids) -> Tensor:
        logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        return logits

    def generated(self, rows: Sequence[Asked], settings: GenerationConfig) -> list[Ids]:
        """In batches, padded on the left: one by one they would take most of a check's time."""
        answers: list[Ids] = []
        for start in range(0, len(rows), self.batch):
            batch = [self._embeds(row, start=False)[0] for row in rows[start : start + self.batch]]
            lengths = [len(embeds_TD) for embeds_TD in batch]
            mask_BT = torch.zeros(len(batch), max(lengths), dtype=torch.long)
            for mask_T, length in zip(mask_BT, lengths, strict=True):
                mask_T[-length:] = 1
            made_BT = self.model.generate(
                inputs_embeds=pad_sequence(batch, batch_first=True, padding_side="left"),
                attention_mask=mask_BT,
                generation_config=settings,
            )
            answers += [tuple(line) for line in made_BT.tolist()]
        return answers

    def _embeds(self, row: Asked, *, start: bool) -> Tensor:
        self.program.rows = self.start_PD if start else self.refined_PD
        embeds: Tensor = self.program.embeddings(dict(row.sequence.example.columns))
        return embeds

    def _table(self, ids: Ids) -> Tensor:
        looked_up: Tensor = self.model.get_input_embeddings()(torch.tensor([ids]))
        return looked_up
