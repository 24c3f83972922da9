"""A loaded prompt that generates: `embedgrad.load(path)`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, final

from torch import Tensor

from embedgrad.errors import ArtifactError, OptionError, nearest
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.events import Report, scoring
from embedgrad.inference.answer import Query, answer, change_decoding, examples_of
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.decoding import Decoding
from embedgrad.model.language_model import LanguageModel, load_model
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Template
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.recipe.build import open_model
from embedgrad.recipe.hub import local_folder
from embedgrad.recipe.open_run import Answering, images_of, load_prompt, model_of, recipe_of
from embedgrad.report.page.notebook import or_else, prompt_html
from embedgrad.report.terminal.bars import show

EXPORT_FOLDER = "embedgrad"  # of an export, which keeps a prompt's artifact beside its files


@final
class RefinedPrompt:
    """A saved prompt, and its model once it has been asked something.

    It has all that its `prompt`, a `PromptEmbedding`, has.
    """

    __slots__ = ("_opened", "prompt")

    # Of the prompt: see `__getattr__`.
    template: Template
    target: Target
    spans: tuple[Span, ...]
    date: datetime.date
    start_rows: Tensor
    rows: Tensor
    trust_region: TrustRegion
    provenance: dict[str, Any]
    drift: Tensor
    cosine: Tensor

    def __init__(self, prompt: PromptEmbedding):
        self.prompt = prompt
        self._opened: dict[object, Answering] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prompt, name)

    def with_rows(self, rows_PD: Tensor) -> RefinedPrompt:
        """The same prompt with other rows."""
        return RefinedPrompt(self.prompt.with_rows(rows_PD))

    def with_provenance(self, **entries: Any) -> RefinedPrompt:
        """The same prompt with more provenance."""
        return RefinedPrompt(self.prompt.with_provenance(**entries))

    def generate(
        self,
        queries: Query | Sequence[Query],
        *,
        model: LanguageModel | str | None = None,
        report: Report = show,
        **decoding: Any,
    ) -> Any:
        """Answer a query by a text, or a list of queries by a list.

        Answers are the likeliest choices where the prompt was trained to choose, else text decoded
        as it was scored; `decoding` changes that by options of `Decoding`, and several `samples`
        make each answer a list. `model` is by default the one that the artifact names, which is
        loaded once. `report` gets events. Raises `ArtifactError`, `DataError`, `EmbedgradError` and
        `ModelError`.
        """
        answers, alone = self._ask(queries, model, report, decoding)
        texts = [[str(s["answer"]) for s in a.get("answers", [])] or a["answer"] for a in answers]
        return texts[0] if alone else texts

    def probabilities(
        self,
        queries: Query | Sequence[Query],
        *,
        model: LanguageModel | str | None = None,
        report: Report = show,
    ) -> Any:
        """How likely each choice is, for a query as a mapping, or for a list of queries as a list.

        Raises as `generate`, and `OptionError` for a prompt whose answers are not chosen.
        """
        if not self.target.choices:
            raise OptionError("probabilities: this prompt's answers are generated; use generate")
        answers, alone = self._ask(queries, model, report, {})
        found = [answer["probabilities"] for answer in answers]
        return found[0] if alone else found

    def _repr_html_(self) -> str:
        """What a notebook shows: the words, and how far each token moved."""
        return or_else("RefinedPrompt", lambda: prompt_html(self.prompt))

    def __reduce__(self) -> tuple[type[RefinedPrompt], tuple[PromptEmbedding]]:
        """A copy has no model; it loads its own."""
        return RefinedPrompt, (self.prompt,)

    def _ask(
        self,
        queries: Query | Sequence[Query],
        model: LanguageModel | str | None,
        report: Report,
        decoding: Mapping[str, Any],
    ) -> tuple[list[dict[str, Any]], bool]:
        """Values of `answer`, one per query, and whether one query was given alone."""
        examples, alone = examples_of(queries, self.template.columns, images_of(self.prompt))
        settings = self._decoding(decoding)
        opened = self._answering(model, report)
        values: list[dict[str, Any]] = []
        for value in answer(opened, examples, decoding=settings):
            values.append(value)
            report(scoring("queries", len(values), len(examples)))
        return values, alone

    def _decoding(self, given: Mapping[str, Any]) -> Decoding:
        """As the artifact says, changed by what is given."""
        known = [f.name for f in fields(Decoding)]
        for name in given:
            if name not in known:
                raise OptionError(f"generate: unknown option {name!r}; {nearest(name, known)}")
        saved = self.provenance.get("decoding")
        saved = saved if isinstance(saved, dict) else {}
        values = {name: saved[name] for name in ("max_new_tokens", "stop") if name in saved}
        spell = "generate: decoding.{}".format
        return change_decoding(values, given, self.target.choices, "prompt", spell)

    def _answering(self, model: LanguageModel | str | None, report: Report) -> Answering:
        """The prompt with its model; kept, so that the next query finds both."""
        key = id(model) if isinstance(model, LanguageModel) else model
        if key not in self._opened:
            opened = self._load_model(model, report)
            prompt = fit_to_model(self.prompt, opened.info, opened.embed)
            sequencer = opened.sequencer(
                self.template, self.target, spans=self.spans, date=self.date
            )
            evaluator = Evaluator(opened, sequencer)
            self._opened.clear()  # one model at a time
            self._opened[key] = Answering(prompt, opened, sequencer, evaluator)
        return self._opened[key]

    def _load_model(self, model: LanguageModel | str | None, report: Report) -> LanguageModel:
        if isinstance(model, LanguageModel):
            return model
        if images_of(self.prompt) is not None:
            named = [f"model.name={json.dumps(model)}"] if model else []
            return open_model(recipe_of(self.prompt, Path(), named), report)
        if model is not None:
            return load_model(model, report=report)
        made_for = model_of(self.prompt, "give model=")
        revision, precision = made_for.get("revision"), made_for.get("dtype")
        return load_model(
            made_for["name"],
            revision=revision if isinstance(revision, str) else None,
            dtype=precision if isinstance(precision, str) else "auto",
            report=report,
        )


def load(folder: str | Path) -> RefinedPrompt:
    """Read a saved prompt: its folder, a run's, or an export's that holds one prompt.

    `hub:OWNER/NAME[@REVISION]` is one on the Hugging Face Hub, checked like any stranger's file.
    Raises `ArtifactError` that says what is missing, damaged or unknown.
    """
    folder = local_folder(folder)
    if not any((folder / f).exists() for f in (artifact.JSON_FILE, "prompt")):
        inside = sorted(p.parent for p in (folder / EXPORT_FOLDER).glob("*/" + artifact.JSON_FILE))
        if len(inside) > 1:
            raise ArtifactError(
                f"{folder}: holds {len(inside)} prompts; give the folder of one: "
                f"{', '.join(map(str, inside))}"
            )
        folder = inside[0] if inside else folder
    return RefinedPrompt(load_prompt(folder))
