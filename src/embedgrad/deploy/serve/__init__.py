"""Start an existing server on an export: an OpenAI-compatible API on a loopback port."""

from embedgrad.deploy.serve.engines import ENGINES
from embedgrad.deploy.serve.server import Served, serve

__all__ = ["ENGINES", "Served", "serve"]
