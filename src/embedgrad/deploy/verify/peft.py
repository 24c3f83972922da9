"""A PEFT adapter, opened by PEFT on a base model that is loaded anew."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    base_from,
    example_source_of,
    run_written,
)
from embedgrad.deploy.destinations.peft import PROGRAM, adapter_rows, prefix_of, write_adapter
from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.verify.engine import Asked
from embedgrad.deploy.verify.local import LocalEngine
from embedgrad.errors import EngineError, ModelError
from embedgrad.model.loading.quiet import guarded, silenced
from embedgrad.prompt.boundaries import Ids

START = "start"  # the adapter of the unrefined rows


class PeftEngine(LocalEngine):
    """The adapter's virtual tokens, then the tokens that `example.py` makes of a query.

    Raises `EngineError` for a folder that PEFT does not open.
    """

    def __init__(self, folder: Path, job: Job, exported: Exported, written: Mapping[str, Any]):
        from peft import PeftModel

        super().__init__(job, exported)
        base = base_from(written, job)
        auto: Any = AutoModelForCausalLM
        attention = job.model.model.config._attn_implementation
        self._aside = tempfile.TemporaryDirectory()
        try:
            with guarded(f"{folder}: PEFT does not open it"), silenced():
                loaded = auto.from_pretrained(
                    base.model,
                    revision=base.revision,
                    dtype=job.model.dtype,
                    attn_implementation=attention,
                    trust_remote_code=False,
                )
                self.model: Any = PeftModel.from_pretrained(loaded, folder)
                # Step zero goes through the same files: the start rows, written as the others were.
                prefix, start_PD = prefix_of(exported, job.model), exported.prompt.start_rows
                rows_PD = adapter_rows(prefix, start_PD, job.model)
                write_adapter(Path(self._aside.name), rows_PD, base, job.model)
                self.model.load_adapter(self._aside.name, adapter_name=START)
                self.model.eval().requires_grad_(False).to(job.model.device)
        except ModelError as error:
            self._aside.cleanup()
            raise EngineError(str(error)) from error
        self.program = run_written(
            folder / EXAMPLE_FILE, example_source_of(PROGRAM, exported, job, written)
        )

    def __exit__(self, *exception: object) -> None:
        self._aside.cleanup()
        super().__exit__(*exception)

    def logits(self, row: Asked, answer: Ids, *, start: bool) -> Tensor:
        self.model.set_adapter(START if start else "default")
        logits: Tensor = self.model(input_ids=self._query(row, answer)).logits
        return logits

    def plain_logits(self, ids: Ids) -> Tensor:
        with self.model.disable_adapter():
            logits: Tensor = self.model(input_ids=torch.tensor([ids], device=self.device)).logits
        return logits

    def generated(self, rows: Sequence[Asked], settings: GenerationConfig) -> list[Ids]:
        self.model.set_adapter("default")
        answers = []
        for query in map(self._query, rows):  # PEFT puts its rows before padding: one at a time
            mask = torch.ones_like(query)  # else tokens that are also padding would go unread
            made = self.model.generate(
                input_ids=query, attention_mask=mask, generation_config=settings
            )
            answers.append(tuple(made[0, query.shape[1] :].tolist()))
        return answers

    def _query(self, row: Asked, answer: Ids = ()) -> Tensor:
        _, suffix = self.program.token_ids(dict(row.sequence.example.columns))
        return torch.tensor([[*suffix, *answer]], device=self.device)
