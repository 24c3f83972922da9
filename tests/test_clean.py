"""`embedgrad clean`: rows ranked by their labels, a page, and the file without the worst."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import embedgrad as eg
from embedgrad import Recipe
from embedgrad.errors import DataError, ModelError, OptionError, RecipeError, RunError
from embedgrad.experiments import clean as module
from embedgrad.experiments.clean import clean
from embedgrad.report.page.suspects import suspects_page
from embedgrad.training.tuner import Tuning
from embedgrad.training.weighted import WeightedTraining
from refusals import refused
from run_kit import ROWS, Command, Done, values, write_jsonl

pytest_plugins = ["tiny_runs"]

QUICK = Tuning(passes=3, products=2)
FAST = ("--passes", "3")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def ranked(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A ranking that tests must not change, with a third of the rows left out where dev agrees."""
    out = tmp_path_factory.mktemp("clean") / "out"
    recipe = Recipe.from_dict(values(model_folder, data))
    return out, clean(recipe, out, eg.quiet, drop=0.25, by="label", tuning=QUICK)


def test_rows_of_every_layer_are_trained(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = list[tuple[int, ...]]()

    def noted(loss: Any, theta: Any, *arguments: Any, **options: Any) -> WeightedTraining:
        shapes.extend(tuple(value.shape) for value in theta.values())
        return WeightedTraining(loss, theta, *arguments, **options)

    monkeypatch.setattr("embedgrad.experiments.clean.WeightedTraining", noted)
    deep = values(model_folder, data, parameterization={"name": "free", "deep": True})
    result = clean(Recipe.from_dict(deep), tmp_path / "out", eg.quiet, tuning=QUICK)
    model = eg.load_model(str(model_folder))
    assert [width for _, width in shapes] == [model.info.width * model.forward.layers.count]
    assert result["train_rows"] == ROWS["train"]


def test_every_row_is_ranked_worst_first(ranked: tuple[Path, Any], data: Path) -> None:
    out, result = ranked
    rows = lines(out / "ranking.jsonl")
    assert sorted(row["source"] for row in rows) == sorted(
        f"train.jsonl:{i + 1}" for i in range(ROWS["train"])
    )
    suspicion = [row["suspicion"] for row in rows]
    assert suspicion == sorted(suspicion, reverse=True)
    assert [row["rank"] for row in rows] == list(range(1, ROWS["train"] + 1))
    # A step of the typical size 1 in the numbers that weights are made of.
    harm = [row["harm"] for row in rows]
    weights = [2 * torch.sigmoid(torch.tensor(-value)).item() for value in harm]
    losses = [row["loss"] for row in rows]
    for row in rows:
        below = [
            sum(v < row[name] for v in held) for name, held in (("harm", harm), ("loss", losses))
        ]
        assert row["suspicion"] == pytest.approx(sum(below) / 2 / (len(rows) - 1))
    sources = result["sources"]
    for row, weight in zip(rows, weights, strict=True):
        assert row["weight"] == pytest.approx(weight * sources[row["answer"]], rel=1e-4)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert row["suggested"] == max(row["probabilities"], key=row["probabilities"].get)
    assert result["flagged"] == sum(value > 0 for value in harm) > 0
    assert set(sources) == {"negative", "positive"}


def test_the_cleaned_file_lacks_the_worst_rows(ranked: tuple[Path, Any], data: Path) -> None:
    out, result = ranked
    first = lines(out / "ranking.jsonl")[: ROWS["train"] // 4]
    gone = {row["source"] for row in first if row["harm"] > 0}
    assert 0 < len(gone) == result["dropped"] <= result["most"] == len(first)
    kept = [
        row
        for number, row in enumerate(lines(data / "train.jsonl"), 1)
        if f"train.jsonl:{number}" not in gone
    ]
    assert lines(out / "cleaned.jsonl") == kept
    assert result["kept"] == len(kept)
    assert not (out / "state.safetensors").exists()


def test_the_page_shows_rows_as_text(ranked: tuple[Path, Any]) -> None:
    out, result = ranked
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "ranked by how suspicious their labels are" in page
    assert page.index("What was found") < page.index("Row by row")
    assert 'data-file="ranking.jsonl" data-answer="label"' in page
    rows = lines(out / "ranking.jsonl")
    rows[0]["columns"]["review"] = "<script>alert(1)</script>"
    rows[0]["answer"] = "<b>bad</b>"
    page = suspects_page(result, rows, "<i>name</i>", ["review"])
    assert "<script>alert" not in page
    assert "<b>bad" not in page
    assert "<i>name" not in page
    held = json.loads(page.partition('id="rows">')[2].partition("</script>")[0])
    assert [row["n"] for row in held] == [row["rank"] for row in rows]
    assert held[0]["badge"][1].startswith(f"1: suspicion {rows[0]['suspicion']:.2f}, harm ")
    assert sum("dropped" in row["kinds"] for row in held) == result["dropped"]


def test_another_share_costs_no_model(
    ranked: tuple[Path, Any], model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = ranked
    monkeypatch.delattr(module, "prepare")
    again = clean(
        Recipe.from_dict(values(model_folder, data)),
        out,
        eg.quiet,
        drop=0.0,
        by="label",
        tuning=QUICK,
    )
    assert again["dropped"] == 0
    assert len(lines(out / "cleaned.jsonl")) == ROWS["train"]
    back = clean(
        Recipe.from_dict(values(model_folder, data)),
        out,
        eg.quiet,
        drop=0.25,
        by="label",
        tuning=QUICK,
    )
    assert back == result


def test_files_are_written_again_from_a_whole_ranking_of_the_same_lines(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    rows = lines(data / "train.jsonl")
    for row in rows:
        row["review"] += "\u2028 \x85"  # which some take for the end of a line
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    train.write_text(
        "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8"
    )
    recipe = Recipe.from_dict(values(model_folder, data, data={"train": str(train)}))
    quick = Tuning(passes=1, products=1)

    def again(drop: float) -> Any:
        return clean(recipe, tmp_path / "out", eg.quiet, drop=drop, tuning=quick)

    again(0.3)
    assert again(0.0)["kept"] == len(rows)
    ranking = tmp_path / "out" / "ranking.jsonl"
    whole = ranking.read_bytes()
    ranking.write_bytes(whole[: len(whole) // 2])
    with refused("ranking.jsonl: lacks rows of the 24", "another folder", error=RunError):
        again(0.3)
    ranking.write_bytes(whole)
    train.write_bytes(b"\n" + train.read_bytes())  # every row has another number now
    with refused("holds the ranking of another recipe, data", error=RunError):
        again(0.3)


def test_a_share_is_not_rounded_off(ranked: tuple[Path, Any], tmp_path: Path) -> None:
    _, result = ranked
    rows = [{"source": f"x:{i}", "harm": 1.0, "suspicion": 1.0, "answer": "a"} for i in range(100)]
    rows = [{**row, "rank": i + 1, "loss": 0.0, "columns": {}} for i, row in enumerate(rows)]
    data = write_jsonl(tmp_path / "x.jsonl", [{"review": "a", "label": "a"}] * 100)
    recipe = Recipe.from_dict(values(tmp_path, tmp_path, data={"train": str(data)}))
    assert module._write(recipe, tmp_path / "out", {**result}, rows, 0.29)["most"] == 29


def test_the_command_shows_a_table(
    recipe: Callable[..., Path], embedgrad: Command, tmp_path: Path
) -> None:
    path, out = recipe(), tmp_path / "out"
    done: Done = embedgrad("clean", path, out, "--quiet", *FAST)
    assert (done.code, done.err) == (0, "")
    first = lines(out / "ranking.jsonl")[0]
    assert first["source"] in done.out
    assert f"{first['harm']:+.2f}" in done.out
    assert "rows make dev worse the more they count" in done.out
    told = embedgrad("clean", path, out, "--json", *FAST)
    assert told.json["worst"][0]["source"] == first["source"]
    assert f"{out}: ranked already" in told.err


def test_an_interrupted_ranking_continues_to_the_bit(
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    ranked: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data))
    whole = Tuning(passes=20, products=2, tolerance=0.001)
    clean(recipe, tmp_path / "whole", eg.quiet, tuning=whole)
    saved = module.write_file
    stopped = list[Path]()

    def once(path: Path, content: bytes) -> None:
        saved(path, content)
        if path.suffix == ".safetensors" and not stopped:
            stopped.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_file", once)
    with pytest.raises(KeyboardInterrupt):
        clean(recipe, tmp_path / "again", eg.quiet, tuning=whole)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["state.safetensors"]
    told = list[dict[str, Any]]()
    clean(recipe, tmp_path / "again", told.append, tuning=whole)
    assert any(event.get("text", "").startswith("continuing after") for event in told)
    for name in ("ranking.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_ranked_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, ranked: tuple[Path, Any]
) -> None:
    def attempt(out: Path = tmp_path / "out", *, drop: float = 0.1, **sections: Any) -> None:
        by = sections.pop("by", None)
        recipe = Recipe.from_dict(values(model_folder, data, **sections))
        clean(recipe, out, eg.quiet, drop=drop, by=by, tuning=QUICK)

    with refused("drop: 1.5", "from 0 to less than 1", error=OptionError):
        attempt(drop=1.5)
    with refused("by: ", "column 'who'"):
        attempt(by="who")
    with refused("objective: trains on something other", error=RecipeError):
        attempt(
            objective={"name": "reward"}, target={"choices": []}, evaluation={"scorer": "contains"}
        )
    with refused("objective: trains on something other", error=RecipeError):
        matrix = [[0.0, 9.0], [1.0, 0.0]]
        attempt(objective={"name": "regret", "decision": "cost_matrix", "costs": matrix})
    with refused("training.warm_start: a ranking begins at", error=RecipeError):
        attempt(training={"warm_start": "runs/a"})
    with refused("by: all 24 training rows have 'me'", "two values or more", error=DataError):
        mine = [{**row, "who": "me"} for row in lines(data / "train.jsonl")]
        attempt(by="who", data={"train": str(write_jsonl(tmp_path / "mine.jsonl", mine))})
    with refused("demonstrations: trains on", error=RecipeError):
        attempt(demonstrations={"k": 1})
    with refused("template.place: 'auto'", error=RecipeError):
        attempt(template={"place": "auto"})
    out, _ = ranked
    with refused("holds the ranking of another recipe, data or setting", error=RunError):
        attempt(out)
    (tmp_path / "full").mkdir()
    write_jsonl(tmp_path / "full" / "x.jsonl", [{"a": 1}])
    for taken in (tmp_path / "full", tmp_path / "full" / "x.jsonl"):
        with refused(f"{taken.name}: exists already; choose another folder", error=RunError):
            attempt(taken)
    with refused("cannot be made (Not a directory)", error=RunError):
        attempt(tmp_path / "full" / "x.jsonl" / "out")
    no_dev = values(model_folder, data)
    del no_dev["data"]["dev"]
    no_dev["data"]["dev_share"] = 0.0
    with refused("data.dev: no dev rows", "whose labels you trust", error=DataError):
        clean(Recipe.from_dict(no_dev), tmp_path / "out", eg.quiet)
    assert not (tmp_path / "out").exists()


def test_a_model_in_16_bits_is_refused(model_folder: Path, data: Path, tmp_path: Path) -> None:
    model = eg.load_model(str(model_folder), dtype="bfloat16", report=eg.quiet)
    with refused("bfloat16", "load it with dtype 'float32'", error=ModelError):
        clean(Recipe.from_dict(values(model_folder, data)), tmp_path / "out", eg.quiet, model=model)


def test_a_recipe_in_16_bits_is_ranked_in_32(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    told = list[dict[str, Any]]()
    recipe = Recipe.from_dict(values(model_folder, data, model={"dtype": "bfloat16"}))
    clean(recipe, tmp_path / "out", told.append, tuning=Tuning(passes=1, products=1))
    notes = [event["text"] for event in told if event["event"] == "note"]
    assert "model.dtype is float32 here, as bfloat16 is too coarse" in notes


def test_a_damaged_state_is_no_ranking(model_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"damaged")
    with refused("exists already; choose another folder", error=RunError):
        clean(Recipe.from_dict(values(model_folder, data)), tmp_path, eg.quiet)
