"""Existing servers, started on an export: an OpenAI-compatible API on a loopback port."""

from embedgrad.serving.engines import ENGINES
from embedgrad.serving.served import Served, serve

__all__ = ["ENGINES", "Served", "serve"]
