"""The saved prompt (artifact) and its files on disk.

The two files belong together: the JSON holds a digest of itself and the other. Nothing in them is
executed, and everything is checked before it is used.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, final

import torch
from annotated_types import Ge, Lt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from embedgrad.atomic_files import (
    SEAL,
    check_seal,
    lock_folder,
    restore_folder,
    seal,
    write_folder,
)
from embedgrad.data.bounded_reads import parse_json, read_bytes
from embedgrad.data.json_rows import unique_keys
from embedgrad.data.typed import adapter_of
from embedgrad.errors import ArtifactError, EmbedgradError, RunError
from embedgrad.prompt.embedding import HoldsPrompt, PromptEmbedding, unwrap
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Template
from embedgrad.prompt.trust_region import TrustRegion, store_compact

T = TypeVar("T")

FORMAT = "embedgrad-prompt"
VERSION = 2
ROWS_FILE = "prompt.safetensors"
JSON_FILE = "prompt.json"
LARGEST_HEADER = 2**20
LARGEST_FILE = 2**30
LARGEST_JSON = 2**24
START_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save(prompt: PromptEmbedding | HoldsPrompt, folder: str | Path) -> Path:
    """Write the prompt into `folder`, whose old content survives if anything fails.

    Raises `ArtifactError` for rows that are not finite, and `RunError` where it cannot be written.
    """
    prompt = unwrap(prompt)
    if prompt.rows.dim() != 2:
        raise ArtifactError(
            f"{folder}: rows of shape {list(prompt.rows.shape)}; an artifact holds [P, D], one row "
            "per token of the text, and none per layer; nothing was written"
        )
    # Cloned, because safetensors refuses tensors that share memory.
    both = {"rows": prompt.rows, "start_rows": prompt.start_rows}
    tensors = {n: t.detach().float().cpu().clone().contiguous() for n, t in both.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{folder}: {name} are not finite; nothing was written")
    tensors["start_rows"] = store_compact(tensors["start_rows"])
    content = tensors_to_bytes(tensors)
    count, width = tensors["rows"].shape
    described = {
        "format": FORMAT,
        "version": VERSION,
        "spans": [
            {
                "text": span.text,
                "token_ids": list(span.ids),
                "tokens": list(span.tokens),
                "drawn_in": [span.drawn_left, span.drawn_right],
                "drift": prompt.drift[place].tolist(),
                "cosine": prompt.cosine[place].tolist(),
            }
            for span, place in zip(prompt.spans, prompt.places().values(), strict=True)
        ],
        "template": prompt.template.as_dict(),
        "date": prompt.date.isoformat(),
        "target": asdict(prompt.target),
        "rows": {
            "count": count,
            "width": width,
            "dtype": "float32",
            "space": "inputs_embeds",
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "trust_region": asdict(prompt.trust_region),
        **prompt.provenance,
    }
    try:
        sealed = seal(described, content)
        text = json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: the provenance holds what JSON cannot ({error}); nothing was written"
        ) from error
    write_folder(Path(folder), {ROWS_FILE: content, JSON_FILE: text.encode()})
    return Path(folder)


def load(folder: str | Path) -> PromptEmbedding:
    """Read a saved prompt. Raises `ArtifactError` that says what is missing, damaged or unknown."""
    folder = Path(folder)
    if not (folder / JSON_FILE).is_file():
        _restore(folder)
        if (folder / "prompt" / JSON_FILE).is_file():
            folder = folder / "prompt"  # a run folder was given
    values = _read_json(folder / JSON_FILE)
    path = folder / ROWS_FILE
    content = _read_bytes(path, LARGEST_FILE)
    try:
        _check_safetensors(path, content)
        if hashlib.sha256(content).hexdigest() != values["rows"]["sha256"]:
            raise ArtifactError(
                f"{path}: is not the file that {JSON_FILE} was written with (digest differs); "
                "restore both files from the same run"
            )
        entries = _from_json(_Entries, {name: values[name] for name in _ENTRY_NAMES}, "prompt")
        target = _from_json(Target, values["target"], "target", "choices")
        region = _from_json(TrustRegion, values["trust_region"], "trust_region", "radius")
        template = Template.from_dict(entries.template)
        if len(entries.spans) != len(template.spans):
            raise ValueError(f"{len(entries.spans)} spans, but {len(template.spans)} in template")
        spans = tuple(map(_build_span, entries.spans, template.spans))
        count = sum(len(span.ids) for span in spans)
        rows, start_rows = _read_rows(path, content, count, entries.rows.width)
        if SEAL in values:  # earlier versions wrote none
            check_seal(values, content)
        return PromptEmbedding(
            template=template,
            target=target,
            spans=spans,
            date=entries.date,
            start_rows=start_rows,
            rows=rows,
            trust_region=region,
            provenance={k: v for k, v in values.items() if k not in _WRITTEN_BY_SAVE},
        )
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, EmbedgradError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{folder / JSON_FILE}: is not a whole prompt: {what}") from error


@final
@dataclass(frozen=True)
class _RowsEntry:
    """The entry "rows" of `prompt.json`."""

    count: int
    width: int
    dtype: Literal["float32"]
    space: Literal["inputs_embeds"]
    sha256: str


@final
@dataclass(frozen=True)
class _SpanEntry:
    """An entry of "spans"."""

    text: str
    token_ids: tuple[Annotated[int, Ge(0), Lt(2**31)], ...]
    tokens: tuple[str, ...]
    drawn_in: tuple[str, str]
    drift: tuple[float, ...]
    cosine: tuple[float, ...]


@final
@dataclass(frozen=True)
class _Entries:
    """What `prompt.json` holds besides target, trust region and provenance."""

    spans: tuple[_SpanEntry, ...]
    template: dict[str, Any]
    date: datetime.date
    rows: _RowsEntry


_ENTRY_NAMES = tuple(field.name for field in fields(_Entries))


def _build_span(entry: _SpanEntry, text: str) -> Span:
    """A span whose words are the template's `text`."""
    left, right = entry.drawn_in
    counts = {n: len(getattr(entry, n)) for n in ("token_ids", "tokens", "drift", "cosine")}
    if 0 in counts.values() or len(set(counts.values())) > 1:
        raise ValueError(
            f"span {entry.text!r} has {', '.join(f'{c} {n}' for n, c in counts.items())}"
        )
    if entry.text != left + text + right:
        raise ValueError(f"text {entry.text!r} is not the template's {text!r}")
    return Span(entry.text, entry.token_ids, entry.tokens, left, right)


