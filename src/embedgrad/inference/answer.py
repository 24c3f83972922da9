"""Answer queries with a run's or an artifact's prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor

from embedgrad.data.bounded_reads import parse_json
from embedgrad.data.examples import Example, cell_text
from embedgrad.data.images import image_query
from embedgrad.errors import DataError, EmbedgradError, OptionError, nearest
from embedgrad.formatting import visible
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.generation import generate, stream
from embedgrad.parts.registry import build, values_of
from embedgrad.prompt.images import Images
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.open_run import Answering
from embedgrad.recipe.overrides import check_values

Q = TypeVar("Q")
R = TypeVar("R")
Query = str | Mapping[str, Any]
"""The text of the template's one column, or the texts of all of them; of an image its columns."""

CUT = " [cut]"  # behind an answer that did not end by itself


def queries_from(
    query: str | None,
    lines: Iterable[bytes],
    columns: Sequence[str],
    images: Images | None = None,
) -> Iterator[Example]:
    """Examples without an answer: one from `query`, or one per JSON line. Raises `DataError`.

    A query, or a line that is only a JSON string, is the text of the template's one column. With
    `images` a line has the columns of an image.
    """
    if query is not None:
        yield example_of(query, columns, "the query", images=images)
        return
    for number, line in enumerate(lines, start=1):
        where = f"standard input:{number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig").encode(), halves=True)
        except ValueError as error:
            raise DataError(
                f"{where}: is not JSON ({error}); expected an object per line"
            ) from error
        yield example_of(row, columns, where, images=images)


def decoding_of(run: Answering, given: Mapping[str, Any]) -> Decoding:
    """The recipe's decoding, changed by options of the command line. Raises `EmbedgradError`."""
    values = values_of(run.evaluator.evaluation.decoding)
    return change_decoding(values, given, run.prompt.target.choices, "run", _option)


def change_decoding(
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    choices: Sequence[str],
    owner: str,
    spell: Callable[[str], str],
) -> Decoding:
    """Decoding from `values`, changed by the options `given`. Raises `EmbedgradError`.

    In its messages `owner` has the prompt, and `spell` gives the name of an option.
    """
    if given and choices:
        raise OptionError(
            f"{spell(next(iter(given)))}: this {owner}'s answers are chosen from {len(choices)} "
            "choices and not generated; leave it out"
        )
    values = {**values, **given}
    problems: list[str] = []
    check_values(values, "decoding", problems)
    decoding = None if problems else build(Decoding, values, "decoding", problems)
    if decoding is None:
        parts = (problem.removeprefix("decoding.").partition(":") for problem in problems)
        raise OptionError("; ".join(f"{spell(name)}:{rest}" for name, _, rest in parts))
    for name, idle in (("samples", decoding.samples > 1), ("top_p", decoding.top_p < 1)):
        if idle and not decoding.temperature:
            raise OptionError(
                f"{spell(name)}: decoding is greedy, so there is one answer; give a temperature "
                "above 0 too"
            )
    return decoding


def _option(place: str) -> str:
    """The option of the command line for a setting, such as stop.0."""
    return f"--{place.partition('.')[0].replace('_', '-')}"


def answer(
    run: Answering,
    queries: Iterable[Example],
    *,
    place: float = 1.0,
    decoding: Decoding | None = None,
) -> Iterator[dict[str, Any]]:
    """One plain JSON value per query, in order, batch by batch.

    `place` is where the rows lie between the text prompt, 0, and the refined one, 1, or beyond.
    `answer` is the text, or `answers` with several samples; with choices, `probabilities` says how
    likely each is among them. The queries before one that is refused are answered first.
    `decoding` is by default the recipe's.
    """

    done = 0

    def respond(batch: list[TokenSequence]) -> Iterator[dict[str, Any]]:
        nonlocal done
        if run.prompt.target.choices:
            answers = _choose(run, batch, place)
        else:
            answers = _generate(run, batch, place, decoding, done)
        for sequence, values in zip(batch, answers, strict=True):
            yield {**values, "columns": dict(sequence.example.columns)}
        done += len(batch)

    yield from in_batches(queries, run.evaluator.evaluation.batch_size, run.sequencer, respond)


def in_batches(
    queries: Iterable[Example],
    size: int,
    prepare: Callable[[Example], Q],
    respond: Callable[[list[Q]], Iterable[R]],
) -> Iterator[R]:
    """What `respond` gives for batches of prepared queries.

    Where one is refused, those before it are answered first. Raises what `prepare` raises.
    """
    queries, failure = iter(queries), None
    while failure is None:
        batch: list[Q] = []
        try:
            for query in islice(queries, size):
                batch.append(prepare(query))
        except EmbedgradError as error:
            failure = error
        if not batch and failure is None:
            return
        yield from respond(batch)
    raise failure


def stream_answer(
    run: Answering, query: Example, *, place: float = 1.0, decoding: Decoding | None = None
) -> Iterator[str]:
    """A free answer as `as_text` gives it, in pieces as they come; see `answer`."""
    rows_PD, sequence = model_inputs(run, run.sequencer(query), place)
    settings = decoding or run.evaluator.evaluation.decoding
    pieces = stream(run.model, rows_PD, sequence, settings, end_ids=run.evaluator.end_ids)
    while True:
        try:
            yield _visible_lines(next(pieces))
        except StopIteration as end:
            if end.value.cut:
                yield CUT
            return


