"""`embedgrad new`: a commented recipe for a data file, with what was guessed said aloud."""

from __future__ import annotations

import json
from pathlib import Path

from embedgrad.errors import RunError
from embedgrad.examples import Guess, guess_columns
from embedgrad.files import write_file
from embedgrad.tables import read_table

CHOICE_PROMPT = "Which of these is it: {choices}? Answer with one of them only:"
FREE_PROMPT = "Please reason step by step, then give the final answer."


def write_starter(data: str, out: str | Path, model: str) -> tuple[Path, tuple[str, ...]]:
    """Write a recipe for `data` to `out`; returns its path and what was guessed.

    Raises `DataError` for data that cannot be read and `RunError` where `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise RunError(f"{out}: exists already; choose another name for --out")
    guess = guess_columns(read_table(data))
    write_file(out, starter(data, guess, model).encode())
    return out, guess.notes


def starter(data: str, guess: Guess, model: str) -> str:
    """The recipe as text."""
    guessed = "".join(f"#   {note}\n" for note in guess.notes)
    answer = guess.answer or "answer"
    if guess.choices:
        span = CHOICE_PROMPT.format(choices=", ".join(guess.choices))
        target = f"choices = {json.dumps(list(guess.choices), ensure_ascii=False)}"
        scorer = ""
    else:
        span = FREE_PROMPT
        target = "# No choices: the model answers in its own words, and learns to end its turn."
        scorer = '\n[evaluation]\nscorer = { name = "number" }   # or exact, contains\n'
    text = json.dumps(f"{{{guess.text}}}\n\n[[{span}]]", ensure_ascii=False)
    group = f"group = {json.dumps(guess.group)}\n" if guess.group else ""
    return f"""\
# A starter recipe. Guessed from the data, so look at it:
{guessed}#
# Run it:  embedgrad optimize THIS.toml --out runs/first

[model]
name = {json.dumps(model)}        # Hub id, folder, .gguf file, or package:NAME

[data]
train = {json.dumps(data)}
# dev and test: files of their own, or else shares of train, drawn by seed
dev_share = 0.2
test_share = 0.2
answer = {json.dumps(answer, ensure_ascii=False)}        # the column with the right answer
{group}# labels = {{ 0 = "negative", 1 = "positive" }}   # what the values mean, if they are not
words # limit = {{ train = 256 }}                        # most rows per split

[template]
# {{column}} is filled in per row; [[...]] is the text whose rows are refined, anywhere in the
prompt. # system = "..." and assistant = "..." (the answer's opening) may stand beside it. # A model
without a chat template takes text = "..." instead. user = {text}

[target]
{target}
{scorer}
[trust_region]
radius = 0.3        # how far a row may go, in its own norms; 0.3 keeps every cosine above 0.95

[training]
epochs = 4
batch_size = 16
seed = 0

# `embedgrad parts` lists everything else that may stand here.
"""
