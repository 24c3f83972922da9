"""Split text into words as a GGUF file asks, before BPE.

transformers knows some of llama.cpp's rules and takes GPT-2's for every other. The rest is here, by
the expressions of llama.cpp (src/llama-vocab.cpp) and of the models' own tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from embedgrad.errors import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_LATIN = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"

_AS_GPT2 = (
    *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"),
    *("mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"),
    *("jina-v1-en", "jina-v2-code", "roberta-bpe"),
)
_DIGITS_APART = (
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "mellum2",
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS),
    "deepseek-llm": (
        *(
            r"[\r\n]",
            rf"\s?[{_LATIN}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        ),
        *(r"\s+$", _HAN, r"\p{N}+"),
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"), (r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)
    ),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), (WORD + r"|\p{N}" + MARKS,)),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (WORD + r"|\p{N}{1,3}" + MARKS,)),
    "minicpm5": (r"\p{N}{1,3}", WORD + r"|\p{N}+" + MARKS),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), (_BLOOM,)),
    "viking": (_BLOOM, r"\p{N}"),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    "seed-coder": (WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
}
# llama.cpp puts a BOS first unless the file says otherwise,
_BOS_FIRST = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken"),
}
# and looks a whole word up in the vocabulary before it merges.
_WHOLE_WORDS_FIRST = {*_BOS_FIRST, "minicpm5"}
_ADD_BOS = "tokenizer.ggml.add_bos_token"


def set_split_rule(file: Path, metadata: Any, tokenizer: Any) -> None:
    """Let a byte-level tokenizer split text by the file's own rule, and others begin it so.

    Raises `ModelError` for a rule that is not known here.
    """
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") != "gpt2":  # SentencePiece does not split
        spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
        if not spaced and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
            blanks = decoders.Replace("\u2581", " ")
            backend.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])
        return
    rule = metadata.get("tokenizer.ggml.pre") or "default"
    if rule in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True
    if rule in _BOS_FIRST and tokenizer.bos_token and _ADD_BOS not in metadata:
        tokenizer.add_bos_token = True
    if rule in GGUF_PRE_TOKENIZER_SPLITS or rule in _AS_GPT2:
        return
    steps: list[Any]
    if rule in _DIGITS_APART:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif rule in _SPLITS:
        steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[rule]]
    else:
        raise ModelError(
            f"{file}: splits text by the rule {rule!r} (tokenizer.ggml.pre), which is not known "
            "here, so its tokens would be wrong; use the model's safetensors"
        )
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in _DIGITS_APART)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytelevel])