def as_text(values: dict[str, Any]) -> str:
    """Values of `answer` for a terminal; what could drive it is shown as an escape."""
    if "answers" in values:
        return "\n".join(f"[{n}] {as_text(v)}" for n, v in enumerate(values["answers"], start=1))
    text = _visible_lines(str(values["answer"]))
    chances = values.get("probabilities")
    if not chances:
        return f"{text}{CUT}" if values.get("cut") else text
    listed = ", ".join(f"{visible(choice)} {chance:.3f}" for choice, chance in chances.items())
    return f"{text}  ({listed})"


def _visible_lines(text: str) -> str:
    return "\n".join(visible(line) for line in text.split("\n"))


def _choose(run: Answering, batch: list[TokenSequence], place: float) -> Iterator[dict[str, Any]]:
    if place:
        answers = run.evaluator.score(run.prompt.rows_at(place), batch)
    else:
        answers = run.evaluator.score_text_prompt(run.prompt.start_rows, batch)
    for scored in answers:
        yield {"answer": scored.predicted, "probabilities": scored.probabilities}


def _generate(
    run: Answering, batch: list[TokenSequence], place: float, decoding: Decoding | None, first: int
) -> Iterator[dict[str, Any]]:
    """`first` is the number of the batch's first query."""
    settings = decoding or run.evaluator.evaluation.decoding
    inputs = [model_inputs(run, sequence, place) for sequence in batch]
    for samples in write(run, inputs, settings, [first + i for i in range(len(batch))]):
        answers = [{"answer": g.text, "cut": not g.ended} for g in samples]
        yield answers[0] if settings.samples == 1 else {"answers": answers}


def write(
    run: Answering,
    inputs: Sequence[tuple[Tensor, TokenSequence]],
    decoding: Decoding,
    numbers: Sequence[int],
) -> list[list[Generation]]:
    """Free answers to the inputs of a model; see `generation.generate`."""
    written: dict[int, list[Generation]] = {}
    for rows_PD, places in by_rows(inputs):
        samples = generate(
            run.model,
            rows_PD,
            [inputs[i][1] for i in places],
            decoding,
            end_ids=run.evaluator.end_ids,
            batch_size=run.evaluator.evaluation.batch_size,
            numbers=[numbers[i] for i in places],
        )
        written |= zip(places, samples, strict=True)
    return [written[i] for i in range(len(inputs))]


def by_rows(
    inputs: Sequence[tuple[Tensor, TokenSequence]],
) -> Iterator[tuple[Tensor, list[int]]]:
    """The places of the inputs of one prompt that have its rows, and of those that have none."""
    for length in dict.fromkeys(len(rows_PD) for rows_PD, _ in inputs):
        places = [i for i, (rows_PD, _) in enumerate(inputs) if len(rows_PD) == length]
        yield inputs[places[0]][0], places


def model_inputs(
    run: Answering, sequence: TokenSequence, place: float
) -> tuple[Tensor, TokenSequence]:
    """Rows and sequence of a query; see `Evaluator.score_text_prompt`."""
    if place:
        return run.prompt.rows_at(place), sequence
    if sequence.plain is None:
        return run.prompt.start_rows, sequence
    return run.prompt.start_rows[:0], sequence.uncut()


def examples_of(
    queries: Query | Sequence[Query], columns: Sequence[str], images: Images | None = None
) -> tuple[list[Example], bool]:
    """Queries from Python as examples, and whether it is one alone. Raises `DataError`."""
    alone = isinstance(queries, str | Mapping)
    given: Sequence[object] = [queries] if alone else list(queries)
    examples = []
    for i, query in enumerate(given):
        where = "the query" if alone else f"query {i}"
        if not isinstance(query, str | Mapping):
            raise DataError(
                f"{where}: {type(query).__name__}; expected a text, or a mapping with "
                f"{', '.join(columns)}"
            )
        advice = "give a mapping with their texts"
        examples.append(example_of(query, columns, where, advice, images))
    return examples, alone


def example_of(
    row: object,
    columns: Sequence[str],
    where: str,
    advice: str = "give JSON lines with all of them on standard input",
    images: Images | None = None,
) -> Example:
    """A query as an example; every column of the template must have text.

    `advice` is for a text where the template has several columns.
    """
    if images is not None:
        return image_query(row, where, images.read)
    if isinstance(row, str):
        if len(columns) != 1:
            raise DataError(
                f"{where}: the template has {len(columns)} columns ({', '.join(columns)}); {advice}"
            )
        row = {columns[0]: row}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a JSON object with {', '.join(columns)}")
    texts = {name: text for name in row if (text := cell_text(row[name])) is not None}
    for name in columns:
        if name not in row:
            raise DataError(f"{where}: no column {name!r}; {nearest(name, row)}")
        if not texts.get(name, "").strip():
            raise DataError(f"{where}: column {name!r} holds no text; expected some")
        try:
            texts[name].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: column {name!r} is not UTF-8 text") from error
    return Example(texts, "", where)
