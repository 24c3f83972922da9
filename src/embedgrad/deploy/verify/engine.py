"""The engines that check an export: their interface, and which checks what."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import Tensor

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.errors import EngineError
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


@final
@dataclass(frozen=True)
class Query:
    """An example of the check: its tokens in training, and the messages that a client sends."""

    sequence: TokenSequence
    messages: Sequence[Mapping[str, str]]


class Engine(AbstractContextManager["Engine"], ABC):
    """An export, opened in its destination's own engine.

    B queries, V ids of the base model's tokenizer. Log-probabilities are natural, fp32, on the CPU,
    of the first token after the whole prompt. `tolerance` is the largest difference to the training
    path that passes; None, as for quantized weights: allow what rounding explains.
    """

    tolerance: float | None

    @abstractmethod
    def logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """With the refined rows, asked as a client asks."""

    @abstractmethod
    def start_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """The same from an export of the start rows."""

    @abstractmethod
    def plain_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """With the plain token ids of the text prompt."""

    @abstractmethod
    def greedy(self, queries: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        """Greedy answers to refined prompts, without the end token."""

    @abstractmethod
    def choose(self, query: Query) -> int | None:
        """The choice that a client gets by the request that the card gives; None for another
        reply."""

    @abstractmethod
    def answer_logprob(self, query: Query, answer: Ids) -> float:
        """Log-probability of an answer to a refined prompt."""

    def answer_logprobs(self, queries: Sequence[Query]) -> list[tuple[float, ...]]:
        """Log-probability of every target of an example, refined."""
        return [
            tuple(self.answer_logprob(query, answer) for answer in query.sequence.targets)
            for query in queries
        ]

    def token_differences(self, queries: Sequence[Query]) -> list[str]:
        """A line for each query that the engine tokenizes unlike training, if it can tell."""
        return []

    def added_mass(self, queries: Sequence[Query]) -> float:
        """Largest probability that the new tokens have together."""
        return 0.0  # an export that adds tokens says more


@final
class CheckEngine(NamedTuple):
    """An engine's class, the optional package and extra that it needs, and how a check calls it.

    `copies`: how many temporary copies of the export a check writes beside it.
    """

    module: str
    name: str
    package: str = ""
    extra: str = ""
    copies: int = 0
    description: str = "its own engine"


_DECODED = "{0} request bodies, decoded and given to the base model ({0} itself was not asked)"
CHECK_ENGINES = {
    "safetensors": CheckEngine("embeddings", "SnippetEngine"),
    "vocabulary": CheckEngine("vocabulary", "CheckpointEngine"),
    "gguf": CheckEngine("llamacpp", "LlamaCppEngine", "xllamacpp", "llamacpp", copies=1),
    "peft": CheckEngine("peft", "PeftEngine", "peft", "compare"),
    "vllm": CheckEngine("embeddings", "BodyEngine", description=_DECODED.format("vLLM")),
    "sglang": CheckEngine("embeddings", "BodyEngine", description=_DECODED.format("SGLang")),
}


def check_installed(destination: str) -> None:
    """Raise `EngineError` if the package of a destination's engine is missing."""
    package, extra = CHECK_ENGINES[destination].package, CHECK_ENGINES[destination].extra
    if package and importlib.util.find_spec(package) is None:
        raise EngineError(
            f"{destination}: its check needs the package {package}, which is not installed; "
            f"pip install 'embedgrad[{extra}]', or export without a check (--no-verify)"
        )


def open_engine(
    destination: str, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
) -> Engine:
    """Open an export of `job` to check one of its prompts. Raises `EngineError`."""
    check_installed(destination)
    entry = CHECK_ENGINES[destination]
    module = importlib.import_module(f"embedgrad.deploy.verify.{entry.module}")
    open_export = getattr(module, entry.name)
    engine: Engine = open_export(folder, job, exported, {**written, "destination": destination})
    return engine
