"""The sums of `benchmarks.policy`: answers that are kept, and a precision that dev rows choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import embedgrad as eg
from benchmarks.policy import answers, follow, recipe_of, write_splits
from embedgrad.inference.policy import Attempt, Price
from embedgrad.inference.pool import Pool, Table

pytestmark = pytest.mark.harness
pytest_plugins = ["tiny_runs"]


@pytest.fixture
def pool(finished: tuple[Path, Any], tmp_path: Path) -> Pool:
    prompts = [{"run": str(finished[0]), "text_prompt": plain} for plain in (False, True)]
    (tmp_path / "policy.toml").write_text(tomli_w.dumps({"prompts": prompts}), encoding="utf-8")
    made: Pool = eg.load_policy(tmp_path / "policy.toml", report=eg.quiet)
    return made


def test_answers_are_kept_and_not_asked_again(pool: Pool, tmp_path: Path) -> None:
    rows = pool._runs[0].read_data().test
    whole = answers(pool, tmp_path / "whole.jsonl", rows, 5)
    assert {*whole} == {(prompt, row) for prompt in range(2) for row in range(len(rows))}
    part = answers(pool, tmp_path / "part.jsonl", rows[:5], 5)
    asked: list[range] = []
    ask = pool.ask

    def count(table: Table, examples: Any, some: range, prompts: Any) -> None:
        asked.append(some)
        ask(table, examples, some, prompts)

    pool.ask = count  # type: ignore[method-assign, assignment]
    assert answers(pool, tmp_path / "part.jsonl", rows, 5) == whole
    assert [some.start for some in asked] == [5, 10]
    assert part.items() <= whole.items()


def test_the_precision_is_chosen_on_dev_rows(pool: Pool) -> None:
    """Prompt 0 is sure where it is right, and prompt 1 is right elsewhere: two rounds are best."""

    def table(rows: int) -> Table:
        price = Price(1, 10)
        made: Table = {}
        for row in range(rows):
            easy = row % 2 == 0
            made[0, row] = Attempt(f"{easy}", 0.9 if easy else 0.4, price, price, {}, float(easy))
            made[1, row] = Attempt(f"{not easy} ", 0.5, price, price, {}, float(not easy))
        return made

    found = follow(pool, table(40), table(20))
    chosen = found["chosen"]
    assert chosen["policy"]["accuracy"] == chosen["dev"]["accuracy"] == 1
    assert chosen["precision"] > 0.5
    assert chosen["policy"]["tokens"] == 15 < chosen["vote"]["tokens"] == 20
    assert [point["precision"] for point in found["curve"]] == sorted(
        point["precision"] for point in found["curve"]
    )


def test_rows_and_recipes_of_both_kinds_of_task(tmp_path: Path) -> None:
    options = type("Options", (), {"model": "tiny", "epochs": 1.0})()
    for task, row in (
        ("sst2", {"text": "Good {}", "label": 1, "label_text": "positive"}),
        ("svamp", {"question": "What is {}?", "equation": "( 1.0 + 2.0 )", "answer": "3"}),
    ):
        (tmp_path / task).mkdir()
        for split in ("train", "dev", "test"):
            rows = [{k: str(v).format(f"{split} {i}") for k, v in row.items()} for i in range(9)]
            lines = "".join(f"{json.dumps(one)}\n" for one in rows)
            (tmp_path / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        out = tmp_path / f"{task}-out"
        write_splits(tmp_path, task, out, 0, {"train": 4, "dev": 3, "test": 5})
        kept = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert len(kept) == 4
        if task == "svamp":
            assert {one["solution"] for one in kept} == {"1 + 2 = 3"}
        recipe = recipe_of(task, "Say:", out, options, 0)
        assert bool(recipe.target.choices) == (task == "sst2")
