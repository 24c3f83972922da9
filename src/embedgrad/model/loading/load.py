"""Load a frozen model and its tokenizer by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from embedgrad.data.bounded_reads import read_json
from embedgrad.errors import ModelError
from embedgrad.events import Report, quiet, say
from embedgrad.model.loading import gguf_conversion as gguf_file
from embedgrad.model.loading.checkpoint_folder import CONFIG, check_folder, missing_packages
from embedgrad.model.loading.device import choose_device, choose_dtype, use_real_cores
from embedgrad.model.loading.info import (
    ModelInfo,
    card_license,
    check_counts,
    check_finite,
    check_weights,
    context_length,
    embedding_digest,
    embedding_scale,
    embedding_table,
)
from embedgrad.model.loading.quiet import model_errors, one_line
from embedgrad.model.loading.resolve import resolve
from embedgrad.model.loading.spread import DeviceMap, check_spread, placement
from embedgrad.model.lockstep import shard
from embedgrad.model.workers import here

_COMPUTED = re.compile(  # in old checkpoints
    r"\.(inv_freq|masked_bias|causal_mask|attn(\.attention)?\.bias|position_ids)$"
)
# "auto" is sdpa (fast) where the model has it (Gemma 2 has not). Only eager attention can be
# differentiated twice. Passes over stored prefixes have an attention of their own.
ATTENTIONS = ("auto", "sdpa", "eager")


@final
class LoadedModel(NamedTuple):
    """A frozen model in eval mode, its tokenizer, and what it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: Mapping[str, int | str] = {},
    fsdp: bool = False,
    local_files_only: bool = False,
    report: Report = quiet,
    weights: bool = True,
) -> LoadedModel:
    """Load a causal language model with every weight frozen.

    `name` is tried as `package:NAME` (a GGUF that an installed Python package carries), a `.gguf`
    file, a folder, then a model of the Hub: the local cache first, the network last. A GGUF is
    converted to safetensors once. Only safetensors weights are read, and no code of a model is run.
    With a `device_map`, as transformers takes it, its parts are spread over devices, memory and
    disk, of which each takes `max_memory` at most; with `fsdp` several workers share them out.
    `report` gets a note before something that takes long, and what to know of the model. Without
    `weights` none are read: the model is on the meta device, and its `embedding_digest` is "".

    Raises `ModelError`, one line, if the model cannot be found, loaded or used.
    """
    if attention not in ATTENTIONS:
        raise ModelError(f"attention {attention!r} is not known; known: {', '.join(ATTENTIONS)}")
    use_real_cores()
    spread = placement(device, device_map, max_memory)
    if fsdp and spread:
        raise ModelError("device_map and fsdp are both given; leave one of them out")
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    source = resolve(name, revision=revision, local_files_only=local_files_only, report=report)
    folder, gguf_sha256 = source.path, None
    if source.kind in ("gguf", "package"):
        folder, gguf_sha256 = gguf_file.convert_gguf(source.path, report)
    check_folder(folder)

    what = f"model {name!r} in {folder}"
    config = load_config(what, folder)
    tokenizer = load_tokenizer(what, folder)
    if not spread and getattr(config, "quantization_config", None):
        spread = {"device_map": {"": place}}  # not all quantized weights can be moved
    model: Any  # partly without types
    if weights:
        model = _load_weights(what, folder, config, precision, attention, spread)
        say(report, check_spread(what, model))
    else:
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
    with model_errors(f"{what}: does not run on {place} in {precision}"):
        if weights:
            if fsdp and here().count > 1:
                layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
                shard(model, layers, place)
            if not spread:
                model.to(place)
            _check_ends(what, model)
            _check_trial(what, model)
        table_VD = embedding_table(model)
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        if weights:
            check_finite(what, table_VD)
            scale = embedding_scale(embedding, table_VD)
    info = ModelInfo(
        name=name,
        revision=source.revision,
        kind=source.kind,
        path=str(folder.absolute()),
        architecture=(config.architectures or [config.model_type])[0],
        width=table_VD.shape[1],
        vocabulary=table_VD.shape[0],
        context=context_length(config),
        dtype=str(precision).removeprefix("torch."),
        embedding_digest=embedding_digest(table_VD) if weights else "",
        embedding_scale=scale,
        tied=output is not None and output.weight is embedding.weight,
        license=gguf_file.license_of(folder) if gguf_sha256 else card_license(folder),
        gguf_sha256=gguf_sha256,
    )
    if len(tokenizer) > info.vocabulary and not gguf_sha256:
        note = (
            f"the tokenizer of {name} has {len(tokenizer):,} tokens, but the model embeds only "
            f"{info.vocabulary:,}: a prompt with one of the others is refused"
        )
        say(report, [note])
    return LoadedModel(model, tokenizer, info)


