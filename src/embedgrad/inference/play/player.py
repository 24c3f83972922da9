"""Answer a query with both prompts of a run, as events for a page."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from embedgrad.errors import EmbedgradError, OptionError, is_out_of_memory, one_line
from embedgrad.evaluation.drift import readable as readable_token
from embedgrad.events import Report
from embedgrad.inference.answer import answer, example_of, model_inputs
from embedgrad.inference.play.feedback import Feedback
from embedgrad.model.generation import next_logits, stream
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.check_rows import read_rows
from embedgrad.recipe.hub import local_folder
from embedgrad.recipe.open_run import OpenRun, load_prompt, open_run
from embedgrad.report.page.safe_text import readable

FARTHEST = 1.2  # on the line from the text prompt, 0, through the refined one, 1
LIKELIEST = 5  # next tokens that are shown
KEPT = 64  # answers in memory, to show them again and to judge them
SAMPLES = 40  # rows of the run to try
TEXT, REFINED = "text", "refined"  # the sides of the page

Events = Generator[dict[str, Any], None, None]


@final
@dataclass(frozen=True)
class Shown:
    """One side's answer: what the model was given, and what it wrote, or how sure it is."""

    rows_PD: Tensor
    sequence: TokenSequence
    text: str
    cut: bool = False
    ids: Ids = ()
    probabilities: Mapping[str, float] | None = None


@final
@dataclass(frozen=True)
class Query:
    """What was asked of which run, and where the refined side's rows are."""

    run: int
    columns: Mapping[str, str]
    place: float