def _from_json(cls: type[T], values: Any, name: str, *needed: str) -> T:
    """A dataclass from JSON values, nothing converted; raises ValueError or KeyError."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"{name}: expected entries {', '.join(sorted(known))}")
    for entry in needed:
        values[entry]
    try:
        return adapter_of(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise ValueError(f"{place}: {first['msg']}") from error


_WRITTEN_BY_SAVE = {SEAL, "format", "version", "target", "trust_region", *_ENTRY_NAMES}


def _restore(folder: Path) -> None:
    """Put back a prompt, a run's too, that a process left aside when it died replacing it."""
    for place in (folder, folder / "prompt"):
        with contextlib.suppress(RunError):  # somebody is at work there
            if not place.exists() and any(place.parent.glob(f".{place.name}.*-*")):
                with lock_folder(place.parent):
                    restore_folder(place, load)


def _read_json(path: Path) -> dict[str, Any]:
    content = _read_bytes(path, LARGEST_JSON)
    try:
        values = parse_json(content, unique_keys)
    except ValueError as error:
        raise ArtifactError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ArtifactError(f'{path}: is not a saved prompt; expected "format": "{FORMAT}"')
    version = values.get("version")
    if isinstance(version, int) and version < VERSION:
        raise ArtifactError(
            f"{path}: written by an older embedgrad (format version {version!r}, this one reads "
            f"{VERSION}); refine the prompt again"
        )
    if version != VERSION:
        raise ArtifactError(
            f"{path}: not written by this embedgrad (format version {version!r}, this one reads "
            f"{VERSION}); install the version that wrote it"
        )
    return values


def _read_bytes(path: Path, most: int) -> bytes:
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}); expected the folder of a saved prompt, "
            f"with {JSON_FILE} and {ROWS_FILE}"
        ) from error


def _check_safetensors(path: Path, content: bytes) -> None:
    """Bound the header before the library parses it."""
    if len(content) < 8:
        raise ArtifactError(f"{path}: is not safetensors ({len(content)} bytes); restore the file")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(LARGEST_HEADER, len(content) - 8) or content[8:9] != b"{":
        raise ArtifactError(
            f"{path}: is not safetensors, or was cut short (its header claims {length} bytes, the "
            f"file has {len(content)}); restore the file"
        )


def _read_rows(
    path: Path, content: bytes, count: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        tensors = tensors_from_bytes(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: is damaged ({error}); restore the file") from error
    if set(tensors) != {"rows", "start_rows"}:
        raise ArtifactError(f"{path}: holds {sorted(tensors)}; expected rows and start_rows")
    for name, tensor in tensors.items():
        kinds = (torch.float32,) if name == "rows" else START_DTYPES
        if tensor.dtype not in kinds or tuple(tensor.shape) != (count, width):
            expected = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise ArtifactError(
                f"{path}: {name} are {tensor.dtype} {list(tensor.shape)}; expected {expected} "
                f"[{count}, {width}], one row per token of the text"
            )
        bad = (~torch.isfinite(tensor)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ArtifactError(f"{path}: {name} hold numbers that are not finite, in rows {bad}")
    rows, start = tensors["rows"], tensors["start_rows"]
    # A row that never moved is its start row to the bit, also where that one was rounded.
    unmoved = (rows.to(start.dtype) == start).all(dim=1, keepdim=True)
    return rows, torch.where(unmoved, rows, start.float())
