"""The output row that new tokens get copies of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedgrad.deploy.formats import guard_row
from export_kit import (
    exported,
    job_of,
    opened,
    save_base,
    small,
)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba", "phi"])
def test_the_guard_row_is_the_one_whose_highest_probability_is_lowest(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small(tmp_path, architecture=architecture)
    monkeypatch.setattr(guard_row, "CHUNK_BYTES", 5 * 4 * job.model.info.vocabulary)
    found = guard_row.guard_row(job)
    (prompt,) = job.prompts
    highest, positions = [], 0
    for s in prompt.sequences:
        embeds = torch.cat(
            [
                job.model.embed(s.prefix),
                prompt.rows_PD,
                job.model.embed(s.suffix + s.targets[s.gold]),
            ]
        )
        with torch.no_grad():
            logits = job.model.model(inputs_embeds=embeds[None]).logits[0]
        highest.append(torch.log_softmax(logits, dim=1).amax(dim=0))
        positions += len(logits)
    highest_V = torch.stack(highest).amax(dim=0)
    assert found.row == int(highest_V.argmin())
    assert found.logprob == pytest.approx(float(highest_V.min()), rel=1e-4)
    assert found.positions == positions


def test_calibration_ends_after_a_while_but_hears_every_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(save_base(tmp_path / "base"))
    prompts = [exported(model, name=f"p{i}", seed=i) for i in range(3)]
    monkeypatch.setattr(guard_row, "POSITIONS", 1)
    found = guard_row.guard_row(job_of(model, *prompts))
    first = prompts[0].sequences[0]
    length = len(first.prefix) + len(prompts[0].rows_PD) + len(first.suffix)
    assert found.positions == 3 * (length + len(first.targets[first.gold]))
