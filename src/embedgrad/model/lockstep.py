"""Lockstep: workers that share out weights (FSDP) make equally many passes.

    worker 0:  pass  pass  pass |
    worker 1:  pass  idle  idle | exchange

A pass gathers layer after layer from all workers, so one without rows left has to take part, in
the backward pass too. Sharding itself is PyTorch's (`torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from embedgrad.errors import ModelError
from embedgrad.model.deep import layer_list
from embedgrad.model.workers import here


def shard(model: Any, layers: int, device: torch.device) -> None:
    """Leave this worker its part of each layer, on a device. Raises `ModelError`."""
    found, mesh = layer_list(model, layers), init_device_mesh(device.type, (here().count,))
    if found is None:
        raise ModelError("model.fsdp: this model has no list of layers to share out; leave it out")
    rest = set(model.parameters()) - {weight for layer in found for weight in layer.parameters()}
    for layer in found:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest)


@final
class Lockstep:
    """The turns of a model whose weights are shared out; of any other there is nothing to do."""

    def __init__(self, model: Any, width: int):
        self.model, self.width = model, width
        self.needed = isinstance(model.base_model, FSDPModule)

    def begin(self) -> None:
        """Before a pass: wait until it is its turn. Passes without a graph come first."""
        graph = torch.is_grad_enabled()
        while self.needed and self._next(graph) != graph:
            self._idle(None)

    def finish(self, rows_PD: Tensor) -> Tensor:
        """Before an exchange: take part until no worker has passes left.

        The result is 0, and has the graph of the idle passes.
        """
        total = rows_PD.new_zeros(())
        while self.needed and (graph := self._next(None)) is not None:
            total = total + self._idle(rows_PD if graph else None)
        return total

    def _next(self, graph: bool | None) -> bool | None:
        """Whether the next pass has a graph, of those that workers ask for; None: none does."""
        plain, more = here().count_up([graph is False, graph is True])
        return False if plain else True if more else None

    def _idle(self, rows_PD: Tensor | None) -> Tensor:
        """A pass of one token of zeros, which has a graph if it is given rows."""
        table = self.model.get_input_embeddings().weight
        zeros = table.new_zeros(1, 1, self.width)
        if rows_PD is not None:
            zeros = zeros + 0 * rows_PD[:1, : self.width].to(zeros)
        with torch.set_grad_enabled(rows_PD is not None):
            output = self.model.base_model(inputs_embeds=zeros, use_cache=False)
        states: Tensor = output.last_hidden_state
        return 0 * states.sum()