def load_config(what: str, folder: Path) -> Any:
    with model_errors(f"{what}: its config.json cannot be used"):
        check_counts(read_json(folder / CONFIG))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{what}: {config.model_type} is not a causal language model; give one that generates"
            " text from left to right"
        )
    if getattr(config.get_text_config(decoder=True), "hidden_size_per_layer_input", None):
        raise ModelError(
            f"{what}: {config.model_type} embeds every token again in each layer, so a prompt's"
            " rows are not all of it; give a model without per-layer embeddings"
        )
    # It may name a weights file other than the one that was checked.
    config.transformers_weights = None
    return config


def load_tokenizer(what: str, folder: Path) -> PreTrainedTokenizerBase:
    with model_errors(f"{what}: its tokenizer cannot be loaded"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers names a package, but often the wrong one
            if missing := missing_packages(folder):
                raise ModelError(
                    f"{what}: reading its tokenizer needs {' and '.join(missing)}: pip install "
                    + " ".join(missing)
                ) from error
            raise
    if not tokenizer.is_fast:
        raise ModelError(f"{what}: its tokenizer has no fast version (tokenizer.json)")
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise ModelError(
            f"{what}: its tokenizer splits words at random, anew each time; set dropout to null in"
            " tokenizer.json"
        )
    return tokenizer


def _load_weights(
    what: str,
    folder: Path,
    config: Any,
    precision: torch.dtype,
    attention: str,
    spread: Mapping[str, Any],
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    with model_errors(f"{what}: cannot be loaded"):
        model, loading = auto.from_pretrained(
            folder,
            config=config,
            dtype=precision,
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **spread,
        )
    check_weights(what, model, loading, _COMPUTED)
    model.requires_grad_(False).eval()
    frozen: PreTrainedModel = model
    return frozen


def _check_ends(what: str, model: Any) -> None:
    """Raise `ModelError` for an end of answers that is no token id."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in listed):  # True is no id
        raise ModelError(
            f"{what}: eos_token_id in its generation_config.json is {ends!r}; expected a token id,"
            " or a list of them"
        )


def _check_trial(what: str, model: PreTrainedModel) -> None:
    """Raise `ModelError` unless a model is causal and reads embeddings alone, tried on a batch."""
    ids_BT = _trial(model)
    expected = _logits(model, input_ids=ids_BT)
    _check_causal(what, expected)
    _check_embedded(what, model, ids_BT, expected)


def _check_causal(what: str, logits_BTV: torch.Tensor) -> None:
    """Raise `ModelError` if a token changes the logits before it.

    Measured, since configurations do not say: GPT-NeoX and BERT both load with is_decoder=False.
    """
    first, second = logits_BTV[:, :2]
    if (first - second).abs().max() > 0.02 * first.abs().max():
        raise ModelError(f"{what}: not causal: a token changes the logits of tokens before it")


def _check_embedded(
    what: str, model: PreTrainedModel, ids_BT: torch.Tensor, expected: torch.Tensor
) -> None:
    """Raise `ModelError` unless the embeddings of tokens are all that a model reads of them."""
    try:
        embedded = _logits(model, inputs_embeds=model.get_input_embeddings()(ids_BT))
        other = (embedded - expected).abs().max() > 0.02 * expected.abs().max()
        problem = "gives other logits for their embeddings" if other else None
    except Exception as error:  # a model may raise anything
        problem = one_line(error)
    if problem:
        raise ModelError(
            f"{what}: {model.config.model_type} reads token ids beside their embeddings, so rows"
            f" cannot take the place of tokens ({problem}); give a model that takes inputs_embeds"
        )


def _trial(model: PreTrainedModel) -> torch.Tensor:
    """Two texts of ordinary token ids that differ at the end."""
    config = model.config.get_text_config(decoder=True)
    named = [value for key, value in config.to_dict().items() if key.endswith("token_id")]
    # The end may be a list of ids, as in Llama 3. In a tiny vocabulary all ids may be named.
    special = [i for ids in named for i in (ids if isinstance(ids, list) else [ids])]
    a, b, c, d = sorted(range(min(64, config.vocab_size)), key=special.__contains__)[:4]
    return torch.tensor([[a, b, c], [a, b, d]], device=model.device)


def _logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # six tokens: on a busy machine threads would only wait for each other
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
            return logits.float()
    finally:
        torch.set_num_threads(threads)
