"""Build a recipe: read the data, load the model, tokenize the rows."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch

from embedgrad.data.examples import Example
from embedgrad.data.images import PIXELS
from embedgrad.data.problems import Problems
from embedgrad.data.splits import NAMES, Splits, label_balance, read_splits
from embedgrad.errors import DataError, RecipeError, RunError, TemplateError
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.events import Report, say, stage
from embedgrad.formatting import pluralize
from embedgrad.model.backbone import Prompt
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.loading.device import choose_device
from embedgrad.model.prefix_cache import PrefixCache, Spill
from embedgrad.model.vision import load_vision_model
from embedgrad.parts.objectives import Distill
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.paths import is_missing, name_source, prompt_folder
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.replay import Replay, as_written
from embedgrad.recipe.warm_start import start_rows
from embedgrad.training.demonstrations import check_length, demonstrate, leave_out
from embedgrad.training.engine import Engine
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.self_training import source_of, training_examples
from embedgrad.training.settings import Parts, Training
from embedgrad.training.teacher import Teacher


@final
@dataclass(frozen=True)
class Prepared:
    """A recipe's data, model and token sequences, ready for training.

    `written` are the training examples with the texts that the model is trained to write, and
    `solutions` says where these come from; `training` is the recipe's, with the metric for them.
    `demonstrations` are shown before every query; `parts` leave a row's own out of its training,
    and replay rows of earlier runs.
    `start` are start rows other than the words' own, as images have.
    With a `teacher` the rows of dev and test that lack an answer have the teacher's.
    """

    splits: Splits
    model: LanguageModel
    sequencer: Sequencer
    written: Sequence[Example]
    solutions: dict[str, Any]
    train: Sequence[TokenSequence]
    dev: Sequence[TokenSequence]
    test: Sequence[TokenSequence]
    training: Training
    parts: Parts
    teacher: Teacher | None = None
    demonstrations: Sequence[Example] = ()
    start: Prompt | None = None


def prepare(
    recipe: Recipe,
    keep_at: Path | None,
    report: Report,
    *,
    model: LanguageModel | None = None,
    date: datetime.date | None = None,
    tested: bool = False,
    part: bool = False,
) -> Prepared:
    """Read, load and tokenize; solutions that the model writes are saved at `keep_at`.

    `date` is the date for chat templates that ask for it (default: today). `tested` requires test
    rows. `part` is for one of several tasks, whose rows are checked together. Raises the errors of
    the recipe's data, template and model.
    """
    refined = teaching_prompt(recipe)
    splits = read_data(recipe, refined=refined, part=part)
    if tested and not splits.test:
        raise DataError("data.test: a comparison needs test rows; set data.test or data.test_share")
    answered = [e for e in (*splits.dev, *splits.test) if e.answer or not recipe.teacher]
    check_answers(answered, recipe.target, recipe.evaluation.scorer)
    if recipe.parts.sampling.engine:
        Engine(recipe.parts.sampling).find_model()  # before a model is loaded, which takes long
    say(report, [*splits.notes, _counts(splits)])
    stage(report, f"loading {recipe.model.name}")
    model = model or open_model(recipe, report)
    say(report, [f"{model.info.architecture} in {model.info.dtype} on {model.device}"])
    shown = demonstrate(recipe.template, recipe.target, splits.train, recipe.demonstrations)
    try:
        sequencer = model.sequencer(
            shown.template,
            recipe.target,
            splits.train,
            date=date,
            merges=recipe.merges,
            truncate=recipe.data.truncate,
        )
    except TemplateError as error:
        if recipe.place != "system":
            raise
        raise TemplateError(f"template.place: 'system', but {error}") from error
    check_length(shown, sequencer)
    start = start_rows(model, sequencer, recipe.parts.parameterization)
    recipe.parts.parameterization.init(start, torch.Generator())  # which may refuse it
    sources_for = (recipe.solutions, splits.train, recipe.target, recipe.evaluation.scorer)
    if shown.examples and source_of(*sources_for) == "self-written":
        raise DataError(
            "demonstrations.k: the model would write its own solutions with the demonstrations' "
            "answers in view; set solutions.source to 'answer' or 'column'"
        )
    teacher = open_teacher(recipe, model, sequencer, report, refined=refined)
    if teacher:
        written, solutions = teacher.answer_train(splits.train, keep_at)
        labelled = {"dev": splits.dev, "test": splits.test}
        solutions["labelled"] = {n: all(e.answer for e in part) for n, part in labelled.items()}
        splits = with_answers(splits, teacher)
    else:
        written, solutions = training_examples(
            model,
            sequencer,
            splits.train,
            recipe.solutions,
            evaluation=recipe.evaluation,
            report=report,
            keep_at=keep_at,
        )
    stage(report, "tokenizing")
    train, dev, test = (sequencer.build(part) for part in (written, splits.dev, splits.test))
    source = solutions["source"]
    if teacher:
        if recipe.parts.objective.sampling is None:
            train = teacher.teach(train)
        if solutions["labelled"]["dev"]:
            source = "answer"
        else:
            dev = teacher.teach(dev)
    say(report, sequencer.notes([*train, *dev, *test]))
    if not recipe.target.choices:
        say(report, _short_of_room(sequencer, [*dev, *test], recipe.evaluation.max_new_tokens))
    parts, choices = with_replay(recipe, model, sequencer), bool(recipe.target.choices)
    metric = recipe.training.metric_for(parts.objective, choices=choices, source=source)
    training = replace(recipe.training, metric=metric)
    if not part:
        parts.check(train)
    if shown.examples:
        own = leave_out(shown, model, sequencer, train, recipe.demonstrations)
        parts = replace(parts, augmentations=(own, *parts.augmentations))
    sampling, by = recipe.parts.objective.sampling, recipe.parts.sampling
    if by.engine and sampling and train:
        evaluator = Evaluator(model, sequencer, recipe.evaluation)
        asked = Rollouts(model, evaluator, train, sampling, by, seed=0, start=start)
        say(report, [asked.try_engine()])
    ready = (splits, model, sequencer, written, solutions, train, dev, test)
    vision: Any = model  # where the recipe has images; see `open_model`
    first = vision.start(sequencer, train) if recipe.images else None
    return Prepared(*ready, training, parts, teacher, shown.examples, first)


def open_teacher(
    recipe: Recipe,
    model: LanguageModel,
    student: Sequencer,
    report: Report,
    *,
    refined: PromptEmbedding | None,
) -> Teacher | None:
    """The recipe's teacher, if it has one; `refined` is its `teaching_prompt`.

    Raises `ArtifactError` for a prompt of another model.
    """
    teaching, objective = recipe.teacher, recipe.parts.objective
    if teaching is None:
        return None
    assert isinstance(objective, Distill)
    if refined is not None:
        refined = fit_to_model(refined, model.info, model.embed)
    return Teacher(
        model,
        student,
        teaching,
        objective,
        refined=refined,
        evaluation=recipe.evaluation,
        report=report,
    )


def with_answers(splits: Splits, teacher: Teacher) -> Splits:
    """The rows of dev and test, those without an answer with the teacher's."""
    dev, test = (
        part if all(example.answer for example in part) else tuple(teacher.label(part))
        for part in (splits.dev, splits.test)
    )
    return replace(splits, dev=dev, test=test)


