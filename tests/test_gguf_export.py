"""GGUF exports: what is in the file, and what llama.cpp computes from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import refusals
import tiny
from embedgrad import Target, Template
from embedgrad.data.examples import Example
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.destinations.gguf import FILE, GRAMMAR, Gguf
from embedgrad.deploy.formats.gguf_file import (
    entry,
    read_contents,
    replace_rows,
    table_rows,
    write_gguf,
)
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.requests import example_requests
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.llamacpp import TOLERANCE, LlamaCppEngine
from embedgrad.deploy.verify.parity import check
from embedgrad.deploy.verify.reference import compute_reference
from embedgrad.errors import EngineError, ExportError
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.llamacpp.server import LlamaCppServer
from embedgrad.model.loading.quiet import silence_libraries
from embedgrad.recipe.settings import ExportSettings
from export_kit import exported, job_of, opened, quiet, save_base
from tiny_gguf import TOKENS as TINY_TOKENS
from tiny_gguf import write_gguf as write_tiny

refused = functools.partial(refusals.refused, error=ExportError)
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SIZE = len(TINY_TOKENS) + 1
TOKENS = {  # with the one that transformers adds where a file has it not
    "tokenizer.ggml.tokens": [*TINY_TOKENS, "<|endoftext|>"],
    "tokenizer.ggml.token_type": [3, *[1] * 258, 3],
    "tokenizer.ggml.scores": [0.0] * SIZE,
    "llama.vocab_size": SIZE,
}
QUIET = "\u0100"  # the byte zero, which no text has


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a GGUF file in f32, with a token that is never likely."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_tiny(
        path,
        **{
            **TOKENS,
            "tokenizer.chat_template": CHAT,
            "tokenizer.chat_template.tool_use": "{{ 'tools' }}",
        },
    )
    contents = read_contents(path, writable=True)
    weights = {weight.name: weight for weight in contents.weights}
    table = _floats(weights["token_embd.weight"])
    row = contents.metadata["tokenizer.ggml.tokens"].value.index(QUIET)
    table[:, 0], table[row], table[row, 0] = 1, 0, -100
    for name, weight in weights.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            _floats(weight)[0] = 0
    return path


@pytest.fixture(scope="module")
def model(base: Path) -> LanguageModel:
    return opened(base)


@pytest.fixture(scope="module")
def quantized(base: Path) -> LanguageModel:
    """The same with matrices in blocks of eight bits."""
    path = base.with_name("quantized.gguf")
    held = read_contents(base)
    weights = [w if len(w.shape) == 1 else w.convert(Kind.Q8_0) for w in held.weights]
    write_gguf(path, held._replace(weights=weights))
    return opened(path)


def _floats(weight: Any) -> np.ndarray:
    found: np.ndarray = weight.read(0, weight.rows).view(np.float32)
    return found


def _asked(prompt: ExportedPrompt, rows: int = 4) -> list[Query]:
    template = prompt.prompt.template
    return [Query(s, plain_messages(template, s.example.columns)) for s in prompt.sequences[:rows]]


@torch.no_grad()
def _trained(model: LanguageModel, rows_PD: Tensor, asked: Sequence[Query]) -> Tensor:
    """Log-probabilities of the token after the prompt, as training computes them, [B, V]."""
    found = []
    for sequence in (row.sequence for row in asked):
        ids = torch.tensor([(*sequence.prefix, *[0] * len(rows_PD), *sequence.suffix)])
        at = torch.arange(len(rows_PD)) + len(sequence.prefix)
        logits = model.model(inputs_embeds=model.forward.splice(ids, at, rows_PD)).logits[0, -1]
        # Of the tokenizer's tokens: new ones take the places of rows behind them.
        found.append(logits[: len(model.tokenizer)].log_softmax(-1))
    return torch.stack(found)


def _written(job: Job, folder: Path) -> dict[str, Any]:
    written = Gguf().write(job, folder)
    assert json.loads(json.dumps(written)) == written
    return written


def _check(job: Job, folder: Path, prompt: ExportedPrompt | None = None, rows: int = 3) -> None:
    """llama.cpp on f32 weights: step zero, then what training computed."""
    written = _written(job, folder)
    prompt = prompt or job.prompts[0]
    asked = _asked(prompt, rows)
    with LlamaCppEngine(folder, job, prompt, written) as engine:
        gelu = job.model.model.config.model_type == "gemma3_text"
        assert engine.tolerance == (None if gelu else TOLERANCE)
        assert engine.token_differences(asked) == []
        mass = engine.added_mass(asked)
        assert 0 <= mass < 1e-4
        start, plain = engine.start_logprobs_BV(asked), engine.plain_logprobs_BV(asked)
        assert (start - plain).abs().max() < 1e-5 + mass
        refined = engine.logprobs_BV(asked)
        expected = _trained(job.model, prompt.rows_PD, asked)
        # Below that llama.cpp's probabilities, in f32, are zero.
        difference = (refined.clamp(min=-80) - expected.clamp(min=-80)).abs()
        assert difference.max() < (10 if gelu else 1) * TOLERANCE
        assert difference.mean() < TOLERANCE
        # The rows do something, else all of this proves nothing.
        assert (refined - plain).abs().max() > 10 * TOLERANCE
    assert not list(folder.glob(".start-rows-*"))


# ------------------------------------------------------------------------------------ the file


def test_reading_and_writing_a_file_changes_no_byte(base: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "again.gguf", read_contents(base))
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("alignment", [64, 8])
def test_a_file_is_read_as_the_gguf_package_reads_it(
    base: Path, tmp_path: Path, alignment: int
) -> None:
    path = tmp_path / "model.gguf"
    held = read_contents(base)
    more = {"general.alignment": entry(alignment), "tags": entry([0.5, 2.5])}
    write_gguf(path, held._replace(metadata={**held.metadata, **more}))
    ours, theirs = read_contents(path), GGUFReader(path)
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: e.value for k, e in ours.metadata.items()} == {
        k: f.contents() for k, f in fields.items()
    }
    assert [w.name for w in ours.weights] == [t.name for t in theirs.tensors]
    for weight, tensor in zip(ours.weights, theirs.tensors, strict=True):
        assert weight.shape == tuple(reversed(tensor.shape.tolist()))
        assert (_floats(weight).ravel() == tensor.data.ravel()).all()


def test_other_tensors_stay_as_they_are_and_refined_rows_are_exact(
    quantized: LanguageModel, tmp_path: Path
) -> None:
    prompt = exported(quantized)
    rows, old = len(prompt.rows_PD), len(quantized.tokenizer)
    written = _written(job_of(quantized, prompt), tmp_path)
    before = {w.name: w for w in read_contents(Path(quantized.info.name)).weights}
    after = {w.name: w for w in read_contents(tmp_path / FILE).weights}
    assert set(after) - set(before) == {"output.weight"}
    table, output = after.pop("token_embd.weight"), after.pop("output.weight")
    old_table = before.pop("token_embd.weight")
    for name, weight in after.items():
        assert weight.kind == before[name].kind
        assert (weight.read(0, weight.rows) == before[name].read(0, weight.rows)).all()
    # The output layer: old bytes, then copies of the guard row's.
    held, bytes_before = output.read(0, output.rows), old_table.read(0, old)
    assert output.kind == Kind.Q8_0
    assert (held[:old] == bytes_before).all()
    assert (held[old:] == bytes_before[written["guard"]["row"]]).all()
    # The table: what the blocks meant, then the rows themselves.
    assert table.kind == Kind.F32
    assert (_floats(table)[:old] == dequantize(bytes_before, Kind.Q8_0)).all()
    assert (_floats(table)[old:] == prompt.rows_PD.numpy()).all()
    assert written["tokens"] == {"sentiment": list(range(old, old + rows))}
    assert written["guard"]["token"] == QUIET
    kept = {"Q8_0": 22, "F32": 8}
    assert (written["types"], written["untied"]) == (kept, True)


def test_new_tokens_are_control_tokens(model: LanguageModel, tmp_path: Path) -> None:
    prompt = exported(model)
    _written(job_of(model, prompt), tmp_path)
    before = read_contents(Path(model.info.name)).metadata
    after = read_contents(tmp_path / FILE).metadata
    new = len(prompt.rows_PD)
    tokens, kinds, scores = (
        after[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type", "scores")
    )
    assert tokens[:SIZE] == before["tokenizer.ggml.tokens"].value
    assert tokens[SIZE:] == [f"<|k3v9x0q7t2ma_sentiment_{i}|>" for i in range(new)]
    assert kinds[SIZE:] == [3] * new
    assert len(scores) == len(tokens) == after["llama.vocab_size"].value == SIZE + new
    # A second template, which llama.cpp takes where there are tools, knows nothing of the prompt.
    assert "tokenizer.chat_template.tool_use" not in after
    changed = {"tokenizer.chat_template", "tokenizer.chat_template.tool_use", "llama.vocab_size"}
    changed |= {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores")}
    changed.add("tokenizer.ggml.add_bos_token")  # training had none before the chat
    assert after["tokenizer.ggml.add_bos_token"].value is False
    assert {k: v for k, v in before.items() if k not in changed} == {
        k: v for k, v in after.items() if k not in changed
    }


@pytest.mark.parametrize("width", [32, 1152])
def test_scaled_rows_are_exact_in_llamacpps_arithmetic(width: int) -> None:
    info = dataclasses.replace(tiny.loaded().info, architecture="Gemma3ForCausalLM", width=width)
    table = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    scaled = table * torch.tensor(float(width)).sqrt()
    assert (table_rows(scaled, info) * torch.tensor(float(width)).sqrt() == scaled).all()


@pytest.mark.parametrize(
    ("settings", "table", "others"),
    [
        ({"gguf": "f32"}, Kind.F32, Kind.F32),
        ({"gguf": "f16"}, Kind.F16, Kind.F16),
        ({"gguf": "q8_0"}, Kind.F32, Kind.Q8_0),
        ({"gguf": "keep", "dtype": "bfloat16"}, Kind.BF16, Kind.F32),
        ({"gguf": "q8_0", "dtype": "float16"}, Kind.F16, Kind.Q8_0),
    ],
)
def test_kinds_of_weights(
    model: LanguageModel, tmp_path: Path, settings: dict[str, Any], table: Kind, others: Kind
) -> None:
    job = job_of(model, exported(model, settings=ExportSettings(**settings)))
    needed = Gguf().bytes_needed(job)
    written = _written(job, tmp_path)
    size = (tmp_path / FILE).stat().st_size
    assert size <= needed < size + 50_000
    for weight in read_contents(tmp_path / FILE).weights:
        expected = table if weight.name == "token_embd.weight" else others
        assert weight.kind == (Kind.F32 if len(weight.shape) == 1 else expected)
    assert (written["embedding"], written["output"]) == (table.name, others.name)
    (prompt,) = job.prompts
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        asked = _asked(prompt, 2)
        start, plain = engine.start_logprobs_BV(asked), engine.plain_logprobs_BV(asked)
        assert (start - plain).abs().max() < 1e-5 + engine.added_mass(asked)
        difference = engine.logprobs_BV(asked) - _trained(model, prompt.rows_PD, asked)
        assert difference.abs().mean() < 0.1


def test_rows_that_f16_cannot_hold_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    prompt = exported(model, settings=ExportSettings(gguf="f16"))
    far = prompt.prompt.with_rows(prompt.rows_PD * 1e6)
    with refused("refined rows", "65504", "f32"):
        Gguf().write(job_of(model, dataclasses.replace(prompt, prompt=far)), tmp_path)


def test_a_file_that_changed_is_refused(base: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(base, tmp_path / "copy.gguf"))
    loaded = opened(path)
    replace_rows(path, [0], torch.ones(1, 32))
    with refused("copy.gguf", "not the file that the model was loaded from"):
        Gguf().bytes_needed(job_of(loaded))


def test_a_check_that_fails_for_other_tokens_says_so_first(tmp_path: Path) -> None:
    """Blanks behind a special token are dropped in training, and GGUF cannot say that."""
    base = save_base(tmp_path / "base")
    parsed = json.loads((base / "tokenizer.json").read_text("utf-8"))
    for token in parsed["added_tokens"]:
        token["rstrip"] = True
    (base / "tokenizer.json").write_text(json.dumps(parsed), "utf-8")
    model = opened(base)
    job = job_of(model, exported(model, examples=tiny.reviews(3)))
    (tmp_path / "out").mkdir()
    found = check("gguf", tmp_path / "out", job, _written(job, tmp_path / "out"))
    problem, *_ = found["problems"]
    assert problem.startswith("llama.cpp makes other tokens of reviews.csv:")
    assert "; export to vocabulary; so " in problem
    assert "different log-probabilities" in problem


def test_a_token_that_only_the_tokenizer_has_gets_a_place(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_tiny(path, **{"tokenizer.chat_template": CHAT})
    model = opened(path)
    assert (len(model.tokenizer), model.info.vocabulary) == (260, 259)
    written = _written(job_of(model), tmp_path)
    assert written["tokens"]["sentiment"][0] == 260
    tokens = read_contents(tmp_path / FILE).metadata["tokenizer.ggml.tokens"].value
    assert tokens[259:261] == ["[PAD259]", "<|k3v9x0q7t2ma_sentiment_0|>"]


# --------------------------------------------------------------------------- what llama.cpp says


def test_llamacpp_computes_what_training_computed(model: LanguageModel, tmp_path: Path) -> None:
    _check(job_of(model), tmp_path)


def test_one_broken_row_is_seen(model: LanguageModel, tmp_path: Path) -> None:
    job = job_of(model)
    written = _written(job, tmp_path)
    prompt, asked = job.prompts[0], _asked(job.prompts[0])
    (last,) = (ids[-1] for ids in written["tokens"].values())
    replace_rows(tmp_path / FILE, [last], prompt.prompt.start_rows[-1:])
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        difference = engine.logprobs_BV(asked) - _trained(model, prompt.rows_PD, asked)
    assert difference.abs().max() > 2 * TOLERANCE


def test_answers_and_greedy_text_are_those_of_training(
    model: LanguageModel, tmp_path: Path
) -> None:
    job = job_of(model)
    prompt = job.prompts[0]
    asked = _asked(prompt)
    written = _written(job, tmp_path)
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        answers, texts = engine.answer_logprobs(asked), engine.greedy(asked, 8)
    outcome = model.outcome(prompt.rows_PD, [row.sequence for row in asked])
    assert torch.tensor(answers) == pytest.approx(outcome.logprobs_BC, abs=TOLERANCE)
    for row, ids in zip(asked, texts, strict=True):
        assert list(ids) == _greedy(model, prompt.rows_PD, row, 8)


@torch.no_grad()
def _greedy(model: LanguageModel, rows_PD: Tensor, row: Query, most: int) -> list[int]:
    """Greedy ids by full passes, up to an end token."""
    found: list[int] = []
    for _ in range(most):
        sequence = dataclasses.replace(row.sequence, suffix=(*row.sequence.suffix, *found))
        logprobs = _trained(model, rows_PD, [Query(sequence, row.messages)])
        token = int(logprobs.argmax())
        if token in model.end_ids:
            break
        found.append(token)
    return found


@pytest.mark.parametrize(
    "target",
    [
        Target(("negative", "positive")),
        Target((" n", "p ", "\n")),
        Target(("not good", "not bad", "fine")),
        Target(("not", "not good", "nothing")),  # scored with the end of the turn
        Target(("a very long way round", "b"), normalize=True),
        # Every token is a part of a character, or few are.
        Target(("日本", '日曜 "a"', "très bon", "😀"), answer_prefix="A: ", normalize=True),
        Target(("é", "è")),
    ],
    ids=[
        "one token each",
        "blanks",
        "one beginning",
        "one inside another",
        "per token",
        "parts of characters, per token",
        "parts of characters",
    ],
)
def test_replies_are_choices_and_ranking_is_exact(
    model: LanguageModel, tmp_path: Path, target: Target
) -> None:
    prompt = exported(model, target=target)
    job = job_of(model, prompt)
    written = _written(job, tmp_path)
    choices = Choices.of(prompt)
    assert choices is not None
    assert (tmp_path / GRAMMAR).read_text() == choices.grammar
    asked = _asked(prompt, 8)
    best = compute_reference(model, prompt, [a.sequence for a in asked], 1).choices
    assert best is not None
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        replies = [engine.choose(query) for query in asked]
        assert None not in replies
        if choices.single:
            assert replies == best
        # By the program of the card, which is not told how training cut a choice.
        url = f"{engine._running.address}/v1"
        ranked = [rank(url, choices, query) for query in asked]
        outcome = model.outcome(
            prompt.rows_PD, [a.sequence for a in asked], normalize=target.normalize
        )
    assert [target.choices.index(names[0]) for names, _ in ranked] == best
    scores = [[found[name] for name in target.choices] for _, found in ranked]
    assert torch.tensor(scores) == pytest.approx(outcome.scores_BC, abs=TOLERANCE)


def rank(url: str, choices: Choices, query: Query) -> tuple[list[str], dict[str, float]]:
    """What the printed Python finds."""
    _, _, program = example_requests("llamacpp", url, "model", choices)
    names: dict[str, Any] = {}
    exec(program.replace('\nprint(rank("YOUR TEXT"))', ""), names)
    with names.get("client", nullcontext()):
        found: tuple[list[str], dict[str, float]] = names["rank"](query.messages[0]["content"])
    return found


def test_prompts_of_other_choices_share_a_file_without_a_grammar(
    model: LanguageModel, tmp_path: Path
) -> None:
    """The server would limit the answers of all of them to those of one."""
    one = exported(model, name="one")
    for other, file in ((Target(("yes", "no")), False), (one.prompt.target, True)):
        folder = tmp_path / str(file)
        folder.mkdir()
        job = job_of(model, one, exported(model, name="two", target=other))
        written = _written(job, folder)
        assert (folder / GRAMMAR).is_file() is written["grammar"] is file
        assert ("--grammar-file" in Gguf().commands(folder, written)[0]) is file


def test_sampling_settings_of_the_base_model_are_left_out(base: Path, tmp_path: Path) -> None:
    held = read_contents(base)
    path = tmp_path / "sampling.gguf"
    more = {"general.sampling.temp": entry(0.7), "general.sampling.penalty_repeat": entry(1.5)}
    write_gguf(path, held._replace(metadata={**held.metadata, **more}))
    (tmp_path / "out").mkdir()
    written = _written(job_of(opened(path)), tmp_path / "out")
    assert written["notes"][0] == (
        "the base model's generation settings are left out, as training had none: temp, "
        "penalty_repeat"
    )
    assert not set(more) & set(read_contents(tmp_path / "out" / FILE).metadata)


def test_a_quantized_file_is_compared_with_itself(quantized: LanguageModel, tmp_path: Path) -> None:
    job = job_of(quantized)
    prompt = job.prompts[0]
    asked = _asked(prompt)
    with LlamaCppEngine(tmp_path, job, prompt, _written(job, tmp_path)) as engine:
        assert engine.tolerance is None
        start, plain = engine.start_logprobs_BV(asked), engine.plain_logprobs_BV(asked)
        assert (start - plain).abs().max() < 1e-5 + engine.added_mass(asked)


def test_two_prompts_share_one_file(model: LanguageModel, tmp_path: Path) -> None:
    first, second = exported(model, name="first"), exported(model, name="second", seed=1)
    job = job_of(model, first, second)
    written = _written(job, tmp_path)
    chosen = [
        Query(row.sequence, [{"role": "system", "content": "<<prompt:second>>"}, *row.messages])
        for row in _asked(second)
    ]
    with LlamaCppEngine(tmp_path, job, second, written) as engine:
        assert engine.token_differences(chosen) == []
        expected = _trained(model, second.rows_PD, chosen)
        assert (engine.logprobs_BV(chosen) - expected).abs().max() < TOLERANCE
        assert len(engine.token_differences(_asked(second))) == 4  # by default it is the first
        ids = engine.prompt_ids(_asked(first)[0])
    assert set(written["tokens"]["first"]) < set(ids)


def test_user_text_never_becomes_refined_rows(model: LanguageModel, tmp_path: Path) -> None:
    job = job_of(model)
    prompt = job.prompts[0]
    written = _written(job, tmp_path)
    (new,) = written["tokens"].values()
    (row,) = _asked(prompt, 1)
    names = [f"<|k3v9x0q7t2ma_sentiment_{i}|>" for i in range(len(new))]
    split = "<|k3v9x0k3v9x0q7t2maq7t2ma_sentiment_0|>"
    text = "".join(names) + split
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        for content in (text, [{"type": "text", "text": text}]):
            hostile: Any = [{"role": "user", "content": content}]
            ids = engine.prompt_ids(Query(row.sequence, hostile))
            assert [i for i in ids if i in new] == list(new)
        # Without a template nothing guards them, as the card says.
        raw = {"content": text, "parse_special": True}
        assert set(new) < set(engine._running.ask("/tokenize", raw)["tokens"])


# ----------------------------------------------------------------------- from a checkpoint


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace-always"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_llama_checkpoint(tmp_path: Path, kind: str, tie: bool) -> None:
    folder = save_base(tmp_path / "base", "llama", tokenizer_kind=kind, tie=tie, padding=5)
    model = opened(folder)
    (tmp_path / "out").mkdir()
    _check(job_of(model), tmp_path / "out")
    tokens = read_contents(tmp_path / "out" / FILE).metadata["tokenizer.ggml.tokens"].value
    # Padding rows are taken first.
    assert tokens[len(model.tokenizer)].startswith("<|k3v9x0q7t2ma_")
    assert len(tokens) == len(model.tokenizer) + len(job_of(model).prompts[0].rows_PD)


ODD_TEXTS = (
    "  two spaces, 3.14 and 1000000  ",
    "a\tb\r\n\n\n c?\n",
    "na\u00efve \u6f22\u5b57 \U0001f600 e\u0301 \u00a0x",
    "it's I'LL <s><unk>x \u2581 <0x41>",
)


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace", "metaspace-always"])
def test_llamacpp_cuts_text_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    model = opened(save_base(tmp_path / "base", "llama", tokenizer_kind=kind))
    examples = [Example({"review": t}, "positive", f"row {i}") for i, t in enumerate(ODD_TEXTS)]
    job = job_of(model, exported(model, examples=examples))
    written = _written(job, tmp_path)
    with LlamaCppEngine(tmp_path, job, job.prompts[0], written) as engine:
        assert engine.token_differences(_asked(job.prompts[0])) == []


ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
SLIDING = ["sliding_attention"] * 5 + ["full_attention"]
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "num_hidden_layers": 7,
    "layer_types": [*SLIDING, "sliding_attention"],
}


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"rope_parameters": ROPE, "head_dim": 16}),
        ("llama", {"rope_parameters": LINEAR, "attention_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", GEMMA),
    ],
)
def test_families(tmp_path: Path, model_type: str, extra: dict[str, Any]) -> None:
    model = opened(_save(tmp_path / "base", model_type, extra))
    (tmp_path / "out").mkdir()
    _check(job_of(model), tmp_path / "out")


def _save(folder: Path, model_type: str, extra: dict[str, Any]) -> Path:
    words = tiny.with_template(tiny.tokenizer("bytelevel"), tiny.CHATML)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **extra,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        for name, weight in built.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                weight.data += 0.1 * torch.randn_like(weight)
    built.eval().requires_grad_(False)
    quiet(built, words.convert_tokens_to_ids("<start_of_turn>"))
    with silence_libraries():
        built.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "how", "says"),
    [
        ("gpt2", {}, ["gpt2", "llama", "qwen2", "convert_hf_to_gguf.py"]),
        ("mistral", {}, ["sliding window (8 tokens)", "convert_hf_to_gguf.py"]),
        ("qwen2-sliding", {}, ["sliding window (8 tokens)"]),
        ("gemma3", {}, ["every sixth layer"]),
        ("llama", {"tokenizer_kind": "wordpiece"}, ["WordPiece", "byte-level BPE"]),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(
    tmp_path: Path, architecture: str, how: dict[str, Any], says: list[str]
) -> None:
    model = opened(save_base(tmp_path / "base", architecture, **how))
    with refused("gguf: ", *says):
        Gguf().bytes_needed(job_of(model))


def test_rotary_scaling_of_another_type_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = opened(_save(tmp_path / "base", "llama", {"rope_parameters": rope}))
    with refused("gguf: ", "'dynamic'", "convert_hf_to_gguf.py"):
        Gguf().bytes_needed(job_of(model))


def test_an_unknown_rule_for_words_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text("utf-8"))
    parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s|\S"}
    file.write_text(json.dumps(parsed), "utf-8")
    with refused("gguf: ", "splitting text into words", "convert_hf_to_gguf.py"):
        Gguf().bytes_needed(job_of(opened(folder)))


def test_an_output_layer_that_llamacpp_does_not_read_is_refused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = read_contents(Path(model.info.name))._replace(architecture="gemma2")
    monkeypatch.setattr("embedgrad.deploy.destinations.gguf.from_gguf", lambda _: held)
    with refused("embedding table of gemma2 as its output layer", "'vocabulary'"):
        Gguf().bytes_needed(job_of(model))


def test_the_span_may_stand_in_the_system_message(model: LanguageModel, tmp_path: Path) -> None:
    template = Template.chat(system="[[Say if reviews are good.]]", user="{review}")
    _check(job_of(model, exported(model, template=template)), tmp_path)


# ------------------------------------------------------------------------------- the server


def test_a_file_that_llamacpp_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(64))
    with refusals.refused("junk.gguf", "cannot open it", "GGUF version", error=EngineError):
        LlamaCppServer(tmp_path / "junk.gguf", n_ctx=64)


def test_a_server_that_dies_and_one_that_refuses(base: Path) -> None:
    with LlamaCppServer(base, n_ctx=64, threads=1) as server:
        with refusals.refused("refused /completion", "context size", error=EngineError):
            server.ask("/completion", {"prompt": [1] * 1000})
        os.kill(server._process.pid, signal.SIGKILL)
        with refusals.refused("did not answer /health", "signal 9", error=EngineError):
            server.ask("/health", {})


def test_a_missing_package_names_the_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with refusals.refused("embedgrad[llamacpp]", error=EngineError):
        LlamaCppServer(base)
