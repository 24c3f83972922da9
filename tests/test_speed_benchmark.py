"""The speed benchmark: peers compute what ours computes; what is written is what was measured."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tiny
from embedgrad import LanguageModel, load_model
from embedgrad.errors import DataError

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # as `python -m` and `python docs/...` have them

import speeds  # noqa: E402

from benchmarks.speed import __main__ as command  # noqa: E402
from benchmarks.speed import memory, peers, scoring, steps, whole, workloads  # noqa: E402
from benchmarks.speed.bench import Bench  # noqa: E402
from benchmarks.speed.measure import Pairs, Side, alternate, compare_steps  # noqa: E402
from benchmarks.speed.ours import Ours, Step  # noqa: E402
from benchmarks.speed.reached import reached  # noqa: E402
from benchmarks.speed.results import Results  # noqa: E402
from benchmarks.speed.work import matmul_rate, operations  # noqa: E402

pytestmark = pytest.mark.harness

SHAPES = {
    letter: replace(
        shape, query=9, prompt=min(shape.prompt, 6), answer=min(shape.answer, 4), batch=3
    )
    for letter, shape in workloads.SHAPES.items()
}
PLAN = whole.Plan(train=6, dev=5, epochs=2, batch=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, and rows of both data sets."""
    folder = tmp_path_factory.mktemp("speed")
    loaded = tiny.loaded(dtype=torch.float32, attention="sdpa")
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    for name in ("sst2", "imdb"):
        for part, skip in (("train", 0), ("dev", 40)):
            rows = tiny.reviews(80)[skip : skip + 40]
            lines = [{"text": e.columns["review"], "label_text": e.answer} for e in rows]
            path = folder / name / f"{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load_model(str(folder / "model"), dtype="float32", device="cpu")


