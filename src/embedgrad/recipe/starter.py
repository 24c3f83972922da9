"""Write starter recipes for `embedgrad new` and `refine`."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import tomli_w

from embedgrad.atomic_files import write_file
from embedgrad.data.examples import cell_text
from embedgrad.data.guess_columns import Guess, guess_columns, list_columns
from embedgrad.data.labels import closest, escape
from embedgrad.data.markup import parse
from embedgrad.data.readers import read_table
from embedgrad.data.table import Table, data_error, quote
from embedgrad.errors import DataError, RecipeError, RunError, TemplateError
from embedgrad.formatting import pluralize
from embedgrad.model.loading.resolve import has_chat_template
from embedgrad.parts.scorers import parse_number
from embedgrad.recipe.paths import relocate
from embedgrad.recipe.recipe import Recipe

PROMPT = "the prompt"
FEW = 100  # test rows
FEW_NAMES = 8  # of columns
QUICK = {"train": (0.6, 256), "dev": (0.2, 150), "test": (0.2, 500)}  # shares, rows for a verdict
CHOICE_PROMPT = "Which of these is it: {choices}? Answer with one of them only:"
STEPS_PROMPT = "Please reason step by step, then give the final answer."
NUMBER_PROMPT = "Give the final number only:"
SOLUTIONS = ("solution", "rationale", "explanation", "reasoning")
CHAT_NOTE = "Assumed that the model has a chat template; for one without, give --plain."
PLAIN_NOTE = "The model has no chat template, so the prompt is plain text."
LIMIT = "# limit = { train = 256 }"
LABELS = '# labels = { 0 = "no", 1 = "yes" }'
FREE_PROMPT = "Give the answer only:"
ANSWER_ONLY = """

[solutions]
source = "answer"        # as the prompt asks; self-written: train on the model's own solutions"""


