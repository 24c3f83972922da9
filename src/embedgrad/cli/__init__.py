"""Command line: thin commands over the library.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 a mistake
in the input (reported in one line), 4 no reliable gain although --require-gain was given, 130
interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer

# In the order of `embedgrad --help`.
# isort: off
from embedgrad.cli import (
    demo,
    refine,
    plan,
    run,
    rerun,
    continual,
    compress,
    compare,
    clean,
    tune,
    map,
    report,
    generate,
    play,
    export,
    push,
    serve,
    recipe,
)

# isort: on
from embedgrad.cli.common import Interruption, NoGain, app, warn
from embedgrad.errors import EmbedgradError, is_out_of_memory, one_line

__all__ = [
    "app",
    "clean",
    "compare",
    "compress",
    "continual",
    "demo",
    "export",
    "generate",
    "main",
    "map",
    "plan",
    "play",
    "push",
    "recipe",
    "refine",
    "report",
    "rerun",
    "run",
    "serve",
    "tune",
]

INTERRUPTED, NO_GAIN = 130, 4

# The base of typer's errors about arguments, which has no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a mistake in the input gives one line and exit status 2."""
    came = list[int]()  # what Ctrl-C does is Python's own; the others are treated like it

    def interrupt(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()  # no other may set handlers
    for name in ("SIGTERM", "SIGHUP") if own else ():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, interrupt)
    # Offline the Hub's client warns at every attempt; the error of the last one is enough.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # A worker that is gone fills screens with frames of C++; the error says who it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed from the beginning
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    code = 2
    try:
        code = app(arguments or ["--help"], prog_name="embedgrad", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == INTERRUPTED:
            code = 128 + came[0] if came else INTERRUPTED
            warn("interrupted")
    except (KeyboardInterrupt, typer.Abort, Interruption) as interrupted:
        code = 128 + came[0] if came else INTERRUPTED
        with suppress(OSError):  # the terminal may be gone
            warn(str(interrupted) or "interrupted")
    except NoGain as error:
        code = NO_GAIN
        warn(str(error))
    except EmbedgradError as error:
        warn(*f"error: {error}".split("\n"))
    except _UsageError as error:
        verb = error.ctx.command_path if error.ctx is not None else "embedgrad"
        warn(f"error: {error.format_message().rstrip('.')}; see `{verb} --help`")
    except OSError as error:
        if error.filename is not None:
            raise
        # What has no name is standard output; what it holds still would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
        if not isinstance(error, BrokenPipeError):  # as of `| head`
            what = f"error: standard output cannot be written ({error.strerror})"
            warn(f"{what}; files are as they would be with it")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        warn(f"error: {one_line(error)}")
    sys.exit(code)
