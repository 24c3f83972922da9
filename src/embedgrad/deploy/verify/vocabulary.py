"""A vocabulary export, opened by `transformers` and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import EXACT, LocalEngine
from embedgrad.errors import EngineError, ModelError
from embedgrad.model.loading.quiet import model_errors
from embedgrad.prompt.boundaries import Ids


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
        try:
            with model_errors(f"{folder}: transformers does not open it"):
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **own)
                self.model = auto.from_pretrained(folder, dtype="auto", **own)
                self.model.eval().requires_grad_(False).to(self.device)
        except ModelError as error:
            raise EngineError(str(error)) from error
        prompts = {prompt["name"]: prompt for prompt in written["prompts"]}
        self.ids = self._ids(prompts[exported.name])
        self.added = [i for prompt in prompts.values() for i in self._ids(prompt)]
        # In table space: the model scales what it looks up.
        self.start_ND = exported.prompt.start_rows / written["embedding_scale"]

    def logits(self, query: Query, answer: Ids, *, start: bool) -> Tensor:
        """With the tokens of the chat template; start rows replace refined ones in the table."""
        ids = self._prompt_ids(query) + answer
        if not start:
            return self.plain_logits(ids)
        with self._start_rows():
            return self.plain_logits(ids)

    def plain_logits(self, ids: Ids) -> Tensor:
        """Logits of any ids, old or new."""
        ids_BT = torch.tensor([ids], device=self.device)
        logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits

    def generate(self, queries: Sequence[Query], settings: GenerationConfig) -> list[Ids]:
        """In batches, padded on the left, with the export's suppressed tokens."""
        settings.suppress_tokens = self.model.generation_config.suppress_tokens
        answers: list[Ids] = []
        for first in range(0, len(queries), self.batch):
            batch = [self._prompt_ids(query) for query in queries[first : first + self.batch]]
            longest = max(map(len, batch))
            ids = [(0,) * (longest - len(line)) + line for line in batch]
            mask = [[0] * (longest - len(line)) + [1] * len(line) for line in batch]
            output_BT = self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=settings,
            )
            answers += [tuple(line) for line in output_BT[:, longest:].tolist()]
        return answers

    def added_mass(self, queries: Sequence[Query]) -> float:
        """Before every token of the right answers."""
        masses = []
        for query in queries:
            answer = query.sequence.targets[query.sequence.gold]
            known = len(answer) == 1
            logprobs_NV = self._after(query)[None] if known else self._logprobs(query, answer)
            masses.append(float(logprobs_NV[:, self.added].double().exp().sum(dim=1).max()))
        return max(masses)

    def _ids(self, prompt: Mapping[str, Any]) -> list[int]:
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(prompt["tokens"]))
        return ids

    def _prompt_ids(self, query: Query) -> Ids:
        encoded = self.tokenizer.apply_chat_template(
            list(query.messages), add_generation_prompt=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    @contextmanager
    def _start_rows(self) -> Iterator[None]:
        """Replace the prompt's rows of the opened table, in memory only."""
        table_VD = self.model.get_input_embeddings().weight.data
        refined_ND = table_VD[self.ids].clone()
        table_VD[self.ids] = self.start_ND.to(table_VD)
        try:
            yield
        finally:
            table_VD[self.ids] = refined_ND