def write_starter(
    data: str,
    out: str | Path,
    model: str,
    *,
    prompt: str | None = None,
    place: str | None = None,
    reads: str | None = None,
    answer: str | None = None,
    words: Mapping[str, str] | None = None,
    plain: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """Write a recipe for `data` to `out`; returns its path and the guesses.

    `prompt` is the user's own (see `user_message`), which needs an answer column, and `place` where
    its words go. `reads` and `answer` name columns that are not to be guessed, `words` say what
    answers mean. A `plain` template is for models without a chat template, which get it unasked if
    their files are here. Raises `DataError` for data that cannot be used, `TemplateError` for the
    prompt, and `RunError` if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise RunError(f"{out}: exists already; choose another name for --out")
    named = [p.text for p in parse(prompt, PROMPT) if p.kind == "column"] if prompt else []
    table = read_table(data)
    for name in named:
        if name not in table.columns:
            problem = f"no column {name!r}, which the prompt names"
            raise data_error(table.name, f"{problem}; {closest(name, table.columns)}")
    reads = named[0] if named else reads
    guess = guess_columns(table, text=reads, answer=answer, words=words)
    if prompt is not None and guess.answer is None:
        columns = list_columns(table)
        problem = f"none of its columns ({columns}) looks like an answer; name one with --answer"
        raise data_error(table.name, problem)
    if guess.answer in named:
        problem = f"the prompt names {guess.answer!r}, which seems to be the answer"
        raise data_error(table.name, f"{problem}; leave it out, or name another with --answer")
    there = relocate({"data": {"train": data}, "model": {"name": model}}, out.parent)
    limits = {n: most for n, (share, most) in QUICK.items() if share * len(table.rows) > most}
    used = {guess.text, guess.answer, guess.group, None if guess.choices else _solution(table)}
    read = () if prompt is not None else table.notes  # a run tells them itself
    unused = _note_unused(table, {*used, *named})
    notes, chats = [*read, *guess.notes, *unused], has_chat_template(model)
    if not (plain or chats):
        notes.append(CHAT_NOTE if chats is None else PLAIN_NOTE)
    limit = LIMIT
    if prompt is not None and limits:
        most = ", ".join(f"{rows} for {name}" for name, rows in limits.items())
        notes.append(f"For a quick verdict, at most {most}; --set data.limit= takes all rows.")
        limit = "limit = { " + ", ".join(f"{n} = {rows}" for n, rows in limits.items()) + " }"
    if prompt is not None and (tested := len(table.rows) // 5) < FEW:
        about = pluralize(max(tested, 1), "row")
        notes.append(f"The test gets about {about}: only a large gain will show.")
    text = starter(
        *(there["data"]["train"], table, guess, there["model"]["name"]),
        notes=notes,
        prompt=prompt,
        place=place,
        limit=limit,
        plain=plain or chats is False,
    )
    try:
        Recipe.from_dict(tomllib.loads(text))
    except RecipeError as error:
        if place is not None:
            raise
        raise DataError(
            f"{data}: its columns cannot be named in a recipe ({'; '.join(error.problems)}); "
            "rename them in the file"
        ) from error
    write_file(out, text.encode())
    return out, tuple(notes)


def user_message(prompt: str, column: str) -> str:
    """A prompt as a template's message: what it does not mark is to be refined, all of it.

    A prompt that names no column stands behind the text of `column`. Raises `TemplateError`.
    """
    prompt = prompt.strip()
    if not prompt:
        raise TemplateError(f"{PROMPT}: it is empty; write what the model is to do")
    kinds = {piece.kind: piece.text for piece in parse(prompt, PROMPT)}
    if "span" not in kinds and "column" in kinds:
        raise TemplateError(
            f"{PROMPT}: it names the column {{{kinds['column']}}}, but not what to refine; write "
            "[[ and ]] around those words, or leave the column out (it is put in front)"
        )
    prompt = prompt if "span" in kinds else f"[[{prompt}]]"
    return prompt if "column" in kinds else f"{{{column}}}\n\n{prompt}"


def starter(
    data: str,
    table: Table,
    guess: Guess,
    model: str,
    *,
    notes: Sequence[str],
    prompt: str | None,
    place: str | None,
    limit: str,
    plain: bool,
) -> str:
    """The recipe as text."""
    guessed = "".join(f"#   {note}\n" for note in notes)
    asked, target, scorer = _task(table, guess)
    user = user_message(asked if prompt is None else prompt, guess.text)
    places = "try the words as system message, before, after and around the query"
    place = f"place = {_toml(place)}" if place else f'# place = "auto"        # {places}'
    group = f"group = {_toml(guess.group)}\n" if guess.group else ""
    solution = None if guess.choices else _solution(table)
    if solution:
        group = f"solution = {_toml(solution)}        # what the model learns to write\n{group}"
    labels = f"labels = {_toml(dict(guess.labels))}" if guess.labels else LABELS
    return f"""\
# A starter recipe. It is guessed from the data, so check it:
{guessed}#
# Run it:  embedgrad optimize THIS.toml --out runs/first

[model]
name = {_toml(model)}        # Hub id, folder, .gguf file, or package:NAME

[data]
train = {_toml(data)}
# dev and test: separate files, or else shares of train, drawn by seed
dev_share = 0.2
test_share = 0.2
answer = {_toml(guess.answer or "answer")}        # the column with the right answer
{group}{labels}        # what the values mean, if they are not words
{limit}        # at most this many rows of a split

[template]
# {{column}} is filled in per row; [[...]] marks the words to refine, anywhere in the text.
# You may add system = "..." and assistant = "..." (the opening of the answer).
# For a model without a chat template, write text = "..." instead.
{"text" if plain else "user"} = {_toml(user)}
{place}

[target]
{target}

[evaluation]
{scorer}

[trust_region]
radius = 0.3        # how far a row may move, in its norms; 0.3 keeps every cosine above 0.95

[training]
epochs = 4
batch_size = 16
seed = 0

# `embedgrad parts` lists all other settings.
"""


def choice_prompt(choices: Sequence[str]) -> str:
    """A prompt that asks which of the choices it is."""
    # A choice with template marks would have to be escaped; leave the list out.
    marked = any(mark in choice for choice in choices for mark in "{}[]")
    return CHOICE_PROMPT.format(choices="the labels" if marked else ", ".join(choices))


def _task(table: Table, guess: Guess) -> tuple[str, str, str]:
    """The prompt, and the contents of [target] and [evaluation]."""
    if guess.choices:
        return (
            choice_prompt(guess.choices),
            f"choices = {_toml(list(guess.choices))}",
            "# Choices are compared by probability; only free answers need a scorer.",
        )
    target = "# No choices: the model answers in its own words and learns to end its turn."
    answers = [cell_text(row.get(guess.answer or "")) or "" for row in table.rows]
    if all(parse_number(answer) is not None for answer in answers):
        scorer = 'scorer = "number"        # or exact, contains'
        if _solution(table):
            return STEPS_PROMPT, target, scorer
        return NUMBER_PROMPT, target + ANSWER_ONLY, scorer
    return FREE_PROMPT, target, 'scorer = "exact"        # or contains, number'


def _solution(table: Table) -> str | None:
    """The column with worked solutions, by its name."""
    return next((name for name in table.columns if name.lower() in SOLUTIONS), None)


def _note_unused(table: Table, used: Collection[str | None]) -> list[str]:
    """A note on columns of text that have a name, and that the recipe does not read."""
    rest = [
        n
        for n in table.columns
        if n and n not in used and any(cell_text(r.get(n)) for r in table.rows)
    ]
    more = f" and {len(rest) - FEW_NAMES} more" if len(rest) > FEW_NAMES else ""
    return [f"Not used: {', '.join(map(quote, rest[:FEW_NAMES]))}{more}."] if rest else []


def _toml(value: str | list[str] | dict[str, str]) -> str:
    """A value as TOML writes it, a table in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{escape(k)} = {escape(v)}" for k, v in value.items()) + " }"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")
