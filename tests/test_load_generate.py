"""`embedgrad.load(path).generate(...)`, and the program that needs no embedgrad."""

from __future__ import annotations

import ast
import copy
import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import embedgrad
import tiny
from embedgrad import ArtifactError, DataError, EmbedgradError, EngineError, Target, Template
from embedgrad.deploy.destinations.client_code import (
    EXAMPLE_FILE,
    program_source,
    run_generated,
)
from embedgrad.deploy.destinations.safetensors import FilesOnly
from embedgrad.deploy.job import Job
from embedgrad.deploy.verify import parity as checks
from embedgrad.deploy.verify.embeddings import SnippetEngine
from embedgrad.deploy.verify.reference import compute_reference
from embedgrad.inference.refined_prompt import RefinedPrompt
from embedgrad.model.generation import replies
from embedgrad.prompt.artifact import save
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.report.terminal.bars import show
from export_kit import asked, exported, job_of, opened, save_base
from kit import PLACEMENTS

torch.set_num_threads(1)
pytest_plugins = ["tiny_runs"]
REVIEW = "The film was wonderful."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("load-generate") / "base")


@pytest.fixture(scope="module")
def job(base: Path) -> Job:
    """A prompt that chooses."""
    return job_of(opened(base))


@pytest.fixture(scope="module")
def free(base: Path) -> Job:
    """A prompt with free answers."""
    model = opened(base)
    made = exported(model)
    target = Target()
    prompt = replace(made.prompt, target=target)
    sequencer = model.sequencer(prompt.template, target, spans=prompt.spans, date=prompt.date)
    return job_of(model, replace(made, prompt=prompt, sequencer=sequencer))


def saved(job: Job, folder: Path, **provenance: Any) -> Path:
    """The job's prompt as an artifact that names its model."""
    info = job.model.info
    said = {"name": info.path, "revision": None, "embedding_digest": info.embedding_digest}
    provenance = {"model": {**said, "dtype": "float32"}, **provenance}
    return save(job.prompts[0].prompt.with_provenance(**provenance), folder)


def greedy(job: Job, texts: list[str], most: int) -> list[str]:
    """What the training path answers."""
    (prompt,) = job.prompts
    rows = [
        prompt.sequencer(replace(tiny.reviews(1)[0], columns={"review": text})) for text in texts
    ]
    ends = tuple({*prompt.sequencer.end_ids, *job.model.end_ids})
    decoding = embedgrad.Decoding(max_new_tokens=most)
    made = replies(job.model, prompt.rows_PD, rows, decoding, end_ids=ends)
    return [reply.text for (reply,) in made]


