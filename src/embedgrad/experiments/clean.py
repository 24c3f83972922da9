"""Rank training rows by how suspicious their labels are.

OUT/ranking.jsonl      every training row, the most suspicious first
OUT/cleaned.jsonl      the training file without the rows that were dropped
OUT/clean.json         what was computed, and what came of it
OUT/report.html        the ranking as a page
OUT/state.safetensors  where an interrupted ranking continues
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, final

import torch
from safetensors import safe_open
from safetensors.torch import save

from embedgrad.atomic_files import finite, to_json_lines, write_file, write_json
from embedgrad.data.bounded_reads import read_json
from embedgrad.data.readers import read_table
from embedgrad.errors import DataError, ModelError, OptionError, RecipeError, RunError
from embedgrad.events import Report, say, stage
from embedgrad.experiments.run_folder import preparing
from embedgrad.model.language_model import LanguageModel
from embedgrad.recipe.build import Prepared, prepare, read_data
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import start_rows
from embedgrad.report.page.run_files import json_lines
from embedgrad.report.page.suspects import RANKING, suspects_page
from embedgrad.report.terminal.bars import show
from embedgrad.training.loss import Loss
from embedgrad.training.tuner import State, Tuned, Tuning, tune
from embedgrad.training.weighted import WeightedTraining

RESULT, CLEANED, PAGE = "clean.json", "cleaned.jsonl", "report.html"
STATE = "state.safetensors"
PRICED = 0.3  # the radius of a trust region whose anchor is 1


@final
class CleanResult(TypedDict):
    """What `clean` found: the content of `clean.json`.

    `rounds` has the figures of each hypergradient, `sources` the weight of each value of the column
    `by`. `flagged` counts the rows whose smaller weight would lower the loss on dev, `dropped`
    those that `cleaned.jsonl` lacks, of the `most` worst. `worst` are the ranking's first rows.
    """

    train_rows: int
    dev_rows: int
    flagged: int
    most: int
    dropped: int
    kept: int
    rounds: list[dict[str, Any]]
    sources: dict[str, float]
    worst: list[dict[str, Any]]
    files: dict[str, str]
    settings: str


def clean(
    recipe: Recipe,
    out: str | Path,
    report: Report = show,
    *,
    drop: float = 0.1,
    by: str | None = None,
    tuning: Tuning = Tuning(),
    anchor: float | None = None,
    curvature_rows: int = 128,
    model: LanguageModel | None = None,
) -> CleanResult:
    """Rank the training rows of a recipe by their labels, with the dev rows as the judge.

    A prompt is trained on all rows, and each row gets the derivative of the dev loss in its weight:
    how much worse dev becomes if the row counts for more (`embedgrad.training.hypergradient`). The
    ranking is by that harm and by the row's own loss, half and half. `drop` is the largest share of
    rows to leave out of `cleaned.jsonl`; a row stays that dev is not better without. `by` names a
    column whose values get a weight too, such as the annotator. `anchor` is the price of leaving
    the text's rows, instead of the trust region (None: by its radius). The recipe's optimizer and
    augmentations play no part.

    The same call continues what was interrupted, and gives the same ranking to the bit; of a
    finished one it only writes the files again, so that `drop` can change at no cost. Raises
    `RecipeError` where labels are not what a recipe trains on, `DataError` without dev rows,
    `ModelError` for a model in 16 bits, and `RunError` where `out` holds something else.
    """
    out = Path(out)
    if not 0 <= drop < 1:
        raise OptionError(f"drop: {drop}; expected a share of the rows from 0 to less than 1")
    recipe.needs_text("clean")
    recipe = _check(recipe, report)
    splits = read_data(recipe)
    if not splits.dev:
        raise DataError(
            "data.dev: no dev rows, which judge the training rows; set data.dev to rows whose "
            "labels you trust, or data.dev_share"
        )
    sources = [None if by is None else example.columns.get(by) for example in splits.train]
    if by is not None and None in sources:
        raise DataError(f"by: not every training row has a text in column {by!r}; name another")
    if by is not None and len({*sources}) < 2:
        raise DataError(
            f"by: all {len(sources)} training rows have {sources[0]!r} in column {by!r}; name a "
            "column with two values or more"
        )
    if anchor is None:
        anchor = (PRICED / (recipe.parts.trust_region.radius or 1.0)) ** 2
    options = [dataclasses.asdict(tuning), by, anchor, curvature_rows]
    rows_from = [[example.source for example in splits.train], sources]
    made_from = json.dumps(
        [recipe.as_dict(), options, dict(splits.digests), rows_from], default=str
    )
    settings = hashlib.sha256(made_from.encode()).hexdigest()
    held = _settings_of(out)
    if held not in (None, settings):
        what = "holds the ranking of another recipe, data or setting"
        raise RunError(f"{out}: {what}; choose another folder")
    if (out / RESULT).is_file():
        say(report, [f"{out}: ranked already; its files are written again"])
        result = read_json(out / RESULT)
        rows = [row for _, row in json_lines(out / RANKING) if row is not None]
        if len(rows) != result["train_rows"]:
            raise RunError(
                f"{out / RANKING}: lacks rows of the {result['train_rows']} that were ranked; "
                "rank them anew in another folder"
            )
    else:
        with ExitStack() as stack:
            with preparing(out, report, stack, resume=held is not None):
                ready = prepare(recipe, None, report, model=model)
                if ready.model.dtype not in (torch.float32, torch.float64):
                    raise ModelError(
                        f"the model is in {ready.model.info.dtype}, too coarse for second "
                        "derivatives; load it with dtype 'float32'"
                    )
                problem = _problem(ready, by, anchor, curvature_rows, report)
            tuned = _tune(problem, tuning, out / STATE, settings, report)
            stage(report, "scoring the training rows")
            rows = _ranking(problem, tuned, ready)
            result = _result(problem, tuned, rows, settings)
    return _write(recipe, out, result, rows, drop)


def _check(recipe: Recipe, report: Report) -> Recipe:
    """The recipe, in 32 bits and trained on its labels."""
    problems = {
        "teacher": recipe.teacher is not None,
        "objective": recipe.parts.objective.sampling is not None or recipe.parts.objective.decides,
        "demonstrations": recipe.demonstrations.k > 0,
    }
    names = [name for name, found in problems.items() if found]
    if names:
        why = "trains on something other than each row's own label"
        raise RecipeError("clean", [f"{name}: {why}; leave the section out" for name in names])
    if recipe.place == AUTO:
        raise RecipeError("clean", ["template.place: 'auto' needs a training; name one place"])
    if recipe.training.warm_start:
        problem = "a ranking begins at the rows of the words; leave it out"
        raise RecipeError("clean", [f"training.warm_start: {problem}"])
    solutions, model = recipe.solutions, recipe.model
    if solutions.source == "self-written":
        solutions = dataclasses.replace(solutions, source="answer")
    if model.dtype not in ("float32", "float64"):
        if model.dtype != "auto":
            say(report, [f"model.dtype is float32 here, as {model.dtype} is too coarse"])
        model = dataclasses.replace(model, dtype="float32")
    return dataclasses.replace(recipe, solutions=solutions, model=model)


def _settings_of(out: Path) -> str | None:
    """What the ranking in a folder was made from; None where there is none."""
    try:
        if (out / RESULT).is_file():
            return str(read_json(out / RESULT)["settings"])
        return str(_read_state(out / STATE)[1]["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _problem(
    ready: Prepared, by: str | None, anchor: float, curvature_rows: int, report: Report
) -> WeightedTraining:
    model, sequencer = ready.model, ready.sequencer
    start = start_rows(model, sequencer, ready.parts.parameterization)
    generator = torch.Generator().manual_seed(ready.training.seed)
    return WeightedTraining(
        Loss(model, ready.parts, sequencer.target, start),
        ready.parts.parameterization.init(start, generator),
        ready.train,
        ready.dev,
        anchor=anchor,
        sources=None if by is None else [s.example.columns[by] for s in ready.train],
        curvature_rows=curvature_rows,
        batch_size=ready.training.batch_size,
        report=report,
    )


def _tune(
    problem: WeightedTraining, tuning: Tuning, path: Path, settings: str, report: Report
) -> Tuned:
    """Tune from the saved state, or from the start."""

    def keep(state: State) -> None:
        more = {"settings": settings, **{n: getattr(state, n) for n in _PLAIN}}
        tensors = {"x": state.x}
        for kind in _TENSORS:
            tensors |= {f"{kind}.{n}": value for n, value in getattr(state, kind).items()}
        held = {name: value.contiguous().cpu() for name, value in tensors.items()}
        write_file(path, save(held, {"state": json.dumps(finite(more))}))

    names = ("examples", "sources") if problem.sources else ("examples",)
    hyper, state = problem.hyper(*names), None
    if path.is_file():
        tensors, plain = _read_state(path)
        on = {name: value.to(problem.start_x.device) for name, value in tensors.items()}
        saved: dict[str, Any] = {
            kind: {n.partition(".")[2]: v for n, v in on.items() if n.startswith(f"{kind}.")}
            for kind in _TENSORS
        }
        state = State(x=on["x"], **saved, **{name: plain[name] for name in _PLAIN})
        say(report, [f"continuing after {state.passes} passes of training"])
    return tune(problem, hyper, tuning, state=state, report=report, keep=keep)


_PLAIN = ("step", "tolerance", "passes", "history")
_TENSORS = ("hyper", "memory")


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, plain  # noqa: SIM118
    except Exception as error:  # safetensors' own errors derive from Exception alone
        raise OSError(f"{path}: cannot be read") from error


def _ranking(problem: WeightedTraining, tuned: Tuned, ready: Prepared) -> list[dict[str, Any]]:
    """A plain row for every training row, the most suspicious first.

    Suspicious is a label that is harmful to dev and unlikely by the prompt: the mean of both ranks.
    """
    losses_N, outcome = problem.outcome(tuned.state.x)
    harm_N = -tuned.suggested["examples"]
    suspicion_N = (_shares_below(harm_N) + _shares_below(losses_N)) / 2
    weights = problem.weights(tuned.suggested).tolist()
    shares_NC = torch.softmax(outcome.scores_BC, dim=1)
    choices = ready.sequencer.target.choices
    rows = list[dict[str, Any]]()
    for i in torch.argsort(suspicion_N, descending=True, stable=True).tolist():
        example = problem.train[i].example
        row = {
            "rank": len(rows) + 1,
            "source": example.source,
            "suspicion": suspicion_N[i].item(),
            "answer": example.answer,
            "harm": harm_N[i].item(),
            "loss": losses_N[i].item(),
            "weight": weights[i],
            "columns": dict(example.columns),
        }
        if choices:
            best = int(outcome.scores_BC[i].argmax())
            row["suggested"] = choices[best]
            row["probabilities"] = dict(zip(choices, shares_NC[i].tolist(), strict=False))
        rows.append(row)
    return rows


def _shares_below(values_N: torch.Tensor) -> torch.Tensor:
    """For each value the share of the others that are smaller; of equal ones the first are."""
    ranks_N = values_N.argsort(stable=True).argsort().double()
    return ranks_N / max(1, len(values_N) - 1)


def _result(
    problem: WeightedTraining, tuned: Tuned, rows: Sequence[dict[str, Any]], settings: str
) -> CleanResult:
    shares = 2 * torch.sigmoid(tuned.suggested.get("sources", torch.zeros(0)))
    return CleanResult(
        train_rows=len(rows),
        dev_rows=len(problem.dev),
        flagged=sum(row["harm"] > 0 for row in rows),
        most=0,
        dropped=0,
        kept=len(rows),
        rounds=tuned.state.history,
        sources=dict(zip(problem.sources, shares.tolist(), strict=True)),
        worst=[],
        files={},
        settings=settings,
    )


def _write(
    recipe: Recipe, out: Path, result: CleanResult, rows: list[dict[str, Any]], drop: float
) -> CleanResult:
    """Write the files; `clean.json` last, so that a folder that has it has them all."""
    most = int(round(drop * len(rows), 9))  # 0.29 of 100 is 28.999999999999996
    dropped = {row["source"] for row in rows[:most] if row["harm"] > 0}
    table = read_table(recipe.data.train, used=())  # else `messages` become columns too
    kept = [
        row for row, source in zip(table.rows, table.sources, strict=True) if source not in dropped
    ]
    shown: list[dict[str, Any]] = [
        {name: value for name, value in row.items() if name != "columns"} for row in rows[:20]
    ]
    result["most"], result["dropped"], result["kept"] = most, len(dropped), len(kept)
    result["worst"] = shown
    names = {"ranking": RANKING, "cleaned": CLEANED, "page": PAGE}
    result["files"] = {name: str(out / file) for name, file in names.items()}
    page = suspects_page(result, rows, out.resolve().name, recipe.template.columns)
    write_file(out / RANKING, to_json_lines(rows))
    write_file(out / CLEANED, to_json_lines(kept, default=str))
    write_file(out / PAGE, page.encode())
    write_json(out / RESULT, finite({**result, "files": names}))
    (out / STATE).unlink(missing_ok=True)
    return result