def teaching_prompt(recipe: Recipe) -> PromptEmbedding | None:
    """The prompt that is the recipe's teacher, if it is one."""
    if recipe.teacher is None or recipe.teacher.prompt is None:
        return None
    return artifact.load(prompt_folder(Path(recipe.teacher.prompt)))


def with_replay(recipe: Recipe, model: LanguageModel | None, sequencer: Sequencer) -> Parts:
    """The recipe's parts, with the rows of the earlier runs that it continues, if it asks for them.

    Without a model, as in a plan, those that have solutions of its own have their bare answers.

    Raises `RecipeError` where there is no such run, and `RunError` where its tasks have another
    template.
    """
    if not recipe.training.replay:
        return recipe.parts
    rows: list[Example] = []
    place = recipe.training.warm_start
    if place is None:
        problem = "needs a run that the training continues; `embedgrad continue` names one"
        raise RecipeError("training.replay", [problem])
    while place is not None:
        if not (Path(place) / "recipe.toml").is_file():
            raise RunError(
                f"training.replay: {place} holds no run with rows to replay; name the folder of a "
                "run in training.warm_start, or leave replay at 0"
            )
        earlier = Recipe.read_run(Path(place))
        if (earlier.template, earlier.target) != (recipe.template, recipe.target):
            raise RunError(
                f"training.replay: {place} has another template or target, whose rows cannot be "
                "replayed here; leave it out"
            )
        # With the columns that this objective reads.
        asked = replace(earlier, parts=replace(earlier.parts, objective=recipe.parts.objective))
        found = read_data(asked, part=True).train
        rows += as_written(found, Path(place), earlier, model, sequencer)
        place = earlier.training.warm_start
    replay = Replay(sequencer.build(rows), recipe.training.replay)
    return replace(recipe.parts, augmentations=(replay, *recipe.parts.augmentations))


def _short_of_room(
    sequencer: Sequencer, sequences: Sequence[TokenSequence], limit: int
) -> list[str]:
    """A note if the context ends before an answer has max_new_tokens tokens."""
    lengths = [s.length(len(sequencer.prompt_ids)) for s in sequences]
    short = [sequencer.context - n for n in lengths if n + limit > sequencer.context]
    if not sequencer.context or not short:
        return []
    return [
        f"in {len(short)} of {len(sequences)} rows of dev and test the model's context of "
        f"{sequencer.context} tokens leaves fewer for an answer than evaluation.max_new_tokens = "
        f"{limit} (least: {max(0, min(short))})"
    ]


