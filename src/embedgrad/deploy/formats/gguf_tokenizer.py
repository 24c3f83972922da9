"""Convert a fast tokenizer to GGUF metadata.

llama.cpp has two kinds that matter here: byte-level BPE, whose rule for splitting text into words
has a name, and BPE on characters with byte fallback, as SentencePiece makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from embedgrad.deploy.formats.gguf_file import Entry, entry
from embedgrad.errors import ExportError
from embedgrad.model.loading.gguf_pretokenizers import MARKS, WORD

_UNLIKELY = -1e6  # score of tokens that no merge makes

# Name of the splitting rule in llama.cpp -> expression in tokenizer.json.
_SPLITS = {
    "qwen2": WORD + r"|\p{N}" + MARKS,
    "llama-bpe": WORD + r"|\p{N}{1,3}" + MARKS,
}
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # llama.cpp looks up a whole word before it merges


def tokenizer_metadata(tokenizer: Any, rows: int, end_ids: Sequence[int]) -> dict[str, Entry]:
    """Metadata of a tokenizer; `rows` is the size of the table. Raises `ExportError`."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"gguf: cannot convert a tokenizer of the kind {model['type']}; only byte-level BPE "
            "and BPE with byte fallback"
        )
    kind = _bytelevel(parsed) if not model.get("byte_fallback") else _sentencepiece(parsed)
    bos = tokenizer.bos_token_id
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    entries: dict[str, Entry] = {
        **kind,
        **_tokens(tokenizer, parsed, rows),
        "tokenizer.ggml.add_bos_token": entry(bos is not None and first == [bos]),
        "tokenizer.ggml.add_eos_token": entry(False),
    }
    ends = [i for i in end_ids if i != tokenizer.eos_token_id]
    ids = {
        "bos": bos,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": ends[0] if ends else None,
    }
    for name, number in ids.items():
        if number is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = entry(number)
    return entries


def _bytelevel(parsed: Mapping[str, Any]) -> dict[str, Entry]:
    model = parsed["model"]
    rule = _rule(parsed["pre_tokenizer"])
    if bool(model.get("ignore_merges")) is not (rule in _WHOLE_WORDS_FIRST):
        rule = None
    if rule is None:
        raise ExportError(
            "gguf: this tokenizer's rule for splitting text into words has no name in llama.cpp "
            "that is known here; export to 'vocabulary' and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": entry("gpt2"),
        "tokenizer.ggml.pre": entry(rule),
        **({"tokenizer.ggml.merges": entry(merges)} if merges else {}),
    }


def _rule(pre: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name for the rule that splits text into words."""
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
    """As in SentencePiece, a merge's place in the list is the score of its token."""
    steps = [parsed["pre_tokenizer"] or {}, parsed["normalizer"] or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", [])]
    always = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in steps
    )
    return {
        "tokenizer.ggml.model": entry("llama"),
        "tokenizer.ggml.pre": entry("default"),
        "tokenizer.ggml.add_space_prefix": entry(always),
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
    entries = {"tokenizer.ggml.tokens": entry(texts), "tokenizer.ggml.token_type": entry(kinds)}
    if model.get("byte_fallback"):
        merges = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        scores: dict[str, float] = {}
        for place, text in enumerate(merges):
            scores.setdefault(text, -float(place))
        values = [scores.get(text, _UNLIKELY) for text in texts]
        entries["tokenizer.ggml.scores"] = entry(values)
    return entries
