"""A converted GGUF file computes what the file says, or is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, LlamaForCausalLM

import tiny
from embedgrad.errors import ModelError
from embedgrad.model.loading import gguf_check, load
from embedgrad.model.loading.gguf_header import GgufHeader
from embedgrad.model.loading.gguf_settings import complete_settings
from refusals import refused
from tiny_gguf import TOKENS, write_gguf

SCALING = "llama.rope.scaling."
YARN = {
    f"{SCALING}type": "yarn",
    f"{SCALING}factor": 4.0,
    f"{SCALING}original_context_length": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS = [1.0, 2.0, 3.0, 4.0]


def longrope(short: list[float], long: list[float], attention: float, original: int) -> Any:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_check, "_MOST", 0.01)  # these files are not quantized


@pytest.mark.parametrize(
    ("changes", "tensors", "rope"),
    [
        ({f"{SCALING}type": "none", f"{SCALING}factor": 4.0}, {}, {}),
        (
            {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
            {},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        (
            {**YARN, f"{SCALING}attn_factor": 0.5},
            {},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 0.5 * 1.138629436111989,
            },
        ),
        ({}, {"rope_freqs.weight": FACTORS}, longrope(FACTORS, FACTORS, 1.0, 512)),
        (
            {f"{SCALING}type": "longrope", f"{SCALING}original_context_length": 256}
            | {f"{SCALING}attn_factor": 1.25},
            {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": [8.0] * 4},
            longrope(FACTORS, [8.0] * 4, 1.25, 256),
        ),
        (
            {"llama.rope.freq_base": 500_000.0},
            {"rope_freqs.weight": [1.0, 1.0, 2.69453, 8.0]},
            {**LLAMA3, "rope_theta": 500_000.0},
        ),
    ],
    ids=["none", "linear", "legacy", "yarn", "factors", "longrope", "llama3"],
)
def test_rotary_scaling_is_carried_over(
    changes: dict[str, Any], tensors: dict[str, Any], rope: dict[str, Any], tmp_path: Path
) -> None:
    plain = write_gguf(tmp_path / "tiny.gguf", tensors=tensors, **changes)
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0, **rope}
    expected = LlamaForCausalLM(config).eval()
    expected.load_state_dict(plain.state_dict())
    converted: Any = load(str(tmp_path / "tiny.gguf"), device="cpu").model
    for length in (100, 300):
        ids = torch.arange(length)[None] % len(TOKENS)
        assert torch.allclose(converted(ids).logits, expected(ids).logits, atol=1e-4)
    kind = rope.get("rope_type", "default")
    assert converted.config.rope_parameters["rope_type"] == kind


@pytest.mark.parametrize(
    ("changes", "tensors", "named"),
    [
        ({f"{SCALING}type": "dynamic"}, {}, "llama.rope.scaling.type = dynamic"),
        ({**YARN, f"{SCALING}yarn_ext_factor": 0.5}, {}, "llama.rope.scaling.yarn_ext_factor"),
        (YARN, {"rope_freqs.weight": FACTORS}, "llama.rope.scaling.type = yarn"),
        ({f"{SCALING}alpha": 10.0}, {}, "llama.rope.scaling.alpha = 10.0"),
        ({"llama.rope.dimension_count": 4}, {}, "llama.rope.dimension_count = 4"),
        ({"llama.rope.dimension_sections": [2, 2, 0, 0]}, {}, "llama.rope.dimension_sections"),
        ({"llama.attention.value_length": 4}, {}, "llama.attention.value_length = 4"),
        ({"llama.logit_scale": 0.5}, {}, "llama.logit_scale = 0.5"),
        ({"llama.residual_scale": 0.5}, {}, "llama.residual_scale = 0.5"),
        ({"llama.attention.scale": 0.5}, {}, "llama.attention.scale = 0.5"),
        ({"llama.attention.causal": False}, {}, "llama.attention.causal = False"),
        ({"llama.attention.sliding_window": 16}, {}, "llama.attention.sliding_window = 16"),
        ({"llama.expert_count": 4}, {}, "llama.expert_count = 4"),
        ({"llama.of_tomorrow": 1.5}, {}, "llama.of_tomorrow = 1.5"),
        ({}, {"blk.0.attn_q.bias": [1.0] * 32}, "1 of its tensors (blk.0.attn_q.bias)"),
        ({}, {"blk.1.attn_q_norm.weight": [2.0] * 8}, "blk.1.attn_q_norm.weight"),
    ],
)
def test_what_has_no_place_is_refused(
    changes: dict[str, Any], tensors: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tensors=tensors, **changes)
    with refused("tiny.gguf", named, "safetensors", error=ModelError):
        load(str(tmp_path / "tiny.gguf"), device="cpu")
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    changes = {
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": 512,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
    }
    write_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": [1.0] * 4}, **changes)
    assert load(str(tmp_path / "tiny.gguf"), device="cpu").info.width == 32


@pytest.mark.parametrize(
    ("arch", "kind", "stated", "expected"),
    [
        ("qwen3", "qwen3", {"attention.key_length": 32}, {"head_dim": 32}),
        ("qwen3", "qwen3", {}, {"head_dim": 16}),
        ("llama", "mistral", {}, {"sliding_window": None}),
        ("phi3", "phi3", {"attention.sliding_window": 100}, {"sliding_window": 100}),
        ("stablelm", "stablelm", {"attention.layer_norm_epsilon": 0.5}, {"layer_norm_eps": 0.5}),
        ("nemotron", "nemotron", {"attention.layer_norm_epsilon": 0.5}, {"norm_eps": 0.5}),
        (
            "gemma2",
            "gemma2",
            {"attention.key_length": 8, "final_logit_softcapping": 9.0},
            {"query_pre_attn_scalar": 8, "final_logit_softcapping": 9.0},
        ),
        ("gemma2", "gemma2", {"block_count": 46}, {"query_pre_attn_scalar": 16}),
        ("falcon", "falcon", {"rope.freq_base": 5.0}, {"head_dim": 16}),
        ("qwen2", "qwen2", {"attention.key_length": 16, "attention.value_length": 16}, {}),
        ("qwen2", "qwen2", {"rope.dimension_sections": (0, 0, 0, 0)}, {}),
        (
            "qwen3moe",
            "qwen3_moe",
            {"expert_feed_forward_length": 24, "expert_weights_norm": True},
            {"moe_intermediate_size": 24, "norm_topk_prob": True},
        ),
        (
            "gemma3",
            "gemma3_text",
            {"attention.sliding_window_pattern": 2},
            {"layer_types": ["sliding_attention", "full_attention"] * 3},
        ),
    ],
)
def test_settings_of_other_architectures(
    arch: str, kind: str, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    layers = stated.get("block_count", 6)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
    config = AutoConfig.for_model(kind, pad_token_id=None, **sizes)
    metadata = {f"{arch}.{key}": value for key, value in stated.items()}
    header = GgufHeader({"general.architecture": arch, **metadata}, (), 0)
    complete_settings(Path("a.gguf"), header, config)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rotated", "factor"), [(8, 0.5), (None, 1.0)], ids=["some dimensions", "all"]
)
def test_partial_rotation_is_the_files(rotated: int | None, factor: float) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", **sizes)  # rotates a quarter unless told otherwise
    metadata = {"general.architecture": "stablelm", "stablelm.rope.dimension_count": rotated}
    known = {key: value for key, value in metadata.items() if value}
    complete_settings(Path("a.gguf"), GgufHeader(known, (), 0), config)
    assert config.rope_parameters["partial_rotary_factor"] == factor


# ------------------------------------------------------------------------------------ text


def vocabulary() -> dict[str, Any]:
    """Tokens that run over any boundary, so that only the splitting rule keeps words apart."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    texts = [text[i : i + 9] for text in gguf_check.TEXTS for i in range(len(text))]
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


