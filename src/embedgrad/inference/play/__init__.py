"""`embedgrad play`: both prompts answer your own query on a local page."""

from embedgrad.inference.play.server import Playing, play

__all__ = ["Playing", "play"]
