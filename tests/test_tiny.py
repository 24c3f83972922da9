"""The tiny models and tokenizers of other tests do what they promise."""

from __future__ import annotations

import copy
import re

import jinja2
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tiny

pytestmark = pytest.mark.harness

WINDOW = 8
BOTH_MASKS = ("gemma2", "gemma3", "qwen2-sliding")
ATTENTION = [
    (architecture, attention)
    for architecture in tiny.ARCHITECTURES
    for attention in ("eager", "sdpa")
    if architecture != "mamba" and (architecture, attention) != ("gemma2", "sdpa")
]
DIALOGUE = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Is it good?"},
]


def some_ids(rows: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def causal(architecture: str, queries: range, keys: int) -> Tensor | dict[str, Tensor]:
    """Additive float64 masks [1, 1, queries, keys] in the form that the architecture takes."""
    query, key = torch.tensor(queries)[:, None], torch.arange(keys)[None, :]
    masks = {
        name: torch.zeros(query.shape[0], keys, dtype=torch.float64)
        .masked_fill(hidden, torch.finfo(torch.float64).min)
        .expand(1, 1, -1, -1)
        for name, hidden in {
            "full_attention": key > query,
            "sliding_attention": (key > query) | (key <= query - WINDOW),
        }.items()
    }
    if architecture in BOTH_MASKS:
        return masks
    return masks["sliding_attention" if architecture == "mistral" else "full_attention"]


# ------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("kind", "text", "decoded"),
    [
        ("bytelevel", " The film:  a\n\n\u00e9?\n ok ", " The film:  a\n\n\u00e9?\n ok "),
        ("metaspace", "The film:  a\n\n\u00e9?\n ok ", "The film:  a\n\n\u00e9?\n ok "),
        ("metaspace", " The film", "The film"),
        ("metaspace-always", "a<|im_end|>b", "a<|im_end|> b"),
        ("wordpiece", "The  film?\n was", "The film ? was"),
    ],
)
def test_decoding_is_as_lossy_as_documented(kind: str, text: str, decoded: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == decoded


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_a_tokenizer_is_small_and_parses_its_special_tokens(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer.encode("x<|im_start|>user", add_special_tokens=False)
    first = tokenizer.encode("the film")[0]
    assert len(tokenizer) <= 600
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, start}) == 3
    assert ids.count(start) == 1
    assert (first == tokenizer.bos_token_id) == kind.startswith("metaspace")


def test_a_mark_and_a_line_break_merge_in_bytelevel() -> None:
    tokenizer = tiny.tokenizer("bytelevel")
    whole = tokenizer.tokenize("Is it positive?\nthe")
    assert whole == ["Is", "\u0120it", "\u0120positive", "?\u010a", "the"]
    apart = tokenizer.tokenize("Is it positive?") + tokenizer.tokenize("\nthe")
    assert apart[3:] == ["?", "\u010a", "the"]


def test_training_a_tokenizer_again_gives_the_same() -> None:
    again = {kind: tiny.tokenizer.__wrapped__(kind).get_vocab() for kind in tiny.TOKENIZERS}
    assert again == {kind: tiny.tokenizer(kind).get_vocab() for kind in tiny.TOKENIZERS}


# ---------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    ("kind", "template", "messages", "text"),
    [
        (
            "bytelevel",
            tiny.CHATML,
            DIALOGUE[1:],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "bytelevel",
            tiny.TRIMMING,
            DIALOGUE[:1],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "metaspace",
            tiny.NO_SYSTEM,
            [*DIALOGUE[1:], {"role": "assistant", "content": "Yes."}],
            "<s><start_of_turn>user\nIs it good?<end_of_turn>\n"
            "<start_of_turn>model\nYes.<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("wordpiece", tiny.PLAIN, DIALOGUE, " Be brief. \nUSER: Is it good?\nASSISTANT:"),
    ],
)
def test_a_template_renders(
    kind: str, template: str, messages: list[dict[str, str]], text: str
) -> None:
    base = tiny.tokenizer(kind)
    tokenizer = tiny.with_template(base, template)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == text
    assert base.chat_template is None


def test_no_system_refuses_a_system_message() -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("metaspace"), tiny.NO_SYSTEM)
    with pytest.raises(jinja2.TemplateError, match="System role not supported"):
        tokenizer.apply_chat_template(DIALOGUE, tokenize=False)


def test_dated_holds_the_day() -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), tiny.DATED)
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    header = r"<\|im_start\|>system\nToday is \d\d \w{3} \d{4}\.\n Be brief. <\|im_end\|>\n"
    assert re.match(header + r"<\|im_start\|>user\nIs it good\?<\|im_end\|>\n$", str(text))


