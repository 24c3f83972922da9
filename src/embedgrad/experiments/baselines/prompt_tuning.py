"""Soft-prompt baselines: prompt tuning and CPT (PEFT).

PEFT can put virtual tokens only before everything else, even the opening of the chat template. So
the span's words are taken out of the template, and the same number of virtual tokens comes first.
Sources: Lester et al. 2021, https://arxiv.org/abs/2104.08691 (prompt tuning); Blau et al. 2024,
https://arxiv.org/abs/2410.17222 (CPT); PEFT 0.21 `PeftModelForCausalLM.forward`.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.experiments.baselines.base import (
    Answers,
    Task,
    Trained,
    question_tokens,
    why_not_one_span,
)
from embedgrad.experiments.baselines.peft_loop import Line, Padded, PeftMethod
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.trust_region import distances
from embedgrad.recipe.recipe import Recipe

ORDER = "PEFT puts the prompt first: the same number of rows, before the chat template's opening"


def prompt_first(sequence: TokenSequence) -> TokenSequence:
    """The row with the prompt first, as PEFT needs it."""
    suffix = sequence.prefix + sequence.suffix
    return replace(sequence, prefix=(), suffix=suffix, plain=None, shared=0)


class PeftPrompt(PeftMethod):
    """A PEFT method that trains prompt rows, which our evaluator scores."""

    start: str

    def why_not(self, recipe: Recipe) -> str | None:
        return super().why_not(recipe) or why_not_one_span(recipe)

    @abstractmethod
    def config(self, task: Task) -> Any:
        """The `PeftConfig`."""

    @contextlib.contextmanager
    def wrap(self, task: Task) -> Iterator[Any]:
        from peft import get_peft_model

        base = task.model.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks for a renamed property
            model: Any = get_peft_model(base, self.config(task))
        try:
            yield model
        finally:
            base.eval()  # nothing else was changed

    def line(self, task: Task, sequence: TokenSequence) -> Line:
        return sequence.prefix + sequence.suffix, sequence.targets[sequence.gold]

    def question(self, task: Task, sequence: TokenSequence) -> TokenSequence:
        return prompt_first(sequence)

    def rows(self, task: Task, model: Any) -> Tensor:
        rows: Tensor = model.get_prompt(batch_size=1)[0].float()
        return rows

    def dev_answers(self, task: Task, model: Any) -> list[ScoredAnswer]:
        rows = [prompt_first(sequence) for sequence in task.dev]
        return task.evaluator().score(rows_of(model), rows)

    def copy_trained(self, model: Any) -> dict[str, Tensor]:
        return {"rows": rows_of(model).cpu()}

    def distances(self, task: Task, model: Any) -> dict[str, float]:
        return distances(rows_of(model), task.model.embed(task.sequencer.prompt_ids))

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"start": self.start, "order": ORDER}

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        rows_PD = trained.tensors["rows"].to(task.model.device)
        rows = [prompt_first(sequence) for sequence in sequences]
        answered = task.evaluator().score(rows_PD, rows, task.report)
        return Answers(answered, [question_tokens(s, len(rows_PD)) for s in rows])


@final
class PromptTuning(PeftPrompt):
    """PEFT prompt tuning from the span's own tokens, or from random rows."""

    def __init__(self, name: str, *, from_text: bool):
        super().__init__(name)
        self.from_text = from_text
        self.start = "the span's tokens" if from_text else "PEFT's random rows"

    def learning_rate(self, recipe: Recipe) -> float:
        if self.from_text:
            return recipe.compare.prompt_tuning_learning_rate
        return recipe.compare.random_prompt_learning_rate

    def config(self, task: Task) -> Any:
        from peft import PromptTuningConfig, PromptTuningInit, TaskType

        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            prompt_tuning_init=PromptTuningInit.RANDOM,
            num_virtual_tokens=len(task.sequencer.prompt_ids),
        )

    @contextlib.contextmanager
    def wrap(self, task: Task) -> Iterator[Any]:
        with super().wrap(task) as model:
            if self.from_text:
                # As PEFT's TEXT start, but with the span's tokens in the template: alone, the text
                # may be tokenized differently.
                rows_PD = task.model.embed(task.sequencer.prompt_ids)
                with torch.no_grad():
                    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(rows_PD)
            yield model


@final
class CPT(PeftPrompt):
    """PEFT CPT: trains a difference of bounded length to the span's embeddings."""

    start = "the span's tokens"

    def learning_rate(self, recipe: Recipe) -> float:
        return recipe.compare.cpt_learning_rate

    def config(self, task: Task) -> Any:
        from peft import CPTConfig, TaskType

        ids = task.sequencer.prompt_ids
        return CPTConfig(
            task_type=TaskType.CAUSAL_LM,
            cpt_token_ids=list(ids),
            cpt_mask=[1] * len(ids),
            cpt_tokens_type_mask=[1] * len(ids),  # type 1: words of the template, which are trained
        )

    def inputs(self, batch: Padded) -> dict[str, Tensor]:
        # CPT adds the prompt's largest type, 1, to these, in place; a multiple of 4 is a label.
        return {"input_type_mask": torch.where(batch.labels == -100, 1, 3) * batch.mask}


@torch.no_grad()
def rows_of(model: Any) -> Tensor:
    """The rows [P, D] that PEFT puts before a batch, in float32."""
    rows: Tensor = model.get_prompt(batch_size=1)[0]
    return rows.detach().float().clone()
