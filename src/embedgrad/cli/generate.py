"""Command `generate`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, Policy, Quiet, Set, app, echo, print_values, warn
from embedgrad.errors import OptionError


@app.command(epilog='Example:  embedgrad generate runs/first "A film to remember."')
def generate(
    run: Annotated[
        str | None,  # a path would change the text of a query
        typer.Argument(metavar="RUN", help="A folder that `optimize` wrote, or a saved prompt's."),
    ] = None,
    query: Annotated[
        str | None,
        typer.Argument(help="Text for the template's column; without it, JSONL on standard input."),
    ] = None,
    policy: Policy = None,
    text_prompt: Annotated[
        bool, typer.Option("--text-prompt", help="Answer with the unrefined prompt.")
    ] = False,
    at: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="Answer with rows between the text (0) and the refined prompt (1), or beyond.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest free answer in tokens; unset: the recipe's.")
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
        typer.Option(help="Text that ends a free answer; may be repeated; unset: the recipe's."),
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

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "stop": stop or None,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if policy is not None:
        if query is not None:
            raise OptionError("--policy: its file names the runs; leave out RUN")
        others = {"stream": as_stream, "text_prompt": text_prompt, "at": at is not None}
        if given := [*options, *(name for name, asked in others.items() if asked)]:
            option = given[0].replace("_", "-")
            raise OptionError(f"--{option}: the policy says how its prompts answer; leave it out")
        _check_query(run)
        _answer_by_policy(policy, run, overrides or (), as_json, quiet)
        return
    if run is None:
        raise OptionError("generate: no RUN; give a run's folder, or --policy FILE")
    if at is not None and not math.isfinite(at):
        raise OptionError(f"--at: {at}; expected a finite number, such as 0.8")
    if text_prompt and at is not None:
        raise OptionError("--text-prompt: is --at 0; give one of them")
    if as_stream and query is None:
        raise OptionError(
            "--stream: needs the query as an argument; leave it out for standard input"
        )
    if as_stream and as_json:
        raise OptionError("--stream: prints plain text; leave out --json")
    if as_stream and samples is not None and samples > 1:
        raise OptionError("--stream: prints one answer; leave out --samples")
    _check_query(query)
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress)
        if as_stream and opened.prompt.target.choices:
            raise OptionError(
                "--stream: this run's answers are chosen and not generated; leave it out"
            )
        answering, place = opened.answering, 0.0 if text_prompt else 1.0 if at is None else at
        decoding = decoding_of(answering, options)
        columns = opened.prompt.template.columns
        queries = queries_from(query, sys.stdin.buffer, columns, opened.recipe.images)
        if not as_stream:
            for reply in answer(answering, queries, place=place, decoding=decoding):
                print_values(
                    reply,
                    as_json or query is None,
                    lambda values: echo(as_text(values), whole=True),
                )
    if as_stream:  # outside the progress display, which holds back unfinished lines
        (one,) = queries
        for piece in stream_answer(answering, one, place=place, decoding=decoding):
            typer.echo(encodable(piece, sys.stdout.encoding), nl=False)
        typer.echo()
    if opened.sequencer.truncated:
        warn(*opened.sequencer.notes([])[-1:])


def _check_query(query: str | None) -> None:
    if query is None and sys.stdin.isatty():
        raise OptionError(
            "generate: no query; give one as an argument, or JSON lines on standard input"
        )


def _answer_by_policy(
    file: Path, query: str | None, overrides: Sequence[str], as_json: bool, quiet: bool
) -> None:
    from embedgrad.formatting import pluralize, visible
    from embedgrad.inference.answer import as_text, queries_from
    from embedgrad.inference.pool import load_policy
    from embedgrad.report.terminal.progress import Progress

    def show(values: Mapping[str, Any]) -> None:
        how = "no round fits the budget" if values["answer"] is None else "no answer accepted, vote"
        how = f"{values['accepted']}" if values["accepted"] else how
        text = as_text({"answer": values["answer"] or ""})
        calls = pluralize(values["calls"], "call")
        spent = f"{calls}, {pluralize(values['tokens'], 'token')}"
        echo(f"{text}  ({visible(how)}; {spent})", whole=True)

    with Progress(quiet=quiet) as progress:
        pool = load_policy(file, overrides, progress)
        for decision in pool.answer(queries_from(query, sys.stdin.buffer, pool.columns)):
            print_values(pool.as_dict(decision), as_json or query is None, show)
