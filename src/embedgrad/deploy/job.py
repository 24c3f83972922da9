"""What every destination is given, and what it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from embedgrad.events import Report, nowhere
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.settings import ExportSettings


@dataclass(frozen=True)
class Exported:
    """One refined prompt on its way to a destination.

    `name` is what a request calls it by, in letters, digits, "-" and "_". `sequences` are rows of
    dev: calibration and checks use them.
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


@dataclass(frozen=True)
class Job:
    """What a destination writes: prompts that share one frozen model; the first is the default.

    `tag` is random letters and digits, part of every new token's name, so that nobody can write
    one by guess.
    """

    prompts: Sequence[Exported]
    model: LanguageModel
    tag: str
    report: Report = nowhere

    @property
    def settings(self) -> ExportSettings:
        """Of the first prompt; those that concern the whole export are taken from it."""
        return self.prompts[0].settings


class Destination(ABC):
    """Writes an export into an empty folder."""

    name: ClassVar[str]

    @abstractmethod
    def bytes_needed(self, job: Job) -> int:
        """Room that `write` takes on disk at most."""

    @abstractmethod
    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Write all files; returns plain JSON values that `export.json` keeps for the check and
        for the card. Raises `ExportError` for what cannot be exported."""

    @abstractmethod
    def commands(self, folder: Path, written: dict[str, Any]) -> list[str]:
        """Lines for a shell or for Python that serve the export, as the card shows them."""
