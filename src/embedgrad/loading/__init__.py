"""A frozen language model from the Hub, a folder, a GGUF file, or a GGUF in a Python package."""

from embedgrad.loading.info import ModelInfo
from embedgrad.loading.load import LoadedModel, load

__all__ = ["LoadedModel", "ModelInfo", "load"]
