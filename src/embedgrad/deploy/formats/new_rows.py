"""Tensors that grow with new tokens: embeddings, output layer.

    table     old rows | refined rows            | remaining padding
    lm_head   old rows | copies of the guard row | remaining padding

Old rows keep their bytes, so old logits stay exactly the same. An lm_head that shared the table
becomes a separate tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.deploy.formats.weight_files import DTYPES, NewTensor, StoredTensor, WeightFiles
from embedgrad.errors import ExportError
from embedgrad.model.loading import ModelInfo

COMPARED = 8  # rows by which a tensor is recognized


@final
@dataclass(frozen=True)
class Tables:
    """Names of embedding table, lm_head and the lm_head's bias ("": none) in a checkpoint.

    `layer` is the lm_head's module name in the model.
    """

    files: WeightFiles
    info: ModelInfo
    table: str
    lm_head: str
    bias: str
    layer: str

    @classmethod
    def find(cls, files: WeightFiles, model: Any, info: ModelInfo) -> Tables:
        """Find them by shape and content. Raises `ExportError`."""
        lm_head = model.get_output_embeddings()
        layer = _name(model, lm_head)
        table_name = f"{_name(model, model.get_input_embeddings())}.weight"
        table = _find(files, table_name, model.get_input_embeddings().weight)
        name, bias = f"{layer}.weight", ""
        if not info.tied:
            name = _find(files, name, lm_head.weight)
        if getattr(lm_head, "bias", None) is not None:
            bias = _find(files, f"{layer}.bias", lm_head.bias)
        return cls(files, info, table, name, bias, layer)

    def changes(self, rows_ND: Tensor, first: int, guard: int, dtype: str) -> dict[str, NewTensor]:
        """The changed tensors, in `dtype` ("": their own), with N new tokens from id `first` on.

        `rows_ND` are rows in table space, before the model scales them.
        """
        stored = self.files.tensors
        changes = {self.table: _with(stored[self.table], [rows_ND], first, guard, dtype)}
        # A tied lm_head is a copy of the table under its own name.
        sources = {self.lm_head: self.table if self.info.tied else self.lm_head}
        sources |= {self.bias: self.bias} if self.bias else {}
        for name, source in sources.items():
            copies = [stored[source].part(guard, guard + 1)] * len(rows_ND)
            changes[name] = _with(stored[source], copies, first, guard, dtype)
        if dtype:
            changes |= {
                name: NewTensor(dtype, tensor.shape, [tensor])
                for name, tensor in stored.items()
                if name not in changes and tensor.dtype in DTYPES and tensor.dtype != dtype
            }
        return changes


def _name(model: Any, layer: Any) -> str:
    name: str = next(name for name, module in model.named_modules() if module is layer)
    return name


def _find(files: WeightFiles, name: str, weight: Tensor) -> str:
    """The tensor that holds a weight of the loaded model; its name may differ in the file."""
    ending = ".".join(name.split(".")[-2:])
    rows = torch.linspace(0, len(weight) - 1, min(COMPARED, len(weight))).long().tolist()
    order = sorted(files.tensors, key=lambda n: (n != name, not n.endswith(ending)))
    for candidate in order:
        stored = files.tensors[candidate]
        if stored.shape == tuple(weight.shape) and stored.dtype in DTYPES:
            pairs = ((stored.part(i, i + 1).read()[0].to(weight.dtype), weight[i]) for i in rows)
            if all(torch.equal(row, other.cpu()) for row, other in pairs):
                return candidate
    raise ExportError(
        f"{files.folder}: no plain tensor holds the model's {name} (a quantized one cannot "
        "take new rows); export prompt embeddings (--to vllm) instead"
    )


def _with(
    stored: StoredTensor, new: Sequence[StoredTensor | Tensor], first: int, guard: int, dtype: str
) -> NewTensor:
    """A tensor with new entries from `first` on, replacing padding or extending it."""
    old, last = stored.shape[0], first + sum(piece.shape[0] for piece in new)
    # A tokenizer may have more tokens than there are rows; no text uses them.
    gap = [stored.part(guard, guard + 1)] * max(0, first - old)
    behind = [stored.part(last, old)] if last < old else []
    return NewTensor.join(
        dtype or stored.dtype, stored.part(0, min(first, old)), *gap, *new, *behind
    )
