"""Puts this folder on the path, so that tests in folders below can import the helpers."""

from __future__ import annotations

from hypothesis import settings

# Times of one example say nothing on a busy machine; the first one also builds models.
settings.register_profile("steady", deadline=None, print_blob=True)
settings.load_profile("steady")
