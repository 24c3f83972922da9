"""Command `generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from embedgrad.cli.common import AsJson, Prompt, Quiet, Set, app, echo, print_values, warn
from embedgrad.errors import OptionError


@app.command(epilog='Example:  embedgrad generate runs/first "A film to remember."')
def generate(
    run: Prompt,
    query: Annotated[
        str | None,
        typer.Argument(help="Text for the template's column; without it, JSONL on standard input."),
    ] = None,
    text_prompt: Annotated[
        bool, typer.Option("--text-prompt", help="Answer with the unrefined prompt.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest free answer in tokens; unset: as the recipe.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; unset or 0: greedy decoding.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: among the likeliest tokens with this total probability."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of free answers per query.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a free answer; may be repeated; unset: as the recipe."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    as_stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer while it is generated.")
    ] = False,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer queries with a refined prompt; JSONL in, JSONL out."""
    from embedgrad.formatting import encodable
    from embedgrad.inference.answer import answer, as_text, decoding_of, queries_from, stream_answer
    from embedgrad.recipe.open_run import open_run
    from embedgrad.report.terminal.progress import Progress

    if as_stream and query is None:
        raise OptionError(
            "--stream: needs the query as an argument; leave it out for standard input"
        )
    if as_stream and as_json:
        raise OptionError("--stream: prints plain text; leave out --json")
    if as_stream and samples is not None and samples > 1:
        raise OptionError("--stream: prints one answer; leave out --samples")
    if query is None and sys.stdin.isatty():
        raise OptionError(
            "generate: no query; give one as an argument, or JSON lines on standard input"
        )
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "stop": stop or None,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        if as_stream and opened.prompt.target.choices:
            raise OptionError(
                "--stream: this run's answers are chosen and not generated; leave it out"
            )
        answering, refined = opened.answering, not text_prompt
        decoding = decoding_of(answering, options)
        columns = opened.prompt.template.columns
        queries = queries_from(query, sys.stdin.buffer, columns, opened.recipe.images)
        if not as_stream:
            for reply in answer(answering, queries, refined=refined, decoding=decoding):
                print_values(
                    reply,
                    as_json or query is None,
                    lambda values: echo(as_text(values), whole=True),
                )
    if as_stream:  # outside the progress display, which holds back unfinished lines
        (one,) = queries
        for piece in stream_answer(answering, one, refined=refined, decoding=decoding):
            typer.echo(encodable(piece, sys.stdout.encoding), nl=False)
        typer.echo()
    if opened.sequencer.truncated:
        warn(*opened.sequencer.notes([])[-1:])
