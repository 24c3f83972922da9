"""The job of an export, and its destinations: interface and names."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor

from embedgrad.deploy.base_model import Base
from embedgrad.errors import ExportError, nearest
from embedgrad.events import Report, quiet
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.recipe.settings import ExportSettings

# Names of all destinations, and of their classes in `destinations`.
DESTINATIONS = {
    "safetensors": "FilesOnly",
    "vocabulary": "Vocabulary",
    "gguf": "Gguf",
    "peft": "PeftAdapter",
    "vllm": "VllmBodies",
    "sglang": "SglangBodies",
}


@final
@dataclass(frozen=True)
class ExportedPrompt:
    """One refined prompt on its way to a destination.

    Requests select it by `name`: letters, digits, "-" and "_". The export is calibrated with
    `sequences`, and checked with `checks`, which are other rows of the run in `folder`.
    """

    name: str
    prompt: PromptEmbedding
    sequencer: Sequencer
    sequences: Sequence[TokenSequence]
    settings: ExportSettings = ExportSettings()
    checks: Sequence[TokenSequence] = ()
    folder: Path = Path()

    @property
    def rows_PD(self) -> Tensor:
        """The refined rows in the space of `inputs_embeds`, fp32."""
        return self.prompt.rows

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.prompt.spans

    def texts(self, sequence: TokenSequence) -> list[Ids]:
        """Token ids before the first span, between spans, and after the last."""
        texts, start, later = [sequence.prefix], 0, list(sequence.later)
        for span in self.spans[1:]:
            texts.append(sequence.suffix[start : later[0]])
            start = later[0] + len(span.ids)
            later = later[len(span.ids) :]
        return [*texts, sequence.suffix[start:]]


@final
@dataclass(frozen=True)
class Job:
    """Prompts to export that share one frozen model; the first is the default.

    `tag` is a random part of every new token's name, so that nobody can guess one.
    """

    prompts: Sequence[ExportedPrompt]
    model: LanguageModel
    tag: str
    report: Report = quiet

    @property
    def settings(self) -> ExportSettings:
        """The first prompt's settings, which decide for the whole export."""
        return self.prompts[0].settings

    @property
    def base(self) -> Base:
        """The model as the export names it."""
        return Base.of(self.model.info, self.settings)

    def checking(self) -> Job:
        """The same job with the rows of the check."""
        return replace(self, prompts=[replace(e, sequences=e.checks) for e in self.prompts])


class Destination(ABC):
    """Writes an export into an empty folder."""

    name: ClassVar[str]

    @abstractmethod
    def bytes_needed(self, job: Job) -> int:
        """Upper bound of the disk space that `write` takes."""

    @abstractmethod
    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Write all files. Returns plain JSON values, which `export.json` keeps for the check and
        the card. Raises `ExportError` for a prompt or model that cannot be exported."""

    @abstractmethod
    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        """Shell or Python lines that serve the export, for the card."""


def find_destination(name: str) -> Destination:
    """The destination of that name, from the module of that name. Raises `ExportError`."""
    if name not in DESTINATIONS:
        raise ExportError(f"--to: unknown destination {name!r}; {nearest(name, DESTINATIONS)}")
    # Imported when first used, as some modules take long.
    module = importlib.import_module(f"embedgrad.deploy.destinations.{name}")
    destination: Destination = getattr(module, DESTINATIONS[name])()
    return destination
