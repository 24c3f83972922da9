"""Silence model libraries and shorten their errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging

from embedgrad.errors import EmbedgradError, ModelError, is_panic

_LONGEST = 300

transformers_logging: Any = transformers.utils.logging  # partly without types


@contextmanager
def model_errors(what: str, raises: type[EmbedgradError] = ModelError) -> Iterator[None]:
    """Run model libraries without their output; their errors become `raises("what: reason")`.

    transformers raises nearly every type for a bad file (OSError, ValueError, KeyError,
    RuntimeError, SafetensorError, ...), hence the wide net. `raises` passes through as it is.
    """
    try:
        with silence_libraries():
            yield
    except raises:
        raise
    except BaseException as error:
        if not (is_panic(error) or isinstance(error, Exception)):
            raise
        reason = one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code of its own, and code of models is never run here; "
                "give a model that transformers has built in"
            )
        raise raises(f"{what}: {reason}") from error


def one_line(error: BaseException) -> str:
    """The error's text with all white space folded, its type last."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " ..."
    return f"{text} ({kind})" if text else kind


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Run model libraries without their log lines, warnings and progress bars."""
    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    spreading = logging.getLogger("accelerate")  # whose warning about offloaded weights is our note
    level = spreading.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    spreading.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # the Hub's bars too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        spreading.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
