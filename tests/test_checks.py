"""The check of an export: what it measures, what it lets pass, what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import export_kit
import kit
import tiny
from embedgrad import Target, Template
from embedgrad.deploy.card import check_figures, format_check
from embedgrad.deploy.job import Job
from embedgrad.deploy.verify import engine as table
from embedgrad.deploy.verify import parity as checks
from embedgrad.deploy.verify.engine import Engine, Query
from embedgrad.deploy.verify.reference import compute_reference, next_logprobs
from embedgrad.errors import EngineError
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids


class Again(Engine):
    """The training path itself, as an engine, with what a test puts wrong in it."""

    def __init__(self, job: Job, **wrong: Any):
        (self.exported,) = job.prompts
        self.model = job.model
        self.tolerance = wrong.get("tolerance", 1e-4)
        self.rows = wrong.get("rows", self.exported.prompt.rows)
        self.start = wrong.get("start", self.exported.prompt.start_rows)
        self.noise = wrong.get("noise", 0.0)
        self.mass = wrong.get("mass", 0.0)
        self.suffix = wrong.get("suffix", ())  # ids behind a greedy answer's end
        self.mute = wrong.get("mute", False)  # its replies are no choices
        self.asked: list[Query] = []

    def __exit__(self, *exception: object) -> None:
        pass

    def logprobs_BV(self, rows: Sequence[Query]) -> Tensor:
        self.asked += list(rows)
        return self._said(self.rows, rows)

    def start_logprobs_BV(self, rows: Sequence[Query]) -> Tensor:
        return self._said(self.start, rows)

    def plain_logprobs_BV(self, rows: Sequence[Query]) -> Tensor:
        return self._said(self.exported.prompt.start_rows, rows)

    def greedy(self, rows: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        found = []
        for row in rows:
            ids: list[int] = []
            sequence = row.sequence
            end = tuple({*self.exported.sequencer.end_ids, *self.model.end_ids})
            while len(ids) < max_new_tokens and not (ids and ids[-1] in end):
                grown = dataclasses.replace(sequence, suffix=(*sequence.suffix, *ids))
                ids.append(int(next_logprobs(self.model, self.rows, [grown]).argmax()))
            found.append((*ids, *self.suffix))
        return found

    def answer_logprob(self, query: Query, answer: Ids) -> float:
        raise NotImplementedError  # all at once below

    def answer_logprobs(self, rows: Sequence[Query]) -> list[tuple[float, ...]]:
        outcome = self.model.outcome(self.rows, [row.sequence for row in rows])
        return [tuple(row) for row in outcome.logprobs_BC.tolist()]

    def choose(self, query: Query) -> int | None:
        (logprobs,) = self.answer_logprobs([query])
        return None if self.mute else logprobs.index(max(logprobs))

    def added_mass(self, rows: Sequence[Query]) -> float:
        return float(self.mass)

    def _said(self, rows_PD: Tensor, rows: Sequence[Query]) -> Tensor:
        found = next_logprobs(self.model, rows_PD, [row.sequence for row in rows])
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found + self.noise * noise


@pytest.fixture(scope="module")
def job() -> Job:
    model = LanguageModel(tiny.loaded(dtype=torch.float32), prefix_cache_budget="64 MiB")
    return export_kit.job_of(model)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, job: Job) -> Any:
    """`checked(mass=0.1)`: what the check says of the training path with that put wrong."""

    def check(the_job: Job = job, **wrong: Any) -> dict[str, Any]:
        engine = Again(the_job, **wrong)
        monkeypatch.setattr(checks, "GREEDY_TOKENS", 3)
        monkeypatch.setattr(checks, "open_engine", lambda *_: engine)
        return checks.check("safetensors", Path("nowhere"), the_job, {})

    return check


def broken(job: Job, row: int = 1) -> Tensor:
    """The refined rows with one of them left as the text's."""
    rows = job.prompts[0].prompt.rows.clone()
    rows[row] = job.prompts[0].prompt.start_rows[row]
    return rows


def test_the_training_path_passes_as_its_own_engine(checked: Any) -> None:
    found = checked()
    assert found["passed"], found["problems"]
    assert found["problems"] == []
    assert found["rows"] == 12
    assert found["prompts"]["sentiment"]["fewer_rows"] == "there were 12"
    assert found["max_logprob_difference"] == found["step_zero_difference"] == 0
    assert found["choice_agreement"] == found["limited_agreement"] == 1
    assert found["greedy_agreement"] is None
    assert found["tolerance"] == 1e-4
    assert found["rounding"] is None
    assert set(found["versions"]) >= {"torch", "transformers"}


