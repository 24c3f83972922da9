"""A model is found, checked, loaded frozen and described; what cannot be used is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import tiny
from embedgrad.atomic_files import scratch_folder, seal
from embedgrad.environment import cache_folder
from embedgrad.errors import ModelError
from embedgrad.model.loading import gguf_conversion as gguf_file
from embedgrad.model.loading import load
from embedgrad.model.loading.gguf_settings import VERSION
from tiny_gguf import write_gguf

WEIGHTS = "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and neither the Hub cache nor our own of the person who runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "cache"))


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expect a ModelError of one line that holds all `parts`, within a second of computing."""
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for part in parts:
        assert part in message
    assert time.process_time() - start < 1


def saved(folder: Path, architecture: str = "llama", **kwargs: Any) -> Path:
    words = tiny.tokenizer("bytelevel")
    tiny.model(architecture, len(words), dtype=torch.float32, **kwargs).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# ------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("architecture", "scale"),
    [
        ("llama", 1.0),
        ("qwen2", 1.0),
        ("gpt2", 1.0),
        ("gemma3", math.sqrt(32)),
        ("granite", 1.0),  # scales too, but after `inputs_embeds`
    ],
)
def test_a_folder_loads_frozen_and_described(
    architecture: str, scale: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "tiny", architecture)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    capfd.readouterr()
    model, tokenizer, info = load(str(folder), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer("The film").input_ids == tiny.tokenizer("bytelevel")("The film").input_ids

    table = model.get_input_embeddings()
    assert info.embedding_scale == pytest.approx(scale, rel=1e-6)
    ids = torch.tensor([0, 7, 200])
    assert torch.allclose(table(ids), table.weight[ids] * info.embedding_scale, rtol=1e-6)
    assert (info.vocabulary, info.width) == tuple(table.weight.shape)
    assert (info.kind, info.name, info.path) == ("folder", str(folder), str(folder))
    assert (info.revision, info.gguf_sha256, info.license) == (None, None, "apache-2.0")
    assert (info.context, info.dtype, info.tied) == (512, "float32", True)
    assert info.architecture == type(model).__name__


def test_weights_are_those_of_the_file(folder: Path) -> None:
    words = tiny.tokenizer("bytelevel")
    ids = torch.tensor([words("The film is great.").input_ids])
    expected = tiny.model("llama", len(words), dtype=torch.float32)(input_ids=ids).logits
    logits = load(str(folder), device="cpu", attention="eager").model(input_ids=ids).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_digest_is_of_the_table_and_not_of_the_dtype(architecture: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny", architecture)
    infos = {
        dtype: load(str(folder), device="cpu", dtype=dtype).info
        for dtype in ("float32", "bfloat16", "float64")
    }
    assert {dtype: info.dtype for dtype, info in infos.items()} == {d: d for d in infos}
    assert len({info.embedding_digest for info in infos.values()}) == 1
    exact = 1.0 if architecture == "llama" else math.sqrt(32)
    rounded = torch.tensor(exact).bfloat16().item()
    assert infos["bfloat16"].embedding_scale == rounded

    weights = load_file(folder / WEIGHTS)
    weights["model.embed_tokens.weight"][5] *= 1.01
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    changed = load(str(folder), device="cpu").info
    assert changed.embedding_digest != infos["float32"].embedding_digest


def test_attention_is_as_asked_and_never_as_the_folder_says(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny")
    change_config(folder, attn_implementation="a/kernel", _attn_implementation="a/kernel")
    for asked, got in {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}.items():
        model = load(str(folder), device="cpu", attention=asked).model
        assert model.config._attn_implementation == got

    capped = saved(tmp_path / "capped", "gemma2")
    assert load(str(capped), device="cpu").model.config._attn_implementation == "eager"
    with refused("cannot be loaded", "scaled_dot_product_attention"):
        load(str(capped), device="cpu", attention="sdpa")


def test_an_untied_output_layer_is_seen(tmp_path: Path) -> None:
    assert not load(str(saved(tmp_path / "tiny", tie=False)), device="cpu").info.tied


def test_shards_are_read(folder: Path) -> None:
    whole = load(str(folder), device="cpu")
    whole.model.save_pretrained(folder / "shards", max_shard_size="20KB")
    whole.tokenizer.save_pretrained(folder / "shards")
    index = folder / "shards" / "model.safetensors.index.json"
    shards = sorted((folder / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    again = load(str(folder / "shards"), device="cpu")
    assert again.info.embedding_digest == whole.info.embedding_digest

    shards[1].unlink()
    with refused("1 files of its model.safetensors.index.json are missing", shards[1].name):
        load(str(folder / "shards"), device="cpu")
    index.write_text(index.read_text().replace(shards[0].name, "../../" + WEIGHTS))
    with refused(str(index), "'../../model.safetensors'", "not a safetensors file beside it"):
        load(str(folder / "shards"), device="cpu")


@pytest.mark.parametrize(
    ("removed", "added", "parts"),
    [
        ("config.json", None, ["not a model folder", "no config.json"]),
        ("config.json", "model.gguf", ["name the file itself", "model.gguf"]),
        ("config.json", "adapter_config.json", ["merge it into its base model"]),
        ("tokenizer.json", None, ["no tokenizer"]),
        (WEIGHTS, None, ["no weights (model.safetensors)"]),
        (WEIGHTS, "pytorch_model.bin", ["pickle", "pytorch_model.bin", "safetensors"]),
        (None, "adapter_config.json", ["it holds an adapter"]),
    ],
)
def test_a_folder_that_lacks_something_is_refused(
    folder: Path, removed: str | None, added: str | None, parts: list[str]
) -> None:
    if removed:
        (folder / removed).unlink()
    if added:
        (folder / added).write_bytes(b"")
    with refused(str(folder), *parts):
        load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("keep", "parts"),
    [(0, ["(0 bytes)"]), (100, ["(100 bytes)"]), (-1, ["not a whole safetensors file"])],
)
def test_truncated_weights_are_refused(folder: Path, keep: int, parts: list[str]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    with refused(WEIGHTS, *parts):
        load(str(folder), device="cpu")


def test_a_git_lfs_pointer_is_recognized(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / WEIGHTS).write_bytes(pointer)
    with refused("git lfs pull"):
        load(str(folder), device="cpu")
    (folder / "model.gguf").write_bytes(pointer)
    with refused("not a GGUF file", "git lfs pull"):
        load(str(folder / "model.gguf"), device="cpu")


def test_weights_that_are_not_there_are_never_made_up(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with refused("1 weights that LlamaForCausalLM needs", "model.layers.1.mlp.up_proj.weight"):
        load(str(folder), device="cpu")


def test_weights_of_another_width_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    with refused("cannot be loaded", "mismatch"):
        load(str(folder), device="cpu")


def test_another_weights_file_in_the_configuration_is_not_followed(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    change_config(folder, transformers_weights="adapter_model.bin")
    assert load(str(folder), device="cpu").info.width == 32


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("not json", ["config.json cannot be used"]),
        ('{"model_type": "nonesuch"}', ["config.json cannot be used", "nonesuch"]),
        ('{"model_type": "llama", "hidden_size": "wide"}', ["config.json cannot be used"]),
        ('{"model_type": "t5"}', ["t5 is not a causal language model"]),
        ('{"model_type": "vit"}', ["vit is not a causal language model"]),
        ('{"model_type": "gemma3n_text"}', ["gemma3n_text", "per-layer embeddings"]),
    ],
)
def test_an_unsuited_configuration_is_refused(folder: Path, config: str, parts: list[str]) -> None:
    (folder / "config.json").write_text(config)
    with refused(str(folder), *parts):
        load(str(folder), device="cpu")


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"})
    with refused("config.json cannot be used"):
        load(str(folder), device="cpu")


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    words = tiny.tokenizer("bytelevel")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with refused("not causal"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ({"device": "tpu"}, ["device 'tpu' is not available", "cpu"]),
        ({"device": "cuda:99"}, ["device 'cuda:99' is not available"]),
        ({"device": "cpu", "dtype": "int8"}, ["dtype 'int8'", "auto, float32, bfloat16"]),
        ({"device": "cpu", "attention": "flash"}, ["attention 'flash'", "sdpa, eager"]),
        ({"device": "cpu", "revision": "main"}, ["revision 'main'", "is a folder"]),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    folder: Path, option: dict[str, str], parts: list[str]
) -> None:
    with refused(*parts):
        load(str(folder), **option)  # type: ignore[arg-type]


# --------------------------------------------------------------------- names and the Hub cache


def in_hub_cache(tmp_path: Path, name: str) -> Path:
    """Lay a tiny model into the Hub cache as a download would."""
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return saved(repository / "snapshots" / COMMIT)


def online(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_cached_hub_model_is_loaded_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, lambda *_, **__: pytest.fail("the Hub was asked"))
    snapshot = in_hub_cache(tmp_path, "owner/tiny")
    info = load("owner/tiny", device="cpu").info
    assert (info.kind, info.name, info.path) == ("hub", "owner/tiny", str(snapshot))
    assert info.revision == COMMIT
    assert load("owner/tiny", revision=COMMIT, device="cpu").info == info


def test_a_download_fetches_no_pickle_no_code_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    told: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        bar = options["tqdm_class"]
        wire, disk = (bar(desc=what, total=0, unit="B") for what in ("Downloading", "Writing"))
        with bar(["config.json", WEIGHTS], desc="Fetching 2 files", total=2) as files:
            for size, _ in zip((30, 70), files, strict=True):
                for counted in (wire, disk):
                    counted.total += size
                for part in (size // 2 + 5, size // 2 - 5):
                    wire.update(part)
                    disk.update(part)
        wire.close()
        disk.close()
        return str(in_hub_cache(tmp_path, name))

    online(monkeypatch, download)
    info = load("owner/tiny", revision="v1", device="cpu", report=told.append).info
    assert (info.revision, asked["name"], asked["revision"]) == (COMMIT, "owner/tiny", "v1")
    assert told[0]["text"] == "fetching owner/tiny from the Hub"
    # Two files of 30 and 70 bytes, counted on the way and on disk; a bar of files tells nothing.
    came = [(e["event"], e["which"], e["done"], e["total"]) for e in told[1:]]
    sums = ((20, 30), (30, 30), (70, 100), (100, 100))
    assert came == [("download", "owner/tiny", done, total) for done, total in sums]
    assert capfd.readouterr() == ("", "")
    there = [
        *("config.json", "tokenizer.json", "vocab.json", "merges.txt", WEIGHTS, "README.md"),
        *("model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"),
        *("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "x.gguf", "tf_model.h5"),
        *("onnx/model.onnx", "original/tokenizer.model", "fp16/config.json"),
    ]
    fetched = huggingface_hub.utils.filter_repo_objects(  # type: ignore[attr-defined]
        there,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(fetched) == there[:9]


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response = SimpleNamespace(headers={}, request=None)
    return kind("404 Client Error.\n\nEntry Not Found for url", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (hub_error(errors.RepositoryNotFoundError), "the Hub has no repository of that name"),
        (hub_error(errors.GatedRepoError), "accept its terms at https://huggingface.co/owner/x"),
        (hub_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (hub_error(errors.HfHubHTTPError), "could not be reached: 404 Client Error. Entry Not"),
        (ConnectionError("no\nroute"), "could not be reached: no route (ConnectionError); offline"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    error: Exception, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    online(monkeypatch, download)
    tried = f"not in the local Hub cache {tmp_path / 'hub'}"
    with refused("model 'owner/x' was not found", "no file or folder here", tried, part):
        load("owner/x", revision="v9", device="cpu")


def test_a_repository_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(tmp_path, "owner/x")
    (snapshot / WEIGHTS).unlink()
    with refused("no weights", "the Hub was not asked, because HF_HUB_OFFLINE is set"):
        load("owner/x", device="cpu")
    online(monkeypatch, lambda *_, **__: str(snapshot))
    with refused("the Hub was not asked, because local_files_only is set"):
        load("owner/x", device="cpu", local_files_only=True)
    with refused("'owner/x': its files on the Hub cannot be used: no weights"):
        load("owner/x", device="cpu")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("", ["the model's name is empty"]),
        ("owner/nonesuch", ["no file or folder here", "local Hub cache", "was not asked"]),
        ("./a/b/c", ["'./a/b/c' was not found", "cannot be a name on the Hub"]),
        ("~nobody-of-that-name/x", ["was not found"]),
        ("x" * 300, ["was not found", "cannot be a name on the Hub"]),
        ("package:no_such_model", ["pip install --no-deps no-such-model", "must be installed"]),
        ("package:no-such-model", ["the Python package no_such_model must be installed"]),
        ("package:a.b", ["not a Python package's name"]),
        ("package:json", ["exactly one .gguf file", "none"]),
        ("package:__main__", ["__main__"]),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name: str, parts: list[str]) -> None:
    with refused(*parts):
        load(name, device="cpu")


def test_near_misses_are_named(folder: Path) -> None:
    with refused("did you mean", str(folder)):
        load(str(folder.with_name("tinny")), device="cpu")
    text = folder.with_name("notes.txt")
    text.write_text("notes")
    with refused(str(text), "not a .gguf"):
        load(str(text), device="cpu")


def test_code_of_a_model_is_never_run(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    with refused(str(folder), "code of models is never run here"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("rows", [[7], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
def test_rows_that_are_not_finite_are_named(folder: Path, rows: list[int]) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.embed_tokens.weight"][rows] = math.nan
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    listed = "7;" if len(rows) == 1 else "3, 4, 5, 6, 7, 8, 9, 10, ...;"
    with refused(str(folder), f"{len(rows)} of the", f"token ids {listed}"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("name", "content", "packages"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece and protobuf"),
        ("tokenizer.model", b"IQ== 0\n", "tiktoken"),
        ("qwen.tiktoken", b"IQ== 0\n", "tiktoken"),
    ],
)
def test_a_tokenizer_without_its_package_names_it(
    folder: Path, name: str, content: bytes, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / name).write_bytes(content)
    monkeypatch.setattr("embedgrad.model.loading.checkpoint_folder._is_installed", lambda _: False)
    with refused(f"needs {packages}: pip install {packages.replace(' and ', ' ')}"):
        load(str(folder), device="cpu")


def test_a_tokenizer_that_splits_words_at_random_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"]["dropout"] = 0.1
    path.write_text(json.dumps(values), "utf-8")
    with refused(str(folder), "splits words at random", "set dropout to null"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("end", ["</s>", [[1, 2]], [1, None], True])
def test_an_end_that_is_no_token_id_is_refused(folder: Path, end: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with refused(str(folder), "generation_config.json", repr(end), "expected a token id"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("how", ["needs them", "adds them"])
def test_a_model_that_reads_token_ids_is_refused(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        if input_ids is None and how == "needs them":
            raise ValueError("You must specify input_ids")
        output = plain(self, input_ids, **inputs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None] % 3 * torch.eye(1, 512)[0]
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with refused(str(folder), "llama reads token ids beside their embeddings"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize(
    "named",
    [
        {"eos_token_id": [5, 6, 7]},  # as Llama 3 has them
        {"eos_token_id": [0, 1], "pad_token_id": 2, "bos_token_id": 3, "sep_token_id": 4},
    ],
)
def test_a_model_may_name_any_ids(folder: Path, named: dict[str, Any]) -> None:
    change_config(folder, **named)
    assert load(str(folder), device="cpu").info.width == 32


def test_tokens_without_an_embedding_are_noted(folder: Path) -> None:
    words = tiny.with_template(tiny.tokenizer("bytelevel"), None)
    size = len(words)
    words.add_tokens(["<x>"])
    words.save_pretrained(folder)
    told: list[dict[str, Any]] = []
    load(str(folder), device="cpu", report=told.append)
    assert f"has {size + 1} tokens, but the model embeds only {size}" in told[0]["text"]


# --------------------------------------------------------------------------------------- GGUF


def test_a_gguf_is_converted_once_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    original = write_gguf(path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # none of its business
    told: list[dict[str, Any]] = []
    capfd.readouterr()
    converted = load(str(path), device="cpu", attention="eager", report=told.append)
    assert [e["text"] for e in told] == ["converting tiny.gguf to safetensors (once, about 1 s)"]
    assert capfd.readouterr() == ("", "")

    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("converted twice"))
    model, tokenizer, info = load(str(path), device="cpu", attention="eager", report=told.append)
    assert info == converted.info
    assert len(told) == 1
    ids = torch.tensor([[5, 60, 100, 7]])
    assert torch.allclose(model(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-5)
    assert tokenizer.tokenize("<|end|>he  12") == ["<|end|>", "he", "\u0120\u0120", "1", "2"]

    cached = tmp_path / "cache" / "converted"
    assert [entry.name for entry in cached.iterdir()] == [f"{info.gguf_sha256[:16]}-{VERSION}"]
    assert (info.kind, info.license, info.path) == ("gguf", "mit", str(next(cached.iterdir())))
    assert (info.context, info.width, info.tied) == (512, 32, True)
    source = json.loads((Path(info.path) / "source.json").read_text())
    assert (source["gguf_sha256"], source["file"]) == (info.gguf_sha256, "tiny.gguf")
    assert set(source["versions"]) == {"gguf", "tokenizers", "torch", "transformers"}


def test_a_package_is_searched_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "carries_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(package.parent)
    with refused("exactly one .gguf file is expected in the package, found: none"):
        load("package:carries_a_model", device="cpu")
    write_gguf(package / "tiny.gguf")
    info = load("package:carries-a-model", device="cpu").info
    assert (info.kind, info.width) == ("package", 32)
    assert "carries_a_model" not in sys.modules
    shutil.copy(package / "tiny.gguf", package / "other.gguf")
    with refused("exactly one .gguf file", "other.gguf", "tiny.gguf"):
        load("package:carries_a_model", device="cpu")


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def fail(_: Any, folder: Path, **__: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
            load(str(tmp_path / "tiny.gguf"), device="cpu")
    if isinstance(failure, OSError):
        assert "could not be converted to safetensors" in str(caught.value)
        assert "No space left" in str(caught.value)
    assert list((tmp_path / "cache" / "converted").iterdir()) == []
    assert load(str(tmp_path / "tiny.gguf"), device="cpu").info.width == 32


def test_a_second_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert = gguf_file._convert

    def race(file: Path, header: Any, aside: Path) -> list[str]:
        notes = convert(file, header, aside)
        faster = aside.with_name("-".join(aside.name[1:].split("-")[:2]))
        shutil.copytree(aside, faster)
        source = {"license": "of the faster one", "notes": [], "files": {}}
        (faster / "source.json").write_text(json.dumps(seal(source)))
        return notes

    monkeypatch.setattr(gguf_file, "_convert", race)
    info = load(str(tmp_path / "tiny.gguf"), device="cpu").info
    assert info.license == "of the faster one"
    assert [str(entry) for entry in (tmp_path / "cache" / "converted").iterdir()] == [info.path]


def test_the_cache_must_be_writable_and_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
        with refused("needs", "1,234 free", "EMBEDGRAD_CACHE"):
            load(str(tmp_path / "tiny.gguf"), device="cpu")
    assert list((tmp_path / "cache" / "converted").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "file"))
    with refused("cannot be written", "Not a directory", "EMBEDGRAD_CACHE"):
        load(str(tmp_path / "tiny.gguf"), device="cpu")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EMBEDGRAD_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/embedgrad"),
        ({}, "~/.cache/embedgrad"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMBEDGRAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == os.path.expanduser(expected)


@pytest.mark.parametrize("name", ["source.json", "model.safetensors", "tokenizer.json", "gone"])
def test_a_damaged_conversion_is_made_again_with_one_line(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = Path(load(str(tmp_path / "tiny.gguf"), device="cpu").info.path)
    whole, told = {p.name: p.read_bytes() for p in folder.iterdir()}, list[dict[str, Any]]()
    if name == "gone":
        (folder / "model.safetensors").unlink()
    else:
        content = bytearray(whole[name])
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    load(str(tmp_path / "tiny.gguf"), device="cpu", report=told.append)
    assert told[0]["text"].startswith(f"{folder}: ")
    assert told[0]["text"].endswith("; the model is converted again")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_what_a_killed_conversion_left_is_swept_at_the_next(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = Path(load(str(tmp_path / "tiny.gguf"), device="cpu").info.path)
    shutil.rmtree(folder)
    with scratch_folder(folder.parent, f".{folder.name}") as alive:
        dead = alive.with_name(alive.name.replace(str(os.getpid()), "999999999"))
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(b"half")
        load(str(tmp_path / "tiny.gguf"), device="cpu")
        assert sorted(folder.parent.iterdir()) == sorted([alive, folder])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer.ggml.tokens": None}, ["no tokenizer"]),
        ({"llama.block_count": 10**9}, ["1000000000 layers", "29 tensors"]),
        ({"split.count": 3}, ["one of 3 parts", "llama-gguf-split --merge"]),
        ({"general.alignment": 48}, ["general.alignment is 48"]),
        ({"llama.block_count": 4}, ["lacks weights", "layers.3."]),
        ({"llama.feed_forward_length": 48}, ["could not be converted", "mismatch"]),
        ({"tokenizer.ggml.model": "nonesuch"}, ["could not be converted", "nonesuch"]),
    ],
)
def test_a_gguf_that_is_no_whole_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with refused("tiny.gguf", *parts):
        load(str(tmp_path / "tiny.gguf"), device="cpu")
    cached = tmp_path / "cache" / "converted"
    assert not cached.exists() or list(cached.iterdir()) == []


def test_a_hostile_gguf_is_refused_before_a_library_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("a library read it"))
    path = tmp_path / "hostile.gguf"
    huge_array = struct.pack("<QsIIQ", 1, b"a", 9, 8, 1 << 60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + huge_array)
    with refused(str(path), "damaged GGUF file"):
        load(str(path), device="cpu")
    assert not (tmp_path / "cache").exists()
