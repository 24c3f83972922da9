"""The state of a training loop as a checkpoint, and back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from embedgrad.errors import RunError
from embedgrad.parts.parameterizations import all_rows
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import Best

if TYPE_CHECKING:
    from embedgrad.training.loop import Loop


def take_checkpoint(loop: Loop) -> Checkpoint:
    """The state of the loop, copied so that the next step cannot change it."""
    loop.note_theta()
    return Checkpoint(
        step=loop.step,
        theta=loop.copy_theta(),
        optimizer=copy.deepcopy(loop.optimizer.state_dict()),
        transforms=copy.deepcopy(loop.transforms),
        objective=dict(loop.memory),
        best={name: rows.clone() for name, rows in loop.best.prompt.items()},
        best_theta=loop.best_theta,
        best_step=loop.best.step,
        history=list(loop.best.history),
        seconds=loop.seconds(),
        dead=loop.dead,
        accumulate=loop.accumulate,
        skipped=loop.skipped,
    )


def restore_checkpoint(loop: Loop, checkpoint: Checkpoint) -> None:
    """Go on from a checkpoint. Raises `RunError` for one that does not fit the loop."""
    saved, own = (
        [{name: value.shape for name, value in tensors.items()} for tensors in pair]
        for pair in ((checkpoint.theta, checkpoint.best), (loop.theta, loop.start_prompt))
    )
    if saved != own or len(checkpoint.transforms) != len(loop.transforms):
        raise RunError("the checkpoint belongs to another prompt, model or set of parts")
    loop.set_theta(checkpoint.theta)
    region, start = loop.parts.trust_region, all_rows(loop.start_prompt)
    best = {name: checkpoint.best[name].to(rows) for name, rows in loop.start_prompt.items()}
    for rows in map(all_rows, (loop.prompt(), best)):
        if not (rows.isfinite().all() and region.holds(rows, start)):
            raise RunError("the checkpoint's rows are not in the trust region; start a new run")
    loop.proven = {name: rows.detach().clone() for name, rows in loop.prompt().items()}
    loop.optimizer.load_state_dict(copy.deepcopy(checkpoint.optimizer))
    device = next(iter(loop.theta.values())).device
    loop.transforms = [
        {name: value.to(device, copy=True) for name, value in state.items()}
        for state in checkpoint.transforms
    ]
    history = list(checkpoint.history)
    loop.best = Best(loop.best.metric, best, checkpoint.best_step, history, len(loop.dev))
    loop.best_theta, loop.memory = checkpoint.best_theta, dict(checkpoint.objective)
    loop.step, loop.seconds_before = checkpoint.step, checkpoint.seconds
    loop.accumulate = max(loop.accumulate, checkpoint.accumulate)
    loop.skipped, loop.dead = checkpoint.skipped, checkpoint.dead
    if loop.rollouts is not None:
        loop.rollouts.dead = checkpoint.dead
