"""Command `refine`: from a prompt and a data file to a verdict."""

from __future__ import annotations

import os
import re
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedgrad.cli.common import (
    DEFAULT_MODEL,
    AsJson,
    Plain,
    Quiet,
    RequireGain,
    Set,
    app,
    command_lines,
    warn,
)
from embedgrad.cli.run import execute

if TYPE_CHECKING:
    from embedgrad.recipe.recipe import Recipe


@app.command(
    epilog='Example:  embedgrad refine "Is it positive or negative?" reviews.csv',
)
def refine(
    prompt: Annotated[
        str,
        typer.Argument(
            help="Your prompt. All its words are refined, or only those in [[double brackets]]. "
            "The text goes in front; {column} puts it elsewhere, and then needs brackets."
        ),
    ],
    data: Annotated[
        str, typer.Argument(help="A data file, hub:OWNER/NAME, or - for standard input.")
    ],
    model: Annotated[str, typer.Option(help="The model to refine the prompt for.")] = DEFAULT_MODEL,
    place: Annotated[
        str | None,
        typer.Option(
            help="Where the words go: system, before, after or around the text; auto tries all."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The column to read; unset: guessed.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="The column with the right answers; unset: guessed.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=WORD", help="What a label means, such as 1=positive; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run, beside its recipe OUT.toml; unset: runs/DATA."),
    ] = None,
    plain: Plain = False,
    overrides: Set = None,
    require_gain: RequireGain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Refine your prompt on your data, in one command.

    It guesses the columns, writes a recipe, runs it, and says whether it helped.
    """
    import tomllib

    import tomli_w

    from embedgrad.errors import EmbedgradError, OptionError, RunError
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.recipe.starter import write_starter

    if os.path.isfile(prompt):  # not Path.is_file, which a long text makes raise
        raise OptionError(f"{prompt}: is a file; the prompt comes first, then the data")
    run = out or new_run("stdin" if data == "-" else re.sub(r"[^\w.-]+", "-", Path(data).stem))
    if run.exists():
        raise RunError(f"{run}: exists already; choose another name for --out")
    words = dict(one.split("=", 1) for one in label or () if "=" in one)
    if len(words) < len(label or ()):
        raise OptionError(
            f"--label: {', '.join(label or ())}; expected LABEL=WORD, each label once"
        )
    made: list[Path] = []
    try:
        if data == "-":
            made.append(keep_input(run))
            data = str(made[0])
        path, notes = write_starter(
            *(data, run.with_name(f"{run.name}.toml"), model),
            prompt=prompt,
            place=place,
            reads=text,
            answer=answer,
            words=words,
            plain=plain,
        )
        made.append(path)
        if not quiet:
            sections = tomllib.loads(path.read_text("utf-8"))
            written = tomli_w.dumps({name: held for name, held in sections.items() if held})
            warn(f"wrote {path}", *notes, "", *written.splitlines())
        recipe = Recipe.read(path, overrides or ())
        execute(
            recipe,
            run,
            resume=False,
            require_gain=require_gain,
            as_json=as_json,
            quiet=quiet,
            more={"recipe": str(path), "notes": list(notes), "next": next_commands(run, recipe)},
        )
    except EmbedgradError:
        if not run.exists():
            for file in made:
                file.unlink()
        raise


def keep_input(run: Path) -> Path:
    """Write what standard input holds beside a run, as the kind of data file that it looks like."""
    from embedgrad.atomic_files import write_file
    from embedgrad.data.bounded_reads import LARGEST_FILE
    from embedgrad.errors import DataError, RunError

    content = sys.stdin.buffer.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise DataError(f"standard input: is larger than {LARGEST_FILE:,} bytes; give a file")
    header = content.lstrip().partition(b"\n")[0]
    kind = "tsv" if b"\t" in header else "csv"
    kind = "json" if header[:1] in (b"[", b"{") else kind
    kind = "parquet" if header[:4] == b"PAR1" else kind
    path = run.with_name(f"{run.name}-data.{kind}")
    if path.exists():
        raise RunError(f"{path}: exists already; choose another name for --out")
    write_file(path, content)
    return path


def next_commands(run: Path, recipe: Recipe) -> list[str]:
    """What to do with a finished run."""
    export = ["export", run, "--to", "vocabulary", "--out", f"{run}-vocabulary"]
    lines = command_lines([["report", run], ["generate", run, "your text"], export])
    if len(recipe.template.columns) > 1:
        lines[1] = lines[1].replace("'your text'", "< queries.jsonl")
    return lines


def new_run(name: str) -> Path:
    """A folder for a run that is not there yet, nor a recipe beside it: runs/name, runs/name-2."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    folders = (Path("runs", name) for name in names)
    return next(f for f in folders if not (f.exists() or f.with_name(f"{f.name}.toml").exists()))
