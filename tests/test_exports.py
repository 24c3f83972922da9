"""Every destination, by the command line: checked, shared, refused, interrupted, broken."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import embedgrad as package
import export_kit
import tiny
from bad_kit import contents
from embedgrad import Recipe, run
from embedgrad.deploy import folder as folders
from embedgrad.deploy.destinations.client_code import open_example
from embedgrad.deploy.job import DESTINATIONS, Destination, Job, find_destination
from embedgrad.deploy.verify import parity
from embedgrad.prompt import artifact
from embedgrad.report.terminal.tables import verdict
from kit import noisy
from run_kit import ROWS, Command, Done, save_model, values, write_jsonl

pytest_plugins = ["tiny_runs"]

TOLERANCE = dict.fromkeys(DESTINATIONS, 1e-4) | {"gguf": 1e-3}
FRONT = {"user": "[[Is the review positive or negative?]]\n\nReview: {review}"}


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs of one model, whose rows were moved so far that each of them counts."""

    folder: Path
    model: Path

    def of(self, to: str) -> Path:
        """A run that can be exported there."""
        return self.folder / ("front" if to == "peft" else "after")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("deployed")
    model = export_kit.save_base(folder / "model")
    texts = {e.columns["review"]: dict(e.columns) for e in tiny.reviews(160)}
    rows = list(texts.values())
    for split, count in {**ROWS, "dev": 34}.items():
        write_jsonl(folder / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    for name, template in (("after", {}), ("front", FRONT)):
        recipe = values(
            model,
            folder,
            template=template,
            training={"steps": 1},
            evaluation={"batch_size": 8},
        )
        run(Recipe.from_dict(recipe), folder / name)
        prompt = artifact.load(folder / name)
        moved = noisy(prompt.start_rows, 0.25, seed=len(name))
        artifact.save(prompt.with_rows(moved), folder / name / "prompt")
    return Runs(folder, model)


def exported(embedgrad: Command, runs: Runs, to: str, out: Path, *more: object) -> Done:
    return embedgrad("export", runs.of(to), "--to", to, "--out", out, "--quiet", *more)


def one_line(done: Done, *parts: str) -> None:
    """Refused by one line on standard error that holds all parts."""
    assert done.code == 2, done
    assert done.out == ""
    assert len(done.lines) == 1, done.err
    assert done.err.startswith("error: ")
    assert done.lines[0].isprintable()
    for part in parts:
        assert part in done.err


# -- every destination -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", DESTINATIONS)
def test_an_export_is_checked_in_its_own_engine(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    done = exported(embedgrad, runs, to, out, "--json")
    assert done.code == 0, done.err
    report = json.loads((out / "verify.json").read_text("utf-8"))
    assert done.json["verify"] == report
    assert report["destination"] == to
    assert report["passed"] is True
    assert report["problems"] == []
    assert report["rows"] == 32
    assert report["tolerance"] == TOLERANCE[to]
    assert 0 <= report["max_logprob_difference"] < TOLERANCE[to]
    assert 0 <= report["step_zero_difference"] < 1e-5 + 1e-4
    assert 0 <= report["added_mass"] < 1e-4
    assert report["greedy_agreement"] is None  # for free answers
    assert report["choice_agreement"] == 1
    # SGLang limits the reply to texts, which a random model spells in letters.
    assert report["limited_agreement"] == 1 or to == "sglang"

    entries = json.loads((out / "embedgrad" / "export.json").read_text("utf-8"))
    name = runs.of(to).name
    assert entries["destination"] == to
    assert list(entries["prompts"]) == [name]
    assert entries["files"] == folders.digests(out)
    assert set(entries["files"]) >= {f"embedgrad/{name}/prompt.json"}
    assert (out / entries["prompts"][name]["run"]).resolve() == runs.of(to).resolve()
    wanted = artifact.load(runs.of(to))
    assert torch.equal(artifact.load(out / "embedgrad" / name).rows, wanted.rows)
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    card = (out / "README.md").read_text("utf-8")
    for command in done.json["commands"]:
        assert command.replace(str(out), "out") in card
    for text in ("The check passed.", "## Security", "License of the data: not stated", "torch "):
        assert text in card
    # The servers themselves are not asked, and nobody may think so.
    server = {"vllm": "vLLM", "sglang": "SGLang"}.get(to)
    by = f"{server} request bodies, decoded and given to the base model" if server else "its own"
    assert report["engine"].startswith(by)
    assert f"It compared this export, by {report['engine']}, with the training path" in card
    assert (f"({server} itself was not asked)" in card) is (server is not None)
    for path in out.rglob("*"):  # the folder it was written in is gone
        if path.suffix in (".json", ".py", ".md", ".jinja"):
            assert ".out." not in path.read_text("utf-8"), path

    before = contents(out)
    again = embedgrad("verify", out, "--json", "--quiet")
    assert again.code == 0, again.err
    assert again.json["passed"] is True
    assert again.json["max_logprob_difference"] == pytest.approx(
        report["max_logprob_difference"], abs=TOLERANCE[to] / 10
    )
    after = contents(out)
    changed = {path for path in after if after[path] != before[path]}
    assert changed <= {"verify.json", "README.md"}
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("to", "remedy"),
    [
        ("vocabulary", "rank the choices by log-probability, as the last request does"),
        ("vllm", "exports to safetensors, gguf and vocabulary can rank the choices"),
    ],
)
def test_low_agreement_is_a_warning_with_its_remedy(
    to: str,
    remedy: str,
    runs: Runs,
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def low(*given: Any) -> dict[str, Any]:
        return {**parity.check(*given), "limited_agreement": 0.5}

    monkeypatch.setattr("embedgrad.deploy.export.check", low)
    out = tmp_path / "out"
    done = embedgrad("export", runs.of(to), "--to", to, "--out", out, "--check-rows", 2)
    told = f"by the answers that clients get in only 50.0 % of the rows; {remedy}"
    assert done.code == 0
    assert told in " ".join(done.err.split())
    assert f"warning: the same choices as `evaluate`, {told}" in (out / "README.md").read_text()
    again = embedgrad("verify", out, "--check-rows", 2)
    assert told in " ".join(again.err.split())


def test_check_rows_sets_how_many_rows_are_compared(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    done = exported(embedgrad, runs, "safetensors", tmp_path / "out", "--check-rows", 5, "--json")
    assert done.json["verify"]["rows"] == 5
    done = embedgrad("verify", tmp_path / "out", "--check-rows", 7, "--json", "--quiet")
    assert done.json["rows"] == 7
    one_line(
        exported(embedgrad, runs, "safetensors", tmp_path / "no", "--check-rows", 0), "check-rows"
    )
    with pytest.raises(package.EmbedgradError, match="check_rows: expected at least 1, got 0"):
        package.export(runs.of("gguf"), "gguf", tmp_path / "no", check_rows=0)


def test_a_card_shows_scores_with_interval_and_verdict(runs: Runs, tmp_path: Path) -> None:
    package.export(runs.of("gguf"), "gguf", tmp_path / "out", verify=False)
    (line,) = (
        line
        for line in (tmp_path / "out" / "README.md").read_text("utf-8").splitlines()
        if line.startswith("- `after`: ")
    )
    assert re.search(r"[\d.]+ % \([\d.]+ to [\d.]+\) right on \d+ test rows, its text", line)
    result = json.loads((runs.of("gguf") / "result.json").read_text("utf-8"))
    assert verdict(result["difference"]) in line
    assert "greedy reply is a choice in" in line


def spoil(monkeypatch: pytest.MonkeyPatch, to: str, change: Callable[[Any], Any]) -> None:
    """Hand the destination's writer prompts with other rows than the check knows."""
    made = type(find_destination(to))
    write = made.write

    def broken(self: Destination, job: Job, folder: Path) -> dict[str, Any]:
        prompts = [
            dataclasses.replace(p, prompt=p.prompt.with_rows(change(p.prompt))) for p in job.prompts
        ]
        return write(self, dataclasses.replace(job, prompts=prompts), folder)

    monkeypatch.setattr(made, "write", broken)


def one_row_of_the_text(prompt: Any) -> torch.Tensor:
    rows = prompt.rows.clone()
    rows[2] = prompt.start_rows[2]
    return rows


@pytest.mark.parametrize("to", DESTINATIONS)
def test_a_writer_broken_in_one_row_is_caught(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, to, one_row_of_the_text)
    done = exported(embedgrad, runs, to, tmp_path / "out", "--check-rows", 8)
    one_line(
        done,
        "out: the export does not compute what training computed: next-token log-probabilities",
        "it was not kept; see ",
        "out.failed.json for the report",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed.json"]
    report = json.loads((tmp_path / "out.failed.json").read_text("utf-8"))
    assert report["passed"] is False
    assert report["max_logprob_difference"] > 10 * TOLERANCE[to]

    monkeypatch.undo()  # the next one, which is good, takes the report away
    assert exported(embedgrad, runs, to, tmp_path / "out", "--no-verify").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rows_in_half_precision_are_caught_too(
    runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "safetensors", lambda prompt: prompt.rows.half().float())
    done = exported(embedgrad, runs, "safetensors", tmp_path / "out")
    one_line(done, "next-token log-probabilities")


# -- several prompts, links, sizes -----------------------------------------------------------------


@pytest.mark.parametrize("to", ["vocabulary", "gguf"])
def test_several_prompts_share_a_checkpoint(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "both"
    both = (runs.folder / "after", f"before={runs.folder / 'front'}")
    done = embedgrad("export", *both, "--to", to, "--out", out, "--json", "--quiet")
    assert done.code == 0, done.err
    found = done.json["verify"]["prompts"]
    assert list(found) == ["after", "before"]
    for one in found.values():
        assert one["problems"] == []
        assert one["max_logprob_difference"] < TOLERANCE[to]
        assert one["rows"] == 32
    card = (out / "README.md").read_text("utf-8")
    assert '"chat_template_kwargs": {"prompt": "before"}' in card
    assert embedgrad("verify", out, "--quiet").code == 0


def test_the_terminal_tells_size_check_commands_and_smaller_ways(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = exported(embedgrad, runs, "vocabulary", out)
    own = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert done.out.startswith(f"wrote {out}: {own / 1000:.0f} kB, in ")
    for part in (
        "check of vocabulary by its own engine: passed\n  rows: 32\n",
        "  the same choices as `evaluate`, ranked by log-probability: 100.0 % (",
        f"to use it:\n  transformers serve {out}\n",
        "smaller exports:\n  the artifact takes ",
        "--to vllm",
    ):
        assert part in done.out


def test_linked_weights_are_told_apart(runs: Runs, embedgrad: Command, tmp_path: Path) -> None:
    sharded = export_kit.save_base(tmp_path / "model", shards="20KB")
    recipe = values(sharded, runs.folder, training={"steps": 1})
    run(Recipe.from_dict(recipe), tmp_path / "run")
    call = ("export", tmp_path / "run", "--to", "vocabulary", "--json", "--quiet", "--no-verify")
    copied = embedgrad(*call, "--out", tmp_path / "copied").json
    linked = embedgrad(*call, "--out", tmp_path / "linked", "--set", "export.weights=link").json
    assert copied["linked_bytes"] == 0
    assert linked["linked_bytes"] > 10_000
    assert linked["bytes"] + linked["linked_bytes"] == pytest.approx(copied["bytes"], rel=0.02)


def test_fewer_rows_than_a_check_wants_are_told(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    few = values(runs.model, runs.folder, training={"steps": 1})
    few["data"] |= {"limit": {"train": 4, "dev": 3, "test": 2}}
    run(Recipe.from_dict(few), tmp_path / "run")
    out = tmp_path / "out"
    done = embedgrad(
        "export", tmp_path / "run", "--to", "safetensors", "--out", out, "--json", "--quiet"
    )
    assert done.code == 0, done.err
    assert done.json["verify"]["rows"] == 9
    assert done.json["verify"]["prompts"]["run"]["fewer_rows"] == "there were 9"
    assert "On fewer rows than 32: there were 9." in (out / "README.md").read_text("utf-8")


def test_what_is_written_is_not_calibrated_on_the_rows_of_the_check(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    made = type(find_destination("safetensors"))
    write = made.write

    def written(self: Destination, job: Job, folder: Path) -> dict[str, Any]:
        seen["written"] = {row.example.source for row in job.prompts[0].sequences}
        return write(self, job, folder)

    def checked(to: str, folder: Path, job: Job, found: Any) -> dict[str, Any]:
        seen["checked"] = {row.example.source for row in job.prompts[0].sequences}
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "write", written)
    monkeypatch.setattr("embedgrad.deploy.export.check", checked)
    with pytest.raises(KeyboardInterrupt):
        package.export(runs.folder / "after", "safetensors", tmp_path / "out")
    assert len(seen["written"]) == len(seen["checked"]) == 32
    assert not seen["written"] & seen["checked"]


# -- what verify refuses ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    package.export(runs.folder / "after", "safetensors", out, verify=False)
    return out


@pytest.fixture
def export_copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copied" / "out"))


def test_a_moved_export_is_checked_where_its_run_is_named(
    export_copy: Path, runs: Runs, embedgrad: Command
) -> None:
    one_line(
        embedgrad("verify", export_copy, "--quiet"),
        "the run that it was made from is not in",
        "--run after=RUN",
    )
    before = (export_copy / "README.md").read_text("utf-8")
    done = embedgrad("verify", export_copy, "--run", runs.folder / "after", "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.json["passed"] is True
    card = (export_copy / "README.md").read_text("utf-8")
    assert "The check passed." in card
    assert "exported without a check" not in card
    assert before.partition("## Security")[2] == card.partition("## Security")[2]
    assert before.partition("## What")[0] == card.partition("## What")[0]


def test_an_export_behind_a_link_finds_its_run(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er", target_is_directory=True)
    out = tmp_path / "link" / "out"
    package.export(runs.folder / "after", "safetensors", out, verify=False)
    for way in (out, tmp_path / "deep" / "er" / "out"):
        assert embedgrad("verify", way, "--quiet").code == 0


def test_a_check_that_fails_later_says_so_everywhere(
    export_copy: Path, runs: Runs, embedgrad: Command
) -> None:
    """An export that was made broken, and signed: as by a writer with a mistake."""
    prompt = artifact.load(export_copy / "prompt")
    artifact.save(prompt.with_rows(one_row_of_the_text(prompt)), export_copy / "prompt")
    entries = json.loads((export_copy / folders.FILE).read_text("utf-8"))
    entries["files"] = folders.digests(export_copy)
    (export_copy / folders.FILE).write_text(json.dumps(entries), "utf-8")
    done = embedgrad("verify", export_copy, "--run", runs.folder / "after", "--quiet")
    assert done.code == 2
    assert len(done.lines) == 1
    assert "does not compute what training computed: next-token" in done.err
    assert "check of safetensors by its own engine: failed" in done.out
    assert "**The check failed.**" in (export_copy / "README.md").read_text("utf-8")
    assert json.loads((export_copy / "verify.json").read_text("utf-8"))["passed"] is False


def change_file(out: Path) -> None:
    path = out / "prompt" / "prompt.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def entry(name: str, value: object) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        entries = json.loads((out / folders.FILE).read_text("utf-8"))
        entries[name] = value
        (out / folders.FILE).write_text(json.dumps(entries), "utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_file, "prompt.safetensors: was changed (its digest differs)"),
        (lambda out: (out / "prompt" / "prompt.json").unlink(), "prompt.json: is missing"),
        (lambda out: (out / folders.FILE).unlink(), "expected a folder that `embedgrad export"),
        (lambda out: (out / folders.FILE).write_bytes(b"{"), "export.json: is not JSON"),
        (entry("format", "x"), 'expected "format": "embedgrad-export"'),
        (entry("version", 1), "has format version 1, but this embedgrad reads 2; export the run"),
        (entry("version", 9), "has format version 9, but this embedgrad reads 2; export"),
        (entry("prompts", {}), "prompts: Dictionary should have at least 1 item"),
        (entry("prompts", {"a": {"run": 3}}), "prompts.a.run: "),
        (entry("destination", "onnx"), "unknown destination 'onnx'"),
    ],
)
def test_a_damaged_export_is_refused(
    change: Callable[[Path], None], told: str, export_copy: Path, runs: Runs, embedgrad: Command
) -> None:
    change(export_copy)
    done = embedgrad("verify", export_copy, "--run", runs.folder / "after", "--quiet")
    one_line(done, told)


def test_a_run_that_was_trained_again_is_refused(
    export_copy: Path, runs: Runs, embedgrad: Command
) -> None:
    done = embedgrad("verify", export_copy, "--run", runs.folder / "front", "--quiet")
    one_line(done, "was made from other rows than", "export that run again")


# -- what export refuses ---------------------------------------------------------------------------


def unchanged(runs: Runs, tmp_path: Path, call: Callable[[], Done], *parts: str) -> None:
    """A call is refused by one line, and leaves all folders as they were."""
    before = contents(tmp_path), contents(runs.folder)
    one_line(call(), *parts)
    assert (contents(tmp_path), contents(runs.folder)) == before


def test_an_unknown_destination_is_told_before_anything_is_loaded(
    embedgrad: Command, tmp_path: Path
) -> None:
    done = embedgrad("export", tmp_path / "none", "--to", "vocabularry", "--out", tmp_path / "out")
    one_line(done, "--to: unknown destination 'vocabularry'; did you mean 'vocabulary'?")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_occupied_place_is_left_alone(
    kind: str, runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        (out / "sub").mkdir(parents=True)
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    told = "out: exists already; choose another folder for --out"
    unchanged(runs, tmp_path, lambda: exported(embedgrad, runs, "safetensors", out), told)


def test_a_place_that_cannot_be_made_is_told(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    unchanged(
        runs,
        tmp_path,
        lambda: exported(embedgrad, runs, "safetensors", out),
        "out: cannot be written (Not a directory)",
    )


def test_a_prompt_for_another_model_is_refused(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=1)
    unchanged(
        runs,
        tmp_path,
        lambda: exported(
            embedgrad, runs, "vocabulary", tmp_path / "out", "--set", f"model.name={other}"
        ),
        f"this prompt was made for {runs.model}, not for {other}: ",
        "use the model that it was made for",
    )


def test_prompts_of_two_models_share_no_export(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    other = export_kit.save_base(tmp_path / "other", seed=1)
    recipe = values(other, runs.folder, training={"steps": 1})
    run(Recipe.from_dict(recipe), tmp_path / "run")
    call = ("export", runs.folder / "after", tmp_path / "run", "--to", "vocabulary")
    unchanged(
        runs,
        tmp_path,
        lambda: embedgrad(*call, "--out", tmp_path / "out", "--quiet"),
        f"this prompt was made for {other}",
        f"not for {runs.model}",
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["after", "after"], "two prompts are called 'after'"),
        (["a b=after"], "prompt name 'a b': expected 1 to 64 letters"),
        (["none"], "none: no such run folder"),
    ],
)
def test_names_of_prompts(
    given: list[str], told: str, runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    def path(text: str) -> str:
        name, equals, folder = text.rpartition("=")
        return f"{name}{equals}{runs.folder / folder}"

    call = ("export", *map(path, given), "--to", "vocabulary", "--out", tmp_path / "out")
    unchanged(runs, tmp_path, lambda: embedgrad(*call, "--quiet"), told)


def test_a_destination_that_cannot_hold_the_prompt_says_why_and_what_can(
    runs: Runs, embedgrad: Command, tmp_path: Path
) -> None:
    call = ("export", runs.folder / "after", "--to", "peft", "--out", tmp_path / "out", "--quiet")
    unchanged(
        runs,
        tmp_path,
        lambda: embedgrad(*call),
        "after: cannot be exported to peft: PEFT puts a prompt before everything else",
        "(possible: safetensors, vocabulary, gguf, vllm, sglang)",
    )


def test_a_missing_engine_is_told_before_anything_is_loaded(
    runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedgrad.deploy.verify import engine as table

    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("embedgrad.deploy.export.open_runs", pytest.fail)
    done = exported(embedgrad, runs, "gguf", tmp_path / "out")
    one_line(done, "needs the package xllamacpp", "pip install 'embedgrad[llamacpp]'")


@pytest.mark.parametrize("to", DESTINATIONS)
def test_a_disk_without_room_is_told_before_anything_is_written(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20 - 1))
    monkeypatch.setattr(type(find_destination(to)), "write", pytest.fail)
    unchanged(
        runs,
        tmp_path,
        lambda: exported(embedgrad, runs, to, tmp_path / "new" / "out"),
        "out: needs ",
        "are free there",
    )


@pytest.mark.parametrize("to", ["vocabulary", "gguf"])
def test_the_room_asked_for_is_what_an_export_takes(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(folders, "check_room", lambda out, need, **_: asked.append(need))
    done = exported(embedgrad, runs, to, tmp_path / "out", "--no-verify", "--json")
    assert done.json["bytes"] <= asked[0] + folders.SPARE
    assert asked[0] < 3 * done.json["bytes"] + 2**21


def test_the_copy_that_a_check_writes_needs_room_too(
    runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 30 * 2**20  # as of a model that the rows of the check do not count beside
    made = type(find_destination("gguf"))
    monkeypatch.setattr(made, "bytes_needed", lambda self, job: need)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need * 3 // 2))
    told = "are free there; free some space, or choose another folder for --out"
    unchanged(
        runs,
        tmp_path,
        lambda: exported(embedgrad, runs, "gguf", tmp_path / "out"),
        "out: needs 64 MB, but only 47 MB",
        told,
    )
    assert exported(embedgrad, runs, "gguf", tmp_path / "out", "--no-verify").code == 0


def test_links_are_named_where_they_would_make_room(
    runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    for to in DESTINATIONS:
        done = exported(embedgrad, runs, to, tmp_path / "out")
        assert ("export.weights=link" in done.err) is (to == "vocabulary"), to


@pytest.mark.parametrize("to", ["safetensors", "vllm"])
def test_a_file_that_cannot_be_written_is_told_by_the_folder_asked_for(
    to: str, runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedgrad import atomic_files as files

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    done = exported(embedgrad, runs, to, tmp_path / "out")
    one_line(done, f"error: {tmp_path / 'out'}: cannot be written (No space left on device);")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", DESTINATIONS)
@pytest.mark.parametrize("how", ["full", "interrupted"])
def test_a_write_that_is_cut_off_leaves_nothing(
    to: str, how: str, runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    made = type(find_destination(to))
    write = made.write

    def cut(self: Destination, job: Job, folder: Path) -> dict[str, Any]:
        write(self, job, folder)
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "write", cut)
    before = contents(runs.folder)
    done = exported(embedgrad, runs, to, tmp_path / "new" / "out")
    if how == "full":
        one_line(done, "out: cannot be written (No space left on device); nothing was left there")
    else:
        assert (done.code, done.err) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert contents(runs.folder) == before


def test_an_interrupted_check_leaves_nothing(
    runs: Runs, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embedgrad.deploy.verify.parity.open_engine", stop)
    assert exported(embedgrad, runs, "safetensors", tmp_path / "out").code == 130
    assert list(tmp_path.iterdir()) == []


# -- the card --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["choices", "free"])
def test_a_model_that_transformers_cannot_answer_with_is_told(
    runs: Runs,
    generated: Path,
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no layer\nof attention")

    def opened(*arguments: Any) -> Any:
        program = open_example(*arguments)
        program.answer = fail
        return program

    if task == "choices":
        monkeypatch.setattr("embedgrad.deploy.verify.embeddings.open_example", opened)
    else:
        monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fail)
    run = generated if task == "free" else runs.of("safetensors")
    done = embedgrad("export", run, "--to", "safetensors", "--out", tmp_path / "out")
    assert done.code == 2
    assert done.lines[-1] == (
        "error: transformers cannot answer with the exported prompt: "
        "no layer of attention (ValueError)"
    )
    assert not list(tmp_path.iterdir())


def test_foreign_text_stays_text_on_the_card() -> None:
    from embedgrad.deploy.card import code

    assert code("a") == "`a`"
    assert code("a`b") == "`` a`b ``"
    assert code("``") == "``` `` ```"
    assert code("x\n## y") == "`x\\n## y`"


def test_the_card_warns_of_what_the_destination_cannot_guard(runs: Runs, tmp_path: Path) -> None:
    said = {}
    for to in ("vocabulary", "vllm", "safetensors"):
        package.export(runs.of(to), to, tmp_path / to, verify=False)
        card = (tmp_path / to / "README.md").read_text("utf-8")
        said[to] = card.partition("## Security\n\n")[2].partition("\n## ")[0]
        assert "Nothing: it was exported without a check." in card
        assert not (tmp_path / to / "verify.json").exists()
    assert "It cannot guard raw completions" in said["vocabulary"]
    assert "trusted users only" in said["vllm"]
    assert "--enable-prompt-embeds" in said["vllm"]
    assert "unpickled" in said["safetensors"]