@final
class Player:
    """Runs that are open, and their latest answers."""

    def __init__(self, runs: Mapping[Path, OpenRun]):
        self.folders, self.runs = list(runs), list(runs.values())
        self.feedback = [Feedback.of(run, folder) for folder, run in runs.items()]
        self._shown: dict[object, Shown] = {}
        self._answers: dict[int, tuple[Query, Mapping[str, Shown]]] = {}
        self._numbers = itertools.count()

    def describe(self) -> list[dict[str, Any]]:
        """What a page says of each run, as plain values."""
        names = [feedback.folder.resolve().name for feedback in self.feedback]
        return [
            {
                "name": name if names.count(name) == 1 else str(folder),
                "model": run.model.info.name,
                "prompt": list(run.prompt.template.spans),
                "same": run.prompt.rows_at(1).equal(run.prompt.rows_at(0)),
                "columns": list(run.prompt.template.columns),
                "choices": list(run.prompt.target.choices),
                "samples": _samples(run),
                "feedback": feedback.count(),
            }
            for name, folder, run, feedback in zip(
                names, self.folders, self.runs, self.feedback, strict=True
            )
        ]

    def ask(self, asked: Mapping[str, Any]) -> tuple[Query, Events]:
        """A query and the events of both its answers.

        `asked` names the `run`, its `columns`, and the `place` of the refined side's rows. Raises
        `EmbedgradError` at once for what cannot be answered.
        """
        number = self._number(asked.get("run"))
        place: Any = asked.get("place")
        if type(place) not in (int, float) or not 0 <= place <= FARTHEST:
            raise OptionError(f"place: {place!r}; expected a number from 0 to {FARTHEST}")
        run = self.runs[number]
        names = run.prompt.template.columns
        example = example_of(asked.get("columns"), names, "the query", "give all of them")
        query = Query(number, {name: example.columns[name] for name in names}, float(place))
        whole = run.sequencer.truncated
        sequence = run.sequencer(replace(example, columns=query.columns))
        return query, self._events(query, sequence, cut=run.sequencer.truncated > whole)

    def judge(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what a person says of an answer; returns the feedback's counts.

        Raises `EmbedgradError`, for an answer too that is not in memory any more.
        """
        number, side = asked.get("answer"), str(asked.get("side"))
        known = self._answers.get(number) if type(number) is int else None
        if known is None:
            raise OptionError("answer: is not in memory any more; ask again")
        query, shown = known
        if side not in shown:
            raise OptionError(f"side: {side!r}; expected {TEXT} or {REFINED}")
        place = query.place if side == REFINED else 0.0
        feedback = self.feedback[query.run]
        feedback.keep(query.columns, place, shown[side].text, asked)
        return feedback.count()

    def write_rows(self, number: object) -> dict[str, Any]:
        """Make the run's feedback a file of training rows. Raises `EmbedgradError`."""
        return self.feedback[self._number(number)].write_rows()

    def _number(self, number: object) -> int:
        if type(number) is not int or not 0 <= number < len(self.runs):
            raise OptionError(f"run: {number!r}; expected a number below {len(self.runs)}")
        return number

    def _events(self, query: Query, asked: TokenSequence, *, cut: bool) -> Events:
        run = self.runs[query.run]
        if cut:
            yield {"note": f"the end of {run.sequencer.truncate} was cut, as it did not fit"}
        shown: dict[str, Shown] = {}
        sides = {TEXT: 0.0, REFINED: query.place}
        turns = deque((side, self._answer(query.run, asked, at)) for side, at in sides.items())
        try:
            while turns:
                side, steps = turns[0]
                try:
                    yield {"side": side, "piece": readable(next(steps))}
                except StopIteration as end:
                    shown[side] = end.value
                    turns.popleft()
                    yield {"side": side, **_facts(end.value)}
                if not run.model.forward.one_by_one:  # such a model writes one answer at a time
                    turns.rotate(-1)
            yield {"next": _next_tokens(run.model, shown)}
        except (EmbedgradError, RuntimeError) as error:
            if not (isinstance(error, EmbedgradError) or is_out_of_memory(error)):
                raise
            yield {"error": one_line(error)}
            return
        finally:
            for _, steps in turns:
                steps.close()
        number = next(self._numbers)
        _keep(self._answers, number, (query, shown))
        yield {"answer": number}

    def _answer(
        self, number: int, asked: TokenSequence, place: float
    ) -> Generator[str, None, Shown]:
        """Pieces of the answer with the rows at a place, at once if it is still in memory."""
        key = number, tuple(asked.example.columns.items()), place
        shown = self._shown.get(key)
        if shown is not None:
            yield shown.text
            return shown
        run = self.runs[number].answering
        rows_PD, own = model_inputs(run, asked, place)
        if run.prompt.target.choices:
            (chosen,) = answer(run, [asked.example], place=place)
            shown = Shown(rows_PD, own, chosen["answer"], probabilities=chosen["probabilities"])
            yield shown.text
        else:
            decoding, end_ids = run.evaluator.evaluation.decoding, run.evaluator.end_ids
            reply = yield from stream(run.model, rows_PD, own, decoding, end_ids=end_ids)
            shown = Shown(rows_PD, own, reply.text, reply.cut, reply.ids)
        _keep(self._shown, key, shown)
        return shown


def _keep(values: dict[Any, Any], key: object, value: object) -> None:
    values[key] = value
    while len(values) > KEPT:
        del values[next(iter(values))]


def _facts(shown: Shown) -> dict[str, Any]:
    chances = shown.probabilities or {}
    return {
        "text": readable(shown.text),
        "cut": shown.cut,
        "probabilities": [[readable(choice), chance] for choice, chance in chances.items()],
    }


def _next_tokens(model: LanguageModel, shown: Mapping[str, Shown]) -> dict[str, Any]:
    """The likeliest tokens where the answers part, or at their beginning if they never do."""
    text, refined = shown[TEXT].ids, shown[REFINED].ids
    pairs, shorter = zip(text, refined, strict=False), min(len(text), len(refined))
    parting = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
    at = parting if text != refined else 0
    tokens: dict[str, Any] = {}
    for side, one in shown.items():
        behind = replace(one.sequence, suffix=one.sequence.suffix + one.ids[:at])
        (logits_V,) = next_logits(model, one.rows_PD, [behind])
        top = logits_V.float().softmax(0).topk(min(LIKELIEST, len(logits_V)))
        ids = top.indices.tolist()
        names = model.tokenizer.convert_ids_to_tokens(ids)
        tokens[side] = [
            [readable(readable_token(name, model.tokenizer, i)), share]
            for name, i, share in zip(names, ids, top.values.tolist(), strict=True)
        ]
    before = model.tokenizer.decode(text[:at], skip_special_tokens=True)
    return {"differ": text != refined, "before": readable(before), **tokens}


def _samples(run: OpenRun) -> list[dict[str, Any]]:
    """Rows that the run kept, to try."""
    rows = [] if run.alone else read_rows(run.folder) or []
    names = run.prompt.template.columns
    return [
        {"columns": {name: row.columns.get(name, "") for name in names}, "answer": row.answer}
        for row in rows[:SAMPLES]
    ]


def open_runs(folders: Sequence[Path], overrides: Sequence[str], report: Report) -> Player:
    """Open finished runs, those of one model with one copy of it. Raises what `open_run` raises."""
    runs: dict[Path, OpenRun] = {}
    models: list[tuple[object, LanguageModel]] = []
    for folder in folders:
        here = local_folder(folder, report)
        made_for = load_prompt(here).provenance.get("model") if models else None
        model = next((known for facts, known in models if facts and facts == made_for), None)
        run = runs[folder] = open_run(here, overrides, report, model=model)
        run.recipe.needs_text("`embedgrad play`")
        if model is None:
            models.append((run.prompt.provenance.get("model"), run.model))
    return Player(runs)
