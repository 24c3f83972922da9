"""Files made to harm: each is refused in one line, in little time and memory."""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from bad_kit import Place, at
from embedgrad import DataError, ModelError, Recipe, RecipeError, TemplateError
from embedgrad.data.bounded_reads import (
    LARGEST_FILE,
    MOST_VALUES,
    parse_json,
    parse_toml,
    read_bytes,
)
from embedgrad.data.readers import read_table
from embedgrad.errors import RunError, border
from embedgrad.model.loading.info import check_counts
from embedgrad.prompt import chat_rendering
from embedgrad.prompt.chat_rendering import render
from embedgrad.prompt.sandbox import end_workers
from refusals import refused
from run_kit import Command, Done

pytest_plugins = ["tiny_runs"]

SECONDS, MEMORY = 15.0, 256 * 2**10  # on a busy machine; kB


def one_line(embedgrad: Command, *arguments: object, parts: tuple[str, ...] = ()) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    done: Done = embedgrad(*arguments, "--quiet")
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    assert done.code == 2, done
    assert len(done.lines) == 1, done.err
    for part in ("error: ", *parts):
        assert part in done.err


# ---------------------------------------------------------------------------------------- models


def with_config(place: Place, **changes: Any) -> list[object]:
    folder = place.folder / "model"
    shutil.copytree(place.model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    return place.optimize(model={"name": str(folder)})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_hidden_layers", -1, "num_hidden_layers is -1, not between 1 and 4,096"),
        ("num_hidden_layers", 10**7, "num_hidden_layers is 10,000,000"),
        ("num_labels", 10**8, "num_labels is 100,000,000, not between 0 and"),
        ("text_config", {"num_experts": 10**9}, "num_experts is 1,000,000,000"),
        ("num_hidden_layers", 1, "weights in the file are no part of the LlamaForCausalLM"),
    ],
)
def test_a_config_that_lies_is_refused(
    embedgrad: Command, place: Place, name: str, value: Any, told: str
) -> None:
    one_line(embedgrad, *with_config(place, **{name: value}), parts=(told,))


def test_weights_that_a_config_leaves_out_are_refused(embedgrad: Command, place: Place) -> None:
    arguments = with_config(place)
    path = place.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.7.extra": torch.ones(2)}, path, {"format": "pt"})
    one_line(embedgrad, *arguments, parts=("1 weights in the file", "model.layers.7.extra"))
    # What old checkpoints hold, and every model computes itself, is none.
    names = ("self_attn.rotary_emb.inv_freq", "attn.attention.bias", "attn.causal_mask")
    computed = {f"model.layers.0.{name}": torch.ones(2) for name in names}
    save_file({**tensors, **computed}, path, {"format": "pt"})
    assert embedgrad("plan", place.folder / "recipe.toml", "--quiet").code == 0


def test_the_counts_of_real_models_are_accepted() -> None:
    check_counts({"num_hidden_layers": 126, "num_labels": 1000, "n_routed_experts": 384})
    check_counts({"num_attention_heads": 128, "layer_types": ["full"] * 80, "num_experts": 0})
    check_counts({"num_experts": 16_384, "vision_feature_layer": -2})  # Doge, Phi-4 multimodal
    with pytest.raises(ValueError, match="n_layer is 0"):
        check_counts({"vision": {"n_layer": 0}})


# ------------------------------------------------------------------------------------- templates

