"""Load a frozen model: Hub, folder or GGUF."""

from embedgrad.model.loading.info import ModelInfo
from embedgrad.model.loading.load import LoadedModel, load

__all__ = ["LoadedModel", "ModelInfo", "load"]
