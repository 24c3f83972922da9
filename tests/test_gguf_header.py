"""A GGUF header is held against the file's size: hostile files are refused fast and small."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.errors import ModelError
from embedgrad.model.loading.gguf_header import read_header
from tiny_gguf import write_gguf


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int) -> bytes:
    return struct.pack("<IQ", kind, length)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 1 << 60
HOSTILE = {
    "empty": (b"", "0 bytes, but a GGUF header alone takes 24"),
    "magic only": (b"GGUF", "4 bytes"),
    "another format": (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
    "version 1": (header(0, 0, version=1), "GGUF version 1; versions 2 and 3"),
    "version 99": (header(0, 0, version=99), "GGUF version 99"),
    "big-endian": (header(0, 0, version=3 << 24), "GGUF version 50331648"),
    "huge tensor count": (header(HUGE, 0), "the number of tensors is given as 1,152"),
    "huge key count": (header(0, HUGE), "the number of metadata keys is given as"),
    "49 bytes, huge array of texts": (
        header(0, 1) + key("a", 9, array(8, HUGE)),
        "the length of 'a' is given as 1,152,921,504,606,846,976, but only 0 bytes follow",
    ),
    "huge array of bytes": (header(0, 1) + key("a", 9, array(0, HUGE)), "the length of 'a'"),
    "length that wraps round": (header(0, 1) + key("a", 9, array(10, (1 << 61) + 1)), "'a'"),
    "nested arrays": (
        header(0, 1) + key("a", 9, array(9, 1) + array(9, 1) + array(0, 0)),
        "'a' is an array of arrays",
    ),
    "array of unknown type": (header(0, 1) + key("a", 9, array(77, 1) + bytes(8)), "type 77"),
    "value of unknown type": (header(0, 1) + key("a", 13, bytes(8)), "unknown type 13"),
    "text beyond the end": (
        header(0, 1) + key("a\nb", 8, struct.pack("<Q", HUGE)),
        "the length of 'a\\nb' is given as",
    ),
    "text in an array beyond the end": (
        header(0, 1) + key("a", 9, array(8, 2) + text("x") + struct.pack("<Q", HUGE)),
        "the texts of 'a' reach beyond its end",
    ),
    "key beyond the end": (header(0, 1) + struct.pack("<Q", HUGE) + bytes(8), "a metadata key"),
    "key that is not UTF-8": (
        header(0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0),
        "not UTF-8",
    ),
    "cut in a value": (header(0, 1) + key("a", 10, bytes(4)), "in the middle of its header"),
    "key twice": (header(0, 2) + 2 * key("a", 0, b"\0"), "the key 'a' occurs twice"),
    "alignment 0": (
        header(0, 1) + key("general.alignment", 4, bytes(4)),
        "general.alignment is 0, not a power of two",
    ),
    "alignment as text": (
        header(0, 1) + key("general.alignment", 8, text("32")),
        "general.alignment",
    ),
    "tensor twice": (header(2, 0) + 2 * tensor("t", [1]), "the tensor 't' occurs twice"),
    "no dimensions": (header(1, 0) + tensor("t", []), "the tensor 't' has 0 dimensions"),
    "five dimensions": (header(1, 0) + tensor("t", [1] * 5), "has 5 dimensions"),
    "no elements": (header(1, 0) + tensor("t", [4, 0]), "the tensor 't' of shape [4, 0]"),
    "unknown tensor type": (header(1, 0) + tensor("t", [1], kind=99), "the unknown type 99"),
    "part of a block": (header(1, 0) + tensor("t", [33], kind=2), "does not fit its type"),
    "unaligned": (header(1, 0) + tensor("t", [1], offset=7), "does not fit its type"),
    "dimensions that overflow": (
        header(1, 0) + tensor("t", [HUGE, HUGE]) + bytes(64),
        "the tensor 't' ends at byte",
    ),
    "data that is not there": (
        header(1, 0) + tensor("t", [8, 4]) + bytes(64),
        "truncated GGUF file: the tensor 't' ends at byte 224, but the file has 129 bytes",
    ),
    "data that begins beyond the end": (
        header(1, 0) + tensor("t", [1], offset=1 << 62) + bytes(64),
        "the tensor 't' ends at byte 4,611,",
    ),
    "no architecture": (header(0, 0), "names no architecture"),
    "architecture as a number": (
        header(0, 1) + key("general.architecture", 4, bytes(4)),
        "names no architecture",
    ),
    "no tokenizer": (
        header(0, 1) + key("general.architecture", 8, text("llama")),
        "holds no tokenizer",
    ),
}


def refusal(path: Path) -> str:
    """Read a header that must be refused, within a second and 64 MiB; the message."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ModelError) as caught:
            read_header(path)
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    raw, part = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    assert part in refusal(path)


def test_more_elements_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    half = (1 << 21) + 1
    values = key("a", 9, array(0, half) + bytes(half)) + key("b", 9, array(0, half) + bytes(half))
    path.write_bytes(header(0, 2) + values)
    assert "its arrays hold more than 4,194,304 elements" in refusal(path)
    path.write_bytes(header(0, 1) + key("a", 9, array(0, 2 * half) + bytes(2 * half)))
    assert "the length of 'a' is 4,194,306, more than the 4,194,304" in refusal(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "nothing.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path)
    return path


def test_a_sound_file_is_read(sound: Path) -> None:
    header = read_header(sound)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.tokens"] == 259
    assert header.metadata["llama.block_count"] == 3
    assert len(header.tensors) == 29
    assert 0 <= sound.stat().st_size - header.weights * 4 < 15_000


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_cut_file_is_refused(sound: Path, data: st.DataObject) -> None:
    raw = sound.read_bytes()
    cut = sound.with_name("cut.gguf")
    cut.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    assert refusal(cut)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_changed_bytes_end_in_a_header_or_in_a_refusal(sound: Path, data: st.DataObject) -> None:
    raw = bytearray(sound.read_bytes())
    end = raw.index(b"output_norm.weight")  # about where the weights begin
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    changed = sound.with_name("changed.gguf")
    changed.write_bytes(raw)
    message = "it is readable still"
    try:
        read_header(changed)
    except ModelError as error:
        message = str(error)
    assert message.isprintable()
