"""Transforms of the gradient and of the step; register them here."""

from embedgrad.parts.transforms.base import Context, Gradients, Setup, State, Transform
from embedgrad.parts.transforms.clip import Clip
from embedgrad.parts.transforms.context import ContextProjection, ContextPull, EmbeddingMetric
from embedgrad.parts.transforms.subspace import SubspaceMemory

TRANSFORMS: dict[str, type[Transform]] = {
    "clip": Clip,
    "subspace": SubspaceMemory,
    "context_projection": ContextProjection,
    "embedding_metric": EmbeddingMetric,
    "context_pull": ContextPull,
}

__all__ = [
    "TRANSFORMS",
    "Clip",
    "Context",
    "ContextProjection",
    "ContextPull",
    "EmbeddingMetric",
    "Gradients",
    "Setup",
    "State",
    "SubspaceMemory",
    "Transform",
]
