"""LoRA baseline (PEFT).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; alpha and dropout as in PEFT's quick tour.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.experiments.baselines.base import Answers, Task, Trained, question_tokens
from embedgrad.experiments.baselines.peft_loop import Line, PeftMethod
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

ALPHA_PER_RANK, DROPOUT = 4, 0.1


@final
class Lora(PeftMethod):
    """PEFT LoRA on the modules that PEFT chooses for the architecture, with the text prompt."""

    def learning_rate(self, recipe: Recipe) -> float:
        return recipe.compare.lora_learning_rate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        rank = recipe.compare.lora_rank
        return {"rank": rank, "alpha": ALPHA_PER_RANK * rank, "dropout": DROPOUT}

    @contextlib.contextmanager
    def wrap(self, task: Task) -> Iterator[Any]:
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
        question = sequence.plain or sequence.context(task.sequencer.prompt_ids)
        return question, sequence.targets[sequence.gold]

    def dev_answers(self, task: Task, model: Any) -> list[ScoredAnswer]:
        return _answers(task, task.dev)

    def copy_trained(self, model: Any) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in _lora_weights(model).items()}

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        with torch.random.fork_rng(), self.wrap(task) as model:
            model.eval()
            with torch.no_grad():
                for name, value in _lora_weights(model).items():
                    value.copy_(trained.tensors[name])
            answered = _answers(task, sequences)
        count = len(task.sequencer.prompt_ids)
        return Answers(answered, [question_tokens(s, count, as_text=True) for s in sequences])


def _lora_weights(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _answers(task: Task, sequences: Sequence[TokenSequence]) -> list[ScoredAnswer]:
    """Answers of the model with LoRA, which cannot reuse prefixes of the bare model."""
    own = task.model
    model = LanguageModel(LoadedModel(own.model, own.tokenizer, own.info), prefix_cache_budget=0)
    start_PD = model.embed(task.sequencer.prompt_ids)
    return task.evaluator(model).score_text_prompt(start_PD, sequences, task.report)
