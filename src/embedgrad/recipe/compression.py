"""Write the recipe that `embedgrad compress` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import read_bytes, read_text
from embedgrad.data.labels import closest
from embedgrad.data.markup import literal
from embedgrad.data.readers import read_table
from embedgrad.errors import DataError, OptionError, RunError
from embedgrad.events import Report, quiet, stage
from embedgrad.model.loading import load
from embedgrad.prompt.boundaries import CuttingTokenizer
from embedgrad.prompt.truncation import longest_fit
from embedgrad.recipe.overrides import override
from embedgrad.recipe.paths import relocate
from embedgrad.recipe.recipe import Recipe

RADIUS = 1.0  # a few rows are to say what hundreds of tokens said
HEADER = """\
# A long prompt into a few rows, by `embedgrad compress`. To run it again:
#   embedgrad optimize THIS.toml --out runs/again
# [teacher.template] holds the long prompt; [template] the words whose rows are to say the same.

"""


def write_compression(
    prompt: str | Path,
    queries: str,
    out: str | Path,
    *,
    tokens: int,
    column: str,
    model: str,
    margin: float,
    overrides: Sequence[str] = (),
    report: Report = quiet,
) -> Recipe:
    """Write a recipe to `out` that refines the prompt's first tokens; returns it.

    `column` is that of the queries; `overrides` are as for `Recipe.read`. Raises `DataError` for a
    prompt or queries that cannot be used, `OptionError` for a number of tokens that is no
    compression, and `RunError` if `out` holds another recipe.
    """
    out = Path(out)
    if tokens < 1:
        raise OptionError(f"--tokens: {tokens}; expected 1 or more")
    text = _read(Path(prompt))
    columns = read_table(queries, used={column}).columns
    if column not in columns:
        raise DataError(
            f"{queries}: no column {column!r} with queries; {closest(column, columns)}; name it "
            "with --column"
        )
    user = f"{{{column}}}"
    values: dict[str, Any] = {
        "model": {"name": model},
        "data": {"train": queries},
        "template": {"system": "", "user": user},
        "objective": {"name": "distill"},
        "trust_region": {"radius": RADIUS},
        "teacher": {
            "margin": margin,
            "template": {"system": literal(text), "user": user},
        },
    }
    override(values, overrides)
    stage(report, f"reading the tokenizer of {values['model']['name']}")
    if not values["template"]["system"]:
        beginning = first_tokens(text, tokens, values["model"], report)
        values["template"]["system"] = f"[[{literal(beginning)}]]"
    recipe = Recipe.from_dict(values, str(out))
    content = HEADER + tomli_w.dumps(relocate(values, out.parent), multiline_strings=True)
    if out.exists() and read_bytes(out) != content.encode():
        raise RunError(f"{out}: holds another recipe; choose another folder for --out")
    write_file(out, content.encode())
    return recipe


def first_tokens(text: str, tokens: int, model: dict[str, Any], report: Report) -> str:
    """The longest beginning of a text that is at most `tokens` tokens long as a span."""
    settings = {name: model[name] for name in ("name", "revision") if name in model}
    tokenizer = load(**settings, weights=False, report=report).tokenizer
    cutting = CuttingTokenizer(tokenizer, adds_bos=False)

    def fits(end: int) -> bool:
        return len(cutting.suffix(text[:end].rstrip())) <= tokens

    length = len(cutting.suffix(text))
    if length <= tokens:
        raise OptionError(
            f"--tokens: {tokens}, but the long prompt has {length}; expected fewer rows than tokens"
        )
    end = longest_fit(tokenizer, text, length - tokens, fits)
    beginning = text[:end].rstrip()
    if not beginning:
        raise OptionError(
            f"--tokens: {tokens} is less than the long prompt's first character takes; give more"
        )
    return beginning


def _read(path: Path) -> str:
    try:
        text = read_text(path).strip()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a text file with the long prompt"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save the long prompt as UTF-8") from error
    if not text:
        raise DataError(f"{path}: is empty; expected the long prompt")
    return text
