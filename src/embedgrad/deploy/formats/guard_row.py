"""Guard row: an unlikely output row, copied for new tokens.

A refined row needs a token, and a token needs an output row. Zeros would give the logit 0, which
may be likely, and minus infinity gives NaN. So every new token gets a copy of the existing row
whose highest probability over calibration text is the lowest.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.deploy.job import Job
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.sequence import TokenSequence

POSITIONS = 1024  # of calibration text, over all prompts
CHUNK_BYTES = 2**27  # of logits at a time


@final
@dataclass(frozen=True)
class GuardRow:
    """An output row, and its highest log-probability (natural) over some text `positions`."""

    row: int
    logprob: float
    positions: int

    def record(self, token: str) -> dict[str, Any]:
        """Plain JSON values for `export.json`."""
        return {
            "row": self.row,
            "token": token,
            "max_logprob": self.logprob,
            "positions": self.positions,
        }


@torch.no_grad()
def guard_row(job: Job) -> GuardRow:
    """Search the next-token distributions of the refined prompts' examples, each prompt in turn.

    Every position of prefix, prompt, suffix and right answer counts. The first row wins a tie.
    """
    highest_V: Tensor | None = None
    positions = 0
    for round_ in itertools.zip_longest(*(exported.sequences for exported in job.prompts)):
        for exported, sequence in zip(job.prompts, round_, strict=True):
            if sequence is None:
                continue
            for logits_NV in _logits(job.model, exported.rows_PD, sequence):
                logits = logits_NV.float()
                here_V = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).amax(dim=0)
                highest_V = here_V if highest_V is None else torch.maximum(highest_V, here_V)
                positions += len(logits_NV)
        if positions >= POSITIONS:
            break
    assert highest_V is not None, "every prompt has examples"
    row = int(highest_V.argmin())
    return GuardRow(row, float(highest_V[row]), positions)


def _logits(model: LanguageModel, rows_PD: Tensor, sequence: TokenSequence) -> Iterator[Tensor]:
    """Logits [N, V] at all positions of an example; a pass for each chunk, seldom more than one."""
    answered = dataclasses.replace(
        sequence, suffix=sequence.suffix + sequence.targets[sequence.gold]
    )
    embeds = model.forward.embed_in_full(rows_PD, answered)
    mask_BT = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    size = max(1, CHUNK_BYTES // (4 * model.info.vocabulary))
    for first in range(0, mask_BT.shape[1], size):
        keep_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
        keep_BT[:, first : first + size] = True
        yield model.forward.full_pass(embeds, mask_BT, keep_BT)
