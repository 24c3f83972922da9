"""A pool of prompts, and the policy over it: `embedgrad.load_policy`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, final

from embedgrad.atomic_files import finite, write_json
from embedgrad.data.bounded_reads import read_json
from embedgrad.data.examples import Example
from embedgrad.data.splits import Splits
from embedgrad.errors import ArtifactError, DataError, RecipeError, RunError
from embedgrad.evaluation.significance import bootstrap_mean, paired_test, score_interval
from embedgrad.events import Report, quiet, say, scoring, stage
from embedgrad.inference.answer import Query, examples_of, in_batches
from embedgrad.inference.asking import Asked, Inputs
from embedgrad.inference.calibration import Round, halve, lowest_threshold, measure, predict
from embedgrad.inference.policy import Attempt, Decision, PolicySettings, PooledPrompt, follow
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.registry import build
from embedgrad.recipe.open_run import OpenRun, open_run
from embedgrad.recipe.recipe import read_toml
from embedgrad.report.terminal.bars import show

Table = dict[tuple[int, int], Attempt]
"""Answers by prompt and row, from which a policy can be followed without asking again."""


@final
class Pool:
    """Prompts on one model, and how they are asked.

    `thresholds` are by a prompt's place in the list, in the order of asking, and `rounds` how each
    does on dev rows; both are empty before `calibrate`.
    """

    def __init__(self, settings: PolicySettings, runs: Sequence[OpenRun], file: Path):
        self.settings, self.file, self._runs = settings, file, runs
        self.columns = runs[0].prompt.template.columns
        self.names = [f"{p.run} (text)" if p.text_prompt else p.run for p in settings.prompts]
        evaluation = runs[0].evaluator.evaluation
        scorer = None if runs[0].prompt.target.choices else evaluation.scorer
        self.prompts = [
            Asked(run.answering, settings, not prompt.text_prompt, scorer)
            for run, prompt in zip(runs, settings.prompts, strict=True)
        ]
        self._batch_size = evaluation.batch_size
        self._kept = file.with_suffix(".calibrated.json")
        self._digest = self._fingerprint()
        self._dev = ""  # digest of the dev rows that the thresholds were set on
        self.thresholds, self.rounds = self._read_calibration()

    def generate(self, queries: Query | Sequence[Query], report: Report = show) -> Any:
        """A `Decision` for a query, or a list of them. Raises `DataError` and `RunError`."""
        examples, alone = examples_of(queries, self.columns)
        decisions = []
        for decision in self.answer(examples):
            decisions.append(decision)
            report(scoring("queries", len(decisions), len(examples)))
        return decisions[0] if alone else decisions

    def answer(self, queries: Iterable[Example]) -> Iterator[Decision]:
        """A decision for each query, batch by batch. Raises `RunError` before `calibrate`."""
        if not self.thresholds:
            raise RunError(
                f"{self.file}: has no thresholds for these prompts and settings; "
                f"`embedgrad evaluate --policy {self.file}` sets them on dev rows"
            )
        order = list(self.thresholds)

        def decide(batch: list[dict[int, Inputs]]) -> list[Decision]:
            self._expect(batch)
            decisions = follow(
                self.settings,
                self.thresholds,
                len(batch),
                lambda prompt, i: self.prompts[prompt].price(batch[i][prompt]),
                lambda prompt, some: self.prompts[prompt].ask([batch[i][prompt] for i in some]),
                self.prompts[0].same,
            )
            for decision, inputs in zip(decisions, batch, strict=True):
                decision.columns = dict(inputs[order[0]][1].example.columns)
            return decisions

        return in_batches(queries, self._batch_size, lambda q: self._inputs(q, order), decide)

    def as_dict(self, decision: Decision) -> dict[str, Any]:
        """A decision as plain values, with the prompts' names."""
        named = [{**entry, "prompt": self.names[entry["prompt"]]} for entry in decision.trace]
        accepted = None if decision.accepted is None else self.names[decision.accepted]
        return {**vars(decision), "accepted": accepted, "trace": named}

    def ask(
        self,
        table: Table,
        examples: Sequence[Example],
        rows: range,
        prompts: Sequence[int],
        report: Report = quiet,
    ) -> None:
        """Add the answers of some prompts to rows, which are asked together for their prefix."""
        for first in rows[:: self._batch_size]:
            some = range(first, min(first + self._batch_size, rows.stop))
            batch = [self._inputs(examples[row], prompts) for row in some]
            self._expect(batch)
            for prompt in prompts:
                asked = self.prompts[prompt]
                attempts = asked.ask([inputs[prompt] for inputs in batch])
                for row, attempt in zip(some, attempts, strict=True):
                    right = asked.right(examples[row], attempt.answer)
                    table[prompt, row] = attempt._replace(right=right)
            report(scoring("rows", some.stop, rows.stop))

    def replay(
        self, table: Table, settings: PolicySettings, thresholds: Mapping[int, float]
    ) -> tuple[list[Decision], list[float]]:
        """What a policy decides on the rows of a table, and how right that is."""
        decisions = follow(
            settings,
            thresholds,
            len({row for _, row in table}),
            lambda prompt, row: table[prompt, row].most,
            lambda prompt, rows: [table[prompt, row] for row in rows],
            self.prompts[0].same,
        )
        right = []
        for row, decision in enumerate(decisions):
            tried = (table[entry["prompt"], row] for entry in decision.trace)
            right.append(next((a.right for a in tried if a.answer == decision.answer), 0.0))
        return decisions, right

    def calibrate(self, report: Report = show) -> Table:
        """Choose prompts and thresholds on the dev rows of the first run, and keep them in a file.

        Each threshold is set on the rows that reach its round, so that the precision holds for all
        that is accepted. Raises `DataError` without dev rows.
        """
        return self._calibrate(self._runs[0].read_data(), report)

    def _calibrate(self, splits: Splits, report: Report) -> Table:
        dev = splits.dev
        if not dev:
            raise DataError(f"{self.file}: {self.names[0]} has no dev rows to set thresholds on")
        table: Table = {}

        def score(prompt: int, rows: range) -> list[float]:
            self.ask(table, dev, rows, [prompt])
            report(scoring("dev answers", len(table), len(self.prompts) * len(dev)))
            return [table[prompt, row].right for row in rows]

        stage(report, "setting thresholds on dev rows")
        order = halve(len(self.prompts), len(dev), score, self.settings.rounds)
        self.set_thresholds(table, order, len(dev))
        self._dev = splits.digests["dev"]
        found = finite(
            {
                "dev": self._dev,
                "thresholds": list(self.thresholds.items()),
                "rounds": [one._asdict() for one in self.rounds],
            }
        )
        names = [self.names[prompt] for prompt in order]
        counts = {"dev_rows": len(dev), "dev_answers": len(table)}
        write_json(self._kept, {"policy": self._stamp(found), "prompts": names, **found, **counts})
        return table

    def set_thresholds(self, table: Table, order: Sequence[int], rows: int) -> None:
        """Set the thresholds of prompts in their order by labelled answers."""
        judged = {key: (attempt.score, attempt.right) for key, attempt in table.items()}
        self.thresholds, self.rounds, reached = {}, [], list(range(rows))
        for prompt in order:
            threshold = lowest_threshold(
                [judged[prompt, row] for row in reached], self.settings.precision
            )
            reached = [row for row in reached if judged[prompt, row][0] < threshold]
            self.thresholds[prompt] = threshold
            self.rounds.append(measure([judged[prompt, row] for row in range(rows)], threshold))

    def evaluate(self, split: str = "test", report: Report = show) -> dict[str, Any]:
        """The policy's scores on a split, beside a majority vote of the same prompts and the first.

        Thresholds are set first if they are not, or were set on other dev rows. Raises `DataError`
        for a split without rows.
        """
        splits = self._runs[0].read_data()
        changed = self.thresholds and self._dev != splits.digests["dev"]
        if changed:
            say(report, [f"{self._kept}: the dev rows have changed; thresholds are set anew"])
        if changed or not self.thresholds:
            self._calibrate(splits, report)
        examples = getattr(splits, split)
        if not examples:
            raise DataError(f"--split {split}: the recipe leaves it no rows; choose another split")
        stage(report, f"answering {split} rows")
        table: Table = {}
        self.ask(table, examples, range(len(examples)), list(self.thresholds), report)
        return {"split": split, **self.summarize(table)}

    def summarize(self, table: Table) -> dict[str, Any]:
        """What `evaluate` gives, from the answers of all prompts that are asked."""
        free = replace(self.settings, max_calls=None, max_tokens=None)
        equal = {key: attempt._replace(score=1.0) for key, attempt in table.items()}
        own = self.replay(table, self.settings, self.thresholds)
        vote = self.replay(equal, free, dict.fromkeys(self.thresholds, math.inf))
        first = self.replay(table, free, {next(iter(self.thresholds)): -math.inf})
        accepted = [right for d, right in zip(*own, strict=True) if d.accepted is not None]
        accuracy, rounds = predict(self.rounds)
        differences = [a - b for a, b in zip(own[1], vote[1], strict=True)]
        test, p_value = paired_test(differences)
        return {
            "rows": len(differences),
            "policy": {
                **_figures(*own),
                "accepted": len(accepted) / len(differences),
                "precision": fmean(accepted) if accepted else None,
                "unanswered": sum(decision.answer is None for decision in own[0]),
            },
            "predicted": {"accuracy": accuracy, "calls": rounds * self.settings.samples},
            "vote": _figures(*vote),
            "first": _figures(*first),
            "difference": {
                "accuracy": fmean(differences),
                "interval": list(bootstrap_mean(differences)),
                "test": test,
                "p_value": p_value,
                "fixed": sum(d > 0 for d in differences),
                "broken": sum(d < 0 for d in differences),
            },
            "prompts": [
                {"prompt": self.names[p], "threshold": finite(threshold), **one._asdict()}
                for (p, threshold), one in zip(self.thresholds.items(), self.rounds, strict=True)
            ],
        }

    def _inputs(self, example: Example, prompts: Sequence[int]) -> dict[int, Inputs]:
        return {prompt: self.prompts[prompt].inputs(example) for prompt in prompts}

    def _expect(self, batch: Sequence[dict[int, Inputs]]) -> None:
        """Let the prefix cache keep a query's prefix until the last prompt has read it."""
        prefixes = [s.prefix for inputs in batch for _, s in inputs.values()]
        self._runs[0].model.prefix_cache.expect((prefixes, self.prompts[0].passes))

    def _fingerprint(self) -> str:
        """Of what the thresholds are for: settings, and prompts with their rows."""
        made = hashlib.sha256(json.dumps({**asdict(self.settings), "prompts": None}).encode())
        for asked in self.prompts:
            prompt = asked.run.prompt
            rows_PD = prompt.rows if asked.refined else prompt.start_rows
            made.update(f"{prompt.template} {asked.refined} ".encode())
            made.update(rows_PD.contiguous().cpu().numpy().tobytes())
        return made.hexdigest()

    def _stamp(self, found: Mapping[str, Any]) -> str:
        """A digest of what `calibrate` found, and of what that is for."""
        return hashlib.sha256(f"{self._digest} {json.dumps(found)}".encode()).hexdigest()

    def _read_calibration(self) -> tuple[dict[int, float], list[Round]]:
        try:
            kept = read_json(self._kept)
            found = {name: kept[name] for name in ("dev", "thresholds", "rounds")}
            if kept["policy"] != self._stamp(found):
                return {}, []
            self._dev = kept["dev"]
            thresholds = {int(p): math.inf if t is None else t for p, t in kept["thresholds"]}
            return thresholds, [Round(**one) for one in kept["rounds"]]
        except (OSError, ValueError, LookupError, TypeError):
            return {}, []


