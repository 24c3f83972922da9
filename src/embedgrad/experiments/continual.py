"""Continue a run: a further task for the prompt of a finished run.

OUT/                      a run folder as `run` writes it, which every command takes
OUT/memory.safetensors    what its tasks depend on, for a further `continue`
OUT/separate/             the new task's own run, without the earlier tasks: the baseline
RUN/memory.safetensors    the same of the earlier run, made where there is none

Each task keeps its name, that of its run's folder, and its run, which has its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import torch

from embedgrad.atomic_files import finite, write_json
from embedgrad.data.bounded_reads import read_object
from embedgrad.errors import RecipeError, RunError
from embedgrad.evaluation.evaluator import summarize
from embedgrad.events import Report, part_of, stage
from embedgrad.experiments.finish import Continual, RunResult
from embedgrad.experiments.run import run
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.parameterizations import Free
from embedgrad.parts.transforms import SubspaceMemory
from embedgrad.parts.transforms.subspace import FILE, read_memory, save_memory
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.span import rows_by_span
from embedgrad.recipe.build import open_model
from embedgrad.recipe.open_run import OpenRun, open_run
from embedgrad.recipe.paths import anchor, find_run
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.replay import as_written
from embedgrad.report.terminal.bars import show
from embedgrad.training.memory import remember

SEPARATE = "separate"


def continue_run(
    earlier: str | Path,
    recipe: Recipe,
    out: str | Path,
    report: Report = show,
    *,
    model: LanguageModel | None = None,
    separate: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train a run's prompt on a further task, and score it on all tasks.

    Training begins at the rows of the run `earlier`, and its steps leave alone what its tasks
    depend on: a transform `subspace`, with its defaults where the recipe has none. The result of
    the run gets `continual`. With `separate` the new task is also trained alone, in OUT/separate.
    A continuation in `out` that was interrupted is resumed. Raises `RunError` for a run without
    scores, or of other words, and what `run` and `open_run` raise.
    """
    recipe.needs_text("continue")
    earlier, out = Path(earlier), Path(out)
    resume = (out / "recipe.toml").is_file()
    previous, chain = _scores_of(earlier), _chain(earlier)
    alone = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, replay=0.0))
    recipe = _continue_from(recipe, earlier, out if resume else None)
    _check_words(Recipe.read_run(earlier), recipe, earlier)
    model = model or open_model(recipe, report)
    before = open_run(earlier, report=report, model=model)
    if not (earlier / FILE).is_file():
        stage(report, f"remembering {earlier.name}")
        found = _extend_memory(_subspace(recipe), before, before.prompt.start_rows, None)
        save_memory(found, earlier)
    _subspace(recipe).init({"rows": before.prompt.rows})
    result = run(recipe, out, report, model=model, resume=resume, should_stop=should_stop)
    if result["interrupted"] or "continual" in result:
        return result
    after = open_run(out, model=model)
    stage(report, f"remembering {out.name}")
    memory = _extend_memory(_subspace(recipe), after, before.prompt.rows, earlier)
    save_memory(memory, out)
    scores = [_score(after.prompt, open_run(folder, model=model), report) for folder in chain]
    own: float | None = None
    if separate:
        stage(report, f"{out.name} alone")
        place = out / SEPARATE
        again = (place / "recipe.toml").is_file()
        found_alone = run(alone, place, report, model=model, resume=again, should_stop=should_stop)
        if found_alone["interrupted"]:
            return {**result, "interrupted": True}
        own = found_alone["refined"]["accuracy"]
    matrix = [*previous["matrix"], [*scores, result["refined"]["accuracy"]]]
    average, backward = measures(matrix)
    result["continual"] = Continual(
        tasks=[*previous["tasks"], out.resolve().name],
        matrix=matrix,
        text=[*previous["text"], result["text"]["accuracy"]],
        separate=[*previous["separate"], own],
        average=average,
        backward_transfer=backward,
        directions=len(memory),
        trained_numbers=memory.shape[1],
    )
    write_json(out / "result.json", finite({**result, "artifact": "prompt"}))
    return result


