"""Images in the place of text: the rows that read them, and sequences.

A vision prompt has four spans, whose rows stand one behind the other:

    queries    [L, n, D]          what is asked of the frozen tokens in each of L layers
    synthesis  [L, 4 h + 8 a, D]  how each layer's queries are made of those before it
    readout    [2 h + 3 L, D]     how what the queries found becomes one feature
    classes    [C, D]             what that feature is compared with, one row for each choice
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, final

from annotated_types import Gt

from embedgrad.data.examples import Example
from embedgrad.data.images import IMAGE, PIXELS, with_images
from embedgrad.data.labels import closest
from embedgrad.data.table import Table
from embedgrad.errors import DataError
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Renderer, Template

SPANS = ("queries", "synthesis", "readout", "classes")
TEMPLATE = Template.plain(f"{{{IMAGE}}}" + "".join(f"[[{name}]]" for name in SPANS))
PIXEL_BYTES = 4


@final
@dataclass(frozen=True)
class Images:
    """A vision transformer that reads images, and the rows that read it."""

    columns: tuple[str, ...] = ("pixel*",)
    """Columns with the numbers of an image, in order: names, or patterns such as pixel*; or one
    column of arrays. Channels first, then lines, as the model reads them."""
    mean: float = 127.5
    """Subtracted from every number, before the division by std."""
    std: Annotated[float, Gt(0)] = 127.5
    """What every number is divided by; the default maps 0 to 255 on -1 to 1."""
    queries: Annotated[int, Gt(0)] = 4
    """Queries in every layer."""
    hidden: Annotated[int, Gt(0)] = 48
    """Width of the adapters that make queries and read them out."""
    mixing: Annotated[int, Gt(0)] = 8
    """Width of the adapters in the attention of a layer's queries to each other."""
    feature_scale: float = 0.1
    """Share of a layer's mean query that goes into the next layer's queries."""
    attention_scale: float = 1.0
    """Share of the queries' attention to each other."""
    adapter_scale: float = 0.1
    """Share of the adapter behind that attention."""
    seed: int = 0
    """Decides the start rows."""

    def read(self, table: Table) -> Table:
        """The table with its rows' images; see `with_images`."""
        return with_images(table, self.columns, self.mean, self.std)

    def rows(self, layers: int, choices: Sequence[str]) -> dict[str, list[str]]:
        """The names of the rows of each span."""

        def of_layers(count: int) -> list[str]:
            return [f"layer {n} {i}" for n in range(1, layers + 1) for i in range(1, count + 1)]

        readout = 2 * self.hidden + 3 * layers
        return {
            "queries": of_layers(self.queries),
            "synthesis": of_layers(4 * self.hidden + 8 * self.mixing),
            "readout": [f"readout {i}" for i in range(1, readout + 1)],
            "classes": list(choices),
        }


@final
class ImageSequencer:
    """Turns images into sequences without tokens; `Sequencer` does so with text.

    `numbers` is how many numbers an image of the model has. Raises `DataError` without choices.
    """

    def __init__(
        self,
        images: Images,
        target: Target,
        *,
        layers: int,
        numbers: int,
        date: datetime.date,
    ):
        if not target.choices:
            problem = "lists none; a vision transformer writes no text, and chooses among classes"
            raise DataError(f"target.choices: {problem}")
        self.target, self.numbers = target, numbers
        self.renderer = Renderer(TEMPLATE, None, date=date)
        names = images.rows(layers, target.choices)
        edges = list(accumulate((len(rows) for rows in names.values()), initial=0))
        self.spans = tuple(
            Span(name, tuple(range(*edge)), tuple(rows))
            for (name, rows), edge in zip(names.items(), pairwise(edges), strict=True)
        )
        self.prompt_ids: Ids = tuple(range(edges[-1]))
        self.vocabulary = edges[-1]
        self.context = self.truncated = 0
        self.end_ids: Ids = ()

    def __call__(self, example: Example) -> TokenSequence:
        """The sequence of one image; its prefix is the image's digest, as four numbers."""
        pixels = example.extra.get(PIXELS)
        if not isinstance(pixels, bytes):
            raise DataError(f"{example.source}: holds no image; make examples by `image_examples`")
        if len(pixels) != PIXEL_BYTES * self.numbers:
            raise DataError(
                f"{example.source}: an image of {len(pixels) // PIXEL_BYTES} numbers, but the model"
                f" reads {self.numbers}; resize the images, or correct images.columns"
            )
        choices = self.target.choices
        if example.answer and example.answer not in choices:
            raise DataError(
                f"{example.source}: the answer {example.answer!r} is not a choice; "
                f"{closest(example.answer, choices)}"
            )
        digest = bytes.fromhex(example.columns[IMAGE])
        return TokenSequence(
            prefix=tuple(int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)),
            suffix=(),
            targets=tuple((i,) for i in range(len(choices))),
            gold=choices.index(example.answer) if example.answer else 0,
            plain=None,
            example=example,
        )

    def build(self, examples: Iterable[Example]) -> list[TokenSequence]:
        """The sequences of all examples."""
        return [self(example) for example in examples]

    def notes(self, sequences: Sequence[TokenSequence]) -> list[str]:
        """What the user should know of these images: how many numbers each has."""
        return [f"images of {self.numbers} numbers"] if sequences else []
