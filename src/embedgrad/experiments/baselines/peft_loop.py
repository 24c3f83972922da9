"""Training loop for PEFT models, with the same batches as our own loop.

Where the objective trains on answers that the model samples (`reward`), PEFT's weights are trained
by the same objective on their own answers (`on_policy`). Else they learn the right answers' tokens:

    loss = model(input_ids=..., attention_mask=..., labels=...).loss

as in PEFT's documentation: the batch padded on the right, labels on the answer only. Both ways:
AdamW, the gradient clipped at norm 1 as in `transformers.Trainer`. Schedule, order of examples,
evaluations on dev and the choice of the best are the recipe's.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import random
import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.events import say
from embedgrad.experiments.baselines.base import Method, Task, Trained
from embedgrad.experiments.baselines.on_policy import OnPolicy
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import Best

LONGEST_GRADIENT = 1.0
MOST_LOGITS = 2**28  # of a pass: some 4 GB with their copies; a few long rows would need more
Line = tuple[Ids, Ids]  # a question and its right answer


@final
@dataclass(frozen=True)
class Padded:
    """A batch as from a data collator, shapes [B, T]; labels are -100 except on the answers."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, lines: Sequence[Line], device: torch.device) -> Padded:
        """Pad on the right with token 0, which the mask excludes."""
        shape = len(lines), max(len(question) + len(answer) for question, answer in lines)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for row, (question, answer) in enumerate(lines):
            end = len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            mask[row, :end] = 1
            labels[row, len(question) : end] = torch.tensor(answer)
        return cls(ids.to(device), mask.to(device), labels.to(device))


def samples_answers(recipe: Recipe) -> bool:
    """Whether the objective trains on answers that the model samples."""
    return recipe.parts.objective.sampling is not None


def learns(recipe: Recipe) -> dict[str, str]:
    """For the results, what PEFT's weights learn from, if not from the right answers."""
    if samples_answers(recipe):
        return {"learns": "its own answers, by the recipe's objective"}
    return {"learns": "the teacher's answers, not its probabilities"} if recipe.teacher else {}


