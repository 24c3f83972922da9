"""Exceptions for bad input, all under one base class.

    EmbedgradError
    ├── RecipeError       a recipe that cannot be used; holds every problem found in it
    ├── DataError         a data file, a column, a label or a split
    ├── InputError        texts or labels that an estimator cannot use; a ValueError too
    ├── TemplateError     a template, its span, or a chat template that cannot hold the span
    ├── ModelError        a model that cannot be found, loaded or used
    ├── ArtifactError     a saved prompt that is damaged or belongs to another model
    ├── RunError          a run folder: exists already, is missing something, cannot be written
    ├── ExportError       a prompt that cannot be exported, or an export that fails its check
    ├── EngineError       a serving engine or a worker that is missing, does not start, or stops
    ├── OptionError       an option of a command or function that cannot be used as given
    └── DivergenceError   the loss or the rows are not finite any more

A message is one line: what, where, what was expected, what to do. The command line prints it after
``error:`` and exits with status 2. `assert` is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final


class EmbedgradError(Exception):
    """Base of every error that an input can cause.

    One that ends a training holds the best rows so far in `refinement`.
    """

    refinement: Any = None


def rows_so_far(error: Exception) -> Any:
    """The refinement that an error which ended a training holds, or None."""
    return getattr(error, "refinement", None)


def add_place(error: Exception, where: object) -> None:
    """Say in an error where the last good rows are."""
    place = f"the last good rows are in {where}"
    if isinstance(error, EmbedgradError):
        error.args = (f"{error}; {place}",)
    else:
        error.add_note(place)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking; a device's is known by the name, as torch is slow to import."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; its exception derives from `BaseException`."""
    return type(error).__name__ == "PanicException"


def one_line(error: BaseException) -> str:
    """An error of our own or of a library in one line, with advice where memory is lacking."""
    if isinstance(error, EmbedgradError):
        return str(error)
    if is_out_of_memory(error):
        what = " ".join(str(error).partition(". ")[0].split()) or "out of memory"
        return (
            f"{what[max(0, what.find('DefaultCPUAllocator')) :]}; make training.batch_size, "
            "evaluation.batch_size or prefix_cache.budget smaller, or training.accumulate larger"
        )
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def border(what: object, raises: Callable[[str], EmbedgradError]) -> Iterator[None]:
    """Turn what a stranger's file makes of the code that reads it into one line of our tree.

    Each room has one around all that reads its files: the checks inside say more, but nobody can
    foresee everything that a library raises.
    """
    try:
        yield
    except EmbedgradError:
        raise
    except BaseException as error:
        if not (is_panic(error) or isinstance(error, Exception)):
            raise
        raise raises(f"{what}: cannot be used ({one_line(error)})") from error


@final
class RecipeError(EmbedgradError):
    """A recipe that cannot be used.

    `problems` holds one line per problem, each starting with its dotted path.
    """

    def __init__(self, source: str, problems: Sequence[str]):
        self.source = source
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            text = f"{source}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            text = f"{source}: {len(self.problems)} problems{lines}"
        super().__init__(text)


@final
class DataError(EmbedgradError):
    """A data file, a column, a label or a split that cannot be used.

    `about` says what it is about where callers tell apart: "missing file" or "choices".
    """

    def __init__(self, text: str, about: str = ""):
        super().__init__(text)
        self.about = about


@final
class InputError(EmbedgradError, ValueError):
    """Texts or labels that an estimator cannot use; a ValueError too, as scikit-learn expects."""


@final
class TemplateError(EmbedgradError):
    """A template that cannot be used, or a chat template that cannot hold its span."""


@final
class ModelError(EmbedgradError):
    """A model that cannot be found, loaded or used."""


@final
class ArtifactError(EmbedgradError):
    """A saved prompt that is damaged, or that belongs to another model."""


@final
class RunError(EmbedgradError):
    """A run folder that exists already, lacks something, or cannot be written."""


@final
class ExportError(EmbedgradError):
    """A prompt that cannot be exported as asked, or an export that fails its check."""


@final
class EngineError(EmbedgradError):
    """A serving engine that is not installed, or a worker: it does not start, or stops."""


@final
class OptionError(EmbedgradError):
    """An option of a command or a function that cannot be used as given."""


@final
class DivergenceError(EmbedgradError):
    """The loss or its gradient stopped being finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown name: the nearest known names, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
