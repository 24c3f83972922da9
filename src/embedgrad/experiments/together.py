"""A run on several workers, of which the first writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedgrad.atomic_files import write_file
from embedgrad.errors import EmbedgradError, RecipeError, one_line
from embedgrad.events import Report, quiet
from embedgrad.model.workers import Workers, joined
from embedgrad.recipe.recipe import Recipe


@contextmanager
def together(
    recipe: Recipe | object, out: Path, report: Report, *, resume: bool
) -> Iterator[tuple[Workers, Path, Report]]:
    """Where this worker runs a recipe, and whom it tells.

    The first one is told `out` and `report`. The others do the same in a folder that is thrown
    away, beginning with a copy of what is resumed. Alone nothing changes. Raises `SystemExit` on
    the others for what the first one says.
    """
    with joined() as workers:
        try:
            if workers.count == 1:
                yield workers, out, report
            elif workers.is_first:
                if isinstance(recipe, Recipe) and recipe.parts.sampling.engine:
                    problem = "several workers would each ask the engine; run one process"
                    raise RecipeError("sampling.engine", [problem])
                workers.wait()  # until the others have copied
                yield workers, out, report
            else:
                with tempfile.TemporaryDirectory() as folder:
                    own = Path(folder) / out.name
                    if resume and out.is_dir():
                        shutil.copytree(out, own)
                        if isinstance(recipe, Recipe):  # with paths as they are from there
                            then = Recipe.read_run(out).as_toml(own)
                            write_file(own / "recipe.toml", then.encode())
                    workers.wait()
                    yield workers, own, quiet
        except Exception as error:
            if workers.count > 1:
                says = workers.speaks()
                workers.say_failure(one_line(error))
                if not says and isinstance(error, EmbedgradError):
                    raise SystemExit(2) from error
            raise