VOCABULARY = vocabulary()


@pytest.mark.parametrize(
    ("rule", "text", "words"),
    [
        ("smollm", "on 1234.", ["on", " ", "1", "2", "3", "4", "."]),
        ("deepseek-llm", "on 1234.", ["on", " ", "1234", "."]),
        ("deepseek-coder", "x2y3.", ["x", "2", "y", "3", "."]),
        ("deepseek-v3", "on 12345", ["on", " ", "123", "45"]),
        ("falcon", "(a) 12345", ["(", "a", ")", " ", "123", "45"]),
        ("stablelm2", "I'LL 12", ["I", "'LL", " ", "1", "2"]),
        ("poro-chat", "a, b", ["a", ",", " b"]),
        ("viking", "a, 12", ["a", ",", " ", "1", "2"]),
        ("glm4", "on 12345", ["on", " ", "123", "45"]),
        (None, "(a) 12345", ["(", "a", ")", " ", "123", "45"]),
    ],
)
def test_text_is_split_by_the_files_rule(
    rule: str | None, text: str, words: list[str], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **{**VOCABULARY, "tokenizer.ggml.pre": rule})
    told: list[Any] = []
    tokenizer: Any = load(str(tmp_path / "tiny.gguf"), device="cpu", report=told.append).tokenizer
    assert len(told) == 1  # llama.cpp, where it is installed, splits all texts so too
    backend = tokenizer.backend_tokenizer
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [piece.replace("\u0120", " ") for piece in found] == words


