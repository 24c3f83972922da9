"""Prompts of several spans: an export places all of them as trained, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from embedgrad import ExportError, Template
from embedgrad.deploy.destinations.peft import PeftAdapter
from embedgrad.deploy.destinations.vllm_chat import chat_problem, message_parts
from embedgrad.deploy.job import Job, find_destination
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.rules import exportability, gather_facts
from embedgrad.deploy.verify import parity
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.template import Message
from export_kit import exported, job_of, opened, save_base

TEMPLATES = {
    "around": Template.chat(user="[[Read this review.]]\nReview: {review}\n\n[[Is it good?]] Say."),
    "apart": Template.chat(
        system="Be brief.\n[[You rate reviews.]]\nOne word.", user="{review}\n[[Is it good?]]"
    ),
    "opening": Template.chat(user="[[Rate it:]] {review}", assistant="So [[it is]]"),
    "three": Template.chat(
        system="[[You rate]]\nBe brief.", user="[[Read this]]\n{review}\n[[Is it good?]]"
    ),
}
EVERYWHERE = ("safetensors", "vocabulary", "gguf", "vllm", "sglang")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return opened(save_base(tmp_path_factory.mktemp("spans") / "base"))


def job(model: LanguageModel, place: str) -> Job:
    return job_of(model, exported(model, template=TEMPLATES[place], examples=tiny.reviews(3)))


def checked(to: str, written: Job, job: Job, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    facts = find_destination(to).write(written, folder)
    return parity.check(to, folder, job, facts)


@pytest.mark.parametrize("place", TEMPLATES)
@pytest.mark.parametrize("to", EVERYWHERE)
def test_every_span_is_where_it_was_trained(
    to: str, place: str, model: LanguageModel, tmp_path: Path
) -> None:
    one = job(model, place)
    assert len(one.prompts[0].spans) == (3 if place == "three" else 2)
    report = checked(to, one, one, tmp_path / "out")
    assert report["problems"] == []
    assert report["max_logprob_difference"] < report["tolerance"] <= 1e-3
    assert report["choice_agreement"] == 1


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("to", EVERYWHERE)
def test_a_broken_row_of_any_span_is_caught(
    to: str, row: int, model: LanguageModel, tmp_path: Path
) -> None:
    one = job(model, "around")
    (prompt,) = one.prompts
    rows_PD = prompt.rows_PD.clone()
    rows_PD[row] = prompt.prompt.start_rows[row]
    broken = replace(prompt, prompt=prompt.prompt.with_rows(rows_PD))
    report = checked(to, replace(one, prompts=(broken,)), one, tmp_path / "out")
    assert not report["passed"]
    assert "are not those of training" in report["problems"][0]


@pytest.mark.parametrize("to", ["vocabulary", "gguf"])
def test_prompts_of_one_span_and_of_several_share_an_export(
    to: str, model: LanguageModel, tmp_path: Path
) -> None:
    rows = tiny.reviews(3)
    prompts = [
        exported(model, name="first", examples=rows),
        exported(model, name="second", template=TEMPLATES["apart"], examples=rows, seed=1),
    ]
    both = job_of(model, *prompts)
    report = checked(to, both, both, tmp_path / "out")
    assert report["problems"] == []
    assert list(report["prompts"]) == ["first", "second"]


def test_peft_can_only_put_rows_first(model: LanguageModel, tmp_path: Path) -> None:
    one = job(model, "around")
    why = "PEFT puts all rows before the text, and this prompt has 2 spans"
    with pytest.raises(ExportError, match=f"^--to peft: {why}; use another destination"):
        PeftAdapter().write(one, tmp_path)
    (prompt,) = one.prompts
    entries = exportability(gather_facts(prompt, model))
    assert [e["destination"] for e in entries if not e["possible"]] == ["peft"]


def test_a_span_between_two_columns_leaves_no_plain_query(model: LanguageModel) -> None:
    template = Template.chat(user="[[First]] {review} [[then]] {label} [[last]]")
    with pytest.raises(ExportError, match="columns are on both sides of a span"):
        plain_messages(template, {"review": "a", "label": "b"})
    around = Template.chat(user="[[First]] {review} and {label} [[last]]")
    (message,) = plain_messages(around, {"review": "a", "label": "b"})
    assert message["content"] == "a and b"


def test_vllms_chat_takes_spans_between_line_feeds(model: LanguageModel) -> None:
    def problem(template: Template) -> str | None:
        return chat_problem(exported(model, template=template, examples=tiny.reviews(3)))

    assert problem(TEMPLATES["three"]) is None  # so that the check above looks at both bodies
    assert problem(Template.chat(user="[[Read this]] {review}\n[[Is it good?]]")) == (
        "the server puts line feeds around the rows, which the template does not have"
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("[[a]]\n[[b]]", ["a", "b"]),
        ("[[a]]\nc\n[[b]]", ["a", "c", "b"]),
        ("[[a]]\n\n\n[[b]]", ["a", "\n", "b"]),
        ("[[a]]\n\n[[b]]", None),  # a part that held nothing would be dropped with its line feed
        ("[[a]][[b]]", None),
        ("[[a]]\nc[[b]]", None),
        ("no span", ["no span"]),
    ],
)
def test_parts_of_a_message(content: str, texts: list[str] | None) -> None:
    parts = message_parts(Message("user", content))
    found = parts and ["".join(piece.text for piece in part) for part in parts]
    assert found == texts
