"""A run on several workers, of which the first writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from embedgrad.atomic_files import write_file, write_folder
from embedgrad.errors import EmbedgradError, RecipeError, one_line
from embedgrad.events import Report, quiet
from embedgrad.model.workers import Workers, join_workers
from embedgrad.recipe.recipe import Recipe

What = Recipe | dict[str, Recipe]


@contextmanager
def together(
    recipe: What, out: Path, report: Report, *, resume: bool
) -> Iterator[tuple[Workers, What, Path, Report]]:
    """The recipe of a worker, the folder that it runs in, and what it reports to.

    The first worker runs in `out` and reports. The others run in a temporary folder, with a copy of
    what is resumed, and report nothing. A single process runs as usual. Raises `SystemExit` on the
    others for an error that the first one reports.
    """
    with join_workers() as workers:
        try:
            if workers.count == 1:
                yield workers, recipe, out, report
            elif workers.is_first:
                if isinstance(recipe, Recipe):
                    _refuse_what_all_would_do(recipe)
                workers.wait()  # until the others have copied
                yield workers, recipe, out, report
            else:
                with tempfile.TemporaryDirectory() as folder:
                    own = Path(folder) / out.name
                    if resume and out.is_dir():
                        shutil.copytree(out, own)
                        if isinstance(recipe, Recipe):  # with paths as they are from there
                            then = Recipe.read_run(out).as_toml(own)
                            write_file(own / "recipe.toml", then.encode())
                    workers.wait()
                    try:
                        yield workers, _silent(recipe), own, quiet
                    except EmbedgradError as error:
                        error.args = (str(error).replace(str(own), str(out)),)
                        if workers.speaks():
                            _hand_over(own, out)
                        raise
        except Exception as error:
            if workers.count > 1:
                says = workers.speaks()
                workers.say_failure(one_line(error))
                if not says and isinstance(error, EmbedgradError):
                    raise SystemExit(2) from error
            raise


def _refuse_what_all_would_do(recipe: Recipe) -> None:
    """Raise `RecipeError` for what workers do not share out."""
    if recipe.parts.sampling.engine:
        problem = "several workers would each ask the engine; run one process"
        raise RecipeError("sampling.engine", [problem])
    if recipe.images is not None:
        problem = "several workers would each read all images; run one process"
        raise RecipeError("images", [problem])


def _hand_over(own: Path, out: Path) -> None:
    """Keep what a worker saved, where the first one is gone. Raises `RunError`."""
    for folder in (*own.glob("checkpoint/step-*"), *own.rglob("prompt")):
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        write_folder(out / folder.relative_to(own), files)


def _silent(recipe: What) -> What:
    """The recipe without trackers."""
    if isinstance(recipe, Recipe):
        return replace(recipe, report=replace(recipe.report, trackers=()))
    return {n: replace(r, report=replace(r.report, trackers=())) for n, r in recipe.items()}