# ----------------------------------------------------------------------------------- models


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_is_frozen_and_speaks_up(architecture: str, tie: bool) -> None:
    model = tiny.model(architecture, 300, tie=tie)
    ids = some_ids()
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float64
    assert 0.5 < logits.std().item() < 2
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    table, prefix = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.weight is prefix.weight) == tie
    assert torch.equal(model(inputs_embeds=table(ids)).logits, logits)
    again = tiny.model(architecture, 300, tie=tie, dtype=torch.float32)
    assert largest(again(input_ids=ids).logits - logits) < 1e-4
    other = tiny.model(architecture, 300, tie=tie, seed=1)
    assert largest(other(input_ids=ids).logits - logits) > 0.1


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_can_be_kept_by_a_mask(architecture: str) -> None:
    model = tiny.model(architecture, 300)
    keep = torch.zeros(2, 24, dtype=torch.bool)
    keep[0, [3, 4, 23]] = keep[1, 7] = True
    kept = model(input_ids=some_ids(), logits_to_keep=keep).logits
    assert kept.shape == (4, 300)
    assert largest(kept - model(input_ids=some_ids()).logits[keep]) < 1e-10


@pytest.mark.parametrize(("architecture", "attention"), ATTENTION)
def test_a_mask_of_our_own_gives_what_the_default_gives(architecture: str, attention: str) -> None:
    model = tiny.model(architecture, 300, attention=attention)
    ids = some_ids()
    own = model(input_ids=ids, attention_mask=causal(architecture, range(24), 24)).logits
    assert largest(own - model(input_ids=ids).logits) < 1e-10


def continued(model: PreTrainedModel, architecture: str, ids: Tensor, prefix: int) -> Tensor:
    past = DynamicCache()
    length = ids.shape[1]
    for part in (range(prefix), range(prefix, length)):
        logits: Tensor = model(
            input_ids=ids[:, part.start : part.stop],
            attention_mask=causal(architecture, part, part.stop),
            position_ids=torch.tensor(part).expand(len(ids), -1),
            past_key_values=past,
            use_cache=True,
        ).logits
    return logits


@pytest.mark.parametrize(("architecture", "attention"), ATTENTION)
def test_stored_keys_and_values_change_nothing(architecture: str, attention: str) -> None:
    model = tiny.model(architecture, 300, attention=attention)
    length_matters = architecture in ("llama-dynamic", "llama-longrope")
    ids = some_ids(tokens=16 if length_matters else 24)
    whole = model(input_ids=ids).logits[:, 12:]
    assert largest(continued(model, architecture, ids, 12) - whole) < 1e-10


@pytest.mark.parametrize("architecture", ["llama-dynamic", "llama-longrope"])
def test_rotary_scaling_by_length_spoils_stored_keys(architecture: str) -> None:
    model = tiny.model(architecture, 300)
    whole = model(input_ids=some_ids()).logits[:, 12:]
    fresh = tiny.model(architecture, 300)
    assert largest(continued(fresh, architecture, some_ids(), 12) - whole) > 0.1


def test_a_deep_copy_calls_its_own_weights() -> None:
    model = tiny.model("llama", 300)
    before = model(input_ids=some_ids()).logits
    changed = copy.deepcopy(model)
    for weight in changed.parameters():
        weight.data.mul_(1.5)
    assert torch.equal(model(input_ids=some_ids()).logits, before)
    assert largest(changed(input_ids=some_ids()).logits - before) > 0.1


# --------------------------------------------------------------------- examples and loading


def test_reviews_are_seeded_and_mixed() -> None:
    rows = tiny.reviews(60)
    assert rows == tiny.reviews(60)
    assert rows != tiny.reviews(60, seed=1)
    assert {row.answer for row in rows} == {"positive", "negative"}
    assert {row.group for row in rows} == {"film", "book", "meal"}
    assert len({len(row.columns["review"]) for row in rows}) > 20
    assert rows[0].source == "reviews.csv:2"


def test_loaded_says_what_it_holds() -> None:
    model, tokenizer, info = tiny.loaded("gemma3", "metaspace", tiny.NO_SYSTEM, tie=False)
    assert tokenizer.chat_template == tiny.NO_SYSTEM
    assert model.get_input_embeddings().weight.shape == (info.vocabulary, info.width)
    assert (info.vocabulary, info.width, info.context) == (len(tokenizer), 32, 512)
    assert (info.architecture, info.dtype, info.tied) == ("Gemma3ForCausalLM", "float64", False)
    assert info.embedding_scale == pytest.approx(32**0.5)
    assert tiny.loaded("gemma3", "metaspace", seed=1).info.embedding_digest != info.embedding_digest


def test_loaded_knows_its_end_token_and_generates() -> None:
    model, tokenizer, _ = tiny.loaded()
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer("The film", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert generated.shape == (1, ids.shape[1] + 2)
    assert generated[0, ids.shape[1]] == model(input_ids=ids).logits[0, -1].argmax()
