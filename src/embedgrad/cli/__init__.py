"""The command line: thin verbs over the library. Whatever is heavy is imported inside them.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 a mistake
in what was given (one line says which), 4 no reliable gain where --require-gain asks for one, 130
interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

# In the order in which `embedgrad --help` lists their verbs.
# isort: off
from embedgrad.cli import plan as planning
from embedgrad.cli import run as running
from embedgrad.cli import compare as comparing
from embedgrad.cli import report as reporting
from embedgrad.cli import generate as answering
from embedgrad.cli import export as exporting
from embedgrad.cli import serve as serving
from embedgrad.cli import recipe as writing

# isort: on
from embedgrad.cli.common import Interruption, NoGain, app, warn
from embedgrad.errors import EmbedgradError, is_out_of_memory, one_line

__all__ = [
    "answering",
    "app",
    "comparing",
    "exporting",
    "main",
    "planning",
    "reporting",
    "running",
    "serving",
    "writing",
]

INTERRUPTED, NO_GAIN = 130, 4

# What typer raises for a mistake in the arguments; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a mistake in the input is one line and exit status 2."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Offline the Hub's client tells of every attempt; the last one's error says it all.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    given = sys.argv[1:] if arguments is None else list(arguments)
    code = 2
    try:
        code = app(given or ["--help"], prog_name="embedgrad", standalone_mode=False) or 0
        if code == INTERRUPTED:
            warn("interrupted")
    except (KeyboardInterrupt, typer.Abort, Interruption) as interrupted:
        code = INTERRUPTED
        warn(str(interrupted) or "interrupted")
    except NoGain as missed:
        code = NO_GAIN
        warn(str(missed))
    except EmbedgradError as error:
        warn(*f"error: {error}".split("\n"))
    except _UsageError as error:
        warn(f"error: {_usage(error)}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        warn(f"error: {one_line(error)}")
    sys.exit(code)


def _usage(error: Any) -> str:
    """What is wrong with the arguments, and where to read on."""
    verb = error.ctx.command_path if error.ctx is not None else "embedgrad"
    return f"{error.format_message().rstrip('.')}; see `{verb} --help`"


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
