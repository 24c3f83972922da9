"""A run is not tied to where it was made: other current folders, moves, prompts alone, exports."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import embedgrad as eg
import export_kit
import tiny
from embedgrad.deploy.job import DESTINATIONS
from embedgrad.deploy.verify import parity
from embedgrad.errors import RunError
from embedgrad.recipe.check_rows import FILE, read_rows
from embedgrad.recipe.open_run import open_run
from embedgrad.recipe.paths import share_folder
from kit import reseal
from run_kit import ROWS, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

FRONT = {"user": "[[Is the review positive or negative?]]\n\nReview: {review}"}


@dataclass(frozen=True)
class Project:
    """A folder with a recipe, its data, a scorer, a model, and a run, all named relatively."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "first"

    def moved(self, to: Path) -> Project:
        """The whole project in another place."""
        return Project(Path(shutil.move(self.folder, to)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("place") / "project"
    export_kit.save_base(folder / "models" / "llama")
    (folder / "data").mkdir()
    (folder / "checks.py").write_text("def right(reply, answer):\n    return reply == answer\n")
    texts = {e.columns["review"]: dict(e.columns) for e in tiny.reviews(160)}
    rows = list(texts.values())
    for split, count in ROWS.items():
        write_jsonl(folder / "data" / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    recipe = values(
        Path("models/llama"),
        Path("data"),
        template=FRONT,
        training={"steps": 1},
        evaluation={"scorer": {"name": "callable", "function": "checks:right"}},
    )
    (folder / "r.toml").write_text(tomli_w.dumps(recipe), "utf-8")
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("nowhere"))
    try:
        eg.run(eg.Recipe.read(folder / "r.toml"), folder / "runs" / "first")
    finally:
        os.chdir(before)
    return Project(folder)


@pytest.fixture
def project(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy that may be changed; the current folder is another one."""
    monkeypatch.setattr(parity, "GREEDY_TOKENS", 4)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return Project(Path(shutil.copytree(made.folder, tmp_path / "project")))


def succeeds(done: Any) -> None:
    assert done.code == 0, done.err


# -- runs ------------------------------------------------------------------------------------------

COMMANDS = {
    "evaluate": lambda p: ["evaluate", p.run],
    "inspect": lambda p: ["inspect", p.run, "--rows", 4],
    "generate": lambda p: ["generate", p.run, "A film."],
    "report": lambda p: ["report", p.run, "--rows", 4, "--out", p.folder / "page.html"],
    "export": lambda p: ["export", p.run, "--to", "safetensors", "--out", p.folder / "out"],
    "resume": lambda p: ["resume", p.run, "--set", "training.steps=2"],
    "plan": lambda p: ["plan", p.folder / "r.toml", "--no-probe"],
    "optimize": lambda p: ["optimize", p.folder / "r.toml", "--out", p.folder / "runs" / "more"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_from_every_folder(
    command: str, project: Project, embedgrad: Command, tmp_path: Path
) -> None:
    place = project.moved(tmp_path / "other")
    done = embedgrad(*COMMANDS[command](place), "--quiet")
    succeeds(done)
    assert "Left out" not in done.err
    if command == "report":
        assert (place.run / "interpolation.json").is_file()


def test_a_comparison_resumes_from_another_folder(
    project: Project, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ["--methods", "text", "--quiet", "--json"]
    succeeds(embedgrad("compare", project.folder / "r.toml", "--out", project.folder / "c", *once))
    monkeypatch.chdir(project.folder)
    succeeds(embedgrad("compare", "r.toml", "--out", "c", *once))
    monkeypatch.chdir(tmp_path)
    place = project.moved(tmp_path / "other").folder
    done = embedgrad("compare", place / "r.toml", "--out", place / "c", *once)
    succeeds(done)
    assert done.json["scored"] == 1


def test_a_run_writes_paths_that_lead_from_it(made: Project) -> None:
    text = (made.run / "recipe.toml").read_text("utf-8")
    assert 'train = "../../data/train.jsonl"' in text
    assert 'name = "../../models/llama"' in text
    assert 'folder = "../.."' in text
    for name in ("recipe.toml", "result.json", "check_rows.jsonl", "predictions.jsonl"):
        assert str(made.folder) not in (made.run / name).read_text("utf-8")


def test_paths_of_settings_are_relative_to_the_current_folder(project: Project) -> None:
    shutil.copy(project.folder / "data" / "test.jsonl", "mine.jsonl")
    read = eg.Recipe.read(project.folder / "r.toml", ["data.test=mine.jsonl"])
    assert read.data.test == "mine.jsonl"
    assert Path(read.data.train).resolve() == project.folder / "data" / "train.jsonl"


def test_what_is_only_in_the_current_folder_is_meant_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.folder / "recipes").mkdir()
    shutil.move(project.folder / "r.toml", project.folder / "recipes" / "r.toml")
    monkeypatch.chdir(project.folder)
    assert eg.Recipe.read("recipes/r.toml").data.train == "data/train.jsonl"


def test_a_starter_recipe_names_the_data_from_where_it_lies(
    project: Project, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    succeeds(embedgrad("new", "data/train.jsonl", "--out", "recipes/n.toml"))
    monkeypatch.chdir(project.folder.parent)
    read = eg.Recipe.read(project.folder / "recipes" / "n.toml")
    assert Path(read.data.train).resolve() == project.folder / "data" / "train.jsonl"


@pytest.mark.parametrize("command", ["evaluate", "inspect", "resume"])
def test_moved_data_is_named_in_one_line(
    command: str, project: Project, embedgrad: Command, tmp_path: Path
) -> None:
    shutil.move(project.folder / "data", tmp_path / "elsewhere")
    more = ["--set", "training.steps=2"] if command == "resume" else []
    done = embedgrad(command, project.run, "--quiet", *more)
    assert (done.code, len(done.lines)) == (2, 1)
    assert "train.jsonl: no such file" in done.err
    assert "--set data.train=PATH" in done.err
    for split in ROWS:
        more += ["--set", f"data.{split}=../elsewhere/{split}.jsonl"]
    succeeds(embedgrad(command, project.run, "--quiet", *more))


def test_a_resumed_run_refuses_other_rows_in_the_place_of_moved_ones(
    project: Project, embedgrad: Command
) -> None:
    shutil.move(project.folder / "data" / "train.jsonl", "t.jsonl")
    rows = Path("t.jsonl").read_text("utf-8").splitlines(keepends=True)
    Path("t.jsonl").write_text("".join(rows[1:]), "utf-8")
    sets = ["--set", "training.steps=2", "--set", "data.train=t.jsonl"]
    done = embedgrad("resume", project.run, "--quiet", *sets)
    assert done.code == 2
    assert "cannot be resumed, as data.train is not what it was" in done.err


def test_a_run_that_moves_alone_finds_its_model(
    project: Project, embedgrad: Command, tmp_path: Path
) -> None:
    alone = Path(shutil.move(project.run, tmp_path / "alone"))
    prompt = json.loads((alone / "prompt" / "prompt.json").read_text("utf-8"))
    prompt["model"]["name"] = str(project.folder / "models" / "llama")  # as if made in this copy
    (alone / "prompt" / "prompt.json").write_text(json.dumps(prompt), "utf-8")
    reseal(alone / "prompt")
    succeeds(embedgrad("generate", alone, "A film.", "--quiet"))
    shutil.move(project.folder / "models", tmp_path / "models")
    done = embedgrad("generate", alone, "A film.", "--quiet")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "give --set model.name=" in done.err
    sets = ["--set", "model.name=../models/llama"]
    succeeds(embedgrad("generate", alone, "A film.", "--quiet", *sets))


# -- rows for checks -------------------------------------------------------------------------------


def test_an_export_needs_neither_the_data_nor_the_scorer(
    project: Project, embedgrad: Command
) -> None:
    kept = read_rows(project.run)
    assert kept is not None
    assert len(kept) == sum(ROWS.values())
    before = open_run(project.run).read_data()
    assert [row.source for row in kept] == [
        row.source for row in (*before.dev, *before.test, *before.train)
    ]
    shutil.rmtree(project.folder / "data")
    (project.folder / "checks.py").unlink()
    done = embedgrad("export", project.run, "--to", "safetensors", "--out", "out", "--json")
    succeeds(done)
    assert done.json["verify"]["rows"] == 32
    succeeds(embedgrad("verify", "out", "--json"))


def test_an_export_without_a_check_needs_no_rows(project: Project, embedgrad: Command) -> None:
    shutil.rmtree(project.folder / "data")
    (project.run / FILE).unlink()
    to = ["export", project.run, "--to", "safetensors", "--out", "out", "--quiet"]
    refused = embedgrad(*to)
    assert refused.code == 2
    assert "--set data.train=PATH" in refused.err
    succeeds(embedgrad(*to, "--no-verify"))


def test_damaged_rows_are_named(project: Project, embedgrad: Command) -> None:
    with (project.run / FILE).open("a") as file:
        file.write('{"columns": {"review": 3}, "answer": "x", "source": "y"}\n')
    done = embedgrad("export", project.run, "--to", "safetensors", "--out", "out", "--quiet")
    assert (done.code, len(done.lines)) == (2, 1)
    assert f"{FILE}:{sum(ROWS.values()) + 1}: is damaged" in done.err


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "{}", "{", '{"columns": [], "answer": "x", "source": "y"}'),
        '{"columns": {"review": "x"}, "answer": 1, "source": "y"}',
        '{"columns": {"review": "x"}, "answer": "x"}',
    ],
)
def test_a_damaged_row_is_one_line(line: str, tmp_path: Path) -> None:
    good = '{"columns": {"review": "x"}, "answer": "x", "source": "y"}'
    (tmp_path / FILE).write_text(f"{good}\n{line}\n")
    with pytest.raises(RunError, match=f"{FILE}:2: is damaged"):
        read_rows(tmp_path)


# -- a prompt alone --------------------------------------------------------------------------------


@pytest.fixture(params=["copied", "saved", "inside its run"])
def prompt(request: pytest.FixtureRequest, project: Project, made: Project) -> Path:
    """A prompt's folder: out of a run, or of prompts trained step by step in Python."""
    if request.param == "inside its run":
        return project.run / "prompt"
    if request.param == "copied":
        return Path(shutil.copytree(made.run / "prompt", "copied"))
    model = eg.load_model(str(made.folder / "models" / "llama"), device="cpu", dtype="float32")
    template, target = eg.Template.chat(**FRONT), eg.Target(("negative", "positive"))
    rows = tiny.reviews(8)
    sequencer = model.sequencer(template, target, rows)
    sequences = sequencer.build(rows)
    training = eg.Training(steps=1, batch_size=4)
    refined = eg.optimize(model, sequencer, sequences, sequences, training=training)
    return eg.save(refined.prompt, "saved")


def test_a_saved_prompt_knows_its_model(prompt: Path, made: Project) -> None:
    facts = eg.load(prompt).provenance["model"]
    assert Path(facts["name"]) in [
        made.folder / "models" / "llama",
        Path("../project/models/llama").resolve(),
    ]
    assert facts["revision"] is None
    assert facts["embedding_digest"].startswith("sha256:")


def test_a_prompt_alone_answers_and_is_exported(
    prompt: Path, embedgrad: Command, tmp_path: Path
) -> None:
    answer = eg.load(prompt).generate("A film to remember.")
    assert answer in ("negative", "positive")
    told = embedgrad("generate", prompt, "A film to remember.", "--json")
    succeeds(told)
    assert told.json["answer"] == answer
    done = embedgrad("export", prompt, "--to", "safetensors", "--out", "out", "--json")
    succeeds(done)
    inside = (prompt.parent / "recipe.toml").is_file()
    notes = [note for note in done.json["notes"] if "not checked" in note]
    assert (done.json["verify"] is not None, len(notes)) == ((True, 0) if inside else (False, 1))
    if not inside:
        shown = embedgrad("export", prompt, "--to", "safetensors", "--out", "shown", "--quiet")
        assert "not checked: " + prompt.name + " is a prompt without its run" in shown.out
    page = embedgrad("report", prompt, "--out", "page.html", "--rows", 4, "--quiet")
    succeeds(page)
    assert ("a prompt without its run" in Path("page.html").read_text("utf-8")) is not inside


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_a_prompt_alone_has_no_rows(
    command: str, made: Project, project: Project, embedgrad: Command
) -> None:
    shutil.copytree(made.run / "prompt", "copied")
    done = embedgrad(command, "copied", "--quiet")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "copied: is a prompt without its run" in done.err


def test_a_prompt_alone_runs_no_scorer_that_it_names(made: Project, project: Project) -> None:
    shutil.copytree(made.run / "prompt", "copied")
    saved = json.loads(Path("copied/prompt.json").read_text("utf-8"))
    assert saved["recipe"]["evaluation"]["scorer"]["function"] == "checks:right"
    assert open_run("copied").recipe.evaluation.scorer == eg.Evaluation().scorer


def test_a_prompt_that_names_no_model_says_what_to_give(
    made: Project, project: Project, embedgrad: Command
) -> None:
    prompt = eg.load(made.run).prompt.with_provenance(model={})
    eg.save(prompt, "bare")
    done = embedgrad("generate", "bare", "A film.", "--quiet")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "does not say which model it is for; give --set model.name=" in done.err
    digest = eg.load(made.run).provenance["model"]["embedding_digest"]
    eg.save(prompt.with_provenance(model={"embedding_digest": digest}), "bare")
    sets = ["--set", f"model.name={made.folder / 'models' / 'llama'}"]
    succeeds(embedgrad("generate", "bare", "A film.", "--quiet", *sets))


# -- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, "owner/llama"])
@pytest.mark.parametrize("to", DESTINATIONS)
def test_no_file_of_an_export_holds_a_path_of_this_machine(
    to: str, named: str | None, project: Project, embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "served" / "out"
    sets = ["--set", f"model.name={project.folder / 'models' / 'llama'}"]
    sets += ["--base-model", named] if named else []
    few = ["--check-rows", 4, "--json"]
    done = embedgrad("export", project.run, "--to", to, "--out", out, *few, *sets)
    succeeds(done)
    assert done.json["verify"]["passed"]
    succeeds(embedgrad("verify", out, *few))
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (tmp_path, tmp_path.parent, Path.home(), Path(eg.__file__).parent):
                assert str(place).encode() not in content, path
    card = (out / "README.md").read_text("utf-8")
    assert f"A refined prompt for `{named or 'llama'}`" in card
    assert ("base_model: " in card) is bool(named)
    if to == "peft":
        adapter = json.loads((out / "adapter_config.json").read_text("utf-8"))
        assert adapter["base_model_name_or_path"] == named
    if to in ("vllm", "sglang"):
        assert (named or '"$BASE_MODEL"') in done.json["commands"][0]
        assert str(project.folder) not in done.json["commands"][0]


def test_a_program_asks_for_a_base_model_that_has_no_public_name(
    project: Project, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("out")
    succeeds(embedgrad("export", project.run, "--to", "safetensors", "--out", out, "--no-verify"))
    program = compile((out / "example.py").read_text("utf-8"), str(out / "example.py"), "exec")
    with pytest.raises(SystemExit, match="set BASE_MODEL to the folder or Hub id of the base mod"):
        exec(program, {"__file__": str(out / "example.py")})
    monkeypatch.setenv("BASE_MODEL", str(project.folder / "models" / "llama"))
    names: dict[str, Any] = {"__file__": str(out / "example.py")}
    exec(program, names)
    assert torch.equal(names["rows"], eg.load(project.run).rows)


def test_a_prompt_in_an_export_asks_for_its_model(project: Project, embedgrad: Command) -> None:
    succeeds(embedgrad("export", project.run, "--to", "vllm", "--out", "out", "--no-verify"))
    with pytest.raises(eg.ArtifactError, match="not a place on this machine; give model="):
        eg.load("out").generate("A film.")
    model = str(project.folder / "models" / "llama")
    assert eg.load("out").generate("A film.", model=model) in ("negative", "positive")


def test_a_path_is_no_public_name(project: Project, embedgrad: Command) -> None:
    to = ["export", project.run, "--to", "vllm", "--out", "out", "--quiet"]
    done = embedgrad(*to, "--base-model", project.folder / "models" / "llama")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "is a path; expected a public name" in done.err


@pytest.mark.parametrize(
    ("path", "other", "shared"),
    [("/data/me/a", "/data/me/b/c", True), ("/data/me/a", "/srv/b", False), ("/a", "/b", False)],
)
def test_paths_without_a_common_folder_are_not_written_relatively(
    path: str, other: str, shared: bool
) -> None:
    assert share_folder(path, other) is shared
