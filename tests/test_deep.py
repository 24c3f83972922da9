"""Rows for every layer of a language model: where they go, and where they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import embedgrad as eg
from embedgrad.errors import ExportError, ModelError, RunError
from embedgrad.evaluation.drift import token_drift
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.decoding import Decoding
from embedgrad.parts.parameterizations import Free
from embedgrad.prompt import artifact
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from kit import Kit, kit
from kit_loop import FAST, QUICK, small, train
from run_kit import values

pytest_plugins = ["tiny_runs"]

DEEP = replace(FAST, parameterization=Free(deep=True))
LAYERS, WIDTH = 3, 32


def wide(made: Kit, noise: float = 0.0) -> Tensor:
    rows = made.model.forward.widen(made.start)
    generator = torch.Generator().manual_seed(5)
    return rows + noise * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)


def by_hand(made: Kit, rows: Tensor) -> Tensor:
    """Log-probabilities of the first choice's first token, each in a plain pass of its own."""
    model: Any = made.loaded.model
    sizes = made.model.forward.layers._sizes_L.to(rows)
    later = rows[:, WIDTH:].view(len(rows), LAYERS - 1, WIDTH)
    found = []
    for s in made.sequences:
        table = model.get_input_embeddings()
        parts = [table(torch.tensor(s.prefix)), rows[:, :WIDTH], table(torch.tensor(s.suffix))]
        place = slice(len(s.prefix), len(s.prefix) + len(rows))
        hooks = []
        for i, layer in enumerate(model.base_model.layers[1:]):

            def add(_: Any, inputs: Any, i: int = i, place: slice = place) -> Any:
                hidden = inputs[0].clone()
                hidden[:, place] += sizes[i] * later[:, i]
                return (hidden, *inputs[1:])

            hooks.append(layer.register_forward_pre_hook(add))
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits
        for hook in hooks:
            hook.remove()
        found.append(torch.log_softmax(logits[0, -1], dim=0)[s.targets[0][0]])
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize("placement", ["user-after", "system"])
def test_rows_are_added_where_the_layers_begin(architecture: str, placement: str) -> None:
    made = kit(architecture, template=placement, rows=4, tie=False)
    rows = wide(made, noise=0.3)
    outcome = made.model.outcome(rows, made.sequences)
    assert outcome.tokens_BC.max() == 1
    assert (outcome.logprobs_BC[:, 0] - by_hand(made, rows)).abs().max().item() < 1e-9
    plain = made.model.outcome(made.start, made.sequences).logprobs_BC
    assert torch.equal(made.model.outcome(wide(made), made.sequences).logprobs_BC, plain)
    assert not torch.allclose(outcome.logprobs_BC, plain, atol=1e-3)


def test_every_layer_has_a_gradient_and_generation_reads_it() -> None:
    made = kit(rows=4, tie=False)
    rows = wide(made, noise=0.1).requires_grad_(True)
    made.model.outcome(rows, made.sequences).answer_logprobs_B.sum().backward()
    assert rows.grad is not None
    lengths = rows.grad.view(len(rows), LAYERS, WIDTH).norm(dim=2)
    assert lengths.min().item() > 0
    free = kit(rows=4, tie=False, target=Target())
    ask = (free.sequences, Decoding(max_new_tokens=4))
    deep = free.model.generate(wide(free, noise=3.0), *ask, end_ids=())
    assert deep != free.model.generate(free.start, *ask, end_ids=())
    assert free.model.generate(wide(free), *ask, end_ids=()) == free.model.generate(
        free.start, *ask, end_ids=()
    )


def test_training_moves_every_layer_inside_the_region_and_resumes(tmp_path: Path) -> None:
    made, kept = small(), list[Checkpoint]()
    training = replace(QUICK, evaluate_every=2, metric="log_loss")
    refined = train(made, training, parts=DEEP, keep=kept.append)
    prompt = refined.prompt
    assert prompt.rows.shape == (len(made.start), LAYERS * WIDTH)
    assert torch.equal(prompt.start_rows, wide(made))
    moved = (prompt.rows - prompt.start_rows).view(-1, LAYERS, WIDTH).norm(dim=2)
    assert moved.min().item() > 0
    assert TrustRegion().holds(prompt.rows, prompt.start_rows)
    resumed = train(made, training, parts=DEEP, checkpoint=kept[0])
    assert torch.equal(resumed.prompt.rows, prompt.rows)
    # Saved, read and scored as it was.
    eg.save(prompt, tmp_path / "deep")
    read = fit_to_model(artifact.load(tmp_path / "deep"), made.model.info, made.model.embed)
    assert torch.equal(read.rows, prompt.rows)
    assert torch.equal(read.start_rows, prompt.start_rows)
    assert [t.distance for t in token_drift(read, made.model)] == prompt.drift.tolist()


def test_where_rows_for_every_layer_cannot_go() -> None:
    other = kit("mamba", rows=3, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"^parameterization\.deep: rows .* which this model \("):
        train(replace(other, sequences=other.sequences * 4), parts=DEEP)
    made = kit(rows=3)
    longer = torch.cat([wide(made), made.start], dim=1)
    with pytest.raises(ModelError, match=r"128 numbers, but this model has 3 layers of 32"):
        made.model.outcome(longer, made.sequences)
    with pytest.raises(ModelError, match="this engine does without"):
        made.model.forward.embed_in_full(wide(made), made.sequences[0])


def test_a_run_with_them_scores_answers_and_is_not_exported(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    deep, out = {"parameterization": {"name": "free", "deep": True}}, tmp_path / "deep"
    eg.run(eg.Recipe.from_dict(values(model_folder, data, **deep)), out, eg.quiet)
    prompt = eg.load(out)
    model = eg.load_model(str(model_folder), report=eg.quiet)
    assert prompt.rows.shape[1] == model.info.width * model.forward.layers.count
    assert not torch.equal(prompt.rows, prompt.start_rows)
    query = dict.fromkeys(prompt.template.columns, "A warm film.")
    assert prompt.generate(query, model=model, report=eg.quiet) in prompt.target.choices
    with pytest.raises(ExportError, match=r"rows for every layer \(parameterization\.deep\)"):
        eg.export(out, "vocabulary", tmp_path / "out", report=eg.quiet)
    assert not (tmp_path / "out").exists()
    # A run without them may begin one with them, but not the other way round.
    flat, warm = tmp_path / "flat", {"training": {"steps": 2, "warm_start": str(out)}}
    with pytest.raises(RunError, match=r"training\.warm_start: .* has rows for every layer"):
        eg.run(eg.Recipe.from_dict(values(model_folder, data, **warm)), flat, eg.quiet)
    eg.run(eg.Recipe.from_dict(values(model_folder, data)), flat, eg.quiet)
    warm["training"]["warm_start"] = str(flat)
    recipe = eg.Recipe.from_dict(values(model_folder, data, **warm, **deep))
    result = eg.run(recipe, tmp_path / "warm", eg.quiet)
    assert result["train"]["steps"] == 2
