"""What an exported checkpoint is made of: bytes of its base, new rows, another precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedgrad import ExportError
from embedgrad.deploy.destinations.vocabulary import Vocabulary
from embedgrad.deploy.formats import weight_files
from embedgrad.deploy.formats.weight_files import WeightFiles
from embedgrad.deploy.job import Job
from embedgrad.deploy.verify.reference import next_logprobs
from embedgrad.deploy.verify.vocabulary import CheckpointEngine
from embedgrad.recipe.settings import ExportSettings
from export_kit import (
    asked,
    config,
    exported,
    job_of,
    opened,
    save_base,
    small,
    tensors,
    written,
)

# -- precision ------------------------------------------------------------------------------------


def test_all_weights_are_rounded_to_the_precision_asked_for(tmp_path: Path) -> None:
    job = small(tmp_path, ExportSettings(dtype="bfloat16"))
    facts = written(tmp_path / "out", job)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name in before.keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(after[name], before[name].bfloat16()), name
    assert config(tmp_path / "out")["dtype"] == facts["rows_dtype"] == "bfloat16"
    assert 0 < facts["rounding"] < 2**-8
    questions = asked(job.prompts[0])
    with CheckpointEngine(tmp_path / "out", job, job.prompts[0], facts) as engine:
        assert engine.tolerance is None  # reported only
        assert engine.model.dtype == torch.bfloat16
        start, plain = engine.start_logprobs_BV(questions), engine.plain_logprobs_BV(questions)
    assert (start - plain).abs().max() < 0.1
    assert any("bfloat16" in note for note in facts["notes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_take_the_precision_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    job = small(tmp_path, dtype=dtype)
    facts = written(tmp_path / "out", job)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    table, count = "model.embed_tokens.weight", len(job.model.tokenizer)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert torch.equal(after[table][:count], before[table])
    assert torch.equal(after["lm_head.weight"][:count], before[table])
    assert torch.equal(after[table][count:], job.prompts[0].rows_PD.to(dtype))
    assert facts["rows_dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < facts["rounding"] < torch.finfo(dtype).eps


def test_one_wrong_row_is_far_outside_the_tolerance(tmp_path: Path) -> None:
    job = small(tmp_path)
    (prompt,) = job.prompts
    rows_PD = prompt.rows_PD.clone()
    rows_PD[3] = prompt.prompt.start_rows[3]
    broken = dataclasses.replace(prompt, prompt=prompt.prompt.with_rows(rows_PD))
    facts = written(tmp_path / "out", job_of(job.model, broken))
    with CheckpointEngine(tmp_path / "out", job, prompt, facts) as engine:
        right_BV = next_logprobs(job.model, prompt.rows_PD, prompt.sequences)
        differences_B = (engine.logprobs_BV(asked(prompt)) - right_BV).abs().amax(dim=1)
    assert (differences_B > 100 * 1e-4).all()


def test_a_number_that_a_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = opened(base)
    job = job_of(model, exported(model, settings=ExportSettings(dtype="float16")))
    with pytest.raises(ExportError, match=r"export\.dtype: F16 cannot hold .*; choose bfloat16"):
        written(tmp_path / "out", job)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["copy", "link"])
@pytest.mark.parametrize("tie", [True, False])
def test_of_a_sharded_model_only_files_with_new_rows_are_written(
    tie: bool, weights: Any, tmp_path: Path
) -> None:
    job = small(tmp_path, ExportSettings(weights=weights), tie=tie, shards="40KB")
    facts = written(tmp_path / "out", job)
    base, out = tmp_path / "base", tmp_path / "out"
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == sorted(file.name for file in out.glob("*.safetensors"))
    index = config(out, "model.safetensors.index.json")
    changed = {index["weight_map"][n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    for name in shards:
        same = (base / name).read_bytes() == (out / name).read_bytes()
        assert same is (name not in changed)
        assert (out / name).samefile(base / name) is (name not in changed and weights == "link")
    assert facts["linked"] == (sorted(set(shards) - changed) if weights == "link" else [])
    found = tensors(out)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    with CheckpointEngine(out, job, job.prompts[0], facts) as engine:
        right_BV = next_logprobs(job.model, job.prompts[0].rows_PD, job.prompts[0].sequences)
        assert (engine.logprobs_BV(asked(job.prompts[0])) - right_BV).abs().max() < 1e-4


def as_the_hub_stores_it(base: Path) -> Path:
    """Move weights away and leave relative links, as in a cache folder of the Hub."""
    blobs = base.parent / "blobs"
    blobs.mkdir()
    for file in base.glob("*.safetensors"):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    return blobs


@pytest.mark.parametrize("one_disk", [True, False])
def test_links_lead_to_the_file_itself(
    one_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    job = small(tmp_path, ExportSettings(weights="link"), shards="40KB")
    blobs = as_the_hub_stores_it(tmp_path / "base")
    if not one_disk:
        monkeypatch.setattr(weight_files.os, "link", refuse)
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "out"
    facts = written(out, job)
    assert facts["linked"]
    for name in facts["linked"]:
        if one_disk:
            assert not (out / name).is_symlink()
            assert (out / name).samefile(blobs / name)
        else:
            assert (out / name).readlink() == blobs / name


def test_a_single_file_cannot_be_linked_and_that_is_said(tmp_path: Path) -> None:
    facts = written(tmp_path / "out", small(tmp_path, ExportSettings(weights="link")))
    assert facts["linked"] == []
    assert any("no file could be linked" in note for note in facts["notes"])


@pytest.mark.parametrize(
    "how", [{}, {"dtype": "bfloat16"}, {"weights": "link"}], ids=["copy", "bfloat16", "link"]
)
def test_the_room_that_is_asked_for_is_enough_and_not_far_off(
    how: dict[str, Any], tmp_path: Path
) -> None:
    job = small(tmp_path, ExportSettings(**how), shards="40KB")
    needed = Vocabulary().bytes_needed(job)
    facts = written(tmp_path / "out", job)
    own = [f for f in (tmp_path / "out").iterdir() if f.name not in facts["linked"]]
    taken = sum(f.stat().st_size for f in own)
    others = sum(f.stat().st_size for f in own if f.suffix != ".safetensors")
    assert taken <= needed <= taken + others + 2**20


def test_the_result_does_not_depend_on_the_size_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small(tmp_path, ExportSettings(dtype="bfloat16"))
    written(tmp_path / "out", job)
    monkeypatch.setattr(weight_files, "CHUNK", 64)
    written(tmp_path / "again", job)
    one, other = (tmp_path / f / "model.safetensors" for f in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_odd_tensors_are_copied_as_they_are(tmp_path: Path) -> None:
    """Scalars, empty ones, bytes of odd number, integers: what quantized checkpoints hold."""
    folder = tmp_path / "model"
    folder.mkdir()
    odd = {
        "a.scale": torch.tensor(0.5),
        "b.empty": torch.empty(0, 3),
        "c.bytes": torch.arange(7, dtype=torch.uint8),
        "d.long": torch.arange(3),
        "e.float8": torch.arange(5).to(torch.float8_e4m3fn),
        "table": torch.randn(4, 3, dtype=torch.bfloat16),
    }
    save_file(odd, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    read = WeightFiles.read(folder)
    table = read.tensors["table"]
    row = torch.randn(2, 3)
    changes = {"table": weight_files.NewTensor.join("BF16", table, row)}
    (tmp_path / "out").mkdir()
    read.write(tmp_path / "out", changes, "table", link=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == odd.keys()
    assert torch.equal(found.pop("table"), torch.cat([odd.pop("table"), row.bfloat16()]))
    for name, tensor in odd.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].float(), tensor.float()), name


# -- quantized checkpoints ------------------------------------------------------------------------


def quantized(tmp_path: Path, settings: dict[str, Any], *, lm_head: bool = False) -> Job:
    """A job whose checkpoint says it is quantized; training saw it dequantized."""
    job = small(tmp_path, tie=False)
    base = tmp_path / "base"
    (base / "config.json").write_text(json.dumps({**config(base), "quantization_config": settings}))
    weights = load_file(base / "model.safetensors")
    packed = [n for n in weights if "_proj" in n] + ["lm_head.weight"] * lm_head
    for name in packed:
        weights[name] = torch.randint(0, 255, (len(weights[name]), 5), dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return job


@pytest.mark.parametrize(
    ("settings", "key", "layers"),
    [
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": None}, None, None),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["x"]}, 0, ["x", "lm_head"]),
        ({"quant_method": "awq", "modules_to_not_convert": ["lm_head"]}, 0, ["lm_head"]),
        ({"quant_method": "compressed-tensors", "ignore": []}, 0, ["lm_head"]),
        ({"quant_method": "gptq", "bits": 4}, None, None),
    ],
)
def test_a_quantized_model_keeps_its_bytes_and_gets_plain_rows(
    settings: dict[str, Any], key: int | None, layers: list[str] | None, tmp_path: Path
) -> None:
    job = quantized(tmp_path, settings)
    facts = written(tmp_path / "out", job)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name in before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(
        after["model.embed_tokens.weight"][-len(job.prompts[0].rows_PD) :], job.prompts[0].rows_PD
    )
    now = config(tmp_path / "out")["quantization_config"]
    if key is None:
        assert now == settings
    else:
        (name,) = set(settings) - {"quant_method"}
        assert now == {**settings, name: layers}
    assert any(settings["quant_method"] in note for note in facts["notes"])
    assert facts["quantized"] == settings["quant_method"]


def test_of_a_quantized_model_differences_are_reported_only(tmp_path: Path) -> None:
    job = small(tmp_path)
    facts = written(tmp_path / "out", job)
    assert facts["quantized"] == ""
    with CheckpointEngine(tmp_path / "out", job, job.prompts[0], facts) as engine:
        assert engine.tolerance == 1e-4
    facts["quantized"] = "gptq"
    with CheckpointEngine(tmp_path / "out", job, job.prompts[0], facts) as engine:
        assert engine.tolerance is None


def test_a_quantized_lm_head_is_refused_with_a_way_out(tmp_path: Path) -> None:
    job = quantized(tmp_path, {"quant_method": "bitsandbytes"}, lm_head=True)
    with pytest.raises(ExportError, match=r"no plain tensor holds .*lm_head\.weight .*--to vllm"):
        written(tmp_path / "out", job)


def test_a_quantized_model_is_not_rounded(tmp_path: Path) -> None:
    job = quantized(tmp_path, {"quant_method": "gptq"})
    prompt = dataclasses.replace(job.prompts[0], settings=ExportSettings(dtype="bfloat16"))
    with pytest.raises(ExportError, match=r"export\.dtype: bfloat16, but .*quantized \(gptq\)"):
        Vocabulary().bytes_needed(job_of(job.model, prompt))