class PeftMethod(Method):
    """A method of the PEFT library."""

    def why_not(self, recipe: Recipe) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return 'PEFT is not installed; pip install "embedgrad[compare]"'
        return None

    @abstractmethod
    def learning_rate(self, recipe: Recipe) -> float:
        """The peak learning rate."""

    @abstractmethod
    def wrap(self, task: Task) -> AbstractContextManager[Any]:
        """The PEFT model; on leaving the context the base model is as it was."""

    @abstractmethod
    def line(self, task: Task, sequence: TokenSequence) -> Line:
        """A row as this method's model reads it."""

    @abstractmethod
    def question(self, task: Task, sequence: TokenSequence) -> TokenSequence:
        """A row as this method's model reads it before it answers, without a prefix."""

    @abstractmethod
    def rows(self, task: Task, model: Any) -> Tensor:
        """The rows [P, D] that the question's places for rows take, with their graph."""

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        """Within it, the model computes as before training, but for its prompt's rows."""
        return nullcontext()

    @abstractmethod
    def dev_answers(self, task: Task, model: Any) -> list[ScoredAnswer]:
        """The current model's answers to the dev rows."""

    @abstractmethod
    def copy_trained(self, model: Any) -> dict[str, Tensor]:
        """Copies of the tensors to save."""

    def inputs(self, batch: Padded) -> dict[str, Tensor]:
        """Inputs of the model besides ids, mask and labels."""
        return {}

    def distances(self, task: Task, model: Any) -> dict[str, float]:
        """How far rows have moved, for the progress display."""
        return {}

    def train(self, task: Task, seed: int) -> Trained:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with self.wrap(task) as model:
                model.eval()
                return self._fit(task, model, seed)

    def _fit(self, task: Task, model: Any, seed: int) -> Trained:
        recipe, began = task.recipe, time.perf_counter()
        training = replace(recipe.training, seed=seed)
        units = training.units([sequence.example.group for sequence in task.train])
        strata = training.strata(units, task.train, recipe.parts.objective.balance_by)
        total = training.steps_in_all(len(units))
        every = training.steps_between_evaluations(len(units))
        leaves = [value for value in model.parameters() if value.requires_grad]
        rate = self.learning_rate(recipe)
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
        best = Best(task.metric, {}, rows=len(task.dev))
        kept, ended, step = self.copy_trained(model), "finished", 0
        learned, policy, kept_at = task.learned, None, began
        if samples_answers(recipe):
            questions = [self.question(task, sequence) for sequence in task.train]
            rows, reference = partial(self.rows, task, model), partial(self.reference, model)
            policy = OnPolicy(task, seed, leaves, rows, questions, reference)
        plan, before, saved = {"total": total, "every": every}, 0.0, task.load_checkpoint()
        if saved is not None:
            with torch.no_grad():
                for i, leaf in enumerate(leaves):
                    leaf.copy_(saved.theta[f"leaf.{i}"])
            optimizer.load_state_dict(copy.deepcopy(saved.optimizer))
            of_best = (name for name in saved.theta if name.startswith("kept."))
            kept = {name.removeprefix("kept."): saved.theta[name] for name in of_best}
            best = Best(task.metric, {}, saved.best_step, saved.history, len(task.dev))
            step, before = saved.step, saved.seconds
            if policy is not None:
                policy.rollouts.dead = saved.dead

        def evaluate() -> None:
            nonlocal kept
            if task.dev:
                best.add(task.dev_score(self.dev_answers(task, model), step), best.prompt)
                task.report({**best.event(), **plan})
            if not task.dev or best.step == step:
                kept = self.copy_trained(model)

        if saved is None:
            evaluate()
        if best.stops_early(training.patience):  # it was interrupted after its last checkpoint
            total, ended = step, "patience"
        for batch in itertools.islice(training.batches(units, total, strata), step, None):
            since = time.perf_counter()
            # Seeded by step, so that a resumed training draws the same dropout.
            torch.manual_seed(random.Random(f"{seed}/dropout/{step}").getrandbits(63))
            for group in optimizer.param_groups:
                group["lr"] = rate * recipe.parts.schedule.factor(step, total)
            loss, norm, figures = 0.0, 0.0, dict[str, float]()
            if policy is None:
                lines = [self.line(task, learned[i]) for i in batch]
                model.train()
                gradients = partial(self._gradients, task, model, lines, training.accumulate)
                examples, updates = len(batch), 1
            else:
                answers, figures = policy.draw(batch, step)
                gradients = partial(policy.gradients, answers, training.accumulate)
                examples, updates = len(answers), policy.updates if answers else 0
            for _ in range(updates):
                loss = gradients()
                norm = torch.nn.utils.clip_grad_norm_(leaves, LONGEST_GRADIENT).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    break
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                ended, where = "diverged", f"{self.name}, seed {seed}, step {step + 1}"
                say(task.report, [f"{where}: the loss is {loss}; stopped, the best so far is kept"])
                break
            step += 1
            task.report(
                {
                    "event": "step",
                    "step": step,
                    "total": total,
                    "loss": loss,
                    "gradient_norm": norm,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    **self.distances(task, model),
                    "examples": examples,
                    "seconds": time.perf_counter() - since,
                    **figures,
                    **task.model.prefix_cache.progress,
                }
            )
            due = step % every == 0 or step == total
            if due:
                evaluate()
            if due or time.perf_counter() - kept_at > training.checkpoint_seconds:
                kept_at = time.perf_counter()
                seconds = before + time.perf_counter() - began
                theta = {f"leaf.{i}": leaf.detach() for i, leaf in enumerate(leaves)}
                theta |= {f"kept.{name}": value for name, value in kept.items()}
                state = Checkpoint(step, theta, optimizer.state_dict(), {}, seconds=seconds)
                state.best_step, state.history = best.step, best.history
                state.dead = {} if policy is None else policy.rollouts.dead
                task.keep(state)
                if due and best.stops_early(training.patience):
                    ended = "patience"
                    break
        seconds = before + time.perf_counter() - began
        task.report({"event": "end", "ended": ended, "steps": step, "seconds": seconds})
        return Trained(
            kept,
            {
                "trained_numbers": sum(leaf.numel() for leaf in leaves),
                "stored_bytes": sum(t.numel() * t.element_size() for t in kept.values()),
                "examples_seen": sum(map(len, training.batches(units, step))),
                "train_seconds": seconds,
                "dev": best.score if best.history else None,
                "history": best.history,
                "ended": ended,
                "settings": {
                    "learning_rate": rate,
                    "steps": step,
                    **learns(recipe),
                    **self.settings(recipe),
                },
            },
        )

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Settings of the method, for the results."""
        return {}

    def _gradients(self, task: Task, model: Any, lines: Sequence[Line], parts: int) -> float:
        """The model's loss, a mean over tokens; the parts add up to the whole batch.

        The model computes logits at every position, so a batch of long rows takes more parts.
        """
        longest = max(len(question) + len(answer) for question, answer in lines)
        logits = len(lines) * longest * task.model.info.vocabulary
        parts, total = max(parts, math.ceil(logits / MOST_LOGITS)), 0.0
        size = math.ceil(len(lines) / parts)
        tokens = sum(len(answer) for _, answer in lines)
        for start in range(0, len(lines), size):
            part = lines[start : start + size]
            batch = Padded.of(part, task.model.device)
            loss = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                labels=batch.labels,
                use_cache=False,
                **self.inputs(batch),
            ).loss
            loss = loss * (sum(len(answer) for _, answer in part) / tokens)
            loss.backward()
            total += loss.item()
        return total