def measures(matrix: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Average accuracy and backward transfer of `matrix[i][j]`, task j's accuracy after task i.

    average = mean_j R[T][j],   backward transfer = mean_{j < T} (R[T][j] - R[j][j])
    Source: Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840, eq. 2 and 3.
    """
    last = matrix[-1]
    changes = [last[j] - matrix[j][j] for j in range(len(matrix) - 1)]
    return fmean(last), fmean(changes) if changes else 0.0


def _scores_of(folder: Path) -> Continual:
    """What the tasks of a run scored so far; one task, unless it is a continuation itself."""
    if find_run(folder) != folder:
        raise RunError(
            f"{folder}: holds no run to continue; give a folder that `embedgrad optimize` or "
            "`embedgrad continue` wrote"
        )
    result = read_object(folder / "result.json")
    if "continual" in result:
        return cast(Continual, result["continual"])
    half = any(part.keeps_start for part in Recipe.read_run(folder).parts.transforms)
    if "refined" not in result or half:
        raise RunError(
            f"{folder}: is not finished, or scored no test rows, by which forgetting is measured; "
            "give the command that began it again, or run its recipe with test rows"
        )
    accuracy = result["refined"]["accuracy"]
    return Continual(
        tasks=[folder.resolve().name],
        matrix=[[accuracy]],
        text=[result["text"]["accuracy"]],
        separate=[accuracy],
        average=accuracy,
        backward_transfer=0.0,
        directions=0,
        trained_numbers=0,
    )


def _chain(folder: Path) -> list[Path]:
    """The runs of the tasks of a run, oldest first."""
    start = Recipe.read_run(folder).training.warm_start
    continued = start is not None and "continual" in read_object(folder / "result.json")
    return [*(_chain(Path(start)) if continued and start else ()), folder]


def _continue_from(recipe: Recipe, earlier: Path, out: Path | None) -> Recipe:
    """The recipe from a run's rows on, with its memory; `out` has begun already."""
    if not isinstance(recipe.parts.parameterization, Free):
        raise RecipeError(
            "parameterization",
            ["only 'free' can begin at the rows of another run; leave the section out"],
        )
    if recipe.teacher or (recipe.data.test is None and not recipe.data.test_share):
        raise RecipeError("continue", ["expected a recipe with test rows, and without a [teacher]"])
    transforms = list(recipe.parts.transforms)
    if not any(isinstance(part, SubspaceMemory) for part in transforms):
        transforms.append(SubspaceMemory())
    transforms = [
        dataclasses.replace(part, memory=str(earlier)) if isinstance(part, SubspaceMemory) else part
        for part in transforms
    ]
    training = dataclasses.replace(recipe.training, warm_start=str(earlier))
    parts = dataclasses.replace(recipe.parts, transforms=tuple(transforms))
    recipe = dataclasses.replace(recipe, training=training, parts=parts)
    if out is None:
        return recipe
    values = recipe.as_dict(out)  # paths in the form that the run's own recipe gives them
    anchor(values, out)
    return Recipe.from_dict(values)


def _subspace(recipe: Recipe) -> SubspaceMemory:
    return next(part for part in recipe.parts.transforms if isinstance(part, SubspaceMemory))


def _check_words(then: Recipe, now: Recipe, earlier: Path) -> None:
    if then.teacher:
        raise RunError(f"{earlier} was distilled from a [teacher], and cannot be continued")
    ours, theirs = (list(recipe.template.spans) for recipe in (now, then))
    if ours != theirs:
        raise RunError(
            f"{earlier} refines {theirs}, and this recipe {ours}; tasks that share a prompt have "
            "the same words"
        )


def _extend_memory(
    subspace: SubspaceMemory, opened: OpenRun, before: torch.Tensor, memory: Path | None
) -> torch.Tensor:
    """The memory of a run: that of the earlier one, and its own task's."""
    prompt = opened.prompt
    rows, earlier, start = (
        rows_by_span(tensor.to(opened.model.device), prompt.spans)
        for tensor in (prompt.rows, before, prompt.start_rows)
    )
    known = torch.zeros(0, prompt.rows.numel()) if memory is None else read_memory(memory)
    its, examples = (opened.model, opened.sequencer), opened.read_data().train
    train = opened.sequencer.build(as_written(examples, opened.folder, opened.recipe, *its))
    own = (opened.model, opened.sequencer.target, train)
    return remember(subspace, known, *own, rows=rows, before=earlier, start=start)


def _score(prompt: PromptEmbedding, task: OpenRun, report: Report) -> float:
    """The accuracy of a prompt's rows on the test rows of another run."""
    sequences = task.sequencer.build(task.read_data().test)
    name = task.folder.resolve().name
    stage(report, f"scoring {name}")
    own = part_of(report, name, 0, len(sequences))
    answers = task.evaluator.greedy.score(prompt.rows, sequences, own)
    return summarize(answers, task.evaluator.target.choices).accuracy
