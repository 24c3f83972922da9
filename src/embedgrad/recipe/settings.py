"""A recipe's sections: model, data, prefix cache, compare."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, final

from annotated_types import Ge, Gt, Le

from embedgrad.data.examples import solution_pieces
from embedgrad.errors import DataError, nearest
from embedgrad.recipe.paths import is_path
from embedgrad.report.trackers import TrackerName


@final
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
    """Attention of full passes: auto (sdpa if the model has it), sdpa, or eager."""
    device_map: str | Mapping[str, int | str] | None = None
    """Placement of a model that is too large for one device, as in transformers: auto, balanced,
    sequential, or by name, as in { "model.embed_tokens" = 0, "model.layers" = "cpu", ... }; unset:
    all of it on the device."""
    max_memory: Mapping[str, int | str] = field(default_factory=dict)
    """Most memory that the model takes of each device, as in { 0 = "20GiB", cpu = "60GiB" }, with
    device_map = "auto"; the rest stays on disk."""
    fsdp: bool = False
    """Whether several workers shard the weights of every layer; else each has all of them."""


@final
@dataclass(frozen=True)
class DataSettings:
    """Where examples come from, and how they are split."""

    train: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .npz file, or `hub:OWNER/NAME[@CONFIG][:SPLIT]`."""
    dev: str | None = None
    """As train; unset: a share of train."""
    test: str | None = None
    """As train; unset: a share of train."""
    answer: str = "label"
    """The column with the right answer."""
    solution: str | None = None
    """What the model is trained to write if that is more than the answer it is scored by: a column,
    such as a worked solution, or a text with columns, as "{equation} = {answer}"; unset: the
    answer."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What values of that column mean, as in { 0 = "negative", 1 = "positive" }."""
    group: str | None = None
    """A column whose rows belong together: no group crosses a split."""
    task: str | None = None
    """A column that names the task of each row, for objectives of your own that compare tasks."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Keep only rows with these values, as in { domain = "movies" }."""
    limit: Mapping[str, int] = field(default_factory=dict)
    """Most rows per split, after shuffling, as in { train = 256 }; every choice keeps its share."""
    dev_share: Annotated[float, Ge(0), Le(0.9)] = 0.2
    """Share of train that becomes dev where dev is unset."""
    test_share: Annotated[float, Ge(0), Le(0.9)] = 0.2
    """Share of train that becomes test where test is unset."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides shuffling and splits."""
    allow_duplicates: bool = False
    """Allow the same text in two splits."""
    drop_duplicates: bool = False
    """Leave out training rows whose text is also in dev or test, and dev rows whose text is also in
    test, before any limit."""
    truncate: str | None = None
    """The column to cut at its end if a row does not fit the context; unset: such a row is
    refused."""
    license: str | None = None
    """The data's licence, recorded in the artifact."""

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):
            if isinstance(source := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(source))
        if self.solution is not None:
            solution_pieces(self.solution)
        if self.allow_duplicates and self.drop_duplicates:
            raise DataError(
                "data.allow_duplicates and data.drop_duplicates are both true; set one of them"
            )


@final
@dataclass(frozen=True)
class PrefixCacheSettings:
    """Where the keys and values of prefixes are stored, and how much room they may take."""

    budget: str | float = 0.25
    """Bytes, a size such as "2 GiB", or a share (below 1) of free memory (on a GPU: of its own
    memory); 0 stores nothing."""
    spill: str | None = None
    """A folder for prefixes that do not fit into memory; unset: they are computed again."""
    spill_budget: str | float = 0.5
    """As budget, but of free disk space; the last 5 % of a disk stay free."""
    precision: Literal["model", "half"] = "model"
    """Precision of stored prefixes; half: 16 bits per number, and the run reports the change in
    the loss."""


COMPARED = (
    "text",
    "no-template",
    "best-of-n",
    "few-shot",
    "batch-calibration",
    "threshold",
    "linear-probe",
    "knn",
    "embedgrad",
    "embedgrad-no-region",
    "random-init",
    "random-reward",
    "peft-prompt-tuning-text",
    "peft-prompt-tuning-random",
    "peft-cpt",
    "peft-lora",
)


@final
@dataclass(frozen=True)
class CompareSettings:
    """Which methods `embedgrad compare` compares, and their options."""

    methods: tuple[str, ...] = ()
    """Methods by name; unset: all that can run. The text prompt is always included."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of each method per seed, instead of training.seed."""
    prompts: tuple[str, ...] = ()
    """Other texts for the span; best-of-n picks the best on dev."""
    shots: Annotated[int, Gt(0)] = 4
    """Number of training examples that few-shot shows before the question."""
    prompt_tuning_learning_rate: Annotated[float, Gt(0)] = 0.003
    """For PEFT prompt tuning that starts at the text."""
    random_prompt_learning_rate: Annotated[float, Gt(0)] = 0.03
    """For PEFT prompt tuning that starts at random, with rows many times longer than a text's."""
    cpt_learning_rate: Annotated[float, Gt(0)] = 0.003
    """For PEFT CPT."""
    lora_learning_rate: Annotated[float, Gt(0)] = 0.0003
    """For PEFT LoRA."""
    lora_rank: Annotated[int, Gt(0)] = 8
    """Rank of PEFT LoRA; its alpha is four times that."""

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in COMPARED:
                raise DataError(
                    f"compare.methods: unknown method {name!r}; {nearest(name, COMPARED)}"
                )
        if not self.seeds or min(self.seeds) < 0:
            raise DataError(
                f"compare.seeds: {list(self.seeds)}; expected one or more numbers from 0 up"
            )
        for option in ("methods", "seeds"):
            values = getattr(self, option)
            if len(set(values)) < len(values):
                raise DataError(f"compare.{option}: {list(values)}; expected each one once")
        if "" in self.prompts:
            raise DataError("compare.prompts: '' has no words; expected texts for the span")


@final
@dataclass(frozen=True)
class ExportSettings:
    """How a refined prompt is exported."""

    base_model: str | None = None
    """The base model's public name, as owner/name on the Hub, for clients, cards and adapters;
    unset: model.name if that is public, else clients ask for it."""
    system: Literal["append", "refuse"] = "append"
    """What to do with a client's system message: append it to the prompt's, or refuse it."""
    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    """Dtype of all weights in an exported checkpoint; model: as in the base model."""
    gguf: Literal["keep", "f32", "f16", "q8_0"] = "keep"
    """Type of the other weights in a GGUF export; keep: as in the base model's file."""
    weights: Literal["copy", "link"] = "copy"
    """Whether files that an export does not change are copied from the base model or linked."""

    def __post_init__(self) -> None:
        if self.base_model and (is_path(self.base_model) or os.path.exists(self.base_model)):
            raise DataError(
                f"export.base_model: {self.base_model!r} is a path; expected a public name, as "
                "owner/name"
            )


@final
@dataclass(frozen=True)
class ReportSettings:
    """What a run writes besides its events.jsonl and its result."""

    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers that follow the run: tensorboard, wandb, mlflow, trackio (each needs the
    extra of its name)."""
    elicit: bool = False
    """Measure before the training whether there is anything to elicit, as `plan --elicit` does, and
    keep it in the run folder: the report page then begins with it."""