@pytest.fixture
def bench(
    model: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """A quick run at a small size, and what it writes."""
    for module in (workloads, steps, scoring):
        monkeypatch.setattr(module, "SHAPES", SHAPES)
    monkeypatch.setattr(steps, "WITH_MEMORY", ())
    monkeypatch.setattr(steps, "matmul_rate", lambda _: 1e9)
    monkeypatch.setattr(steps, "D_BATCH", 4)
    monkeypatch.setattr(scoring, "NEW_TOKENS", 5)
    model.prefix_cache.clear()
    return Bench(model, Results(tmp_path / "speed.json"), quick=True, data=folder)


def held(bench: Bench) -> list[dict[str, Any]]:
    values = json.loads(bench.results.path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = values["rows"]
    return rows


# -- both sides compute the same ------------------------------------------------------------------


@pytest.mark.parametrize("letter", "ABCEFG")
def test_synthetic_rows_have_the_lengths_of_their_workload(
    model: LanguageModel, letter: str
) -> None:
    shape = workloads.SHAPES[letter]
    rows = workloads.synthetic(model, shape)
    assert len(rows) == shape.batch
    header = workloads.synthetic(model, replace(shape, query=0))[0]
    for row in rows:
        queries = len(row.prefix) - len(header.prefix), len(row.suffix) - len(header.suffix)
        assert queries == ((0, shape.query) if shape.before else (shape.query, 0))
        assert [len(ids) for ids in row.targets] == [shape.answer] * shape.choices
    assert len({row.prefix + row.suffix for row in rows}) == shape.batch
    assert rows == workloads.synthetic(model, shape)


@pytest.mark.parametrize("letter", "ABC")
@pytest.mark.parametrize("kind", peers.TRAINING)
def test_every_peer_makes_our_step(model: LanguageModel, kind: peers.Kind, letter: str) -> None:
    prompt = workloads.prompt_ids(model, SHAPES[letter].prompt)
    rows = workloads.synthetic(model, SHAPES[letter])
    ours, peer = Ours(model, prompt), kind(model.info.path, prompt)
    rows = [peer.layout(row) for row in rows]
    found, expected = ours.step(rows), peer.step(rows)
    compared = compare_steps(found, expected)
    assert compared["same_gradient"], compared
    assert found.loss > 1
    # The step itself: rows have moved alike, and go back.
    start = ours.start_PD
    moved = peer.rows + start if kind is peers.PeftCPT else peer.rows
    assert torch.allclose(ours.rows, moved, atol=1e-5)
    assert (ours.rows - start).abs().max() > 5e-4
    peer.reset()
    ours.reset()
    assert torch.equal(ours.rows, start)
    assert peer.step(rows).loss == pytest.approx(expected.loss, rel=1e-6)


def test_peft_starts_at_the_words_of_the_prompt(model: LanguageModel) -> None:
    prompt = workloads.prompt_ids(model, 6)
    tuned = peers.PeftPromptTuning(model.info.path, prompt)
    assert torch.equal(tuned.rows.detach(), model.embed(prompt))
    row = workloads.synthetic(model, SHAPES["A"])[0]
    first = tuned.layout(row)
    assert (first.prefix, first.suffix) == ((), row.prefix + row.suffix)


def test_real_rows_leave_long_queries_out(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [len(model.tokenizer(e.columns["review"])["input_ids"]) for e in tiny.reviews(40)]
    limit = sorted(lengths)[30]
    monkeypatch.setattr(workloads, "LONGEST_QUERY", limit)
    _, train, dev = workloads.examples(model, workloads.ROWS["D"], folder, 5, 3)
    texts = [row.example.columns["text"] for row in (*train, *dev)]
    assert (len(train), len(dev)) == (5, 3)
    assert max(len(model.tokenizer(text)["input_ids"]) for text in texts) <= limit


@pytest.mark.parametrize("letter", "ABCDEFG")
def test_a_workload_gives_valid_rows(bench: Bench, letter: str) -> None:
    bench.quick = letter not in "ABC"
    command.run(bench, letter)
    rows = held(bench)
    names = [kind.name for kind in peers.TRAINING] if letter in "ABC" else ["inputs_embeds"]
    names = ["transformers-generate"] if letter == "G" else names
    prefixes = {"E": ["built", "stored"], "F": ["built", "stored"], "G": ["built"]}
    expected = [(h, name) for h in prefixes.get(letter, ["stored"]) for name in sorted(names)]
    assert [(row["prefixes"], row["peer"]) for row in rows] == expected
    for row in rows:
        assert row["workload"] == letter
        assert row["pairs"] == (1 if bench.quick else 5)
        if bench.quick:
            assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["our_seconds"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert {row["same_gradient"], row["same_result"]} == {True, None}
        counted = row["matmul_fraction"]
        assert (counted is not None and counted > 0) == (letter in "BC")
        assert ("only put the prompt first" in row["note"]) == ("peft" in row["peer"])


def test_a_quick_run_measures_one_pair_beside_the_plain_loop(bench: Bench) -> None:
    for letter in "ABC":
        command.run(bench, letter)
    assert [(row["workload"], row["peer"], row["pairs"]) for row in held(bench)] == [
        (letter, "inputs_embeds", 1) for letter in "ABC"
    ]


def test_a_timed_step_follows_one_of_its_own() -> None:
    calls: list[str] = []
    side = steps.settled(lambda: calls.append("step"), lambda: calls.append("reset"))
    side.timed()
    assert calls == ["step", "reset", "step"]


def test_a_whole_run_is_the_same_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    whole.measure(bench, "H", PLAN)
    (row,) = held(bench)
    assert row["same_result"], row
    assert row["result_difference"] < 1e-5
    # 6 rows, 2 epochs: both sides end at the same scores too.
    ours, _, peer = row["note"].removeprefix("dev at the end: ours ").partition(", the peer ")
    assert ours == peer
    assert capsys.readouterr().out.count(" 7/7 ") == 2  # 4 steps and 3 evaluations, two sides


# -- counting and timing --------------------------------------------------------------------------


def test_work_is_counted_as_by_hand(model: LanguageModel) -> None:
    rows = workloads.synthetic(model, SHAPES["A"])
    prompt = workloads.prompt_ids(model, 6)
    peer = peers.InputsEmbeds(model.info.path, prompt)
    peer.step(rows)
    config = model.model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    prefixes = config.num_attention_heads
    size = width // prefixes
    keys = config.num_key_value_heads * size
    length = len(rows[0].prefix) + 6 + len(rows[0].suffix) + len(rows[0].targets[0])
    tokens = len(rows) * length
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    weights += width * config.vocab_size
    attention = layers * len(rows) * prefixes * length * length * 2 * size
    # Forward and backward; attention has two products forward and four backward.
    assert operations(lambda: peer.step(rows)) == 2 * 2 * weights * tokens + 2 * 3 * attention


def test_the_rate_of_a_multiply_counts_its_operations() -> None:
    a = torch.ones(256, 256)
    began = time.perf_counter()
    for _ in range(50):
        a @ a
    rate = 50 * 2 * 256**3 / (time.perf_counter() - began)
    assert rate / 20 < matmul_rate(a, repeats=1) < rate * 20


def test_prefix_reuse_does_less_work(model: LanguageModel) -> None:
    rows = workloads.synthetic(model, workloads.SHAPES["A"])
    prompt = workloads.prompt_ids(model, 16)
    ours, peer = Ours(model, prompt), peers.InputsEmbeds(model.info.path, prompt)
    ours.build_prefixes(rows)
    assert operations(lambda: ours.step(rows)) < operations(lambda: peer.step(rows)) / 5


def test_ratios_are_medians_over_pairs() -> None:
    pairs = Pairs(None, None, [1.0, 2.0, 4.0], [10.0, 10.0, 100.0])
    assert pairs.summary() == {
        "ratio": 10.0,
        "ratio_low": 5.0,
        "ratio_high": 25.0,
        "pairs": 3,
        "our_seconds": 2.0,
        "peer_seconds": 10.0,
    }


def test_sides_take_turns() -> None:
    said: list[str] = []

    def side(name: str) -> Side[str]:
        return Side(lambda: said.append(name) or name, lambda: said.append(f"before {name}"))

    found = alternate({"a": side("a"), "b": side("b")}, side("peer"), 2)
    turn = ["before a", "a", "before b", "b", "before peer", "peer"]
    assert said == 2 * turn
    assert (found["b"].ours, found["b"].peer) == ("b", "peer")
    assert len(found["a"].our_seconds) == len(found["a"].peer_seconds) == 2


def test_saved_activations_leave_weights_out() -> None:
    weight = torch.ones(4, 4)
    rows = torch.ones(8, 4, requires_grad=True)
    # The product saves its weight only, the square its input of 8 x 4 floats.
    step = lambda: (rows @ weight).square().sum()  # noqa: E731
    assert memory.saved(step, [weight]) == 8 * 4 * 4
    assert memory.saved(step, []) == 8 * 4 * 4 + 4 * 4 * 4


def test_the_peak_is_seen_after_it_is_gone() -> None:
    size = 64 * 2**20
    before = memory._settled()
    with memory.peak() as found:
        block = bytearray(b"\1") * size
        del block
    assert size * 0.9 < found[0] - before < size * 3


# -- a row that is wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "gradient", "same"),
    [(1.0, 1.0, True), (1.00002, 1.0, False), (1.0, 1.0002, False), (math.nan, 1.0, False)],
)
def test_steps_are_compared_at_the_tolerances(loss: float, gradient: float, same: bool) -> None:
    ours = Step(loss, torch.full((2, 2), gradient))
    assert compare_steps(ours, Step(1.0, torch.ones(2, 2)))["same_gradient"] is same


def test_a_peer_that_computes_something_else_voids_its_row(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peers.InputsEmbeds.loss
    monkeypatch.setattr(peers.InputsEmbeds, "loss", lambda *given: right(*given) * 1.01)
    command.run(bench, "A")
    rows = {row["peer"]: row for row in held(bench)}
    void = rows.pop("inputs_embeds")
    assert void["same_gradient"] is False
    assert (void["ratio"], void["ratio_low"], void["ratio_high"]) == (None, None, None)
    assert void["note"].startswith("void: the two sides differ (loss difference 9.9e-03")
    assert void["our_seconds"] > 0
    assert all(row["ratio"] for row in rows.values())
    void |= {"memory_ratio": 0.1}
    (first, *others) = reached({"rows": [void, *rows.values()]})
    assert (first["measured"], first["met"]) == (None, False)
    (memory_of_a,) = (d for d in others if d["demand"].startswith("A: peak memory"))
    assert (memory_of_a["measured"], memory_of_a["met"]) == (None, False)


NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "evaluations", "same"),
    [
        ((1.0, 0.9, 0.8), ((0.5, 0.7), (0.9, 0.3)), True),
        ((1.0, 0.9, 0.8005), ((0.5, 0.7), (0.8, 0.31)), True),  # rounding, which has grown
        ((1.0001, 0.9, 0.8), ((0.5, 0.7), (0.9, 0.3)), False),
        ((1.0, NAN, 0.8), ((0.5, 0.7), (0.9, 0.3)), False),
        ((1.0, 0.9, NAN), ((0.5, 0.7), (0.9, 0.3)), False),
        ((1.0, 0.9, 0.8), ((0.5, NAN), (0.9, 0.3)), False),
        ((1.0, 0.9, 0.8), ((0.5, 0.7), (0.9, 0.4)), False),
        ((1.0, 0.9, 0.8), ((0.5, 0.7), (0.9, NAN)), False),
        ((1.0, 0.9, 0.8), ((0.5, 0.7), (0.7, 0.6), (0.9, 0.3)), False),
    ],
)
def test_whole_runs_are_compared_from_their_beginning_to_their_end(
    losses: tuple[float, ...], evaluations: tuple[tuple[float, float], ...], same: bool
) -> None:
    plain = whole.Course((1.0, 0.9, 0.8), ((0.5, 0.7), (0.9, 0.3)))
    assert whole.Course(losses, evaluations).compared(plain)["same_result"] is same


def test_other_replies_void_the_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ours, "generate", lambda *_: ["something else"] * 3)
    command.run(bench, "G")
    (row,) = held(bench)
    assert (row["ratio"], row["note"]) == (None, "void: the two sides differ")


# -- the file -------------------------------------------------------------------------------------


def row_of(letter: str, peer: str = "inputs_embeds", **more: Any) -> dict[str, Any]:
    times = Pairs(None, None, [1.0, 2.0], [9.0, 20.0]).summary()
    checks = {"same_gradient": True, "loss_difference": 1e-7, "gradient_difference": 2e-6}
    others = {"same_result": None, "result_difference": None, "memory_ratio": None}
    key = {"workload": letter, "title": "a title", "prefixes": "stored", "peer": peer}
    more = {"matmul_fraction": None, "note": "", **more}
    return {**key, **times, **checks, **others, **more}


def test_rows_are_replaced_one_by_one(tmp_path: Path) -> None:
    results = Results(tmp_path / "speed.json")
    for letter in "CAB":
        results.put(row_of(letter))
    results.put(row_of("A", "peft-cpt"))
    results.put(row_of("A", pairs=7))
    again = Results(results.path)
    rows = [(row["workload"], row["peer"], row["pairs"]) for row in again.values["rows"]]
    plain = "inputs_embeds"
    assert rows == [("A", plain, 7), ("A", "peft-cpt", 2), ("B", plain, 2), ("C", plain, 2)]
    assert {"machine", "versions", "reached"} <= set(again.values)
    assert "peft" in again.values["versions"]


def test_an_interrupted_run_keeps_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "speed.json"
    Results(path).put(row_of("A"))
    key = ("A", "stored", "inputs_embeds")
    again = Results(path)
    again.begin(fresh=False)
    assert again.has(key, 2)
    assert not again.has(key, 3)  # a quick run made fewer pairs
    assert not again.has(("A", "built", "inputs_embeds"), 2)
    assert not again.has_section("growth")
    again.put_section("growth", {"our_growth": 1.2})
    assert again.has_section("growth")
    monkeypatch.setattr("benchmarks.speed.results.code_digest", lambda: "another")
    changed = Results(path)
    assert not changed.has(key, 2)
    assert not changed.has_section("growth")
    assert Results(path).values["rows"]  # shown until it is measured again


def test_another_start_of_the_same_machine_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "speed.json"
    Results(path).put(row_of("A"))
    memory_now = psutil.virtual_memory()
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: memory_now._replace(total=memory_now.total - 8192)
    )
    assert len(Results(path).values["rows"]) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', "{}"])
