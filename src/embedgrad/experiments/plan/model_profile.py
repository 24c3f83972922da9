"""The recipe's model, loaded, or known without its weights."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from typing import Any

from embedgrad.data.examples import Example
from embedgrad.data.splits import Splits
from embedgrad.errors import DataError
from embedgrad.events import Report, say
from embedgrad.experiments.plan.flops import Reuse
from embedgrad.experiments.plan.model_shape import Shape, empty_model, shape_of
from embedgrad.experiments.plan.problems import Problems
from embedgrad.model.capabilities import rope_limit, why_not_reusable
from embedgrad.model.forward import last_feed_forward
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import gguf_conversion as gguf_file
from embedgrad.model.loading.checkpoint_folder import check_folder
from embedgrad.model.loading.device import choose_device, choose_dtype
from embedgrad.model.loading.info import context_length
from embedgrad.model.loading.load import load_config, load_tokenizer
from embedgrad.model.loading.resolve import resolve
from embedgrad.model.prefix_cache import PrefixCache, Spill
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Renderer
from embedgrad.recipe.build import open_model
from embedgrad.recipe.recipe import Recipe


@dataclass(frozen=True)
class Described:
    """A model's tokenizer, configuration and shape; the model itself where it was loaded."""

    name: str
    tokenizer: Any
    config: Any
    shape: Shape
    reuse: Reuse
    why_not_reusable: str | None
    context: int
    dtype: str
    device: Any
    room: int
    """Bytes for prefixes in the device's memory."""
    slower_room: int
    """Bytes for prefixes in a GPU's host memory and on disk."""
    embedding_scale: float
    kind: str
    """Of its source; see `ModelInfo`."""
    model: LanguageModel | None


def loaded(recipe: Recipe, report: Report) -> Described:
    """The model as a run loads it."""
    model = open_model(recipe, report)
    shape = shape_of(model.model, model.forward.feed_forward)
    if model.why_not_reusable is None:
        shape = _with_keys_of(shape, model)
    return Described(
        name=recipe.model.name,
        tokenizer=model.tokenizer,
        config=model.model.config,
        shape=shape,
        reuse=Reuse(model.why_not_reusable is None, model.forward.longest_reuse),
        why_not_reusable=model.why_not_reusable,
        context=model.info.context,
        dtype=model.info.dtype,
        device=model.device,
        room=model.prefix_cache.budget,
        slower_room=model.prefix_cache.room - model.prefix_cache.budget,
        embedding_scale=model.info.embedding_scale,
        kind=model.info.kind,
        model=model,
    )


def _with_keys_of(shape: Shape, model: LanguageModel) -> Shape:
    """The shape with keys as they really are; not every configuration says it alike."""
    # In a cache of its own: a look at one prefix is no use of it.
    (prefix,) = model.with_prefix_cache(PrefixCache(0)).prefixes_of([(0, 1)])
    _, kv_heads, _, size = prefix.keys.shape
    return dataclasses.replace(shape, kv_heads=kv_heads, head_size=size)


def described(recipe: Recipe, report: Report) -> Described:
    """The model without its weights: configuration, tokenizer, and modules that hold no memory."""
    settings = recipe.model

    def notify(text: str) -> None:
        say(report, [text])

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = resolve(
        settings.name, revision=settings.revision, local_files_only=False, notify=notify
    )
    folder = source.path
    if source.kind in ("gguf", "package"):
        folder, _ = gguf_file.convert_gguf(folder, notify)
    check_folder(folder)
    what = f"model {settings.name!r} in {folder}"
    config, tokenizer = load_config(what, folder), load_tokenizer(what, folder)
    model = empty_model(config)
    text = config.get_text_config(decoder=True)
    why_not = why_not_reusable(model, text)
    stored = recipe.prefix_cache
    spill = None if stored.spill is None else Spill(stored.spill, stored.spill_budget, notify)
    prefixes = PrefixCache.on(device, stored.budget, spill=spill)
    return Described(
        name=settings.name,
        tokenizer=tokenizer,
        config=config,
        shape=shape_of(model, last_feed_forward(model, text.num_hidden_layers), dtype.itemsize),
        reuse=Reuse(why_not is None, rope_limit(text)),
        why_not_reusable=why_not,
        context=context_length(config),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        room=prefixes.budget,
        slower_room=prefixes.room - prefixes.budget,
        embedding_scale=getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0),
        kind=source.kind,
        model=None,
    )


def sequencer_of(recipe: Recipe, model: Described, splits: Splits) -> Sequencer:
    """What turns rows into tokens; rows that do not fit are refused by `tokenized` only."""
    return Sequencer(
        Renderer(recipe.template, model.tokenizer, date=datetime.date.today()),
        model.tokenizer,
        recipe.target,
        rows=splits.train,
        context=model.context if recipe.data.truncate else 0,
        merges="report",
        truncate=recipe.data.truncate,
    )


def tokenized(
    sequencer: Sequencer, examples: tuple[Example, ...], context: int, problems: Problems
) -> tuple[list[TokenSequence], int]:
    """Every row in tokens, and the longest length; rows that a run would refuse are noted."""
    found, lines, longest = [], [], 0
    for example in examples:
        try:
            sequence = sequencer(example)
        except DataError as error:
            lines.append(str(error))
            continue
        found.append(sequence)
        length = length_of(sequence, len(sequencer.span.ids))
        longest = max(longest, length)
        if context and length > context:
            lines.append(
                f"{example.source}: {length} tokens, but the model takes {context}; shorten the "
                "row, drop it, or set data.truncate to the column that may be cut"
            )
    problems.add(lines)
    return found, longest


def length_of(sequence: TokenSequence, prompt: int) -> int:
    """Tokens of a row with its longest target."""
    longest = max((len(ids) for ids in sequence.targets), default=0)
    return len(sequence.prefix) + prompt + len(sequence.suffix) + longest