def read_data(
    recipe: Recipe,
    problems: Problems | None = None,
    *,
    refined: PromptEmbedding | None = None,
    part: bool = False,
) -> Splits:
    """The recipe's examples, checked and split; see `read_splits`.

    `refined` is its `teaching_prompt`, where it was read before. The objective checks the training
    rows, unless they are `part` of those that are trained on, or only others are scored.
    """
    data = recipe.data
    with_solutions = recipe.solutions.source in ("auto", "column")
    refined = refined or teaching_prompt(recipe)
    taught = refined.template if refined else recipe.teacher and recipe.teacher.template
    objective = recipe.parts.objective
    try:
        splits = read_splits(
            data.train,
            data.dev,
            data.test,
            columns=recipe.template.columns,
            answer=data.answer,
            choices=recipe.target.choices,
            labels=data.labels,
            solution=data.solution if with_solutions else None,
            group=data.group,
            task=data.task,
            extra=(*objective.columns, *((PIXELS,) if recipe.images else ())),
            compared=recipe.evaluation.group,
            teacher=taught.columns if taught else (),
            labelled=objective.needs_labels,
            where=data.where,
            dev_share=data.dev_share,
            test_share=data.test_share,
            seed=data.seed,
            limit=data.limit,
            allow_duplicates=data.allow_duplicates,
            drop_duplicates=data.drop_duplicates,
            convert=recipe.images and recipe.images.read,
            problems=problems,
        )
    except DataError as error:
        gone = [name for name in NAMES if is_missing(getattr(data, name))]
        if not gone or error.about != "missing file":
            raise
        raise DataError(f"{error}; if it moved, give --set data.{gone[0]}=PATH") from error
    try:
        if splits.train and not part:
            objective.check(splits.train, splits.dev, splits.test)
    except DataError as error:
        if problems is None:
            raise
        problems.add([str(error)])
    return splits


def open_model(recipe: Recipe, report: Report) -> LanguageModel:
    """The recipe's model with the recipe's prefix cache; of a recipe with images a `VisionModel`.

    That one has of a language model what a run asks of it, and no text.
    """
    if recipe.images is not None:
        own = {**asdict(recipe.model), "prefix_cache_budget": recipe.prefix_cache.budget}
        del own["device_map"], own["max_memory"], own["fsdp"]
        return cast(LanguageModel, load_vision_model(recipe.images, **own, report=report))
    loaded, cache = load_parts(recipe, report)
    return LanguageModel(loaded, prefix_cache_budget=0).with_prefix_cache(cache)


@final
class KeptModel:
    """The model of the last recipe, opened once for all recipes that say the same of it."""

    def __init__(self) -> None:
        self.made_from: object = None
        self.model: LanguageModel | None = None

    def open(self, recipe: Recipe, report: Report) -> LanguageModel:
        """The recipe's model, as from `open_model`; there is never room needed for two."""
        made_from = recipe.model, recipe.prefix_cache, recipe.images
        if self.model is None or self.made_from != made_from:
            self.model = None
            self.model, self.made_from = open_model(recipe, report), made_from
        return self.model


def load_parts(
    recipe: Recipe, report: Report, *, weights: bool = True
) -> tuple[LoadedModel, PrefixCache]:
    """The recipe's model, or what is known of it without its weights, and its prefix cache."""
    prefixes = recipe.prefix_cache
    # Before the model is loaded, so that a folder that cannot be used is reported at once.
    spill = None if prefixes.spill is None else Spill(prefixes.spill, prefixes.spill_budget, report)
    loaded = load(**asdict(recipe.model), weights=weights, report=report)
    cache = PrefixCache.on(
        loaded.model.device if weights else choose_device(recipe.model.device),
        prefixes.budget,
        spill=spill,
        precision=prefixes.precision,
    )
    return loaded, cache


def sources(recipe: Recipe, splits: Splits) -> dict[str, dict[str, Any]]:
    """The source, number and digest of every split's rows; of files the names, without folders."""
    return {
        name: {
            "source": name_source(getattr(recipe.data, name))
            or f"a share of {name_source(recipe.data.train)}",
            "rows": len(getattr(splits, name)),
            "sha256": splits.digests.get(name),
        }
        for name in NAMES
    }


def _counts(splits: Splits) -> str:
    parts = []
    for name in NAMES:
        rows = getattr(splits, name)
        balance = label_balance(rows)
        listed = ", ".join(f"{n} {label}" for label, n in balance.items())
        few = 0 < len(balance) <= 5 and "" not in balance
        parts.append(pluralize(len(rows), f"{name} row") + (f" ({listed})" if few else ""))
    return "; ".join(parts)
