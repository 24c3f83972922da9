"""Verify a PEFT adapter on a freshly loaded base model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from torch import Tensor
from transformers import AutoModelForCausalLM

from embedgrad.deploy.base_model import Base
from embedgrad.deploy.destinations.client_code import open_example
from embedgrad.deploy.destinations.peft import adapter_rows, common_prefix, write_adapter
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import LocalEngine
from embedgrad.errors import EngineError
from embedgrad.model.loading.quiet import model_errors
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
        self.batch = 1  # PEFT puts its rows before padding
        base = Base.read(written, job.model.info, job.settings)
        auto: Any = AutoModelForCausalLM
        with (
            model_errors(f"{folder}: PEFT does not open it", EngineError),
            tempfile.TemporaryDirectory() as aside,
        ):
            loaded = auto.from_pretrained(
                job.model.info.path,
                dtype=job.model.dtype,
                attn_implementation=job.model.model.config._attn_implementation,
                trust_remote_code=False,
            )
            self.model: Any = PeftModel.from_pretrained(loaded, folder)
            # Step zero goes through the same kind of files, written with the start rows.
            prefix = common_prefix(exported, job.model)
            rows_PD = adapter_rows(prefix, exported.prompt.start_rows, job.model)
            write_adapter(Path(aside), rows_PD, base, job.model)
            self.model.load_adapter(aside, adapter_name=START)
            self.model.eval().requires_grad_(False).to(job.model.device)
        self.program = open_example("peft", folder, job, exported, written)

    def prompt(self, query: Query) -> Tensor:
        _, suffix = self.program.token_ids(dict(query.sequence.example.columns))
        return self.lookup(suffix)

    def choose(self, query: Query) -> int | None:
        assert self.choices is not None
        answer = self.program.answer(self.model, dict(query.sequence.example.columns))
        return self.choices.names.index(answer)

    @contextmanager
    def start_rows(self) -> Iterator[None]:
        self.model.set_adapter(START)
        try:
            yield
        finally:
            self.model.set_adapter("default")

    def plain_logits(self, ids: Ids) -> Tensor:
        with self.model.disable_adapter():
            return super().plain_logits(ids)
