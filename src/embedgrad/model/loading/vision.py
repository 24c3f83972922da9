"""Load a frozen vision transformer by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, ViTModel

from embedgrad.data.bounded_reads import read_json
from embedgrad.errors import ModelError
from embedgrad.events import Report, quiet
from embedgrad.model.loading.checkpoint_folder import CONFIG, check_folder
from embedgrad.model.loading.device import choose_device, choose_dtype, use_real_cores
from embedgrad.model.loading.info import (
    ModelInfo,
    card_license,
    check_counts,
    check_weights,
    weights_digest,
)
from embedgrad.model.loading.quiet import model_errors
from embedgrad.model.loading.resolve import resolve

_HEADS = re.compile(r"^(vit\.)?(pooler|classifier|decoder)\.|\.mask_token$")  # not needed here
LONGEST_PROMPT = 2**16  # rows; there is no vocabulary that would bound it


def load_vision(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    report: Report = quiet,
) -> tuple[ViTModel, ModelInfo]:
    """Load a vision transformer of a folder or the Hub: one of transformers' `vit` models.

    Only safetensors are read, and no code of a model is run. Raises `ModelError`, one line, if it
    cannot be found, loaded or used.
    """
    use_real_cores()
    place = choose_device(device)
    source = resolve(name, revision=revision, local_files_only=False, report=report)
    what = f"model {name!r} in {source.path}"
    if source.kind in ("gguf", "package"):
        raise ModelError(f"{what}: a GGUF holds no vision transformer; give a folder or a Hub id")
    check_folder(source.path)
    with model_errors(f"{what}: cannot be loaded"):
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        check_counts(read_json(source.path / CONFIG))
        config = AutoConfig.from_pretrained(source.path, **local)
        if config.model_type != "vit":
            raise ModelError(
                f"{what}: {config.model_type} is not a vision transformer (vit), which a recipe "
                "with [images] needs; give one, or take the section out"
            )
        config.transformers_weights = None
        auto: Any = ViTModel  # its types do not know of output_loading_info
        model, loading = auto.from_pretrained(
            source.path,
            config=config,
            dtype=choose_dtype(dtype, place),
            attn_implementation=None if attention == "auto" else attention,
            add_pooling_layer=False,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        model.to(place)
    check_weights(what, model, loading, _HEADS)
    info = replace(
        describe_vision(model, name),
        revision=source.revision,
        kind=source.kind,
        path=str(source.path.absolute()),
        license=card_license(source.path),
    )
    return model, info


def describe_vision(model: Any, name: str = "in memory") -> ModelInfo:
    """What identifies a vision transformer, with a digest of its weights as that of the rows."""
    return ModelInfo(
        name=name,
        revision=None,
        kind="memory",
        path="",
        architecture=type(model).__name__,
        width=model.config.hidden_size,
        vocabulary=LONGEST_PROMPT,
        context=0,
        dtype=str(model.dtype).removeprefix("torch."),
        embedding_digest=weights_digest(model),
        embedding_scale=1.0,
        tied=False,
        license=None,
        gguf_sha256=None,
    )
