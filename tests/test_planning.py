"""`embedgrad plan`: exact counts, problems reported together, settings that do what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from transformers import AutoConfig

from embedgrad import Recipe, load_model, optimize
from embedgrad.deploy.rules import Facts, exportability
from embedgrad.environment import memory_in_use, peak_memory, reset_peak_memory
from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.experiments.plan import Budget, plan
from embedgrad.experiments.plan.estimate import Estimator, suggest
from embedgrad.experiments.plan.probe import Rates
from embedgrad.experiments.plan.workload import TokenizedSplits, Workload, count
from embedgrad.formatting import operations
from embedgrad.model.capabilities import key_value_bytes
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Template
from embedgrad.recipe.build import read_data
from kit import LABELS, Kit, kit
from run_kit import CHOICES, Command, save_model, values, write_jsonl

pytest_plugins = ["tiny_runs"]

AMPLE = 2**30
FREE = Target()
SPLITS = (20, 28, 40)  # where train, dev and test end
LONGEST = 6  # tokens of a free answer
TOKEN = 3 * 2 * 2 * 8 * 4  # bytes of a prefix token of the tiny Llama: 3 layers, 2 key heads of 8


def recipe_of(target: Target = LABELS, **sections: Any) -> Recipe:
    """A recipe whose rows come from elsewhere."""
    return Recipe.from_dict(
        {
            "model": {"name": "tiny"},
            "data": {"train": "rows.jsonl", **sections.pop("data", {})},
            "template": {"user": "{text} [[Is it good?]]"},
            "target": {"choices": list(target.choices)},
            "training": {"epochs": 1, "batch_size": 6, **sections.pop("training", {})},
            "evaluation": {"batch_size": 5, "max_new_tokens": LONGEST},
            **sections,
        }
    )


def splits_of(made: Kit) -> TokenizedSplits:
    a, b, c = SPLITS
    rows, reuse = made.sequences, made.model.why_not_reusable is None
    longest = made.model.forward.longest_reuse or math.inf
    prompt = len(made.sequencer.prompt_ids)
    return TokenizedSplits(rows[:a], rows[a:b], rows[b:c], prompt, longest if reuse else 0, False)


def fresh(*arguments: Any, **options: Any) -> Kit:
    """A kit with a model wrapper of its own: nothing is built or stored yet."""
    made = kit(*arguments, rows=SPLITS[-1], dtype=torch.float32, **options)
    return dataclasses.replace(made, model=LanguageModel(made.loaded, prefix_cache_budget=0))


# -- counts ----------------------------------------------------------------------------------------


@contextmanager
def counted_tokens(model: LanguageModel) -> Iterator[list[int]]:
    """Tokens that each pass through the model's first layer computes, padding included."""
    tokens: list[int] = []

    def count_tokens(_: Any, arguments: Any, named: Any) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        tokens.append(hidden.shape[0] * hidden.shape[1])

    layer = model.model.model.layers[0]
    hook = layer.register_forward_pre_hook(count_tokens, with_kwargs=True)
    try:
        yield tokens
    finally:
        hook.remove()


def all_work(recipe: Recipe, splits: TokenizedSplits, stored: float = 1.0) -> Workload:
    return count(recipe, splits, stored, LONGEST, LONGEST)


