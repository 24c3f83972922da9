"""The base model as an export names it, without a path."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, final

from embedgrad.deploy.programs import to_source
from embedgrad.errors import EngineError
from embedgrad.model.loading.info import ModelInfo
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.overrides import override
from embedgrad.recipe.paths import PATHS, anonymize
from embedgrad.recipe.settings import ExportSettings

VARIABLE = "BASE_MODEL"  # of the environment: where generated programs find the base model


@final
class Base(NamedTuple):
    """The frozen model: its name, its commit on the Hub, and whether others can load it so."""

    model: str
    revision: str | None
    public: bool

    @classmethod
    def of(cls, info: ModelInfo, settings: ExportSettings) -> Self:
        """The settings' name, else the model's own; of a path the last part."""
        if settings.base_model in (None, info.name):
            return cls(info.title, info.revision, info.kind == "hub")
        return cls(str(settings.base_model), None, public=True)

    @classmethod
    def read(cls, written: Mapping[str, Any], model: ModelInfo, settings: ExportSettings) -> Self:
        """The base that an export names. Raises `EngineError` if it is not the model at hand."""
        exported = cls(str(written["model"]), written["revision"], bool(written["public"]))
        base = cls.of(model, settings)
        if exported.public and exported != base:
            raise EngineError(
                f"the export loads its model from {exported.model} ({exported.revision}), but here "
                f"the model is {base.model} ({base.revision}); export again"
            )
        return exported

    @property
    def source(self) -> str:
        """The name for `from_pretrained`, as Python; users may name a place of their own."""
        own = f'os.environ.get("{VARIABLE}"'
        if self.public:
            return f"{own}, {to_source(self.model)})"
        ask = f"set {VARIABLE} to the folder or Hub id of the base model, {self.model}"
        return f"{own}) or sys.exit({to_source(ask)})"

    @property
    def arguments(self) -> str:
        """Arguments of `from_pretrained`, as Python that refers to MODEL."""
        return "MODEL" + (f", revision={to_source(self.revision)}" if self.revision else "")

    @property
    def serving(self) -> str:
        """The model as an argument of a serving command."""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        return shlex.quote(self.model) + revision if self.public else f'"${VARIABLE}"'

    def notes(self, info: ModelInfo) -> list[str]:
        """What to know where clients load the base model."""
        if not self.public:
            return [
                f"clients and commands ask for the base model, {self.model}: set {VARIABLE} to its "
                "folder or Hub id, or export with --base-model NAME"
            ]
        if self.model != info.name:
            return [f"it was made with {info.title}, and nothing was loaded from {self.model}"]
        return []


@contextmanager
def model_at(path: str) -> Iterator[None]:
    """Let generated programs find the base model in a folder."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def anonymous(
    prompt: PromptEmbedding, info: ModelInfo, settings: ExportSettings
) -> PromptEmbedding:
    """The prompt whose provenance holds no path."""
    base, known = Base.of(info, settings), dict(prompt.provenance)
    named = {
        "name": base.model,
        **({"kind": "hub", "revision": None} if settings.base_model else {}),
    }
    for entry, change in (
        ("model", lambda values: {**values, **named}),
        ("recipe", lambda values: anonymize(values, base.model)),
    ):
        if isinstance(known.get(entry), dict):
            known[entry] = change(known[entry])
    return prompt.with_provenance(**known)


def shareable(settings: Sequence[str]) -> list[str]:
    """The settings of `--set` without those that name places."""
    kept = []
    for setting in settings:
        values: dict[str, Any] = {}
        override(values, [setting])
        if values == anonymize(values, "") and not any(_has(values, name) for name in PATHS):
            kept.append(setting)
    return kept


def _has(values: Any, name: str) -> bool:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values is not None
