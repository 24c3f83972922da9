"""Find labels that differ only in blanks, case or Unicode form: twins."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping

from embedgrad.data.problems import SHOWN
from embedgrad.errors import nearest
from embedgrad.formatting import pluralize

_WHOLE = r"^([+-]?\d+)(?:\.0+)?$"  # a number, as spreadsheets and pandas write it


def fold(text: str) -> str:
    """What twins have in common: the text without case and what `_tidy` takes away."""
    return _tidy(_tidy(text).casefold())


def _tidy(text: str) -> str:
    """The text in its usual form: single blanks, whole numbers without ".0", nothing unseen."""
    text = unicodedata.normalize("NFKC", text)
    # Some characters that nobody sees are no blanks for Python, as U+200B or U+FEFF.
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    return re.sub(_WHOLE, r"\1", text)


def difference(one: str, other: str) -> str:
    """In what two twins differ."""
    nfc = unicodedata.normalize("NFC", one), unicodedata.normalize("NFC", other)
    if nfc[0] == nfc[1]:
        return "Unicode form"
    if re.match(_WHOLE, fold(one)):
        return "how a number is written"
    if "".join(nfc[0].split()) == "".join(nfc[1].split()):
        return "blanks"
    return "case" if nfc[0].casefold() == nfc[1].casefold() else "case, blanks or Unicode form"


def escape(text: str) -> str:
    """A text as TOML writes it, in ASCII where it may look like another."""
    written = json.dumps(text, ensure_ascii=False)
    if text.isprintable() and unicodedata.is_normalized("NFC", text):
        return written
    return "".join(c if " " <= c <= "~" else _codepoint(ord(c)) for c in written)


def _codepoint(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def advise_mapping(pairs: Mapping[str, str]) -> str:
    """The setting that maps answers to others."""
    listed = ", ".join(f"{escape(one)} = {escape(other)}" for one, other in pairs.items())
    return f"data.labels = {{ {listed} }}"


def find_twin(name: str, known: Iterable[str]) -> str | None:
    """The known name that is a twin of this one."""
    return next((other for other in known if fold(other) == fold(name)), None)


def compare_twins(one: str, other: str) -> str:
    """How two twins differ, as the beginning of a message."""
    return f"{escape(one)} differs from {escape(other)} only in {difference(one, other)}"


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: its twin, or else the nearest known names."""
    known = list(known)
    twin = find_twin(name, known)
    if twin is None:
        return nearest(name, known)
    return f"{compare_twins(name, twin)}: write them alike"


def map_twins(counts: Mapping[str, int]) -> dict[str, str]:
    """Each twin with the one to write instead: the most frequent, tidy ones first."""
    groups: dict[str, list[str]] = {}
    for name in counts:
        groups.setdefault(fold(name), []).append(name)
    pairs: dict[str, str] = {}
    for group in groups.values():
        kept = max(group, key=lambda name: (name == _tidy(name), counts[name]))
        pairs |= {name: kept for name in group if name != kept}
    return pairs


def note_twins(counts: Mapping[str, int], *, mapped: bool = False) -> list[str]:
    """A note on answers that are twins, given the rows of each, and on what to do.

    `mapped`: a new recipe maps them already.
    """
    pairs = map_twins(counts)
    if not pairs:
        return []
    said = [
        f"{escape(one)} ({pluralize(counts[one], 'row')}) and {escape(other)} "
        f"({pluralize(counts[other], 'row')}) differ only in {difference(one, other)}"
        for one, other in pairs.items()
    ]
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    mapping = advise_mapping(pairs)
    advice = (
        f"The recipe takes them for the same: {mapping}; take out what is not."
        if mapped
        else "If they mean the same, write them alike in the file, or map them and drop the "
        f"others from the choices: {mapping}."
    )
    listed = "; ".join(said[:SHOWN])
    return [f"Answers that look alike count as different: {listed}{more}. {advice}"]