@pytest.mark.parametrize("architecture", ["llama", "llama-longrope"])
def test_a_run_computes_the_tokens_that_were_counted(architecture: str) -> None:
    made = fresh(architecture)
    recipe, splits = recipe_of(training={"batch_size": 1}), splits_of(made)
    recipe = dataclasses.replace(
        recipe, evaluation=dataclasses.replace(recipe.evaluation, batch_size=1)
    )  # one row a pass: no padding
    work = all_work(recipe, splits)
    made = made.with_cache(PrefixCache(AMPLE))
    prefixes = [s.prefix for s in splits.all if splits.reuses(s)]
    if prefixes:  # a pass over few tokens is padded, so these are counted apart
        made.model.prefixes_of(prefixes)
    with counted_tokens(made.model) as tokens:
        refinement = optimize(
            made.model,
            made.sequencer,
            splits.train,
            splits.dev,
            training=recipe.training,
            parts=recipe.parts,
            evaluation=recipe.evaluation,
        )
    assert refinement.steps == work.steps
    assert len(refinement.best.history) == work.evaluations
    assert sum(tokens) == work.effort["steps", "steps"] + work.effort["dev", "scoring"]
    evaluator = Evaluator(made.model, made.sequencer, recipe.evaluation)
    moved = refinement.prompt.with_rows(refinement.prompt.rows * 1.001)  # else scored once
    with counted_tokens(made.model) as tokens:
        evaluate(evaluator, moved, splits.test)
    assert sum(tokens) == work.effort["test", "scoring"]


def test_prefixes_are_counted_once_where_they_are_stored() -> None:
    made = fresh()
    splits = splits_of(made)
    everything = splits.prefixes(splits.all)
    work = all_work(recipe_of(training={"epochs": 3}), splits)
    built = work.effort["prefixes", "prefixes"] + work.effort["test", "prefixes"]
    assert built == sum(everything.values())
    assert everything == {s.prefix: len(s.prefix) - s.shared for s in splits.all}
    without = all_work(recipe_of(training={"epochs": 3}), splits, stored=0.0)
    train, dev = (sum(splits.prefixes(part).values()) for part in (splits.train, splits.dev))
    assert without.effort["prefixes", "prefixes"] == 3 * train + 4 * dev  # an evaluation more


def test_a_second_gradient_is_a_second_step() -> None:
    splits, (once, twice) = (
        splits_of(fresh()),
        (
            recipe_of(optimizer={"name": "extrapolated", "direction": direction})
            for direction in ("past", "fresh")
        ),
    )
    one, two = (count(r, splits, 1.0, LONGEST, LONGEST).effort for r in (once, twice))
    assert two.pop(("steps", "steps")) == 2 * one.pop(("steps", "steps")) > 0
    assert one == two


def test_free_answers_are_decoded_and_scored() -> None:
    made = fresh(target=FREE)
    splits, recipe = splits_of(made), recipe_of(FREE)
    work, twice = (count(recipe, splits, 1.0, n, n).effort for n in (LONGEST, 2 * LONGEST - 1))
    assert twice["test", "answers"] == 2 * work["test", "answers"] > 0
    assert twice["test", "scoring"] == work["test", "scoring"]
    sampling = recipe_of(
        FREE, evaluation={"max_new_tokens": LONGEST, "samples": 3, "batch_size": 5}
    )
    sampled = count(sampling, splits, 1.0, LONGEST, LONGEST).effort
    assert sampled["dev", "answers"] == work["dev", "answers"]  # only test rows are sampled
    assert sampled["test", "answers"] > 3.5 * work["test", "answers"]
    once = sum(splits.tokens(s, choices=False) for s in splits.test)
    assert work["test", "scoring"] == 2 * 2 * once


def test_a_row_that_merges_with_the_span_is_scored_by_its_plain_tokens() -> None:
    splits = splits_of(fresh())
    plain = dataclasses.replace(splits.test[0], plain=(1, 2, 3))
    merged = dataclasses.replace(splits, test=[plain, *splits.test[1:]])
    before, after = (all_work(recipe_of(), s).effort["test", "scoring"] for s in (splits, merged))
    assert after - before == len(plain.prefix)


def test_rows_that_no_step_takes_have_no_prefixes() -> None:
    made = fresh()
    recipe, splits = recipe_of(training={"steps": 1}), splits_of(made)
    made = made.with_cache(PrefixCache(AMPLE))
    work = all_work(recipe, splits)
    optimize(made.model, made.sequencer, splits.train, splits.dev, training=recipe.training)
    prefixes = splits.prefixes(work.trained_on, splits.dev)
    assert made.model.prefix_cache.nbytes == TOKEN * sum(map(len, prefixes))