def test_a_damaged_file_is_told_in_one_line(
    tmp_path: Path,
    content: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "speed.json"
    path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["speed", "A", "--out", str(path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "speed.json: is no results file (" in capsys.readouterr().err.splitlines()[-1]
    assert path.read_text() == content


@pytest.mark.parametrize(("finished", "fresh"), [(True, False), (False, True)])
def test_a_full_run_starts_anew_after_a_finished_one(
    tmp_path: Path, finished: bool, fresh: bool
) -> None:
    path = tmp_path / "speed.json"
    first = Results(path)
    first.put(row_of("A"))
    if finished:
        first.finish()
    again = Results(path)
    again.begin(fresh=fresh)
    assert again.values["rows"] == []
    assert again.values["finished"] is False


def test_rows_of_another_machine_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Results(tmp_path / "speed.json").put(row_of("A"))
    monkeypatch.setattr("benchmarks.speed.results.machine", lambda: {"cores": 640})
    assert Results(tmp_path / "speed.json").values["rows"] == []
    assert "starts over" in capsys.readouterr().out


def test_a_run_that_goes_on_measures_only_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.quick = False
    command.run(bench, "A")
    before = held(bench)
    bench.kept = True
    command.run(bench, "A")
    assert held(bench) == before
    gone = [row for row in bench.results.values["rows"] if row["peer"] != "peft-cpt"]
    bench.results.values["rows"] = gone
    command.run(bench, "A")
    after = {row["peer"]: row for row in held(bench)}
    assert [row for row in before if row["peer"] != "peft-cpt"] == [
        after[name] for name in ("inputs_embeds", "peft-prompt-tuning")
    ]
    assert "peft-cpt" in after


def test_quick_and_named_runs_measure_their_workloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    lost = ""  # a workload without its data

    def measured(_: Bench, name: str) -> bool:
        calls.append(name)
        return name != lost

    monkeypatch.setattr(command, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(command, "run", measured)
    path = tmp_path / "speed.json"

    def run(*arguments: str) -> tuple[str, bool]:
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["speed", "--out", str(path), *arguments])
        command.main()
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return " ".join(calls), bool(values.get("finished"))

    assert run("--quick") == ("A B C D E F G", False)
    assert run("C", "growth") == ("C growth", False)
    lost = "D"
    assert run() == ("loading A B C D E F G growth H I", False)
    lost = ""
    assert run() == ("loading A B C D E F G growth H I", True)
    with pytest.raises(SystemExit):
        run("J")


def test_a_workload_without_its_data_is_left_out(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.data = tmp_path
    assert not command.run(bench, "D")
    assert capsys.readouterr().out.startswith("D: left out: ")
    assert not bench.results.path.exists()
    with pytest.raises(DataError):
        workloads.examples(bench.model, workloads.ROWS["H"], tmp_path, 4, 2)


# -- what is shown --------------------------------------------------------------------------------


def test_the_worst_row_says_whether_a_demand_is_met() -> None:
    rows = [
        row_of("A", ratio=12.0, memory_ratio=0.2),
        row_of("A", "peft-cpt", ratio=9.5, memory_ratio=0.26),
        row_of("C", ratio=1.9, matmul_fraction=0.61),
        row_of("C", "peft-cpt", ratio=2.9, matmul_fraction=0.6),
    ]
    loading = {"first_step_starts_seconds": 5.0, "first_step_done_seconds": 6.1}
    found = reached({"rows": rows, "growth": {"our_growth": 1.6}, "loading": loading})
    facts = {line["demand"]: (line["measured"], line["met"]) for line in found}
    best = "times as fast as the best peer"
    assert facts[f"A, prefixes stored: {best}"] == (9.5, False)
    assert facts[f"B, prefixes stored: {best}"] == (None, None)
    assert facts[f"C, prefixes stored: {best}"] == (1.9, True)
    assert facts["A: peak memory of a step, as a share of the best peer's"] == (0.26, False)
    assert facts["C: floating-point rate, as a share of torch.mm's"] == (0.6, True)
    assert facts["A: step time at a query of 800 tokens, over that at 100"] == (1.6, False)
    starts, done = (fact for name, fact in facts.items() if name.startswith("loading: "))
    assert starts == (5.0, True)
    assert done == (6.1, False)


def test_tables_show_rows_and_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "speed.json"
    empty = speeds.rows(tmp_path) + speeds.summary(tmp_path, "") + speeds.growth(tmp_path)
    assert empty.count("Not measured yet: `A`, `B`, `C`, `D`, `E`, `F`, `G`, `H`, `I`.") == 2
    assert "The growth with the query is not measured yet." in empty
    results = Results(path)
    results.put(row_of("A", ratio=12.0, memory_ratio=0.21))
    results.put(row_of("A", "peft-cpt", ratio=11.0, note="prompt first"))
    results.put(row_of("B", ratio=None, note="void: wrong"))
    seconds = {"our_seconds": [0.5, 0.6], "peer_seconds": [4.0, 120.0]}
    growths = {"our_growth": 1.2, "peer_growth": 30.0}
    results.put_section("growth", {"peer": "p", "queries": [100, 800], **seconds, **growths})

    short = speeds.summary(tmp_path, "../")
    line = "| A: a title, prefixes stored | **11.00** (9.00 to 10.00) | 2 | 1.50 s | 14.50 s "
    assert f"{line}| peft-cpt |\n" in short
    assert "| B: a title, prefixes stored | void |" in short
    assert "Not measured yet: `C`, `D`, `E`, `F`, `G`, `H`, `I`." in short
    assert "From [speed.json](../benchmarks/results/speed.json), on " in short
    every = speeds.rows(tmp_path)
    assert every.count("\n| A: ") == 2
    assert "| loss 1e-07, gradient 2e-06 | 0.21 |  |  |\n" in every
    assert "| prompt first |\n" in every
    assert "| **12.00** (9.00 to 10.00) |" in every
    demands = speeds.reached(tmp_path)
    assert "times as fast as the best peer | 10 | 11.00 | yes |" in demands
    assert "times as fast as the best peer | 1.6 | void | **no** |" in demands
    assert "times as fast as the best peer | 1.8 |  | not measured |" in demands
    assert "| 100 tokens | 0.50 s | 4.00 s |\n| 800 tokens | 0.60 s | 120 s |" in speeds.growth(
        tmp_path
    )
