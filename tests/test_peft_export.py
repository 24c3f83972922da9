"""Adapters for PEFT: what PEFT computes with them, and what cannot be one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from embedgrad import ExportError, Target, Template
from embedgrad.data.examples import Example
from embedgrad.deploy.destinations.peft import PeftAdapter
from embedgrad.deploy.job import Job
from embedgrad.deploy.verify import parity as checks
from embedgrad.deploy.verify.reference import next_logprobs
from embedgrad.model.loading.quiet import silence_libraries
from export_kit import CHOICES, exported, job_of, opened, save_base
from kit import PLACEMENTS

torch.set_num_threads(1)
FIRST = PLACEMENTS["user-before"]


def made(
    folder: Path,
    architecture: str = "llama",
    template: Template = FIRST,
    target: Target = Target(CHOICES),
    **how: Any,
) -> Job:
    """A job of one prompt on a tiny model."""
    model = opened(save_base(folder / "base", architecture, **how))
    made = exported(model, template=template, target=target, examples=tiny.reviews(4))
    return job_of(model, made)


def written(job: Job, folder: Path) -> tuple[Path, dict[str, Any]]:
    out = folder / "adapter"
    out.mkdir()
    return out, PeftAdapter().write(job, out)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "granite", "gpt2"])
def test_peft_computes_what_training_computes(architecture: str, tmp_path: Path) -> None:
    """By nothing but PEFT and transformers; a query is the tokens behind the span."""
    job = made(tmp_path, architecture)
    (prompt,) = job.prompts
    out, _ = written(job, tmp_path)
    with silence_libraries():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, out).eval()
    expected = next_logprobs(job.model, prompt.rows_PD, prompt.sequences)
    for sequence, expected_V in zip(prompt.sequences, expected, strict=True):
        logits = model(input_ids=torch.tensor([sequence.suffix])).logits[0, -1]
        found_V = torch.log_softmax(logits, dim=0)[: len(expected_V)]
        assert (found_V - expected_V).abs().max().item() < 1e-4


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize("placement", ["system", "user-before", "plain-start"])
def test_its_own_check_passes(
    kind: str, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(tmp_path, template=PLACEMENTS[placement], tokenizer_kind=kind)
    out, facts = written(job, tmp_path)
    found = checks.check("peft", out, job, facts)
    assert found["problems"] == []
    assert found["step_zero_difference"] <= 1e-5
    assert found["max_logprob_difference"] < 1e-4
    assert found["choice_agreement"] == found["limited_agreement"] == 1


@pytest.mark.parametrize("row", [0, -1])
def test_a_writer_broken_in_one_row_is_caught(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(tmp_path)
    (prompt,) = job.prompts
    broken_PD = prompt.rows_PD.clone()
    broken_PD[row] = prompt.prompt.start_rows[row]
    broken = replace(prompt, prompt=prompt.prompt.with_rows(broken_PD))
    out, facts = written(replace(job, prompts=(broken,)), tmp_path)
    found = checks.check("peft", out, job, facts)
    assert not found["passed"]
    assert "are not those of training" in found["problems"][0]


def test_the_files_hold_prefix_and_rows(tmp_path: Path) -> None:
    """Format of PEFT 0.21: one fp32 tensor; nothing that PEFT would need a tokenizer for."""
    job = made(tmp_path)
    (prompt,) = job.prompts
    out, facts = written(job, tmp_path)
    prefix = prompt.sequences[0].prefix
    tensors = load_file(out / "adapter_model.safetensors")
    assert set(tensors) == {"prompt_embeddings"}
    rows = tensors["prompt_embeddings"]
    assert torch.equal(rows[: len(prefix)], job.model.embed(prefix))
    assert torch.equal(rows[len(prefix) :], prompt.rows_PD)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == len(rows) == facts["virtual_tokens"]
    assert config["peft_type"], config["prompt_tuning_init"] == ("PROMPT_TUNING", "RANDOM")
    assert facts["folded"] == len(prefix) > 0
    assert "a query is the text after the span" in facts["notes"][1]


def test_its_program_answers_as_peft_does(tmp_path: Path) -> None:
    """`example.py` as written, without embedgrad: the suffix's tokens, and only new text."""
    from embedgrad.deploy.destinations.client_code import program_source, run_generated

    job = made(tmp_path, target=Target())
    (prompt,) = job.prompts
    out, facts = written(job, tmp_path)
    source = program_source("peft", "example.py", prompt, job.base, dtype=facts["dtype"])
    program = run_generated(out / "example.py", source, job)
    with silence_libraries():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, out).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        sequence = prompt.sequences[0]
        answer = program.answer(model, dict(sequence.example.columns), max_new_tokens=8)
        rows = torch.cat([job.model.embed(sequence.prefix), prompt.rows_PD])
        embeds = torch.cat([rows, job.model.embed(sequence.suffix)])[None]
        ids = base.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)[0]
    assert answer == tokenizer.decode(ids, skip_special_tokens=True)
    assert program.token_ids(dict(sequence.example.columns))[0] == list(sequence.prefix)


@pytest.mark.parametrize("placement", ["user-after", "opening", "plain"])
def test_text_that_differs_before_the_span_cannot_be_folded_in(
    placement: str, tmp_path: Path
) -> None:
    job = made(tmp_path, template=PLACEMENTS[placement])
    with pytest.raises(ExportError) as told:
        written(job, tmp_path)
    assert str(told.value).startswith("--to peft: PEFT puts a prompt before everything else, and")
    assert "different texts come before it" in str(told.value)
    assert "put the span before the columns, or use another destination" in str(told.value)
    assert list((tmp_path / "adapter").iterdir()) == []


def test_rows_that_begin_alike_by_chance_are_no_reason(tmp_path: Path) -> None:
    model = opened(save_base(tmp_path / "base"))
    row = Example({"review": "The same words."}, "positive", "reviews.csv:2")
    prompt = exported(model, template=PLACEMENTS["user-after"], examples=[row, row])
    with pytest.raises(ExportError, match="3 different texts come before it"):
        written(job_of(model, prompt), tmp_path)


def test_several_prompts_are_refused(tmp_path: Path) -> None:
    model = opened(save_base(tmp_path / "base"))
    prompts = [exported(model, name=name, template=FIRST) for name in ("a", "b")]
    with pytest.raises(ExportError, match="an export holds one prompt, and 2 were given"):
        written(job_of(model, *prompts), tmp_path)
