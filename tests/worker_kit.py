"""What one of several workers computes, for `test_workers`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import generate
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.lockstep import shard
from embedgrad.model.workers import here, join_workers
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.parameterizations import Free
from embedgrad.parts.scorers import Scorer
from embedgrad.prompt.sequence import Target
from embedgrad.training.loss import Loss
from embedgrad.training.self_training import Solutions, training_examples
from embedgrad.training.settings import Parts
from kit import Kit, kit, noisy
from seam_parts import OrderedAverage, WorstGroup

OBJECTIVES = {"mean": CrossEntropy(), "ordered": OrderedAverage(), "worst": WorstGroup()}


def shared(made: Kit, fsdp: bool) -> Kit:
    """The kit, with the weights of its model shared out if asked."""
    if not fsdp:
        return made
    if not isinstance(made.loaded.model.base_model, FSDPModule):  # kits share it too
        shard(made.loaded.model, 3, torch.device("cpu"))
    return dataclasses.replace(made, model=LanguageModel(made.loaded))


def found(fsdp: bool = False) -> dict[str, Any]:
    """Gradients of several objectives, and free answers, of this worker and all others."""
    made, values = shared(kit(rows=9), fsdp), dict[str, Any]()
    theta = Free().reach({"span": noisy(made.start)}, {"span": made.start})
    theta["span"].requires_grad_(True)
    for name, objective in OBJECTIVES.items():
        loss = Loss(
            made.model, Parts(objective=objective), made.sequencer.target, {"span": made.start}
        )
        for accumulate in (1, 4):  # of 9 rows, so that some parts have fewer rows than workers
            here().begin_step()
            gradient = loss.gradient(theta, made.sequences, accumulate)
            numbers = gradient.gradients["span"].flatten().tolist()
            losses = gradient.losses_B.tolist()
            values[f"{name} {accumulate}"] = [gradient.loss, *losses, *numbers]
    free = shared(kit(rows=9, target=Target()), fsdp)
    evaluator = Evaluator(free.model, free.sequencer, Evaluation(max_new_tokens=4, batch_size=4))
    scored = evaluator.score(noisy(free.start), free.sequences)
    few = Decoding(max_new_tokens=5, temperature=1.0, samples=3, stop=("e",), seed=4)
    with patch("embedgrad.model.language_model.generate", wraps=generate) as own:
        sampled = free.model.sample(
            *(noisy(free.start), free.sequences, few),
            end_ids=evaluator.end_ids,
            numbers=range(20, 29),
        )
    return {
        "numbers": values,
        "sampled": [[[a.ids, a.end, a.text, a.ended, a.over] for a in group] for group in sampled],
        "sampled here": sum(len(call.args[2]) for call in own.call_args_list),
        "answers": [dataclasses.astuple(answer)[:4] for answer in scored],
        "losses": [answer.loss for answer in scored],
        "sent": dict(here().sent),
        "stored": made.model.prefix_cache.figures,
        "weights": sum(
            (w.to_local() if isinstance(w, DTensor) else w).numel()
            for w in made.loaded.model.parameters()
        ),
    }


class OddLength(Scorer):
    """Whether a reply has an odd number of characters."""

    def score(self, reply: str, answer: str) -> float:
        return float(len(reply) % 2)


def sampled_solutions() -> dict[str, Any]:
    """Solutions that the model writes, of the cache folder or now, and for how many questions."""
    made = kit(rows=9, target=Target())
    rows = [dataclasses.replace(s.example, answer="a") for s in made.sequences]
    evaluation = Evaluation(scorer=OddLength(), batch_size=4, max_new_tokens=24, stop=("e",))
    settings = Solutions(source="self-written", samples=2, temperature=1.0)
    with patch("embedgrad.model.language_model.generate", wraps=generate) as own:
        found, facts = training_examples(
            *(made.model, made.sequencer, rows, settings), evaluation=evaluation
        )
    return {
        "solutions": [(example.source, example.solution) for example in found],
        "asked": sum(len(call.args[2]) for call in own.call_args_list),
        "file": facts["file"],
        "sha256": facts["sha256"],
    }


def tell_solutions(caches: Path) -> None:
    """Print it as JSON, with a cache folder for each worker."""
    with join_workers() as workers:
        os.environ["EMBEDGRAD_CACHE"] = str(caches / str(workers.rank))
        print(json.dumps(sampled_solutions()))


def tell(fsdp: bool) -> None:
    """Print it as JSON, by the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    with join_workers():
        print(json.dumps(found(fsdp)))
