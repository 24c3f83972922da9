"""Every destination by name."""

from __future__ import annotations

import importlib

from embedgrad.deploy.job import Destination
from embedgrad.deploy.rules import DESTINATIONS
from embedgrad.errors import ExportError, nearest


def find_destination(name: str) -> Destination:
    """The destination of that name, from the module of that name. Raises `ExportError`."""
    if name not in DESTINATIONS:
        raise ExportError(f"--to: unknown destination {name!r}; {nearest(name, DESTINATIONS)}")
    # Imported when first used, as some modules take long.
    module = importlib.import_module(f"embedgrad.deploy.destinations.{name}")
    destination: Destination = getattr(module, DESTINATIONS[name])()
    return destination
