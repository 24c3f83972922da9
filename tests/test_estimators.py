"""The estimators for scikit-learn: its own checks, its tools, and what they refuse."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

import embedgrad as eg
import tiny
from embedgrad.experiments import estimators
from run_kit import PROMPT, save_model

torch.set_num_threads(1)
pytest_plugins = ["tiny_runs"]
REVIEWS = {e.columns["review"]: e.answer for e in tiny.reviews(120)}
X, Y = list(REVIEWS)[:24], list(REVIEWS.values())[:24]
QUICK = {"training.steps": 2, "training.batch_size": 8, "optimizer.learning_rate": 0.03}


class OnNumbers(eg.PromptClassifier):
    """Rows of numbers as texts, which is what scikit-learn's checks have."""

    def fit(self, X: Any, y: Any) -> OnNumbers:
        return super().fit(self._write(X, reset=True), y)

    def predict_proba(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return super().predict_proba(self._write(X, reset=False))

    def _write(self, X: Any, *, reset: bool) -> list[str]:
        return [" ".join(f"{v:.1f}" for v in row) for row in validate_data(self, X, reset=reset)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = False, True
        return tags


EXPECTED_TO_FAIL = {
    "check_classifiers_train": "asks for 83 % accuracy, which one step of a random model has not",
}


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model by the name that the checks' estimator has, as they are collected before it."""
    folder = tmp_path_factory.mktemp("estimators")
    save_model(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def classifier(**params: Any) -> eg.PromptClassifier:
    settings = {**QUICK, **params.pop("settings", {})}
    return eg.PromptClassifier(
        **{"model": "tiny", "prompt": PROMPT, "verbose": False, **params}, settings=settings
    )


@pytest.mark.slow
@parametrize_with_checks(
    [
        OnNumbers(
            "tiny",
            "Which is it?",
            settings={"training.steps": 1, "data.dev_share": 0.0, "model.dtype": "float64"},
            verbose=False,
        )
    ],
    expected_failed_checks=lambda _: EXPECTED_TO_FAIL,
)
def test_it_passes_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def fitted(tiny_model: None) -> eg.PromptClassifier:
    return classifier().fit(X, Y)


def test_it_comes_to_the_rows_of_its_recipe(fitted: eg.PromptClassifier, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(X, Y, strict=True)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    recipe = eg.Recipe.from_dict(
        {
            "model": {"name": "tiny"},
            "data": {"train": str(data), "test_share": 0.0},
            "template": {"user": f"{{text}}\n\n[[{PROMPT}]]"},
            "target": {"choices": ["negative", "positive"]},
            "training": {"steps": 2, "batch_size": 8},
            "optimizer": {"learning_rate": 0.03},
        }
    )
    eg.run(recipe, tmp_path / "run", eg.quiet)
    ran = eg.load(tmp_path / "run")
    assert not torch.equal(ran.rows, ran.start_rows)
    assert torch.equal(fitted.prompt_.rows, ran.rows)
    assert fitted.predict(X).tolist() == ran.generate(X, report=eg.quiet)


def test_it_says_how_likely_each_class_is(fitted: eg.PromptClassifier) -> None:
    assert fitted.classes_.tolist() == ["negative", "positive"]
    chances = fitted.predict_proba(X)
    assert chances.shape == (24, 2)
    assert chances.sum(axis=1) == pytest.approx(1)
    assert chances.std() > 0
    assert fitted.predict(X).tolist() == [["negative", "positive"][i] for i in chances.argmax(1)]
    assert fitted.score(X, Y) == np.mean(fitted.predict(X) == Y)
    assert fitted.result_["train"]["steps"] == 2


@pytest.mark.parametrize("words", [None, {0: "negative", 1: "positive"}])
def test_labels_come_back_as_they_were(words: dict[int, str] | None, tmp_path: Path) -> None:
    made = classifier(labels=words).fit(X, [int(y == "positive") for y in Y])
    assert made.prompt_.target.choices == (("negative", "positive") if words else ("0", "1"))
    assert made.predict(X).dtype.kind == "i"
    made.save(tmp_path / "prompt")
    again = eg.PromptClassifier.load(tmp_path / "prompt", verbose=False)
    assert again.classes_.tolist() == [0, 1]
    assert again.predict(X).tolist() == made.predict(X).tolist()
    assert eg.load(tmp_path / "prompt").prompt.provenance["classes"] == [0, 1]


def test_a_run_can_be_loaded(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    made = eg.PromptClassifier.load(folder, verbose=False, settings={"training.epochs": 3})
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    found = made.predict([row["columns"] for row in rows])
    assert found.tolist() == [row["refined"]["predicted"] for row in rows]
    assert made.recipe_.training.epochs == 3
    assert made.model == result_model(folder)
    with pytest.raises(eg.InputError, match=r"X\[0\]: no column 'review'"):
        made.predict([{"text": "x"}])


def test_a_damaged_artifact_is_refused(fitted: eg.PromptClassifier, tmp_path: Path) -> None:
    for classes in ("ab", ["a"], None):
        damaged = fitted.prompt_.with_provenance(classes=classes)
        with pytest.raises(eg.ArtifactError, match=r"classes are .* expected 2 of them"):
            eg.PromptClassifier.load(eg.save(damaged, tmp_path / "prompt"))


def result_model(folder: Path) -> str:
    return str(json.loads((folder / "prompt" / "prompt.json").read_text())["model"]["name"])


def test_parameters_are_read_set_and_copied() -> None:
    made = classifier()
    assert made.get_params()["training__steps"] == 2
    assert "training__steps" not in made.get_params(deep=False)
    copied = clone(made).set_params(training__steps=1, prompt="Good?", evaluation__batch_size=4)
    assert copied.settings == {**QUICK, "training.steps": 1, "evaluation.batch_size": 4}
    assert (copied.prompt, made.prompt, made.settings) == ("Good?", PROMPT, QUICK)
    with pytest.raises(ValueError, match="Invalid parameter 'promt'"):
        made.set_params(promt="x")
    template = eg.Template.chat(system="[[Judge.]]", user="{text}")
    assert clone(classifier(prompt=template)).prompt == template


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scikit_learn_searches_and_validates(jobs: int) -> None:
    scores = cross_val_score(classifier(), X, Y, cv=2, n_jobs=jobs, error_score="raise")
    assert len(scores) == 2
    grid = {"training__steps": [1, 2], "prompt": [PROMPT]}
    search = GridSearchCV(classifier(), grid, cv=2, n_jobs=jobs, error_score="raise").fit(X, Y)
    assert search.best_estimator_.recipe_.training.steps in (1, 2)
    assert search.predict(X[:2]).shape == (2,)


def test_its_state_holds_no_model(fitted: eg.PromptClassifier) -> None:
    file = io.BytesIO()
    joblib.dump(fitted, file)
    assert file.tell() < 30_000  # the model alone has 400,000 bytes
    estimators._KEPT.model = None
    file.seek(0)
    again = joblib.load(file)
    assert estimators._KEPT.model is None
    assert np.array_equal(again.predict_proba(X), fitted.predict_proba(X))


def test_texts_come_in_many_kinds(fitted: eg.PromptClassifier) -> None:
    expected = fitted.predict(X).tolist()
    for texts in (tuple(X), np.array(X), np.array(X, dtype=object), pd.Series(X)):
        assert fitted.predict(texts).tolist() == expected
    frame = pd.DataFrame({"title": X, "body": [x[::-1] for x in X]})
    made = classifier(prompt="{title}: {body} [[Good?]]").fit(frame, pd.Series(Y))
    assert made.prompt_.template.columns == ("title", "body")
    assert made.predict(frame.to_dict("records")).tolist() == made.predict(frame).tolist()
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    lowered = fitted.predict([x.lower() for x in X]).tolist()
    assert make_pipeline(lower, fitted).predict([x.upper() for x in X]).tolist() == lowered


BAD: dict[str, tuple[Any, Any, str]] = {
    "numbers": ([1.5, 2.5], ["a", "b"], "X[0] is '1.5' (float); expected a text"),
    "a matrix": (np.ones((2, 2)), ["a", "b"], "expected a text"),
    "NaN": (["good", float("nan")], ["a", "b"], "X[1] is 'nan' (float); expected a text"),
    "None": ([None, "x"], ["a", "b"], "X[0] is 'None' (NoneType); expected a text"),
    "no text": (["good", " "], ["a", "b"], "X[1]: column 'text' holds no text; expected some"),
    "half a character": (["good", "\ud800"], ["a", "b"], "X[1]: column 'text' is not UTF-8 text"),
    "one text": ("good", ["a", "b"], "X is 'good' (str); expected a list of texts"),
    "no texts": ([], ["a", "b"], "X holds no texts; expected at least one"),
    "a number": (7, ["a", "b"], "X is '7' (int); expected a list of texts"),
    "lengths": (["good", "bad", "fine"], ["a", "b"], "X holds 3 texts, and y 2; give one for each"),
    "no labels": (["good"], None, "fit requires y to be passed, but the target y is None"),
    "one class": (["good", "bad"], ["a", "a"], "y holds one class only, 'a', in 2 samples"),
    "NaN label": (["good", "bad"], [1.0, float("nan")], "y[1] is nan; expected a label"),
    "None label": (["good", "bad"], ["a", None], "y[1] is None; expected a label"),
    "a target": (["good", "bad"], [0.5, 1.5], "Unknown label type: continuous"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_in_one_line(kind: str) -> None:
    texts, labels, told = BAD[kind]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        classifier().fit(texts, labels)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert kind == "a target" or isinstance(error.value, eg.InputError)


def test_what_is_not_fitted_says_so(tmp_path: Path) -> None:
    for made in (classifier(), eg.PromptGenerator("tiny")):
        for ask in (
            made.predict,
            lambda _, m=made: m.save(tmp_path),
            lambda x, m=made: m.score(x, x),
        ):
            with pytest.raises(NotFittedError, match="is not fitted yet"):
                ask(X)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"settings": {"training.epoch": 2}}, "training.epoch: unknown option; did you mean"),
        ({"settings": {"trainin.epochs": 2}}, "trainin: unknown section"),
        ({"prompt": "{text} is it good?"}, "names the column {text}, but not what to refine"),
        ({"prompt": "[[Good"}, "a span that is not closed"),
        ({"settings": 5}, "settings: '5' (int); expected a mapping"),
        ({"settings": {3: 2}}, "3: unknown section"),
        (
            {"settings": {"training": 2, "training.epochs": 3}},
            "settings: training is '2' (int), and training.epochs is set too; give one of them",
        ),
        ({"labels": {"0": "bad"}}, "labels: '0'; none of them is a class of y"),
        ({"labels": ["bad"]}, "labels: \"['bad']\" (list); expected a mapping"),
        ({"prompt": ""}, "the prompt: it is empty"),
        ({"prompt": 5}, "prompt: '5' (int); expected a text or a Template"),
        ({"model": "tinny"}, "model 'tinny' was not found"),
    ],
)
def test_bad_parameters_are_told_when_it_is_fitted(
    params: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = classifier().set_params(**params)
    with pytest.raises(eg.EmbedgradError) as error:
        made.fit(X, Y)
    assert told in str(error.value)
    assert not hasattr(made, "prompt_")


class Odd:
    """A parameter that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_it_always_has_html(fitted: eg.PromptClassifier) -> None:
    assert "not fitted" in classifier()._repr_html_().lower()
    shown = fitted._repr_html_()
    assert f"refined: <q>{PROMPT}</q>" in shown
    for damage in ("prompt", "settings", "model"):
        odd = clone(classifier()).set_params(**{damage: Odd()})
        assert "PromptClassifier" in odd._repr_html_()
    hurt = clone(fitted)
    hurt.prompt_ = None
    assert "PromptClassifier" in hurt._repr_html_()


def test_ctrl_c_keeps_the_best_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: Any, **named: Any) -> Any:
        return eg.run(*given, **named, should_stop=lambda: True)

    monkeypatch.setattr(estimators, "run", stopped)
    made = classifier()
    with pytest.raises(KeyboardInterrupt, match="the best rows so far are kept"):
        made.fit(X, Y)
    assert made.predict(X[:1])[0] in made.classes_


@pytest.fixture(scope="module")
def generator(tiny_model: None) -> eg.PromptGenerator:
    settings = {**QUICK, "evaluation.scorer": "contains", "evaluation.max_new_tokens": 3}
    settings["solutions.source"] = "answer"
    made = eg.PromptGenerator("tiny", "Go:", settings=settings, verbose=False)
    return made.fit([f"Say {i}." for i in range(12)], [f"word {i}" for i in range(12)])


def test_free_answers_are_generated_and_scored(
    generator: eg.PromptGenerator, tmp_path: Path
) -> None:
    replies = generator.generate(["Say 3.", "Say 4."])
    assert replies == generator.predict(["Say 3.", "Say 4."])
    assert len(generator.generate(["Say 3."], max_new_tokens=1)[0]) <= len(replies[0])
    assert generator.score(["Say 3.", "Say 4."], [replies[0], "no such reply"]) == 0.5
    generator.save(tmp_path / "prompt")
    again = eg.PromptGenerator.load(tmp_path / "prompt", verbose=False)
    assert again.generate(["Say 3.", "Say 4."]) == replies
    assert json.loads((tmp_path / "prompt" / "prompt.json").read_text())["model"]["name"]


def test_settings_of_the_caller_stay_as_they_are() -> None:
    section = {"steps": 2, "batch_size": 8}
    made = eg.PromptClassifier("tiny", PROMPT, verbose=False)
    made.set_params(settings={"training": section, "training.steps": 1}).fit(X, Y)
    assert (made.recipe_.training.steps, section["steps"]) == (1, 2)


def test_answers_that_are_no_texts_are_refused(generator: eg.PromptGenerator) -> None:
    with pytest.raises(eg.InputError, match="X holds 1 texts, and y 2; give one for each"):
        generator.score(["x"], ["a", "b"])
    for answers, told in ((["a", 3], "y[1] is '3'"), (None, "the target y is None")):
        with pytest.raises(eg.InputError) as error:
            clone(generator).fit(["x", "y"], answers)
        assert told in str(error.value)
    with pytest.raises(eg.OptionError, match="answers are generated; use generate"):
        generator.prompt_.probabilities("x")


def test_without_scikit_learn_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; import embedgrad\n"
        "try: embedgrad.PromptClassifier\n"
        "except embedgrad.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "embedgrad's estimators: needs the package sklearn; install it: "
        "pip install 'embedgrad[sklearn]'\n"
    )


def test_the_tags_say_that_it_reads_texts() -> None:
    ours, theirs = (e.__sklearn_tags__().input_tags for e in (classifier(), CountVectorizer()))
    assert (ours.string, ours.two_d_array) == (theirs.string, theirs.two_d_array) == (True, False)