def test_a_row_that_was_not_written_is_found(checked: Any, job: Job) -> None:
    found = checked(rows=broken(job))
    assert not found["passed"]
    assert found["max_logprob_difference"] > 1e-2
    assert found["step_zero_difference"] == 0
    (problem, *_) = found["problems"]
    assert problem.startswith("next-token log-probabilities are not those of training")
    assert f"{found['max_logprob_difference']:.1e} (at most 1.0e-04), most in " in problem
    sources = {row.example.source for row in job.prompts[0].sequences}
    assert problem.rpartition(" in ")[2] in sources


def test_step_zero_is_looked_at_by_itself(checked: Any, job: Job) -> None:
    start = job.prompts[0].prompt.start_rows * 1.0001
    found = checked(start=start)
    assert not found["passed"]
    assert len(found["problems"]) == 1
    assert (
        "the unrefined rows and the plain text give different log-probabilities"
        in found["problems"][0]
    )
    assert "(at most 1.0e-05)" in found["problems"][0]


def test_new_tokens_may_have_little_probability_and_no_more(checked: Any) -> None:
    assert checked(mass=0.99e-4)["passed"]
    found = checked(mass=1.01e-4)
    assert found["problems"] == [
        "the new tokens have a probability of 1.0e-04 together (below 1e-04)"
    ]
    # What they have is missing elsewhere, and both tolerances allow for it.
    assert checked(mass=0.9e-4, noise=3e-5)["max_logprob_difference"] > 1e-4
    assert checked(mass=0.9e-4, noise=3e-5)["passed"]
    assert not checked(mass=0.0, noise=3e-5)["passed"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_never_passes(bad: float, checked: Any, job: Job) -> None:
    rows = job.prompts[0].prompt.rows.clone()
    rows[0, 0] = bad
    found = checked(rows=rows, tolerance=None)
    assert not found["passed"]
    assert math.isinf(found["max_logprob_difference"])


def test_weights_that_are_not_exact_are_measured_by_their_own_rounding(
    checked: Any, job: Job
) -> None:
    found = checked(tolerance=None, noise=0.02)
    assert found["passed"], found["problems"]
    assert found["tolerance"] == pytest.approx(2 * found["rounding"] + 0.01)
    assert 0.05 < found["rounding"] < 0.12
    assert found["max_logprob_difference"] == pytest.approx(found["rounding"], rel=0.2)
    assert not checked(tolerance=None, noise=0.002, rows=broken(job))["passed"]


def test_a_small_break_shows_in_the_mean_where_rounding_hides_the_largest(
    checked: Any, job: Job
) -> None:
    """As in a quantized model, whose rounding of a rare token is large."""
    prompt = job.prompts[0].prompt
    rows = prompt.rows + 0.15 * (prompt.start_rows - prompt.rows)
    found = checked(tolerance=None, noise=0.02, rows=rows)
    assert found["max_logprob_difference"] < found["tolerance"]
    (problem,) = found["problems"]
    assert "on average (at most " in problem


def test_a_model_in_half_precision_is_no_exact_reference(job: Job, checked: Any) -> None:
    half = LanguageModel(tiny.loaded(dtype=torch.bfloat16), prefix_cache_budget="64 MiB")
    found = checked(export_kit.job_of(half), tolerance=1e-4)
    assert found["passed"], found["problems"]
    assert found["tolerance"] == pytest.approx(0.01)
    assert found["rounding"] == 0


def test_rounded_rows_of_a_model_that_scales_them_may_miss_the_text_a_little(
    checked: Any, job: Job
) -> None:
    gemma = LanguageModel(tiny.loaded("gemma3", dtype=torch.float32), prefix_cache_budget="64 MiB")
    for model, passes in ((gemma, True), (job.model, False)):
        one = export_kit.job_of(model)
        start = one.prompts[0].prompt.start_rows * 1.0002
        found = checked(one, start=start, tolerance=None, noise=0.01)
        assert found["step_zero_difference"] > 2e-5
        assert found["passed"] is passes
        assert not checked(one, start=start, noise=1e-6)["passed"]


def test_greedy_texts_are_compared_up_to_the_end_token(checked: Any, job: Job) -> None:
    free = with_target(job.model, Target())
    assert checked(free, suffix=(job.model.end_ids[0], 5, 6))["greedy_agreement"] == 1


def test_other_greedy_texts_fail_where_weights_are_exact(checked: Any, job: Job) -> None:
    free = with_target(job.model, Target())
    found = checked(free, suffix=(5,))
    assert found["greedy_agreement"] == 0
    assert found["problems"] == ["greedy texts agree with training in only 0% of the rows"]
    assert checked(free, suffix=(5,), tolerance=None)["passed"]  # reported only


def test_how_far_a_check_is_is_reported(job: Job, monkeypatch: Any) -> None:
    events: list[dict[str, Any]] = []
    reported = dataclasses.replace(job, report=events.append)
    monkeypatch.setattr(checks, "open_engine", lambda *_: Again(job))
    checks.check("safetensors", Path("nowhere"), reported, {})
    last = {e["which"]: (e["done"], e["total"]) for e in events if e["event"] == "scoring"}
    passes = ("plain text", "unrefined rows", "refined rows", "choices", "replies")
    assert list(last) == ["sentiment in training", *(f"sentiment: {what}" for what in passes)]
    assert set(last.values()) == {(12, 12)}


def test_choices_are_checked_without_any_free_text(checked: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Again, "greedy", None)
    assert checked()["passed"]


def test_replies_of_a_server_are_compared_and_fail_nothing(checked: Any) -> None:
    found = checked(mute=True)
    assert (found["choice_agreement"], found["limited_agreement"]) == (1, 0)
    assert found["passed"]
    name, value = check_figures(found)[-1]
    assert name == "the same choices as `evaluate`, by the answers that clients get"
    assert value == "0.0 % (0.0 to 24.2)"


def test_normalized_choices_are_compared_per_token(checked: Any) -> None:
    model = LanguageModel(tiny.loaded(dtype=torch.float32), prefix_cache_budget="64 MiB")
    found = []
    for normalize in (False, True):
        target = Target(kit.LONG_CHOICES, normalize=normalize)
        one = with_target(model, target)
        predicted = compute_reference(model, one.prompts[0], one.prompts[0].sequences, 1).choices
        assert predicted is not None
        found.append(predicted)
        assert checked(one)["choice_agreement"] == 1
    assert found[0] != found[1]  # else nothing would be shown here


def with_target(model: LanguageModel, target: Target) -> Job:
    return export_kit.job_of(model, export_kit.exported(model, target=target))


def test_free_answers_have_no_choices_to_agree_in(checked: Any, job: Job) -> None:
    found = checked(with_target(job.model, Target()))
    assert found["choice_agreement"] is None
    assert found["passed"], found["problems"]
    assert not any("choices" in name for name, _ in check_figures(found))


def test_rows_are_asked_as_a_client_asks(checked: Any, job: Job, monkeypatch: Any) -> None:
    engine = Again(job)
    monkeypatch.setattr(checks, "open_engine", lambda *_: engine)
    checks.check("safetensors", Path("nowhere"), job, {})
    for asked in engine.asked:
        review = asked.sequence.example.columns["review"]
        assert list(asked.messages) == [{"role": "user", "content": review}]


def test_a_template_without_a_plain_query_is_asked_by_tokens(job: Job, monkeypatch: Any) -> None:
    plain = export_kit.exported(
        job.model, template=Template.plain("Review: {review}\n[[Is it good?]]\nAnswer:")
    )
    engine = Again(export_kit.job_of(job.model, plain))
    monkeypatch.setattr(checks, "open_engine", lambda *_: engine)
    checks.check("safetensors", Path("nowhere"), export_kit.job_of(job.model, plain), {})
    assert all(not asked.messages for asked in engine.asked)


@pytest.mark.parametrize("architecture", ["llama", "llama-dynamic", "gemma3", "gpt2", "mamba"])
def test_the_training_path_is_what_plain_transformers_computes(architecture: str) -> None:
    one = kit.kit(architecture, rows=4)
    rows_PD = kit.noisy(one.start)
    found = next_logprobs(one.model, rows_PD, one.sequences)
    for sequence, logprobs in zip(one.sequences, found, strict=True):
        whole = [(i,) for i in range(0, found.shape[1], 97)]
        asked = dataclasses.replace(sequence, targets=tuple(whole))
        (wanted,) = kit.full_logprobs(one.loaded, rows_PD, [asked])
        assert torch.allclose(logprobs[::97].double(), wanted, atol=1e-5)
        assert logprobs.exp().sum() == pytest.approx(1, abs=1e-4)


def test_an_engine_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        table.check_installed("gguf")
    assert str(caught.value) == (
        "gguf: its check needs the package xllamacpp, which is not installed; pip install "
        "'embedgrad[llamacpp]', or export without a check (--no-verify)"
    )
    table.check_installed("vocabulary")  # transformers is always there


def test_the_card_tells_what_was_found(checked: Any, job: Job) -> None:
    good, bad = format_check(checked()), format_check(checked(rows=broken(job)))
    assert good.startswith("The check passed.")
    assert "On fewer rows than 32: there were 12." in good
    ranked = "the same choices as `evaluate`, ranked by log-probability"
    assert f"| {ranked} | 100.0 % (75.8 to 100.0) |" in good
    assert bad.startswith("**The check failed.**")
    assert "next-token log-probabilities are not those of training" in bad
    assert format_check(None).startswith("Nothing: it was exported without a check.")
