"""A PEFT adapter, opened by PEFT on a freshly loaded base model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from embedgrad.deploy.destinations.client_code import open_example, read_base
from embedgrad.deploy.destinations.peft import PROGRAM, adapter_rows, common_prefix, write_adapter
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import LocalEngine
from embedgrad.errors import EngineError, ModelError
from embedgrad.model.loading.quiet import model_errors, silence_libraries
from embedgrad.prompt.boundaries import Ids

START = "start"  # the adapter of the unrefined rows


@final
class PeftEngine(LocalEngine):
    """The adapter's virtual tokens, then the tokens that `example.py` makes of a query.

    Raises `EngineError` for a folder that PEFT cannot open.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        from peft import PeftModel

        super().__init__(job, exported)
        base = read_base(written, job)
        auto: Any = AutoModelForCausalLM
        attention = job.model.model.config._attn_implementation
        self._aside = tempfile.TemporaryDirectory()
        try:
            with model_errors(f"{folder}: PEFT does not open it"), silence_libraries():
                loaded = auto.from_pretrained(
                    base.model,
                    revision=base.revision,
                    dtype=job.model.dtype,
                    attn_implementation=attention,
                    trust_remote_code=False,
                )
                self.model: Any = PeftModel.from_pretrained(loaded, folder)
                # Step zero goes through the same kind of files, written with the start rows.
                prefix = common_prefix(exported, job.model)
                rows_PD = adapter_rows(prefix, exported.prompt.start_rows, job.model)
                write_adapter(Path(self._aside.name), rows_PD, base, job.model)
                self.model.load_adapter(self._aside.name, adapter_name=START)
                self.model.eval().requires_grad_(False).to(job.model.device)
        except ModelError as error:
            self._aside.cleanup()
            raise EngineError(str(error)) from error
        self.program = open_example(PROGRAM, folder, job, exported, written)

    def __exit__(self, *exception: object) -> None:
        self._aside.cleanup()
        super().__exit__(*exception)

    def logits(self, query: Query, answer: Ids, *, start: bool) -> Tensor:
        self.model.set_adapter(START if start else "default")
        logits: Tensor = self.model(input_ids=self._ids(query, answer)).logits
        return logits

    def plain_logits(self, ids: Ids) -> Tensor:
        with self.model.disable_adapter():
            logits: Tensor = self.model(input_ids=torch.tensor([ids], device=self.device)).logits
        return logits

    def generate(self, queries: Sequence[Query], settings: GenerationConfig) -> list[Ids]:
        self.model.set_adapter("default")
        answers = []
        for ids in map(self._ids, queries):  # PEFT puts its rows before padding: one at a time
            mask = torch.ones_like(ids)  # else the model would ignore padding tokens in a query
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings
            )
            answers.append(tuple(output[0, ids.shape[1] :].tolist()))
        return answers

    def _ids(self, query: Query, answer: Ids = ()) -> Tensor:
        _, suffix = self.program.token_ids(dict(query.sequence.example.columns))
        return torch.tensor([[*suffix, *answer]], device=self.device)
