"""Scored answers, and a file that keeps them for a resumed scoring."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from embedgrad.atomic_files import SEAL, check_seal, seal
from embedgrad.data.bounded_reads import open_to_append, read_lines


@final
@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One row's answer: the right one, the prediction, and how likely the right one was.

    `correct` is 1 or 0, or between where a user's function grades; `cut` means that a free answer
    did not end by itself, `unread` that it is wrong and the scorer finds no answer in it. `loss` is
    in nats: per choice for choices (over a teacher's shares where it has said them), else per token
    of the answer. `probabilities` are those of the choices among themselves, or None for free text.
    `reply` is what the model writes to a row with choices by itself, decoded greedily, where it was
    asked. `answer_loss` is in nats per token of the right choice, among all that the model could
    write. `samples` are further answers, sampled, with their `sample_scores`.
    """

    source: str
    answer: str
    predicted: str
    correct: float
    loss: float
    probabilities: Mapping[str, float] | None
    cut: bool = False
    unread: bool = False
    reply: str | None = None
    answer_loss: float | None = None
    samples: tuple[str, ...] = ()
    sample_scores: tuple[float, ...] = ()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ScoredAnswer:
        """An answer from its JSON, where null is an infinite loss.

        Raises `KeyError` or `TypeError` for anything else.
        """
        loss = values["loss"]
        tuples = {name: tuple(values.get(name) or ()) for name in ("samples", "sample_scores")}
        return cls(**{**values, **tuples, "loss": math.inf if loss is None else loss})


@final
class AnswerLog:
    """Answers by batch in a file, a line each; damaged lines, and those `made_from` else, are none.

    A batch is known by what is scored and the number of its first row. That the file cannot be
    written ends no scoring.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path, self._made_from = path, seal(made_from)[SEAL]
        self._known = dict[tuple[str, int], list[ScoredAnswer]]()
        with suppress(OSError):
            for line in read_lines(path):
                with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    values = json.loads(line)
                    check_seal(values)
                    if values["made_from"] == self._made_from:
                        answers = [ScoredAnswer.from_values(answer) for answer in values["answers"]]
                        self._known[values["of"], values["first"]] = answers

    def get(self, of: str, first: int, rows: int) -> list[ScoredAnswer] | None:
        """The answers to a batch of `rows` rows, if the file has all of them."""
        known = self._known.get((of, first), [])
        return known if len(known) == rows else None

    def add(self, of: str, first: int, answers: Sequence[ScoredAnswer]) -> None:
        """Write the answers to a batch."""
        values = {"of": of, "first": first, "answers": [asdict(answer) for answer in answers]}
        line = json.dumps(seal({"made_from": self._made_from, **values}))
        with suppress(OSError), open_to_append(self.path) as file:
            file.write(f"\n{line}".encode())  # what comes before may be half a line
