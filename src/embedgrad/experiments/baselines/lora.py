"""LoRA baseline (PEFT).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; alpha and dropout as in PEFT's quick tour.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.experiments.baselines.base import (
    Answers,
    Task,
    Trained,
    question_ids,
    question_tokens,
)
from embedgrad.experiments.baselines.on_policy import without_prefixes
from embedgrad.experiments.baselines.peft_loop import Line, PeftMethod, samples_answers
from embedgrad.model.backbone import join_spans
from embedgrad.model.packing import full_context
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.warm_start import read_warm_start

ALPHA_PER_RANK, DROPOUT = 4, 0.1


@final
class Lora(PeftMethod):
    """PEFT LoRA on the modules that PEFT chooses for the architecture, with the text prompt.

    Trained by rewards it begins where EmbedGrad does, with the rows of `training.warm_start`.
    """

    def learning_rate(self, recipe: Recipe) -> float:
        return recipe.compare.lora_learning_rate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        rank = recipe.compare.lora_rank
        dropout = 0.0 if samples_answers(recipe) else DROPOUT
        return {"rank": rank, "alpha": ALPHA_PER_RANK * rank, "dropout": dropout}

    @contextlib.contextmanager
    def wrap(self, task: Task) -> Iterator[Any]:
        recipe, rows = task.recipe, None
        if samples_answers(recipe):
            rows = read_warm_start(recipe, task.model, task.sequencer)
        with self._adapt(task) as model:
            model.warm_rows = None if rows is None else join_spans(rows).to(task.model.device)
            yield model

    @contextlib.contextmanager
    def _adapt(self, task: Task) -> Iterator[Any]:
        from peft import LoraConfig, TaskType, get_peft_model

        base, rank = task.model.model, task.recipe.compare.lora_rank
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=ALPHA_PER_RANK * rank,
            lora_dropout=DROPOUT,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                # PEFT corrects this by itself in GPT-2.
                warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
                model: Any = get_peft_model(base, config)
        except ValueError as error:
            reason = f"PEFT has no LoRA for {task.model.info.architecture} ({error})"
            raise ModelError(f"{self.name}: {reason}; leave it out") from error
        try:
            yield model
        finally:
            model.unload()
            base.eval().requires_grad_(False)

    def line(self, task: Task, sequence: TokenSequence) -> Line:
        return question_ids(task, sequence), sequence.targets[sequence.gold]

    def question(self, task: Task, sequence: TokenSequence) -> TokenSequence:
        ids, places = self.line(task, sequence)[0], list[int]()
        if task.recipe.training.warm_start:
            ids, places = full_context(sequence, len(task.sequencer.prompt_ids))
        row = replace(sequence, prefix=(), suffix=ids, later=tuple(places))
        return replace(row, plain=None, shared=0, inputs=None)

    def rows(self, task: Task, model: Any) -> Tensor:
        rows: Tensor = task.model.embed(()) if model.warm_rows is None else model.warm_rows
        return rows

    def reference(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        off: contextlib.AbstractContextManager[Any] = model.disable_adapter()
        return off

    def dev_answers(self, task: Task, model: Any) -> list[ScoredAnswer]:
        return _answers(task, task.dev, model.warm_rows)

    def copy_trained(self, model: Any) -> dict[str, Tensor]:
        weights = _lora_weights(model)
        if model.warm_rows is not None:
            weights["rows"] = model.warm_rows
        return {name: value.detach().cpu().clone() for name, value in weights.items()}

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        rows = trained.tensors.get("rows")
        with torch.random.fork_rng(), self._adapt(task) as model:
            model.eval()
            with torch.no_grad():
                for name, value in _lora_weights(model).items():
                    value.copy_(trained.tensors[name])
            answered = _answers(task, sequences, rows)
        count, text = len(task.sequencer.prompt_ids), rows is None
        return Answers(answered, [question_tokens(s, count, as_text=text) for s in sequences])


def _lora_weights(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _answers(
    task: Task, sequences: Sequence[TokenSequence], rows_PD: Tensor | None
) -> list[ScoredAnswer]:
    """Answers of the model with LoRA to the text prompt, or to rows."""
    model = without_prefixes(task)
    if rows_PD is not None:
        return task.evaluator(model).score(rows_PD.to(model.device), sequences, task.report)
    start_PD = model.embed(task.sequencer.prompt_ids)
    return task.evaluator(model).score_text_prompt(start_PD, sequences, task.report)
