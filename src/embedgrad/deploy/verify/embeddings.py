"""Check exports that send embeddings, by their own program.

safetensors      the program's own model answers
vLLM, SGLang     the client's request bodies are decoded, and the base model answers; the server
                 itself, which is seldom installed where prompts are refined, is not asked
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from torch import Tensor

from embedgrad.deploy.destinations.client_code import open_example
from embedgrad.deploy.destinations.embedding_client import Bodies
from embedgrad.deploy.destinations.vllm import VllmBodies
from embedgrad.deploy.job import ExportedPrompt, Job, find_destination
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import CANNOT_ANSWER, EXACT, LocalEngine
from embedgrad.errors import ExportError
from embedgrad.model.loading.quiet import model_errors
from embedgrad.prompt.boundaries import Ids


class EmbeddingEngine(LocalEngine):
    """A program with `rows` and `embed`, and a model for the embeddings that the program makes."""

    def __init__(self, job: Job, exported: ExportedPrompt, program: Any, model: Any):
        super().__init__(job, exported)
        self.program, self.model = program, model

    def lookup(self, ids: Ids) -> Tensor:
        embeds_TD: Tensor = self.program.embed(super().lookup(ids))
        return embeds_TD

    @contextmanager
    def start_rows(self) -> Iterator[None]:
        refined_PD = self.program.rows
        self.program.rows = self.exported.prompt.start_rows.to(refined_PD)
        try:
            yield
        finally:
            self.program.rows = refined_PD


@final
class SnippetEngine(EmbeddingEngine):
    """`example.py`: its own model, its own tokens, the rows that it read.

    Raises `EngineError` for a program that is not the one that embedgrad writes.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        program = open_example("safetensors", folder, job, exported, written)
        super().__init__(job, exported, program, program.model)

    def prompt(self, query: Query) -> Tensor:
        embeds_TD: Tensor = self.program.embeddings(dict(query.sequence.example.columns))
        return embeds_TD

    def choose(self, query: Query) -> int | None:
        assert self.choices is not None
        with model_errors(CANNOT_ANSWER, ExportError):
            answer = self.program.answer(dict(query.sequence.example.columns))
        return self.choices.names.index(answer)


@final
class BodyEngine(EmbeddingEngine):
    """`client.py`: the prompt in its request bodies, decoded as the server decodes it.

    All embeddings are rounded to the server's precision. Raises `EngineError` for a client that is
    not the one that embedgrad writes, and for bodies that hold different prompts.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        writer = find_destination(written["destination"])
        assert isinstance(writer, Bodies)
        client = writer.client(folder, job, exported, written)
        super().__init__(job, exported, client, job.model.model)
        self.tolerance = EXACT if written["dtype"] == "float32" else None
        self.limits_by_text = not isinstance(writer, VllmBodies)
        self._writer = writer

    def prompt(self, query: Query) -> Tensor:
        columns = dict(query.sequence.example.columns)
        return self._writer.decode(self.program, columns, self.exported)
