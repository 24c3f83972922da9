"""Name new tokens after a random tag.

The tag is random, so that no text contains such a name by chance; chat templates replace it in what
clients send, so that none contains it on purpose.
"""

from __future__ import annotations

import re
import secrets
import string

from embedgrad.errors import ExportError

TAG_LENGTH = 12
_TAG = re.compile(rf"[a-z0-9]{{{TAG_LENGTH}}}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def new_tag() -> str:
    """A tag of random lower-case letters and digits."""
    letters = string.ascii_lowercase + string.digits
    return "".join(secrets.choice(letters) for _ in range(TAG_LENGTH))


def token_names(tag: str, name: str, count: int) -> tuple[str, ...]:
    """Names of the tokens of a prompt's rows, in order. Raises `ExportError` for a bad name."""
    assert _TAG.fullmatch(tag), tag
    check_name(name)
    return tuple(f"<|{tag}_{name}_{i}|>" for i in range(count))


def check_name(name: str) -> None:
    """Raise `ExportError` for a name that a request could not use."""
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"prompt name {name!r}: expected 1 to 64 letters, digits, '-' and '_'; rename it"
        )
