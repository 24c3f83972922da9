"""The job of an export, and the interface of its destinations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor

from embedgrad.deploy.base_model import Base
from embedgrad.events import Report, quiet
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.recipe.settings import ExportSettings


@final
@dataclass(frozen=True)
class ExportedPrompt:
    """One refined prompt on its way to a destination.

    Requests select it by `name`: letters, digits, "-" and "_". `sequences` are dev examples, used
    to calibrate or to check the export.
    """

    name: str
    prompt: PromptEmbedding
    sequencer: Sequencer
    sequences: Sequence[TokenSequence]
    settings: ExportSettings = ExportSettings()

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
