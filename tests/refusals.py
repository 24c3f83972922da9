"""One way to assert that bad input is refused with a message that helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embedgrad.errors import DataError, EmbedgradError


@contextmanager
def refused(*parts: str, error: type[EmbedgradError] = DataError) -> Iterator[None]:
    """Expect an error on one printable line that holds all `parts`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for part in parts:
        assert part in message
