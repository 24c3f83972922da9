"""Laws of runs that do not reach their end: good rows survive, and a resumed run loses no bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from embedgrad.atomic_files import seal
from embedgrad.errors import DivergenceError, RunError
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
from embedgrad.parts.optimizers import OPTIMIZERS, SGD, Schedule
from embedgrad.parts.parameterizations import PARAMETERIZATIONS
from embedgrad.parts.transforms import Clip
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.interruption import hold_interrupts
from embedgrad.training.settings import Parts, Refinement, Training
from kit_loop import FAST, QUICK, rows_at_evaluations, small, train
from pairwise import pairwise
from seam_parts import Average

EVERY_STEP = dataclasses.replace(QUICK, evaluate_every=1)
LONGER = Training(steps=8, batch_size=3, evaluate_every=2)


class Spoiled(LanguageModel):
    """A model whose outcome, in training, is passed through `spoil` with the rows and a count."""

    def outcome(self, prompt: Prompt | Tensor, *args: Any, **options: Any) -> Outcome:
        outcome, rows_PD = super().outcome(prompt, *args, **options), join_spans(prompt)
        if not rows_PD.requires_grad:
            return outcome
        self.passes = getattr(self, "passes", 0) + 1
        return dataclasses.replace(
            outcome, logprobs_BC=outcome.logprobs_BC + self.spoil(rows_PD, self.passes)
        )

    def spoil(self, rows_PD: Tensor, count: int) -> Tensor | float:
        raise NotImplementedError


class NanAtThree(Spoiled):
    def spoil(self, rows_PD: Tensor, count: int) -> float:
        return torch.nan if count == 3 else 0.0


class GradientNanAtThree(Spoiled):
    def spoil(self, rows_PD: Tensor, count: int) -> Tensor | float:
        # The loss is finite; its derivative is 0 times infinity.
        return (rows_PD.sum() * 0).sqrt() if count == 3 else 0.0


class NanAwayFromText(Spoiled):
    def spoil(self, rows_PD: Tensor, count: int) -> float:
        return torch.nan if count > 1 else 0.0


def diverged(kind: type[Spoiled], **options: Any) -> tuple[Refinement, str]:
    made = small()
    made = dataclasses.replace(made, model=kind(made.loaded))
    with pytest.raises(DivergenceError) as caught:
        train(made, EVERY_STEP, **options)
    assert caught.value.refinement is not None
    return caught.value.refinement, str(caught.value)


# ------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("kind", [NanAtThree, GradientNanAtThree])
def test_a_loss_that_is_not_finite_stops_before_the_step(kind: type[Spoiled]) -> None:
    refined, message = diverged(kind, dev=())
    _, rows = rows_at_evaluations(small(), training=EVERY_STEP, dev=())
    assert (refined.ended, refined.steps) == ("diverged", 2)
    assert "\n" not in message
    assert message.startswith("step 3: ")
    assert "nan" in message
    assert "reviews.csv:" in message
    assert "learning_rate" in message
    # The rows of the failed pass, or those before them.
    assert any(torch.equal(refined.prompt.rows, rows[step]) for step in (1, 2))


@pytest.mark.parametrize("kind", [NanAtThree, GradientNanAtThree])
def test_the_best_rows_survive_a_divergence(kind: type[Spoiled]) -> None:
    refined, _ = diverged(kind)
    whole, rows = rows_at_evaluations(small(), training=EVERY_STEP)
    assert refined.checkpoint.history == whole.checkpoint.history[:3]
    assert torch.equal(refined.prompt.rows, rows[refined.checkpoint.best_step])


def test_rows_whose_loss_is_not_finite_are_not_kept() -> None:
    refined, _ = diverged(NanAwayFromText, dev=())
    assert torch.equal(refined.prompt.rows, refined.prompt.start_rows)


@pytest.mark.parametrize("region", [TrustRegion(None), TrustRegion(0.3), TrustRegion(None, 0.9)])
@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_a_step_to_infinity_is_a_divergence(region: TrustRegion, rate: float) -> None:
    made = small()
    parts = Parts(
        trust_region=region,
        optimizer=SGD(learning_rate=rate),
        transforms=(),
        schedule=Schedule(0.0, "constant"),
    )
    try:
        refined = train(made, parts=parts, dev=())
    except DivergenceError as error:
        refined = error.refinement
    assert torch.isfinite(refined.prompt.rows).all()
    assert torch.isfinite(made.model.outcome(refined.prompt.rows, made.sequences).logprobs_BC).all()


# ----------------------------------------------------------------------------------------- Ctrl-C


def interrupt_at(step: int, event: str = "step") -> Any:
    def report(values: dict[str, Any]) -> None:
        if values["event"] == event and values["step"] == step:
            raise KeyboardInterrupt

    return report


def test_ctrl_c_ends_the_loop_and_keeps_the_last_rows() -> None:
    _, rows = rows_at_evaluations(small(), training=EVERY_STEP, dev=())
    refined = train(small(), EVERY_STEP, dev=(), report=interrupt_at(3))
    assert (refined.ended, refined.steps) == ("interrupted", 3)
    assert torch.equal(refined.prompt.rows, rows[3])


def test_ctrl_c_keeps_the_best_rows_so_far() -> None:
    whole, rows = rows_at_evaluations(small(), training=EVERY_STEP)
    refined = train(small(), EVERY_STEP, report=interrupt_at(3))
    assert refined.ended == "interrupted"
    assert refined.checkpoint.history == whole.checkpoint.history[:3]
    assert torch.equal(refined.prompt.rows, rows[refined.checkpoint.best_step])


def test_ctrl_c_before_the_first_step_gives_the_text_prompt() -> None:
    refined = train(small(), EVERY_STEP, report=interrupt_at(0, "evaluation"))
    assert (refined.ended, refined.steps) == ("interrupted", 0)
    assert torch.equal(refined.prompt.rows, refined.prompt.start_rows)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, print])
def test_a_handler_that_is_set_while_signals_are_held_stays(
    handler: Any,
) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        with hold_interrupts(), hold_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
        with hold_interrupts():
            signal.signal(signal.SIGTERM, handler)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------- resuming


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same bits, the time that they took aside."""
    pairs = [(one.theta, other.theta), (one.best, other.best)]
    pairs += zip(one.transforms, other.transforms, strict=True)
    assert one.optimizer["state"].keys() == other.optimizer["state"].keys()
    pairs += [(v, other.optimizer["state"][i]) for i, v in one.optimizer["state"].items()]
    return (one.step, one.best_step, one.history) == (
        other.step,
        other.best_step,
        other.history,
    ) and all(
        a.keys() == b.keys() and all(torch.equal(*map(torch.as_tensor, (a[n], b[n]))) for n in a)
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("optimizer", "parameterization", "precision"),
    pairwise(
        sorted(OPTIMIZERS),
        sorted(PARAMETERIZATIONS),
        [(torch.float32, "1 GiB"), (torch.float64, "1 GiB"), (torch.float64, 60_000)],
    ),
)
def test_a_resumed_run_gives_the_same_bits(
    tmp_path: Path, optimizer: str, parameterization: str, precision: tuple[torch.dtype, str | int]
) -> None:
    dtype, budget = precision
    parts = Parts(
        optimizer=OPTIMIZERS[optimizer](),
        parameterization=PARAMETERIZATIONS[parameterization](),
        transforms=(Average(), Clip()),
    )
    whole = train(
        small(dtype=dtype, budget=budget),
        LONGER,
        parts=parts,
        keep=lambda checkpoint: checkpoint.save(tmp_path / str(checkpoint.step)),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6", "8"]
    for step in (2, 4, 6):
        # A new model: nothing is stored yet.
        checkpoint = Checkpoint.load(tmp_path / str(step))
        assert checkpoint.step == step
        resumed = train(
            small(dtype=dtype, budget=budget), LONGER, parts=parts, checkpoint=checkpoint
        )
        assert same(resumed.checkpoint, whole.checkpoint)
        assert torch.equal(resumed.prompt.rows, whole.prompt.rows)


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_an_interrupted_run_resumes_from_its_own_checkpoint(
    tmp_path: Path, optimizer: str, step: int
) -> None:
    parts = Parts(optimizer=OPTIMIZERS[optimizer]())
    whole = train(small(), LONGER, parts=parts)
    stopped = train(small(), LONGER, parts=parts, report=interrupt_at(step))
    stopped.checkpoint.save(tmp_path / "checkpoint")
    checkpoint = Checkpoint.load(tmp_path / "checkpoint")
    resumed = train(small(), LONGER, parts=parts, checkpoint=checkpoint)
    assert torch.equal(resumed.checkpoint.theta["span"], whole.checkpoint.theta["span"])
    assert resumed.checkpoint.history == whole.checkpoint.history
    assert torch.equal(resumed.prompt.rows, whole.prompt.rows)


def test_a_checkpoint_does_not_change_after_it_is_kept() -> None:
    kept: list[Checkpoint] = []
    copies: list[Checkpoint] = []

    def keep(checkpoint: Checkpoint) -> None:
        kept.append(checkpoint)
        copies.append(copy.deepcopy(checkpoint))

    train(small(), EVERY_STEP, keep=keep, parts=FAST)
    assert all(same(one, other) for one, other in zip(kept, copies, strict=True))


# -- a damaged checkpoint --------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    train(small(), LONGER, keep=lambda checkpoint: checkpoint.save(folder))
    return folder


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2}',
        '{"format": 2, "transforms": 0, "optimizer_numbers": []}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_damaged_description_is_refused(saved: Path, content: str) -> None:
    (saved / "checkpoint.json").write_text(content)
    with pytest.raises(RunError, match=r"checkpoint.*(read|format)") as caught:
        Checkpoint.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "unsealed"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("step", value) for value in ("3", -3, 3.0, None, True)],
        *[("best_step", value) for value in (77, "0", None, [])],
        *[("history", value) for value in ("abc", [{"a": 1}], [1], None)],
        ("history", [{"step": 8, "accuracy": "1", "log_loss": None}]),
        *[("optimizer_groups", value) for value in ([], [{"lr": 1}], [1], None)],
        *[("optimizer_numbers", value) for value in ({"a": {}}, [], {"0": 1})],
        *[("seconds", value) for value in (None, "abc", -1)],
        *[("transforms", value) for value in ("1", None)],
        *[("made_from", value) for value in ([1], "abc", None)],
    ],
)
def test_a_wrong_value_is_refused(saved: Path, name: str, value: Any, is_sealed: bool) -> None:
    path = saved / "checkpoint.json"
    values = {**json.loads(path.read_text()), name: value}
    if is_sealed:  # as if it had been written so
        del values["sha256"]
        values = seal(values, (saved / "checkpoint.safetensors").read_bytes())
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match="checkpoint cannot be read") as caught:
        Checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def cut_rows(content: bytes) -> bytes:
    return to_bytes({n: t[:1].clone() if t.ndim else t for n, t in from_bytes(content).items()})


def drop_optimizer(content: bytes) -> bytes:
    kept = {n: t for n, t in from_bytes(content).items() if not n.startswith("optimizer")}
    return to_bytes(kept)


@pytest.mark.parametrize("change", [flip, cut_rows, drop_optimizer])
def test_changed_tensors_are_refused(saved: Path, change: Callable[[bytes], bytes]) -> None:
    path = saved / "checkpoint.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RunError, match="digest differs"):
        Checkpoint.load(saved)


def test_damaged_tensors_are_refused(saved: Path) -> None:
    path = saved / "checkpoint.safetensors"
    content = path.read_bytes()
    for length in (0, 7, 8, 60, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match="cannot be read"):
            Checkpoint.load(saved)
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        Checkpoint.load(saved)


def test_a_checkpoint_of_another_run_is_refused(saved: Path) -> None:
    checkpoint = Checkpoint.load(saved)
    values = json.loads((saved / "checkpoint.json").read_text())
    assert values["step"] == 8
    with pytest.raises(RunError, match="checkpoint"):
        train(small(template="system"), LONGER, checkpoint=checkpoint)
