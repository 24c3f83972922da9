"""`embedgrad serve`: start an existing server on an export."""

from embedgrad.deploy.serve.engines import ENGINES
from embedgrad.deploy.serve.server import Served, serve

__all__ = ["ENGINES", "Served", "serve"]