def load_policy(
    file: str | Path,
    overrides: Sequence[str] = (),
    report: Report = show,
    *,
    model: LanguageModel | None = None,
) -> Pool:
    """Open the prompts of a policy's file on one model. Raises `EmbedgradError`.

    `overrides` change the recipes of all runs; a loaded `model` replaces theirs.
    """
    file = Path(file)
    settings = _read_settings(file)
    runs: list[OpenRun] = []
    problems: list[str] = []
    for i, prompt in enumerate(settings.prompts):
        beside = file.parent / prompt.run
        folder = beside if beside.exists() else prompt.run
        try:
            runs.append(open_run(folder, overrides, report, model=model))
        except ArtifactError as error:
            raise ArtifactError(f"{file}: prompts.{i}: {error}") from error
        runs[i].recipe.needs_text("a policy")
        model = runs[0].model
        for name in ("columns", "choices"):
            own, first = (
                sorted(r.prompt.template.columns) if name == "columns" else r.prompt.target.choices
                for r in (runs[i], runs[0])
            )
            if own != first:
                problems.append(
                    f"prompts.{i}: {prompt.run} has the {name} {', '.join(own)}, the first "
                    f"{', '.join(first)}; prompts of a pool answer the same queries"
                )
        if runs[i].recipe.data != runs[0].recipe.data:
            rows = f"the dev and test rows are those of {settings.prompts[0].run}"
            say(report, [f"{rows}; {prompt.run} has other data, and may have trained on some"])
    if runs[0].prompt.target.choices:
        idle = [f"validators: {v!r}" for v in settings.validators if v != "margin"]
        idle += ["samples"] if settings.samples > 1 else []
        problems += [f"{name}: these answers are chosen and not written; leave it" for name in idle]
    if problems:
        raise RecipeError(str(file), problems)
    return Pool(settings, runs, file)


