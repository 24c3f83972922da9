"""Facts that identify a loaded model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import huggingface_hub
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedgrad.errors import ModelError
from embedgrad.model.loading.quiet import silence_libraries
from embedgrad.model.loading.spread import find_weight

_CHUNK_ROWS = 4096
# Names of numbers of modules, or of names: layers, heads, experts, labels.
_COUNTED = re.compile(
    r"((?<!feature_)layers?|heads?|experts?|labels|blocks|groups|codebooks)(_per_\w+)?$"
)
MOST_PARTS, MOST_EXPERTS = 2**12, 2**14
_SAMPLE = 1024  # numbers of each weight


@final
@dataclass(frozen=True)
class ModelInfo:
    """Identity of a frozen model.

    name: what the user asked for. revision: the commit of a Hub model, else None.
    kind: "hub", "folder", "gguf" or "package". path: the folder whose safetensors were read.
    width, vocabulary: D and V of the embedding table. context: the longest sequence, 0 if unknown.
    embedding_digest, embedding_scale: see the functions of these names.
    tied: the output layer uses the embedding table.
    license: from the model card or the GGUF file, else None. gguf_sha256: of the file converted.
    """

    name: str
    revision: str | None
    kind: str
    path: str
    architecture: str
    width: int
    vocabulary: int
    context: int
    dtype: str
    embedding_digest: str
    embedding_scale: float
    tied: bool
    license: str | None
    gguf_sha256: str | None

    @property
    def is_local(self) -> bool:
        """Whether the name is a path, which says nothing elsewhere."""
        return self.kind in ("folder", "gguf")

    @property
    def title(self) -> str:
        """The name for people: of a path the last part."""
        return Path(os.path.abspath(self.name)).name if self.is_local else self.name

    def facts(self) -> dict[str, Any]:
        """What an artifact records, as plain JSON values; a path is absolute."""
        facts = {name: value for name, value in asdict(self).items() if name != "path"}
        if self.is_local:
            facts["name"] = os.path.abspath(os.path.expanduser(self.name))
        return {**facts, "fits_revisions": [self.revision] if self.revision else []}


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The unscaled table [V, D] of a model; raises `ModelError` where it is no plain matrix."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2 or not table.is_floating_point():
        raise ModelError(f"{type(model).__name__} has no plain embedding table to take rows from")
    return table.detach()


def check_counts(values: object) -> None:
    """Raise `ValueError` for the counts of a config.json that no model has, at any depth.

    transformers makes a module for each layer and a name for each label before it sees a weight.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, int) and _COUNTED.search(name):
            least = 1 if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") else 0
            most = MOST_EXPERTS if "expert" in name else MOST_PARTS
            if not least <= value <= most:
                raise ValueError(f"{name} is {value:,}, not between {least} and {most:,}")
        check_counts(value)


def check_weights(
    what: str, model: nn.Module, loading: Mapping[str, Any], unneeded: re.Pattern[str]
) -> None:
    """Raise `ModelError` for weights that a model lacks, and for others than it may leave out."""
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{what}: {len(missing)} weights that {type(model).__name__} needs are not in the file,"
            f" such as {missing[0]}"
        )
    unused = sorted(name for name in loading["unexpected_keys"] if not unneeded.search(name))
    if unused:  # transformers would leave them out
        raise ModelError(
            f"{what}: {len(unused)} weights in the file are no part of the {type(model).__name__} "
            f"that its config.json describes, such as {unused[0]}; download both again"
        )


def check_finite(what: str, table_VD: Tensor) -> None:
    """Raise `ModelError` with the rows of a table that are not finite."""
    bad = [~rows.isfinite().all(1) for rows in torch.split(table_VD, _CHUNK_ROWS)]
    rows = torch.cat(bad).nonzero().flatten().tolist()
    if rows:
        listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ModelError(
            f"{what}: {len(rows)} of the {len(table_VD):,} rows of its embedding table are not"
            f" finite (NaN or infinite), of the token ids {listed}; repair them, or download it"
            " again"
        )


def embedding_digest(table_VD: Tensor) -> str:
    """Digest a table's shape and its values rounded to bfloat16, as "sha256:...".

    The rounding makes float32, float64 and bfloat16 loads of one checkpoint agree. float16 agrees
    too unless the checkpoint has values that float16 cannot hold.
    """
    digest = hashlib.sha256(f"{table_VD.shape[0]}x{table_VD.shape[1]}\n".encode())
    for rows in torch.split(table_VD, _CHUNK_ROWS):
        rounded = rows.to(torch.bfloat16).cpu().contiguous()
        digest.update(rounded.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def weights_digest(model: nn.Module) -> str:
    """Digest a sample of every weight in the precision it is loaded in, as "sha256:...".

    It does not depend on where the weights are. Of a model that workers share out, all must ask.
    It tells a fine-tuned model from its base, whose embedding table may be the same.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        whole = find_weight(model, name, weight)
        if not whole.is_meta:
            flat = whole.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLE)].to(weight.dtype).contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def embedding_scale(embedding: nn.Module, table_VD: Tensor) -> float:
    """Measure the factor between table rows and what the embedding module gives for their ids.

    That output is the space of `inputs_embeds`: 1.0 for Llama, Qwen and GPT-2, sqrt(D) in the
    model's dtype for Gemma. Raises `ModelError` when no one factor explains the output.
    """
    vocabulary, width = table_VD.shape
    ids = torch.linspace(0, vocabulary - 1, min(vocabulary, 16), device=table_VD.device).long()
    # A table of ones shows the factor itself, free of rounding and of rows that are zero.
    ones_VD = table_VD.new_ones(1, 1).expand(vocabulary, width)
    with torch.no_grad():
        factors = torch.func.functional_call(embedding, {"weight": ones_VD}, (ids,))
        given = embedding(ids)
    scale = factors.flatten()[0]
    if not (factors == scale).all() or not torch.allclose(given, table_VD[ids] * scale, rtol=1e-2):
        raise ModelError(
            f"{type(embedding).__name__} does more than scale its rows; such a model cannot be used"
        )
    return float(scale)


def context_length(config: Any) -> int:
    """The longest sequence of the text model, 0 when its configuration names none."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    lengths = (getattr(text, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int)), 0)


def card_license(folder: Path) -> str | None:
    """The license that the front matter of a model card (README.md) names, if there is one."""
    try:
        with silence_libraries():
            matter = huggingface_hub.metadata_load(folder / "README.md") or {}
    except Exception:  # a card is for people; a model with none or a broken one still loads
        return None
    name = matter.get("license_name") if matter.get("license") == "other" else matter.get("license")
    return name if isinstance(name, str) else None
