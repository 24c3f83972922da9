"""Change the bytes or the values of files at random, as a stranger or a bad disk would."""

from __future__ import annotations

import json
import tomllib
from random import Random
from typing import Any

import tomli_w

Files = dict[str, bytes]

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**53, -(2**63), 2**64, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "\0", "a\nb", "\ud800", "\u202e", "\x1b[31m", "x" * 5000, "../../x", "/dev/zero"),
    *("NaN", "1e999", "[[", "]]", "{", "{a}", "[[x]]", "{% for %}", "__class__", "\ufeff"),
    *([], {}, [[]], [None], {"": None}, {"a": 1}, ["a", 1], [0.5, "a"], [1, 2, 3]),
)
TOKENS: tuple[bytes, ...] = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"'", b"\\", b"\r", b"\n", b"\r\n", b",", b"\t", b";"),
    *(b"{", b"}", b"[", b"]", b"[[", b"]]", b'"""', b"\\ud800", b"\\u0000", b"NaN", b"1e999"),
    *(b"-1", b"0", b"9" * 5000, b"null", b"true", b"[" * 2000, b"{" * 2000, b"a." * 2000),
    *(b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\1\0\0\0\0\0\0\0", b"%s", b"{{", b"}}"),
)


def mutate(draw: Random, seeds: list[Files]) -> Files:
    """One of the seeds with something in one of its files changed, moved or taken away."""
    files = dict(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        name = draw.choice(sorted(files))
        if draw.random() < 0.01 and len(files) > 1:
            del files[name]
        elif draw.random() < 0.02:
            files[name] = draw.choice(list(draw.choice(seeds).values()))
        else:
            files[name] = _values(draw, name, files[name]) or _bytes(draw, files[name])
    return files


def _bytes(draw: Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 1, 2, 4, 8, 64, 1024)))
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = draw.choice(TOKENS)
        elif kind == 4:
            data[at:end] = draw.choice(TOKENS)
        elif kind == 5:
            data[at:at] = data[at:end] * draw.choice((1, 2, 50))
        else:
            del data[at:]
    return bytes(data)


def _values(draw: Random, name: str, content: bytes) -> bytes | None:
    """The file with one value changed; None where it is no JSON and no TOML, or by chance."""
    if draw.random() < 0.3:
        return None
    try:
        if name.endswith((".json", ".toml")):
            text = content.decode()
            values = json.loads(text) if name.endswith(".json") else tomllib.loads(text)
            _change(draw, values)
            text = json.dumps(values) if name.endswith(".json") else tomli_w.dumps(values)
            return text.encode()
        if name.endswith(".jsonl"):
            lines = content.split(b"\n")
            at = draw.randrange(len(lines))
            values = json.loads(lines[at])
            _change(draw, values)
            lines[at] = json.dumps(values).encode()
            return b"\n".join(lines)
    except (ValueError, TypeError, RecursionError, LookupError):
        pass
    return None


def _change(draw: Random, values: Any) -> None:
    places = list(_places(values))
    parent, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [parent[key]]
    elif kind == 2:
        there, other = draw.choice(places)
        parent[key] = json.loads(json.dumps(there[other]))
    elif kind == 3 and isinstance(parent, dict):
        parent[str(draw.choice(ODD))] = parent.pop(key)
    else:
        parent[key] = draw.choice(ODD)


def _places(values: Any) -> Any:
    """Every member of every list and object, at any depth."""
    items: Any = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    for key, inner in list(items):
        yield values, key
        yield from _places(inner)