def _read_settings(file: Path) -> PolicySettings:
    if not file.is_file():
        problem = 'no such file; a policy begins with prompts = [{ run = "runs/first" }]'
        raise RecipeError(str(file), [problem])
    problems: list[str] = []
    values = read_toml(file)
    for i, prompt in enumerate(p if isinstance(p := values.get("prompts"), list) else ()):
        build(PooledPrompt, prompt, f"prompts.{i}", problems)
    settings = None if problems else build(PolicySettings, values, "", problems)
    if settings is not None:
        for name in ("prompts", "validators"):
            if not getattr(settings, name):
                problems.append(f"{name}: []; expected one or more")
        if "agreement" in settings.validators and settings.samples < 2:
            problems.append("samples: 1; 'agreement' compares two or more")
        if (settings.max_calls or math.inf) < settings.samples:
            calls, samples = settings.max_calls, settings.samples
            problems.append(f"max_calls: {calls}; a round takes {samples}, as samples says")
        try:
            re.compile(settings.pattern or "")
        except re.error as error:
            problems.append(f"pattern: {settings.pattern!r} is no regular expression: {error}")
    if problems or settings is None:
        raise RecipeError(str(file), [problem.removeprefix(".") for problem in problems])
    return settings


def _figures(decisions: Sequence[Decision], right: Sequence[float]) -> dict[str, Any]:
    return {
        "accuracy": fmean(right),
        "interval": list(score_interval(right)),
        "calls": fmean(decision.calls for decision in decisions),
        "tokens": fmean(decision.tokens for decision in decisions),
    }
