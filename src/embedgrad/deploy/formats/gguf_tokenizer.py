"""A fast tokenizer of transformers in GGUF's terms.

llama.cpp knows two kinds that matter here: byte-level BPE, whose rule for cutting text into words
has a name, and BPE on characters with bytes to fall back to, as SentencePiece makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFValueType as Type
from gguf import TokenType

from embedgrad.deploy.formats.gguf_writer import Entry, count, flag, listed, string
from embedgrad.errors import ExportError

_UNLIKELY = -1e6  # scores of what no merge makes

_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
# Name of the cutting rule in llama.cpp -> splitting expression in tokenizer.json.
_SPLITS = {
    "qwen2": _WORDS + r"|\p{N}" + _MARKS,
    "llama-bpe": _WORDS + r"|\p{N}{1,3}" + _MARKS,
}
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # rules under which llama.cpp looks up a word before it merges


def tokenizer_metadata(tokenizer: Any, rows: int, end_ids: Sequence[int]) -> dict[str, Entry]:
    """Metadata of a tokenizer whose model has so many rows. Raises `ExportError`."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"gguf: a tokenizer of the kind {model['type']} is not converted; only byte-level BPE "
            "and BPE with byte fallback are"
        )
    kind = _bytelevel(parsed) if not model.get("byte_fallback") else _sentencepiece(parsed)
    entries: dict[str, Entry] = {
        **kind,
        **_tokens(tokenizer, parsed, rows),
        "tokenizer.ggml.add_bos_token": flag(_adds_bos(tokenizer)),
        "tokenizer.ggml.add_eos_token": flag(False),
    }
    ends = [i for i in end_ids if i != tokenizer.eos_token_id]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": ends[0] if ends else None,
    }
    for name, number in ids.items():
        if number is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = count(number)
    return entries


def _bytelevel(parsed: Mapping[str, Any]) -> dict[str, Entry]:
    model = parsed["model"]
    rule = _rule(parsed["pre_tokenizer"])
    if bool(model.get("ignore_merges")) is not (rule in _WHOLE_WORDS_FIRST):
        rule = None
    if rule is None:
        raise ExportError(
            "gguf: this tokenizer's rule for cutting text into words has no name in llama.cpp that "
            "is known here; export to 'vocabulary' and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(rule),
        **({"tokenizer.ggml.merges": listed(merges, Type.STRING)} if merges else {}),
    }


def _rule(pre: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name for a rule by which text is cut into words."""
    steps = [] if pre is None else pre.get("pretokenizers", [pre])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        return "smollm" if before == [{"type": "Digits", "individual_digits": True}] else None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    if before[0]["behavior"] != "Isolated" or before[0].get("invert"):
        return None
    expression = before[0]["pattern"].get("Regex")
    return next((name for name, known in _SPLITS.items() if known == expression), None)


def _sentencepiece(parsed: Mapping[str, Any]) -> dict[str, Entry]:
    """A merge's place in the list is the score of what it makes, as SentencePiece has it."""
    steps = [parsed["pre_tokenizer"] or {}, parsed["normalizer"] or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", [])]
    always = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in steps
    )
    return {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.add_space_prefix": flag(always),
    }


def _tokens(tokenizer: Any, parsed: Mapping[str, Any], rows: int) -> dict[str, Entry]:
    model = parsed["model"]
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in parsed["added_tokens"]}
    texts, kinds = [], []
    for number in range(rows):
        text = by_id.get(number)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            special = added[number]["special"]
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and text.startswith("<0x") and len(text) == 6:
            kind = TokenType.BYTE
        if number == tokenizer.unk_token_id and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        texts.append(text)
        kinds.append(int(kind))
    entries = {
        "tokenizer.ggml.tokens": listed(texts, Type.STRING),
        "tokenizer.ggml.token_type": listed(kinds, Type.INT32),
    }
    if model.get("byte_fallback"):
        made = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        scores: dict[str, float] = {}
        for place, text in enumerate(made):
            scores.setdefault(text, -float(place))
        values = [scores.get(text, _UNLIKELY) for text in texts]
        entries["tokenizer.ggml.scores"] = listed(values, Type.FLOAT32)
    return entries


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