# -- the plan --------------------------------------------------------------------------------------


def test_the_plan_of_a_small_recipe(recipe: Callable[..., Path], embedgrad: Command) -> None:
    done = embedgrad("plan", recipe(), "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["problems"] == []
    assert [found["data"][name]["rows"] for name in ("train", "dev", "test")] == [24, 8, 12]
    assert sum(found["data"]["train"]["answers"].values()) == 24
    assert set(found["data"]["train"]["answers"]) == set(CHOICES)
    assert found["data"]["duplicates"] == ""
    assert found["course"] == {"steps": 6, "steps_per_epoch": 3, "evaluations": 3}
    assert found["spans"][0]["text"] == "Is the review positive or negative?"
    assert found["seconds"]["all"] > found["seconds"]["train"] > 0
    assert found["memory"]["peak"] >= found["memory"]["loaded"] > found["model"]["bytes"]
    assert found["budget"]["fits"]


def test_memory_and_time_are_of_the_size_of_a_run(
    recipe: Callable[..., Path], finished: tuple[Path, dict[str, Any]]
) -> None:
    found, result = plan(Recipe.read(recipe())), finished[1]
    assert 0.5 < found["memory"]["peak"] / result["peak_memory_bytes"] < 2
    assert 0.02 < found["seconds"]["train"] / result["train"]["seconds"] < 50


def test_several_spans_are_counted_together(
    recipe: Callable[..., Path], model_folder: Path
) -> None:
    template = {"user": "[[Read this review.]] {review}\n\n[[Is it good?]]"}
    read = Recipe.read(recipe(template=template))
    found, sequencer = plan(read, measure=False), load_model(str(model_folder)).sequencer
    made = sequencer(read.template, read.target, read_data(read).train)
    train = made.build(read_data(read).train)
    tokens, spans = found["tokens"], found["spans"]
    assert [span["text"].strip() for span in spans] == ["Read this review.", "Is it good?"]
    assert tokens["prompt"] == 24 * sum(len(span["ids"]) for span in spans)
    before = [len(s.context(made.prompt_ids)) for s in train]
    assert sum(tokens[part] for part in ("prefix", "prompt", "suffix")) == sum(before)
    full = sum(n + len(ids) - 1 for n, s in zip(before, train, strict=True) for ids in s.targets)
    full += len(train)  # the right choice's last token, behind which the end of the turn is learned
    assert tokens["per_step_without_reuse"] == full / 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process")
def test_a_peak_that_is_forgotten_counts_no_more() -> None:
    cpu, block = torch.device("cpu"), 2**27
    with mmap.mmap(-1, block) as memory:  # of its own, not what the process keeps from before
        for _ in range(block // 2**20):
            memory.write(b"x" * 2**20)
        peak = peak_memory(cpu)
    reset_peak_memory(cpu)
    assert max(memory_in_use(cpu), peak_memory(cpu)) < peak - block / 2


def test_tokens_are_those_of_the_rows(
    recipe: Callable[..., Path], model_folder: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    read = Recipe.read(recipe())
    found = plan(read, measure=False)
    model = load_model(str(model_folder))
    splits = read_data(read)
    sequencer = model.sequencer(read.template, read.target, splits.train)
    train = sequencer.build(splits.train)
    tokens, prompt = found["tokens"], len(sequencer.prompt_ids)
    assert tokens["prefix"] == sum(len(s.prefix) for s in train)
    assert tokens["prompt"] == 24 * prompt
    assert tokens["suffix"] == sum(len(s.suffix) for s in train)
    assert tokens["target"] == sum(len(ids) for s in train for ids in s.with_end().targets)
    lines = [(s, ids) for s in train for ids in s.targets]
    full = sum(len(s.prefix) + prompt + len(s.suffix) + len(ids) - 1 for s, ids in lines)
    full += len(train)  # the right choice's last token, behind which the end of the turn is learned
    assert tokens["per_step_without_reuse"] == full / 3
    assert tokens["per_step"] < tokens["per_step_without_reuse"] / 4
    everything = [*train, *sequencer.build(splits.dev), *sequencer.build(splits.test)]
    assert found["data"]["train"]["longest"] == max(
        len(s.prefix) + prompt + len(s.suffix) + max(map(len, s.targets)) for s in train
    )
    assert found["prefixes"]["bytes"] == finished[1]["prefix_cache"]["bytes"]
    assert found["prefixes"]["bytes"] == found["prefixes"]["token_bytes"] * sum(
        map(len, {s.prefix for s in everything})
    )


def test_what_is_counted_does_not_depend_on_the_measurement(recipe: Callable[..., Path]) -> None:
    read = Recipe.read(recipe())
    without, measured = plan(read, measure=False), plan(read)
    for name in ("data", "spans", "tokens", "flops", "course", "prefixes", "exports", "model"):
        assert without[name] == measured[name], name
    assert "seconds" not in without


def test_without_a_probe_no_weights_are_read(
    recipe: Callable[..., Path], embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedgrad.model.loading import load

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setitem(load.__globals__, "_load_weights", refuse)
    done = embedgrad("plan", recipe(), "--no-probe", "--json")
    assert done.code == 0
    assert not done.json["measured"]


def test_every_problem_is_reported_at_once(
    recipe: Callable[..., Path], data: Path, tmp_path: Path, embedgrad: Command
) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    dev = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    long = {"review": "good " * 600, "label": "positive"}
    bad = [{"review": "", "label": "positive"}, {"review": "Fine.", "label": "nice"}, long]
    train = write_jsonl(tmp_path / "bad.jsonl", [*lines, *bad])
    twice = write_jsonl(tmp_path / "twice.jsonl", [*dev, lines[0]])
    written = recipe(data={"train": str(train), "dev": str(twice)})
    done = embedgrad("plan", written, "--no-probe", "--json", "--quiet")
    assert done.code == 2
    told = "\n".join(done.json["problems"])
    for words in ("bad.jsonl:25: column 'review' is empty", "bad.jsonl:26: label 'nice'"):
        assert words in told
    assert "1 row repeats the text of a row in another split" in told
    assert "bad.jsonl:27: 2434 tokens, but the model takes 512" in told
    assert len(done.json["problems"]) == 4
    assert done.json["data"]["train"]["rows"] == 25
    assert done.json["data"]["duplicates"].startswith("1 row repeats the text of a row in another")
    assert done.lines[0].startswith("error: ")
    assert [line.strip() for line in done.lines[1:]] == done.json["problems"]


def test_rows_that_are_dropped_are_no_problem_and_no_duplicates(
    recipe: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    dev = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    twice = write_jsonl(tmp_path / "twice.jsonl", [*lines, dev[0]])
    found = plan(
        Recipe.read(recipe(data={"train": str(twice), "drop_duplicates": True})), measure=False
    )
    assert found["problems"] == []
    assert found["data"]["train"]["rows"] == 24
    assert found["data"]["duplicates"] == ""
    assert "Left out by data.drop_duplicates: 1 row of train also in dev or test." in found["notes"]


def test_a_template_that_the_model_cannot_hold_is_a_problem_beside_the_others(
    recipe: Callable[..., Path], data: Path, other_models: dict[str, Path], embedgrad: Command
) -> None:
    written = recipe(model={"name": str(other_models["no-chat"])}, data={"dev": str(data / "x")})
    done = embedgrad("plan", written, "--no-probe", "--json", "--quiet")
    assert done.code == 2
    assert len(done.json["problems"]) == 2
    assert "no such file" in done.json["problems"][0]
    assert "no chat template" in done.json["problems"][1]


@pytest.mark.parametrize("source", ["answer", "self-written"])
def test_free_answers_are_read_to_their_end(
    source: str, model_folder: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(30)]
    written = values(
        model_folder,
        tmp_path,
        data={"train": str(write_jsonl(tmp_path / "sums.jsonl", rows)), "answer": "answer"},
        template={"user": "{question}\n\n[[Give the answer only:]]"},
        target={"choices": []},
        evaluation={"scorer": "number", "max_new_tokens": 40},
        solutions={"source": source},
    )
    del written["data"]["dev"], written["data"]["test"]
    found = plan(Recipe.from_dict(written))
    assert found["problems"] == []
    assert found["data"]["train"]["answers"] == 18
    replies, seconds = found["replies"], found["seconds"]
    assert replies["read"] == 6  # all dev rows
    assert replies["mean"] <= replies["text"] <= 40
    assert seconds["at_most"] >= seconds["all"]
    writes = source == "self-written"
    assert (seconds["solutions"] > 0) == writes
    assert (replies["refined"] == replies["text"]) == writes
    told = [note for note in found["notes"] if "writes its own solutions" in note]
    assert len(told) == writes
    if writes:
        assert found["tokens"]["target"] == 18 * round(replies["mean"])
    else:
        assert replies["refined"] <= 4  # two digits and the end of the turn


def test_sampled_answers_are_counted(model_folder: Path, tmp_path: Path) -> None:
    sections = {"training": {"steps": 5, "batch_size": 3}, "data": sums(tmp_path), **SUMS}
    plain = plan(Recipe.from_dict(values(model_folder, tmp_path, **sections)), measure=False)
    objective = {"name": "reward", "samples": 4, "updates": 2}
    recipe = Recipe.from_dict(values(model_folder, tmp_path, objective=objective, **sections))
    assert recipe.solutions.source == "answer"
    found = plan(recipe, measure=True)
    assert found["problems"] == []
    assert found["course"]["answers"] == 5 * 3 * 4
    assert found["seconds"]["sampling"] > 0
    assert found["seconds"]["train"] >= found["seconds"]["sampling"] + found["seconds"]["steps"]
    (note,) = [note for note in found["notes"] if note.startswith("a step samples 12 answers")]
    assert "up to 4 times as many" in note
    assert "answers" not in plain["course"]
    assert found["tokens"]["per_step"] > 3 * plain["tokens"]["per_step"]


SUMS: dict[str, dict[str, Any]] = {
    "template": {"user": "{question}\n\n[[Give the answer only:]]"},
    "target": {"choices": []},
    "evaluation": {"scorer": "number", "max_new_tokens": 4},
}


def sums(folder: Path, bad: int = 0) -> dict[str, str]:
    """Data of a recipe: questions without a worked solution, `bad` training answers no number."""
    for i, split in enumerate(("train", "dev", "test")):
        rows = [{"question": f"What is {n} plus {i}?", "answer": str(n + i)} for n in range(12)]
        for row in rows[:bad] if split == "train" else ():
            row["answer"] = "none"
        write_jsonl(folder / f"{split}.jsonl", rows)
    paths = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    return {**paths, "answer": "answer"}


def test_a_column_of_solutions_that_is_not_used_need_not_be_there(
    model_folder: Path, tmp_path: Path
) -> None:
    data = {**sums(tmp_path), "solution": "none"}
    for source, problems in (("answer", 0), ("self-written", 0), ("column", 3)):
        written = values(model_folder, tmp_path, data=data, solutions={"source": source}, **SUMS)
        assert len(plan(Recipe.from_dict(written), measure=False)["problems"]) == problems, source


def test_answers_that_no_solution_can_reach_are_a_problem(
    model_folder: Path, tmp_path: Path
) -> None:
    data = sums(tmp_path, bad=2)
    for source, problems in (("answer", 0), ("self-written", 2)):
        written = values(model_folder, tmp_path, data=data, solutions={"source": source}, **SUMS)
        found = plan(Recipe.from_dict(written), measure=False)["problems"]
        assert len(found) == problems, source
        assert all("the answer 'none' is none" in line for line in found)


def test_a_split_that_cannot_be_read_is_not_carved(recipe: Callable[..., Path], data: Path) -> None:
    found = plan(Recipe.read(recipe(data={"test": str(data / "none.jsonl")})), measure=False)
    assert [found["data"][name]["rows"] for name in ("train", "dev", "test")] == [24, 8, 0]
    assert len(found["problems"]) == 1
    assert not any("Set aside" in note for note in found["notes"])


def test_no_test_row_is_answered(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: set[str] = set()
    plain = LanguageModel.outcome

    def outcome(self: LanguageModel, rows_PD: Any, sequences: Any, **options: Any) -> Any:
        answered.update(s.example.source.split(":")[0] for s in sequences)
        return plain(self, rows_PD, sequences, **options)

    monkeypatch.setattr(LanguageModel, "outcome", outcome)
    written = tomllib.loads(recipe().read_text("utf-8"))
    del written["data"]["dev"]
    written["data"]["dev_share"] = 0.0
    assert plan(Recipe.from_dict(written))["seconds"]["test"] > 0
    assert answered == {"train.jsonl"}


def test_where_no_row_reuses_its_prefix_reuse_saves_nothing(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "mamba", "mamba")
    found = plan(Recipe.read(recipe(model={"name": str(model)})), measure=False)
    assert found["problems"] == []
    assert found["tokens"]["per_step"] == found["tokens"]["per_step_without_reuse"] > 0
    assert found["flops"]["per_step"] == found["flops"]["per_step_without_reuse"] > 0
    assert found["prefixes"]["bytes"] == 0
    measured = plan(Recipe.read(recipe(model={"name": str(model)})), report=lambda event: None)
    assert measured["seconds"]["all"] > 0


def test_layers_of_several_widths_are_counted_each_by_its_own() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma4_text",
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        global_head_dim=32,
    )
    assert key_value_bytes(config, 4) == 4 * 2 * (2 * 8 + 2 * 8 + 1 * 32)


def test_rows_that_a_run_would_begin_at_are_looked_for(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    lost = Recipe.read(recipe(training={"warm_start": str(tmp_path / "nowhere")}))
    (problem,) = plan(lost, report=lambda event: None)["problems"]
    assert "nowhere" in problem
    cold, warm = (plan(r, measure=False)["course"] for r in (Recipe.read(recipe()), lost))
    assert warm["evaluations"] == cold["evaluations"] + 1  # its rows are scored as well


def test_room_on_a_disk_is_reported_beside_that_in_memory(
    recipe: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    spill = {"budget": 100_000, "spill": str(tmp_path / "prefixes"), "spill_budget": 10**9}
    found = plan(Recipe.read(recipe(prefix_cache=spill)), measure=False)["prefixes"]
    assert (found["room_bytes"], found["slower_room_bytes"]) == (100_000, 10**9)
    told = embedgrad("plan", recipe(prefix_cache=spill), "--no-probe", "--quiet").out
    assert "room for 100 kB (prefix_cache.budget) and for 1.0 GB in slower places\n" in told


def test_the_table_says_what_balance_leaves_out(
    recipe: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    letters = "abcdefghij"
    rows = [{"review": f"This is text {i}.", "label": letters[i % 10]} for i in range(20)]
    train = str(write_jsonl(tmp_path / "ten.jsonl", rows))
    written = tomllib.loads(recipe().read_text("utf-8"))
    written["data"] = {"train": train, "dev_share": 0.0, "test_share": 0.0}
    written["target"] = {"choices": list(letters)}
    path = tmp_path / "ten.toml"
    path.write_text(tomli_w.dumps(written), encoding="utf-8")
    told = embedgrad("plan", path, "--no-probe", "--quiet").out
    assert "train: 20 rows (2 a, 2 b, 2 c, 2 d, 2 e, 2 f, 4 more answers)" in told
    assert "dev: no rows\n" in told


def test_the_table_says_the_numbers(recipe: Callable[..., Path], embedgrad: Command) -> None:
    done = embedgrad("plan", recipe(), "--memory", "1 KiB", "--quiet")
    assert done.code == 0
    for words in (
        "no row merges with it",
        "6 steps (3 an epoch), 3 evaluations",
        "no text is in two splits",
        "over the budget in memory",
        "peft: no (PEFT puts a prompt before everything else",
    ):
        assert words in done.out, words
    assert "fits the budget" in embedgrad("plan", recipe(), "--minutes", "60", "--quiet").out


def test_a_budget_needs_the_measurement(recipe: Callable[..., Path], embedgrad: Command) -> None:
    done = embedgrad("plan", recipe(), "--no-probe", "--minutes", "1")
    assert done.code == 2
    assert "--no-probe: a budget needs the measurement" in done.err
    done = embedgrad("plan", recipe(), "--memory", "much")
    assert done.code == 2
    assert "--memory: 'much'" in done.err


def test_operations_are_said_in_short() -> None:
    assert operations(0) == "0 FLOP"
    assert operations(1234) == "1.23 kFLOP"
    assert operations(5e16) == "50 PFLOP"


# -- settings under a budget ---------------------------------------------------------------------


def estimator(room: int = AMPLE) -> Estimator:
    """One whose work takes 1 ms per token, on a model of 10 MB, with 1 kB per example of a pass."""
    seconds = dict.fromkeys(("prefixes", "steps", "scoring"), 1e-3)
    rates = Rates(seconds=seconds, bytes={"steps": 1000.0, "scoring": 1000.0})
    return Estimator(splits_of(fresh()), rates, TOKEN, room, 0, 10**7, 10**7, {})


def test_a_recipe_that_fits_needs_no_other_setting() -> None:
    recipe, estimating = recipe_of(), estimator()
    now = estimating(recipe)
    within = Budget(int(now.memory["peak"]) + 1, now.seconds["all"] + 1)
    assert within.over(now) == []
    assert suggest(recipe, estimating, within) == []


def test_memory_is_brought_down_by_what_changes_no_result_first() -> None:
    recipe, estimating = recipe_of(), estimator()
    now = estimating(recipe)
    budget = Budget(memory_bytes=int(now.memory["peak"] - now.prefix_bytes / 4))
    first = suggest(recipe, estimating, budget)[0]
    assert first["setting"] == "prefix_cache.budget"
    assert first["exact"]
    assert first["fits"]
    assert first["memory_bytes"] <= (budget.memory_bytes or 0)
    assert first["seconds"] > now.seconds["all"]
    changed = dataclasses.replace(estimating, room=first["value"])(recipe)
    assert (changed.amount("memory"), changed.amount("time")) == (
        first["memory_bytes"],
        first["seconds"],
    )
    milder = dataclasses.replace(estimating, room=2 * first["value"])(recipe)
    assert budget.over(milder) == ["memory"]


def test_time_is_brought_down_by_fewer_epochs() -> None:
    recipe, estimating = recipe_of(training={"epochs": 4}), estimator()
    now = estimating(recipe).seconds["all"]
    knobs = {k["setting"]: k for k in suggest(recipe, estimating, Budget(seconds=0.7 * now))}
    epochs = knobs["training.epochs"]
    assert epochs["fits"]
    assert epochs["value"] in (2.0, 1.0)
    less = recipe_of(training={"epochs": epochs["value"]})
    assert estimating(less).seconds["all"] == pytest.approx(epochs["seconds"])


def test_a_number_of_steps_is_brought_down_itself() -> None:
    recipe, estimating = recipe_of(training={"steps": 12}), estimator()
    knobs = {k["setting"]: k for k in suggest(recipe, estimating, Budget(seconds=0.0))}
    assert "training.epochs" not in knobs
    steps = knobs["training.steps"]
    assert (steps["value"], steps["fits"]) == (1, False)
    assert estimating(recipe_of(training={"steps": 1})).workload.steps == 1


def test_prefixes_that_find_no_room_are_built_again() -> None:
    recipe = recipe_of(training={"epochs": 4})
    ample, none = (estimator(room)(recipe) for room in (AMPLE, 0))
    assert none.seconds["prefixes"] > 3 * ample.seconds["prefixes"]
    assert none.memory["prefixes"] == 0
    slow = dataclasses.replace(estimator(0), slower_room=AMPLE)(recipe)
    assert slow.seconds == ample.seconds
    assert slow.memory["prefixes"] == 0


# -- exports ---------------------------------------------------------------------------------------


def facts(template: Template, prefixes: tuple[tuple[int, ...], ...], **others: Any) -> Facts:
    return Facts(
        **{
            "prefixes": frozenset(prefixes),
            "template": template,
            "model_type": "llama",
            "embedding_scale": 1.0,
            **others,
        }
    )


def said(found: Facts) -> dict[str, tuple[bool, str]]:
    return {
        e["destination"]: (e["possible"], "; ".join(e["remarks"])) for e in exportability(found)
    }


def test_a_prompt_that_is_first_goes_everywhere() -> None:
    found = said(facts(Template.chat(user="[[Is it good?]]\n{text}"), ((),)))
    assert all(possible for possible, _ in found.values())
    assert found["peft"] == (True, "")


def test_peft_folds_one_prefix_in_and_refuses_several() -> None:
    template = Template.chat(system="[[Be brief.]]", user="{text}")
    assert said(facts(template, ((1, 2, 3),)))["peft"] == (
        True,
        "the 3 tokens before the span become rows too; queries leave them out",
    )
    possible, why = said(facts(template, ((1, 2), (1, 3))))["peft"]
    assert not possible
    assert "2 different texts" in why


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (Template.plain("{text} [[Is it good?]]"), "plain text has no chat template"),
        (Template.chat(user="{a} [[Is it good?]] {b}"), "columns are on both sides"),
        (Template.chat(system="{a}", user="{b} [[Is it good?]]"), "in 2 messages (system, user)"),
        (Template.chat(system="{a}", user="[[Is it good?]]"), "are in the system message"),
    ],
)
def test_a_chat_template_must_hold_the_span_for_plain_queries(template: Template, why: str) -> None:
    found = said(facts(template, ((1,),)))
    for name in ("vocabulary", "gguf"):
        assert not found[name][0]
        assert why in found[name][1]
    assert found["vllm"][0]
    assert found["safetensors"] == (True, "")


def test_gguf_must_know_the_architecture_and_scaling_is_told() -> None:
    template = Template.chat(user="{text} [[Is it good?]]")
    for known in ("llama", "mistral", "qwen2", "gemma3_text", "gpt_neox", "qwen3_moe"):
        found = said(facts(template, ((1,),), model_type=known, from_gguf=True))
        assert found["gguf"][0], known
    assert not said(facts(template, ((1,),), model_type="ctrl", from_gguf=True))["gguf"][0]


def test_checkpoints_of_some_families_become_gguf_and_others_are_told_the_way() -> None:
    template = Template.chat(user="{text} [[Is it good?]]")
    for written in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        assert said(facts(template, ((1,),), model_type=written))["gguf"][0], written
    possible, why = said(facts(template, ((1,),), model_type="gpt_neox"))["gguf"]
    assert not possible
    assert "checkpoints of gpt_neox are not converted here; use its GGUF file" in why


def test_scaled_embeddings_are_told() -> None:
    template = Template.chat(user="{text} [[Is it good?]]")
    scaled = said(facts(template, ((1,),), embedding_scale=5.5))
    assert scaled["vocabulary"][0]
    assert "by 5.5" in scaled["vocabulary"][1]