def test_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", **{"tokenizer.ggml.pre": "of-tomorrow"})
    with refused("tiny.gguf", "'of-tomorrow' (tokenizer.ggml.pre)", error=ModelError):
        load(str(tmp_path / "tiny.gguf"), device="cpu")


@pytest.mark.parametrize("spaced", [None, True, False])
def test_sentencepiece_puts_a_space_first_unless_the_file_says_otherwise(
    spaced: bool | None, tmp_path: Path
) -> None:
    words = ["\u2581", "h", "e", "he", "\u2581he"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    write_gguf(
        tmp_path / "tiny.gguf",
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": spaced,
        },
    )
    told: list[Any] = []
    tokenizer: Any = load(str(tmp_path / "tiny.gguf"), device="cpu", report=told.append).tokenizer
    assert len(told) == 1  # llama.cpp, where it is installed, reads all texts so too
    assert tokenizer.tokenize("he") == ["he" if spaced is False else "\u2581he"]
    ids = tokenizer("he he", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "he he"


@pytest.mark.parametrize(("stated", "first"), [(None, True), (True, True), (False, False)])
def test_llama3_files_begin_with_a_bos_unless_they_say_otherwise(
    stated: bool | None, first: bool, tmp_path: Path
) -> None:
    changes = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0}
    write_gguf(tmp_path / "tiny.gguf", **{**changes, "tokenizer.ggml.add_bos_token": stated})
    tokenizer: Any = load(str(tmp_path / "tiny.gguf"), device="cpu").tokenizer
    assert (tokenizer("he")["input_ids"][0] == 0) is first
    assert tokenizer.backend_tokenizer.model.ignore_merges


# ------------------------------------------------------------------------------- llama.cpp


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp (xllamacpp)"
)
def test_what_llamacpp_computes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **{f"{SCALING}factor": 4.0})
    monkeypatch.setattr("embedgrad.model.loading.gguf_settings._set_rope", lambda *_: [])
    with refused("tiny.gguf", "nats off those of llama.cpp", error=ModelError):
        load(str(tmp_path / "tiny.gguf"), device="cpu")


def test_a_note_of_the_comparison_is_kept_with_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    compare = "embedgrad.model.loading.gguf_conversion.compare_with_llamacpp"
    monkeypatch.setattr(compare, lambda *_: ["tokens differ"])
    for said in (["converting tiny.gguf to safetensors (once, about 1 s)"], []):
        told: list[dict[str, Any]] = []
        load(str(tmp_path / "tiny.gguf"), device="cpu", report=told.append)
        assert [event["text"] for event in told] == [*said, "tokens differ"]


@pytest.mark.parametrize(
    "answer", [{}, {"completion_probabilities": []}, {"completion_probabilities": [{}]}, None, "no"]
)
def test_an_answer_of_another_llamacpp_is_a_note(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def __init__(self, *arguments: object, **options: object):
            pass

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def ask(self, path: str, body: object) -> Any:
            return {"tokens": [1]} if path == "/tokenize" else answer

    made = tiny.loaded()
    monkeypatch.setattr(gguf_check, "LlamaCppServer", Server)
    monkeypatch.setattr(gguf_check.importlib.util, "find_spec", lambda name: object())
    (note,) = gguf_check.compare_with_llamacpp(Path("a.gguf"), made.model, made.tokenizer)
    assert note.startswith("a.gguf was not compared with llama.cpp, ")
