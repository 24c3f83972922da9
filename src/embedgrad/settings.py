"""The plain sections of a recipe: model, data, head cache, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True)
class ModelSettings:
    """Which frozen model, and how it is loaded."""

    name: str
    """Hub id, folder, .gguf file, or package:NAME (a GGUF that an installed package carries)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto, float32, bfloat16, float16, float64; the refined rows are always kept in float32."""
    attention: str = "auto"
    """auto (sdpa where the model has it), sdpa, or eager (differentiable twice)."""


@dataclass(frozen=True)
class DataSettings:
    """Where examples come from, and how they are split."""

    train: str
    """A .jsonl, .csv, .tsv or .parquet file, or hub:OWNER/NAME[@CONFIG][:SPLIT]."""
    dev: str | None = None
    """As train; unset: a share of train."""
    test: str | None = None
    """As train; unset: a share of train."""
    answer: str = "label"
    """The column with the right answer."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What values of that column mean, as in { 0 = "negative", 1 = "positive" }."""
    group: str | None = None
    """A column whose rows belong together: no group crosses a split."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Keep only rows with these values, as in { domain = "movies" }."""
    limit: Mapping[str, int] = field(default_factory=dict)
    """Most rows per split, after shuffling, as in { train = 256 }."""
    dev_share: Annotated[float, Ge(0), Le(0.9)] = 0.2
    """Share of train that becomes dev where dev is unset."""
    test_share: Annotated[float, Ge(0), Le(0.9)] = 0.2
    """Share of train that becomes test where test is unset."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides shuffling and splits."""
    allow_duplicates: bool = False
    """Allow the same text in two splits."""
    truncate: str | None = None
    """The column that may be cut where a row does not fit; unset: such a row is refused."""
    license: str | None = None
    """The data's licence, noted in the artifact."""


@dataclass(frozen=True)
class HeadCacheSettings:
    """How much memory stored heads may take."""

    budget: str | float = 0.25
    """Bytes, a size such as "2 GiB", or a share (below 1) of free memory; 0 stores nothing."""


@dataclass(frozen=True)
class ReportSettings:
    """What is written besides the terminal and events.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard files into the run folder (extra: tensorboard)."""
