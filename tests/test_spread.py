"""Models spread over devices, memory and disk, with the rows of plain ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, TorchAoConfig

import tiny
from embedgrad import Recipe, run
from embedgrad import load as load_prompt
from embedgrad.errors import ModelError
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.loading.info import weights_digest
from kit_loss import full_loss_and_gradient, loss_and_gradient, mixed
from run_kit import save_model, values

pytest_plugins = ["tiny_runs"]

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
SMALL = {"device_map": "auto", "max_memory": {"cpu": "200KB"}}  # the rest is on disk


def spread(folder: Path, **options: Any) -> LanguageModel:
    return LanguageModel(load(str(folder), dtype="float32", **options))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"device_map": ON_DISK}),
        ("llama", {"device_map": "cpu"}),
        ("gpt2", SMALL),
        ("gemma2", SMALL),
    ],
)
def test_gradients_are_those_of_the_whole_model(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    attention = "eager" if architecture == "gemma2" else "sdpa"
    made = mixed(architecture, dtype=torch.float32, attention=attention)
    model = spread(save_model(tmp_path / "model", architecture, tie=False), **options)
    offloaded = any(weight.is_meta for weight in model.model.parameters())
    assert offloaded == (options["device_map"] != "cpu")
    assert weights_digest(model.model) == weights_digest(made.model.model)
    assert model.why_not_reusable is None
    loss, gradient = loss_and_gradient(model, made.start, made.sequences)
    expected, slope = loss_and_gradient(made.model, made.start, made.sequences)
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    found = replies(model, made.start, made.sequences, Decoding(4), end_ids=())
    assert found == replies(made.model, made.start, made.sequences, Decoding(4), end_ids=())


def test_a_graph_keeps_no_weight_that_is_loaded_for_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import OffloadedWeightsLoader

    read, loaded = OffloadedWeightsLoader.__getitem__, list[StorageWeakRef]()

    def getitem(self: Any, name: str) -> Tensor:
        weight: Tensor = read(self, name)
        loaded.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    made = mixed(dtype=torch.float32, attention="sdpa")
    model = spread(save_model(tmp_path / "model", tie=False), device_map=ON_DISK)
    model.prepare(made.sequences)
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", getitem)
    rows = made.start.clone().requires_grad_(True)
    outcome = model.outcome(rows, made.sequences)
    forward = len(loaded)
    assert forward > 2 * 9
    assert all(weight.expired() for weight in loaded)
    outcome.answer_logprobs_B.sum().backward()
    assert len(loaded) > forward
    assert all(weight.expired() for weight in loaded)


def test_a_run_has_the_rows_of_a_plain_one(
    finished: tuple[Path, Any], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    notes = list[str]()

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    recipe = values(
        model_folder, data, model={**SMALL, "device": "auto", "max_memory": {"cpu": "140KB"}}
    )
    run(Recipe.from_dict(recipe), tmp_path / "run", report=report)
    expected = load_prompt(finished[0]).rows
    assert (load_prompt(tmp_path / "run").rows - expected).abs().max().item() < 1e-6
    assert any(note.startswith("parts of the model: ") and "disk" in note for note in notes)


@pytest.mark.filterwarnings("ignore")  # of torchao, when it is imported
def test_gradients_reach_the_rows_through_quantized_weights(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    made = mixed(dtype=torch.float32, attention="sdpa")
    plain, folder = save_model(tmp_path / "plain", tie=False), tmp_path / "int8"
    auto: Any = AutoModelForCausalLM
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    small = auto.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    small.save_pretrained(folder)
    made.loaded.tokenizer.save_pretrained(folder)
    model = spread(folder)
    assert "Int8" in type(model.model.model.layers[0].mlp.up_proj.weight).__name__
    assert model.why_not_reusable is None
    loss, gradient = loss_and_gradient(model, made.start, made.sequences)
    again = dataclasses.replace(made, loaded=made.loaded._replace(model=model.model))
    expected, slope = full_loss_and_gradient(again, made.start, made.sequences)
    assert torch.allclose(loss, expected.float(), rtol=1e-5)
    assert torch.allclose(gradient, slope.float(), rtol=1e-3, atol=1e-4)
    whole = loss_and_gradient(made.model, made.start, made.sequences)[1]
    near = torch.nn.functional.cosine_similarity(gradient.flatten(), whole.flatten(), 0)
    assert 0.99 < near < 1 - 1e-6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device 'cpu' and a device_map are given"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory is for device_map = 'auto'"),
        ({"device_map": {"": "disk"}}, "its embedding table is kept in memory or on disk"),
        ({"device_map": "auto", "fsdp": True}, "device_map and fsdp are both given"),
        ({"device_map": "everywhere"}, "cannot be loaded: .*'auto'"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "cannot be loaded: .*GB"),
    ],
)
def test_what_cannot_be_spread_is_one_line(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", tie=False)
    with pytest.raises(ModelError, match=told) as caught:
        load(str(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_layers_on_two_devices_compute_what_one_does() -> None:
    from accelerate import dispatch_model

    made = mixed(dtype=torch.float32, attention="sdpa")
    loaded = tiny.loaded(dtype=torch.float32, attention="sdpa", tie=False)
    places = {**ON_DISK, "model.layers.1": 0, "model.layers.2": 0, "lm_head": 0}
    skipped = loaded.model._skip_keys_device_placement
    network: Any = dispatch_model(
        loaded.model, places, main_device="cpu", skip_keys=skipped, force_hooks=True
    )
    model = LanguageModel(LoadedModel(network, loaded.tokenizer, loaded.info))
    assert model.why_not_reusable is None
    loss, gradient = loss_and_gradient(model, made.start, made.sequences)
    expected, slope = loss_and_gradient(made.model, made.start, made.sequences)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(gradient, slope, rtol=1e-3, atol=1e-5)
    found = replies(model, made.start, made.sequences, Decoding(8), end_ids=())
    assert found == replies(made.model, made.start, made.sequences, Decoding(8), end_ids=())