def test_a_loaded_prompt_is_what_it_was(job: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(saved(job, tmp_path / "prompt"))
    assert isinstance(prompt.prompt, PromptEmbedding)
    assert torch.equal(prompt.rows, job.prompts[0].rows_PD)
    assert prompt.template == job.prompts[0].prompt.template
    moved = prompt.with_rows(prompt.start_rows)
    assert moved.drift.max().item() == 0
    assert callable(moved.generate)
    assert prompt.spans == job.prompts[0].prompt.spans
    assert prompt.places() == {"span": slice(0, len(prompt.rows))}
    again = embedgrad.load(embedgrad.save(copy.copy(prompt), tmp_path / "again"))
    assert torch.equal(again.rows, prompt.rows)
    assert again.provenance == prompt.provenance
    with pytest.raises(AttributeError):
        prompt.rows = prompt.start_rows


def test_a_notebook_shows_the_words_and_their_drift(job: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(saved(job, tmp_path / "prompt"))
    shown = prompt._repr_html_()
    assert f"<q>{html.escape(prompt.spans[0].text)}</q>" in shown
    far = [float(cell) for cell in re.findall(r"<td[^>]*>([\d.]+)</td><td[^>]*>[\d.]+</td>", shown)]
    assert far == [round(d, 3) for d in sorted(prompt.drift.tolist(), reverse=True)]
    assert "\u00b7" in shown
    assert "\u0120" not in shown
    hostile = replace(prompt.spans[0], text="<img src=x>\u202e")
    odd = RefinedPrompt(replace(prompt.prompt, spans=(hostile, *prompt.spans[1:])))
    assert "<q>&lt;img src=x&gt;\\u202e</q>" in odd._repr_html_()
    assert RefinedPrompt(None)._repr_html_() == "<pre>RefinedPrompt</pre>"  # type: ignore[arg-type]


def test_a_query_is_answered_by_a_text_and_a_list_by_a_list(free: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(saved(free, tmp_path / "prompt"))
    texts = [example.columns["review"] for example in tiny.reviews(3)]
    expected = greedy(free, texts, 6)
    assert any(expected)
    assert prompt.generate(texts[0], max_new_tokens=6) == expected[0]
    assert prompt.generate({"review": texts[0]}, max_new_tokens=6) == expected[0]
    assert prompt.generate(texts, max_new_tokens=6) == expected
    assert prompt.generate([{"review": text} for text in texts], max_new_tokens=6) == expected
    assert prompt.generate([]) == []


def test_the_model_is_loaded_once(
    free: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedgrad.inference import refined_prompt as deployed

    loaded: list[tuple[Any, ...]] = []
    real = deployed.load_model

    def counted(name: str, **how: Any) -> Any:
        loaded.append((name, how))
        return real(name, **how)

    monkeypatch.setattr(deployed, "load_model", counted)
    prompt = embedgrad.load(saved(free, tmp_path / "prompt"))
    assert loaded == []
    first = prompt.generate(REVIEW, max_new_tokens=3)
    assert prompt.generate(REVIEW, max_new_tokens=3) == first
    how = {"revision": None, "dtype": "float32", "report": show}
    assert loaded == [(free.model.info.path, how)]
    assert prompt.generate(REVIEW, model=free.model, max_new_tokens=3) == first
    assert len(loaded) == 1


def test_decoding_is_that_of_the_artifact_unless_it_is_given(free: Job, tmp_path: Path) -> None:
    decoding = {"do_sample": False, "max_new_tokens": 2, "stop": []}
    prompt = embedgrad.load(saved(free, tmp_path / "prompt", decoding=decoding))
    assert prompt.generate(REVIEW, model=free.model) == greedy(free, [REVIEW], 2)[0]
    samples = prompt.generate(REVIEW, model=free.model, samples=3, temperature=2.0, seed=1)
    assert len(samples) == 3
    assert len(set(samples)) > 1
    stop = greedy(free, [REVIEW], 8)[0][-1]
    cut = prompt.generate(REVIEW, model=free.model, max_new_tokens=8, stop=(stop,))
    assert cut == greedy(free, [REVIEW], 8)[0].split(stop)[0]


def test_a_prompt_with_choices_chooses(job: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(saved(job, tmp_path / "prompt"))
    (made,) = job.prompts
    evaluator = embedgrad.Evaluator(job.model, made.sequencer)
    answered = evaluator.score(made.rows_PD, made.sequences)
    texts = [sequence.example.columns["review"] for sequence in made.sequences]
    assert prompt.generate(texts, model=job.model) == [a.predicted for a in answered]
    with pytest.raises(EmbedgradError, match="seed: this prompt's answers are chosen from 2"):
        prompt.generate(REVIEW, model=job.model, seed=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 3}, "unknown option 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 0}, "decoding.max_new_tokens: Input should be greater than 0"),
        ({"samples": 2}, "decoding is greedy, so there is one answer; give a temperature"),
        ({"stop": ("",)}, "decoding.stop: "),
    ],
)
def test_wrong_options_are_told(
    options: dict[str, Any], told: str, free: Job, tmp_path: Path
) -> None:
    prompt = embedgrad.load(saved(free, tmp_path / "prompt"))
    with pytest.raises(EmbedgradError) as error:
        prompt.generate(REVIEW, model=free.model, **options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_queries_are_told(free: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(saved(free, tmp_path / "prompt"))
    with pytest.raises(DataError, match="the query: no column 'review'; did you mean 'reviews'"):
        prompt.generate({"reviews": "x"}, model=free.model)
    with pytest.raises(DataError, match="query 1: column 'review' holds no text"):
        prompt.generate([REVIEW, " "], model=free.model)
    with pytest.raises(DataError, match="query 0: int; expected a text, or a mapping with review"):
        prompt.generate([3], model=free.model)  # type: ignore[list-item]


def test_a_text_is_not_enough_for_two_columns(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    template = Template.chat(user="{label}: {review}\n\n[[Is that right?]]")
    job = job_of(model, exported(model, template=template))
    prompt = embedgrad.load(saved(job, tmp_path / "prompt"))
    with pytest.raises(DataError, match=r"2 columns \(label, review\); give a mapping"):
        prompt.generate(REVIEW, model=model)
    assert prompt.generate({"label": "warm", "review": REVIEW}, model=model) in (
        "negative",
        "positive",
    )


def test_a_prompt_for_another_model_is_refused(job: Job, tmp_path: Path) -> None:
    other = opened(save_base(tmp_path / "other", seed=1))
    prompt = embedgrad.load(saved(job, tmp_path / "prompt"))
    with pytest.raises(ArtifactError, match="the embedding tables differ"):
        prompt.generate(REVIEW, model=other)
    with pytest.raises(ArtifactError, match="the embedding tables differ"):
        prompt.generate(REVIEW, model=other.info.path)


def test_an_artifact_without_a_model_needs_one(job: Job, tmp_path: Path) -> None:
    prompt = embedgrad.load(save(job.prompts[0].prompt, tmp_path / "prompt"))
    with pytest.raises(ArtifactError, match="does not say which model it is for; give model="):
        prompt.generate(REVIEW)


def test_a_run_and_an_export_are_loaded_like_their_artifact(
    finished: tuple[Path, Any], job: Job, tmp_path: Path
) -> None:
    assert embedgrad.load(finished[0]).generate(REVIEW) in ("negative", "positive")
    saved(job, tmp_path / "export" / "embedgrad" / "one")
    assert torch.equal(embedgrad.load(tmp_path / "export").rows, job.prompts[0].rows_PD)
    saved(job, tmp_path / "export" / "embedgrad" / "two")
    with pytest.raises(ArtifactError, match="holds 2 prompts; give the folder of one: "):
        embedgrad.load(tmp_path / "export")
    with pytest.raises(ArtifactError, match="cannot be read"):
        embedgrad.load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------ the program


def source(job: Job, facts: dict[str, Any]) -> str:
    prompt, dtype = job.prompts[0], facts["dtype"]
    return program_source("safetensors", EXAMPLE_FILE, prompt, job.base, dtype=dtype)


def files(job: Job, folder: Path) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    return folder, FilesOnly().write(job, folder)


def test_the_program_is_short_and_needs_transformers_only(job: Job, tmp_path: Path) -> None:
    out, facts = files(job, tmp_path / "out")
    source = (out / "example.py").read_text()
    assert source == facts["snippet"]
    tree = ast.parse(source)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name.split(".")[0] for name in imported} == {
        *("os", "sys", "pathlib", "torch", "safetensors", "transformers"),
    }
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert len(statements) - 1 <= 40  # without the docstring


def test_the_program_answers_as_training_does_in_a_process_of_its_own(
    free: Job, tmp_path: Path
) -> None:
    (made,) = free.prompts
    scored = made.prompt.with_provenance(decoding={"max_new_tokens": 6})
    out, _ = files(replace(free, prompts=(replace(made, prompt=scored),)), tmp_path / "out")
    moved = tmp_path / "moved"
    shutil.move(out, moved)  # it finds its files wherever they are
    program = [sys.executable, str(moved / "example.py"), REVIEW]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == "set BASE_MODEL to the folder or Hub id of the base model, base\n"
    place = {**os.environ, "BASE_MODEL": free.model.info.path}
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, cwd=tmp_path, env=place
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == greedy(free, [REVIEW], 6)[0]


def test_settings_of_the_model_s_folder_do_not_change_a_program(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file = base / "generation_config.json"
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 6}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    model = opened(base)
    prompt = exported(model, target=Target(), examples=tiny.reviews(4))
    job = job_of(model, prompt)
    out, facts = files(job, tmp_path / "out")
    program = run_generated(out / "example.py", source(job, facts), job)
    replies = compute_reference(model, prompt, prompt.sequences, 6).texts
    rows = [dict(s.example.columns) for s in prompt.sequences]
    assert [program.answer(row, max_new_tokens=6) for row in rows] == replies


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_check_of_the_program_passes(kind: str, placement: str, tmp_path: Path) -> None:
    model = opened(save_base(tmp_path / "base", tokenizer_kind=kind))
    job = job_of(model, exported(model, template=PLACEMENTS[placement], examples=tiny.reviews(4)))
    out, facts = files(job, tmp_path / "out")
    found = checks.check("safetensors", out, job, facts)
    assert found["problems"] == []
    assert found["step_zero_difference"] <= 1e-5
    assert found["max_logprob_difference"] < 1e-4
    assert found["choice_agreement"] == found["limited_agreement"] == 1


def test_the_check_writes_texts_side_by_side_and_alters_none(job: Job, tmp_path: Path) -> None:
    """Rows of several lengths: what is padded is not read."""
    out, facts = files(job, tmp_path / "out")
    rows = asked(job.prompts[0])
    assert len({len(row.sequence.prefix) for row in rows}) > 2
    with SnippetEngine(out, job, job.prompts[0], facts) as engine:
        sizes: list[int] = []
        generate = engine.model.generate

        def counted(**given: Any) -> Any:
            sizes.append(len(given["inputs_embeds"]))
            return generate(**given)

        engine.model.generate = counted
        together = engine.greedy(rows, 12)
        assert sizes == [8, 4]
        engine.batch = 1
        assert engine.greedy(rows, 12) == together
    assert len(set(together)) > 2


@pytest.mark.parametrize("template", [tiny.DATED, tiny.TRIMMING])
def test_dates_and_options_are_those_of_training(template: str, base: Path, tmp_path: Path) -> None:
    reads_options = template + "{% if enable_thinking or not tools_in %}think{% endif %}"
    model = opened(save_base(tmp_path / "base", template=reads_options))
    options = {"enable_thinking": False, "tools_in": ["a", {"b": None}]}
    made = Template.chat(user="{review}\n\n[[Is it positive?]]", options=options)
    job = job_of(model, exported(model, template=made))
    out, facts = files(job, tmp_path / "out")
    program = run_generated(out / "example.py", source(job, facts), job)
    dated = template == tiny.DATED
    assert (out / "chat_template.jinja").is_file() is dated
    for sequence in job.prompts[0].sequences:
        prefix, suffix = program.token_ids(dict(sequence.example.columns))
        assert (tuple(prefix), tuple(suffix)) == (sequence.prefix, sequence.suffix)
    assert ("12 Mar 2024" in program.tokenizer.decode(prefix)) is dated


def test_a_query_cannot_hold_the_place_of_the_rows(job: Job, tmp_path: Path) -> None:
    out, facts = files(job, tmp_path / "out")
    program = run_generated(out / "example.py", source(job, facts), job)
    with pytest.raises(ValueError, match="is longer than argument"):
        program.embeddings({"review": f"Good. {program.MARK}"})


@pytest.mark.parametrize("row", [0, -1])
def test_a_writer_broken_in_one_row_is_caught(
    row: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "GREEDY_TOKENS", 2)
    (prompt,) = job.prompts
    broken_PD = prompt.rows_PD.clone()
    broken_PD[row] = prompt.prompt.start_rows[row]
    broken = replace(prompt, prompt=prompt.prompt.with_rows(broken_PD))
    out, facts = files(replace(job, prompts=(broken,)), tmp_path / "out")
    found = checks.check("safetensors", out, job, facts)
    assert not found["passed"]
    assert "are not those of training" in found["problems"][0]


def test_a_program_from_elsewhere_is_not_run(job: Job, tmp_path: Path) -> None:
    out, facts = files(job, tmp_path / "out")
    trace = tmp_path / "trace"
    with (out / "example.py").open("a") as file:
        file.write(f"Path({str(trace)!r}).touch()\n")
    with pytest.raises(EngineError, match="is not what embedgrad writes for this prompt"):
        checks.check("safetensors", out, job, facts)
    # A folder may say of itself what it likes: it is no part of the program.
    foreign = f'float32"); Path({str(trace)!r}).touch(); print("'
    hostile = {**facts, "dtype": foreign}
    (out / "example.py").write_text(source(job, hostile))
    with pytest.raises(EngineError):
        checks.check("safetensors", out, job, hostile)
    elsewhere = {**facts, "model": "somebody/model", "public": True}
    with pytest.raises(EngineError, match="the export loads its model from somebody/model"):
        checks.check("safetensors", out, job, elsewhere)
    assert not trace.exists()


def test_names_of_columns_are_never_code(base: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    name = f'"""; open({str(trace)!r}, "w"); """ ; \'\\'
    model = opened(base)
    rows = [replace(e, columns={name: e.columns["review"]}) for e in tiny.reviews(3)]
    template = Template.chat(user=f"{{{name}}}\n\n[[Is it positive?]]")
    job = job_of(model, exported(model, template=template, examples=rows))
    out, facts = files(job, tmp_path / "out")
    program = run_generated(out / "example.py", source(job, facts), job)
    assert program.token_ids(rows[0].columns)[0] == list(job.prompts[0].sequences[0].prefix)
    assert not trace.exists()
