"""Verify a vocabulary export with plain `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import EXACT, LocalEngine
from embedgrad.errors import EngineError
from embedgrad.model.loading.quiet import model_errors


@final
class CheckpointEngine(LocalEngine):
    """Messages -> the export's own chat template -> its model.

    Raises `EngineError` for a folder that `transformers` cannot open.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        super().__init__(job, exported)
        # Kernels of quantized layers may round differently in different batches.
        exact = written["rows_dtype"] == "float32" and not written["quantized"]
        self.tolerance = EXACT if exact else None
        auto: Any = AutoModelForCausalLM
        own = {"local_files_only": True, "trust_remote_code": False}
        where = "the export" if folder.name.startswith(".") else folder  # not published yet
        with model_errors(f"{where}: transformers does not open it", EngineError):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **own)
            self.model = auto.from_pretrained(folder, dtype="auto", **own)
            self.suppressed = self.model.generation_config.suppress_tokens
            self.model.eval().requires_grad_(False).to(job.model.device)
        ids_of = self.tokenizer.convert_tokens_to_ids
        new_ids: dict[str, Any] = {p["name"]: ids_of(p["tokens"]) for p in written["prompts"]}
        self.ids: list[int] = new_ids[exported.name]
        self.added: list[int] = [i for ids in new_ids.values() for i in ids]
        self.scale: float = written["embedding_scale"]

    def prompt(self, query: Query) -> Tensor:
        encoded = self.tokenizer.apply_chat_template(
            list(query.messages), add_generation_prompt=True, return_dict=True
        )
        return self.lookup(tuple(encoded["input_ids"]))

    @contextmanager
    def start_rows(self) -> Iterator[None]:
        """Replace the prompt's rows of the opened table, in memory only."""
        table_VD = self.model.get_input_embeddings().weight.data
        refined_ND = table_VD[self.ids].clone()
        # In table space: the model scales what it looks up.
        table_VD[self.ids] = (self.exported.prompt.start_rows / self.scale).to(table_VD)
        try:
            yield
        finally:
            table_VD[self.ids] = refined_ND

    def added_mass(self, queries: Sequence[Query]) -> float:
        """Before every token of the right answers."""
        masses = []
        for query in queries:
            answer = query.sequence.targets[query.sequence.gold]
            known = len(answer) == 1
            logprobs_NV = self._after(query)[None] if known else self._logprobs(query, answer)
            masses.append(float(logprobs_NV[:, self.added].double().exp().sum(dim=1).max()))
        return max(masses)