M = "{% for i in range(99999) %}"
LOOP = f"{M}{M}{{% endfor %}}{{% endfor %}}"
TEMPLATES = {
    "loops": (LOOP, "took longer than 0.5 s"),
    "grows": ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 1,0"),
    "one huge text": ("{% set x = 'a' * 9999999999 %}{{ x }}", "bytes of memory"),
    "long": ("a" * (2**20 + 1), "is longer than 1,048,576 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "deep": ("{{" + "(" * 100_000, ""),
    "attributes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_has_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.5)
    source, told = TEMPLATES[name]
    tokenizer = tiny.tokenizer("metaspace")
    tokenizer.name_or_path = "models/strange"
    started = time.monotonic()
    with refused("template: ", told, error=TemplateError) as _:
        render(tokenizer, [{"role": "user", "content": "hi"}], source)
    assert time.monotonic() - started < SECONDS
    # The next one gets another process.
    assert (
        render(tokenizer, [{"role": "user", "content": "hi"}], "{{ messages[0].content }}") == "hi"
    )


def test_what_breaks_a_limit_names_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.5)
    tokenizer = tiny.tokenizer("metaspace")
    tokenizer.name_or_path = "models/strange"
    with refused("the chat template of strange took longer than 0.5 s", error=TemplateError):
        render(tokenizer, [{"role": "user", "content": "hi"}], LOOP)


def test_code_in_the_current_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    end_workers()
    tokenizer = tiny.tokenizer("metaspace")
    assert render(tokenizer, [{"role": "user", "content": "hi"}], "{{ messages[0].content }}")


@pytest.mark.parametrize("chat", [tiny.CHATML, tiny.TRIMMING, tiny.PLAIN, tiny.DATED])
def test_the_text_is_that_of_transformers(chat: str) -> None:
    tokenizer = tiny.tokenizer("metaspace")
    messages = [
        {"role": "user", "content": " a\n<b> \u00e9 \ud83d "},
        {"role": "assistant", "content": "x"},
    ]
    extra = (
        "{% set ns = namespace(n=0) %}{% generation %}{{ messages | tojson }}{% endgeneration %}"
    )
    for source in (chat, extra + chat):
        for generation in (False, True):
            expected = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=generation
            )
            assert render(tokenizer, messages, source, generation=generation) == expected


# ------------------------------------------------------------------------------------------ data


def packed(rows: int, text: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.table({"review": pyarrow.array([text]).take(pyarrow.array([0] * rows))})
    pyarrow.parquet.write_table(table, buffer, **how)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rows", "text"), [(3_000_000, ""), (60_000, "a" * 20_000)], ids=["rows", "texts"]
)
def test_a_parquet_bomb_is_refused(tmp_path: Path, rows: int, text: str) -> None:
    if text:  # one text of a dictionary in every row
        array = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), [text])
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"review": array}), buffer)
        content = buffer.getvalue()
    else:
        content = packed(rows, text, compression="zstd")
    path = at(tmp_path / "bomb.parquet", content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with refused("bomb.parquet", error=DataError):
        read_table(path)
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * MEMORY


QUADRATIC: dict[str, tuple[str, bytes]] = {
    "wide header": ("a.csv", (",".join(map(str, range(100_000))) + ",0\n").encode()),
    "keys of an object": (
        "a.jsonl",
        ("{" + ",".join(f'"{i}":1' for i in range(20_000)) + ',"0":1}').encode(),
    ),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_many_names_take_little_time(tmp_path: Path, name: str) -> None:
    file, content = QUADRATIC[name]
    started = time.process_time()
    with refused("'0'", "twice"):
        read_table(at(tmp_path / file, content))
    assert time.process_time() - started < 2


# ------------------------------------------------------------------------------ recipes and JSON


@pytest.mark.parametrize(
    "text",
    [
        "a." * 100_000 + "a = 1",
        "[" + "a." * 5_000 + "a]",
        "a = " + "9" * 5_000,
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 200 + "1" + "}" * 200,
    ],
    ids=["dots", "header", "digits", "brackets", "tables"],
)
def test_odd_toml_is_one_line(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError, match="is not TOML: "):
        Recipe.read(at(tmp_path / "recipe.toml", text.encode()))
    assert time.process_time() - started < 2


def test_dots_that_are_no_names_are_read() -> None:
    text = 'a = "' + "b." * 200 + '"\n# ' + "c." * 200 + "\nd = [" + "1.5, " * 200 + "]\n"
    text += "e = '''\n" + "f. " * 200 + "'''\n"
    assert list(parse_toml(text)) == ["a", "d", "e"]


@pytest.mark.parametrize(
    "setting",
    ["training.seed=" + "9" * 5_000, "a." * 2_000 + "a=1", "model.name=" + "[" * 5_000, "a\0b=1"],
    ids=["digits", "dots", "brackets", "NUL"],
)
def test_odd_settings_are_one_line(embedgrad: Command, place: Place, setting: str) -> None:
    one_line(embedgrad, *place.optimize(setting))


def test_reading_takes_the_memory_of_the_file_and_not_of_its_bound(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    tracemalloc.start()
    assert read_bytes(tmp_path / "small", LARGEST_FILE) == b"small"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_json_has_bounds() -> None:
    with pytest.raises(ValueError, match="holds more than 1,048,576 values"):
        parse_json(b"[" + b"[]," * (MOST_VALUES // 2 + 1) + b"0]")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 100 + b"]" * 100)
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(b'"\\ud800"')
    assert parse_json(b'["\\ud83d\\ude00"]') == ["\U0001f600"]


def test_a_border_turns_everything_into_one_line() -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    for error in (KeyError("x"), OverflowError("y"), PanicException("z"), OSError(2, "w")):
        with refused("the file: cannot be used", error=RunError), border("the file", RunError):
            raise error
    with pytest.raises(KeyboardInterrupt), border("the file", RunError):
        raise KeyboardInterrupt
    with refused("mine", error=ModelError), border("the file", RunError):
        raise ModelError("mine")


# ------------------------------------------------------------------------------- runs and exports


def test_a_token_beyond_the_vocabulary_is_refused(embedgrad: Command, place: Place) -> None:
    described = json.loads((place.run / "prompt" / "prompt.json").read_text("utf-8"))
    described["spans"][0]["token_ids"][0] = 2**31 - 1
    run = place.describe(**described)
    one_line(embedgrad, "evaluate", run, parts=("this prompt was made for",))


def spoiled_export(embedgrad: Command, place: Place, change: Callable[[Any], None]) -> Path:
    out = place.folder / "export"
    done = embedgrad("export", place.run, "--to", "safetensors", "--out", out, "--quiet")
    assert done.code == 0, done
    path = out / "embedgrad" / "export.json"
    entries = json.loads(path.read_text("utf-8"))
    change(entries)
    path.write_text(json.dumps(entries), "utf-8")
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["files"].update({"a\0b": "0"}),
        lambda e: e["files"].update({"a" * 5_000: "0"}),
        lambda e: e["files"].update({"../../x": "0"}),
        lambda e: e["prompts"].update({"a\0b": next(iter(e["prompts"].values()))}),
        lambda e: next(iter(e["prompts"].values())).update(run="a\0b"),
        lambda e: next(iter(e["prompts"].values())).update(run="a" * 5_000),
        lambda e: e.update(written={}) or e["files"].update({"x": "0"}),
    ],
    ids=["NUL", "long", "outside", "NUL prompt", "NUL run", "long run", "written"],
)
def test_a_spoiled_export_is_one_line(
    embedgrad: Command, place: Place, change: Callable[[Any], None]
) -> None:
    one_line(embedgrad, "verify", spoiled_export(embedgrad, place, change))


def test_every_entry_that_an_export_wrote_may_be_missing_or_odd(
    embedgrad: Command, place: Place
) -> None:
    out = spoiled_export(embedgrad, place, lambda entries: None)
    path = out / "embedgrad" / "export.json"
    whole = json.loads(path.read_text("utf-8"))
    for name in whole["written"]:
        for odd in (None, -1):
            entries = json.loads(json.dumps(whole))
            entries["written"][name] = odd
            if odd is None:
                del entries["written"][name]
            path.write_text(json.dumps(entries), "utf-8")
            done = embedgrad("verify", out, "--quiet")
            assert done.code in (0, 2)
            assert "Traceback" not in done.err


@pytest.mark.parametrize("odd", ["x", None, 10**400], ids=["text", "null", "huge"])
def test_a_page_of_odd_results_is_one_line_or_a_page(
    embedgrad: Command, tmp_path: Path, odd: Any
) -> None:
    import made_runs

    folder = made_runs.made_comparison(tmp_path / "comparison")
    whole = json.loads((folder / "results.json").read_text("utf-8"))
    for name in (*list(whole["methods"][1])[::3], *whole):
        values = json.loads(json.dumps(whole))
        if name in values:
            values[name] = odd
        else:
            values["methods"][1][name] = odd
        (folder / "results.json").write_text(json.dumps(values), "utf-8")
        done = embedgrad("report", folder, "--out", tmp_path / "page.html")
        assert done.code in (0, 2)
        if done.code:
            assert len(done.lines) == 1, done.err


def test_a_rate_that_overflows_is_one_line(embedgrad: Command, place: Place) -> None:
    arguments = place.optimize(model={"dtype": "float16"}, optimizer={"learning_rate": 1e38})
    done = embedgrad(*arguments, "--quiet")
    assert done.code in (0, 2)
    assert "Traceback" not in done.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("output", ["full", "closed"])
def test_an_output_that_takes_nothing_is_no_traceback(output: str) -> None:
    """A child process, as the streams of this one are pytest's."""
    redirected = ">/dev/full" if output == "full" else ">&-"
    line = f"{shlex.quote(sys.executable)} -m embedgrad parts --json {redirected}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if output == "full" else 0)
    full = "error: standard output cannot be written (No space left on device); files are as they "
    assert done.stderr == (f"{full}would be with it\n" if output == "full" else "")
