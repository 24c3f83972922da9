"""A frozen language model from the Hub, a folder, a GGUF file, or a GGUF in a Python package."""

from embedgrad.model.loading.info import ModelInfo
from embedgrad.model.loading.load import LoadedModel, load

__all__ = ["LoadedModel", "ModelInfo", "load"]
