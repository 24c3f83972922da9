"""Spread a model over several devices, memory and disk, by accelerate.

Whatever is in memory or on disk is loaded where it computes, and left again. For the gradient
autograd would keep every weight of a pass, so that in the end all of them would lie on the device;
`Offloaded` keeps where they came from instead, and loads them a second time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from embedgrad.errors import ModelError

DeviceMap = str | Mapping[str, int | str]


def placement(
    device: str, device_map: DeviceMap | None, max_memory: Mapping[str, int | str]
) -> dict[str, Any]:
    """How `from_pretrained` is to spread a model; empty: not at all. Raises `ModelError`."""
    if device_map is None:
        if max_memory:
            raise ModelError("max_memory is for device_map = 'auto'; set it, or leave this out")
        return {}
    if device != "auto":
        raise ModelError(f"device {device!r} and a device_map are given; leave one of them out")
    if not isinstance(device_map, str):
        device_map = dict(device_map)
    room = {int(name) if name.isdigit() else name: most for name, most in max_memory.items()}
    return {"device_map": device_map, "max_memory": room or None}


def check_spread(what: str, model: Any) -> list[str]:
    """What to know of where a model's parts are. Raises `ModelError` if its table is nowhere."""
    places = getattr(model, "hf_device_map", {})
    if getattr(model.get_input_embeddings().weight, "is_meta", False):
        raise ModelError(
            f"{what}: its embedding table is kept in memory or on disk, but rows are taken from "
            "it all the time; give model.device_map or model.max_memory room for it on a device"
        )
    counted = [f"{count} on {place}" for place, count in Counter(map(str, places.values())).items()]
    return [f"parts of the model: {', '.join(counted)}"] if len(counted) > 1 else []


def find_weight(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight wherever it is: with the workers that share it out, in memory, or on disk."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    module, _, last = name.rpartition(".")
    hooks = _hooks(model.get_submodule(module)) if weight.is_meta else []
    return hooks[0].weights_map[last] if hooks else weight


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """What loads a module's weights for each pass."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return [one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload]


@final
class _Source(NamedTuple):
    """Where a weight is loaded from, and its place in what was loaded."""

    hook: AlignDevicesHook
    name: str
    dtype: torch.dtype
    offset: int | torch.SymInt


@final
class Offloaded:
    """The weights of a model that are loaded for each pass."""

    def __init__(self, model: nn.Module):
        self._loaded: dict[int, _Source] = {}  # by address
        hooks = [hook for module in model.modules() for hook in _hooks(module)]
        self._any = bool(hooks)
        for hook in hooks:
            self._watch(hook)

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Within the block no graph keeps an offloaded weight; backward passes load it again."""
        if not self._any:
            yield
            return
        self._loaded.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _watch(self, hook: AlignDevicesHook) -> None:
        """Note which weights a hook has loaded at present."""
        load, leave = hook.pre_forward, hook.post_forward

        def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = load(module, *args, **kwargs)
            for name, weight in module.named_parameters(recurse=hook.place_submodules):
                source = _Source(hook, name, weight.dtype, weight.storage_offset())
                self._loaded[weight.untyped_storage().data_ptr()] = source
            return found

        def post_forward(module: nn.Module, output: Any) -> Any:
            for weight in module.parameters(recurse=hook.place_submodules):
                self._loaded.pop(weight.untyped_storage().data_ptr(), None)
            return leave(module, output)

        hook.pre_forward, hook.post_forward = pre_forward, post_forward

    def _pack(self, tensor: Tensor) -> Any:
        source = self._loaded.get(tensor.untyped_storage().data_ptr())
        if source is None:
            return tensor
        offset = tensor.storage_offset() - source.offset
        return source, tensor.size(), tensor.stride(), offset


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    source, size, stride, offset = kept
    weight: Tensor = source.hook.weights_map[source.name]
    weight = weight.to(source.hook.execution_device, source.dtype)
    return weight.as_strided(size, stride, weight.storage_offset() + offset)
