"""A vision transformer as the second backbone: SynQT's laws, and the house's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import embedgrad as eg
from benchmarks.vision import InSequence, saved_bytes
from embedgrad.data.images import image_examples
from embedgrad.errors import DataError, ModelError
from embedgrad.evaluation.evaluator import evaluate
from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.loading.info import weights_digest
from embedgrad.parts.objectives import OWA, CrossEntropy
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import LowRank
from embedgrad.prompt import artifact
from embedgrad.prompt.images import TEMPLATE, Images
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.span import rows_by_span
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts, Refinement, Training
from kit_vision import CLASSES, SMALL, Published, VisionKit, pictures, vision_kit

RANKED = CrossEntropy(over="choices")
QUICK = Training(steps=12, batch_size=6, evaluate_every=6, metric="log_loss")
ONE = replace(SMALL, queries=1, feature_scale=0.7, attention_scale=0.2, adapter_scale=1.0)


def noisy(prompt: Prompt) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        for name, rows in prompt.items()
    }


def parts(**changes: Any) -> Parts:
    return replace(Parts(objective=RANKED, optimizer=AdamW(learning_rate=0.05)), **changes)


def train(made: VisionKit, **options: Any) -> Refinement:
    given = {"training": QUICK, "parts": parts(), "start": made.start, "report": eg.quiet}
    dev = made.sequences[:6]
    return eg.optimize(made.model, made.sequencer, made.sequences, dev, **{**given, **options})


def theta_of(start: Prompt) -> dict[str, Tensor]:
    return {name: torch.zeros_like(rows, requires_grad=True) for name, rows in start.items()}


# -- the published algorithm -------------------------------------------------------


@pytest.mark.parametrize("images", [SMALL, ONE])
def test_it_computes_what_the_published_algorithm_does(images: Images) -> None:
    made = vision_kit(images=images)
    prompt = noisy(made.start)
    published = Published(made.model.model, images, len(CLASSES)).double()
    published.take(prompt)
    logits = published(pictures(len(made.sequences))[0].double())
    expected = torch.log_softmax(logits, dim=1)
    outcome = made.model.outcome(prompt, made.sequences)
    assert (outcome.logprobs_BC - expected).abs().max().item() < 1e-10
    right = made.model.outcome(prompt, made.sequences, choices=False)
    assert torch.equal(right.answer_logprobs_B, outcome.answer_logprobs_B)
    assert right.logprobs_BC.shape == (len(made.sequences), 1)


def test_the_gradient_reaches_every_row_and_no_weight() -> None:
    made = vision_kit()
    prompt = {name: rows.requires_grad_(True) for name, rows in noisy(made.start).items()}
    before = weights_digest(made.model.model)
    RANKED.losses(made.model.outcome(prompt, made.sequences)).sum().backward()
    for name, rows in prompt.items():
        assert rows.grad is not None
        assert rows.grad.norm(dim=1).min().item() > 0, name
    assert not any(w.requires_grad or w.grad is not None for w in made.model.model.parameters())
    train(made)
    assert weights_digest(made.model.model) == before


def test_the_readout_sees_every_layer() -> None:
    """3 L + 1 features: the last query, every layer's, and what its attention and MLP add."""
    made = vision_kit()
    queries, *_ = made.start.values()
    rows_PD = torch.cat(list(made.start.values()))
    found = made.model.attend(made.model.split(rows_PD), made.sequences)
    assert found.shape == (len(made.sequences), 3 * made.model.layers + 1, 32)
    assert torch.equal(found[:, 0], found[:, made.model.layers])
    # A layer's queries change its own features and the later ones, through the mean query.
    changed = rows_PD.clone()
    changed[SMALL.queries : 2 * SMALL.queries] += 0.1
    others = made.model.attend(made.model.split(changed), made.sequences)
    same = (found == others).flatten(2).all(2).all(0).tolist()
    assert same == [False, *[True, False, False] * 3]
    assert len(queries) == made.model.layers * SMALL.queries


def test_the_loss_is_differentiable_twice() -> None:
    made = vision_kit(count=4)
    loss = Loss(made.model, parts(), made.sequencer.target, noisy(made.start))
    theta = theta_of(made.start)
    leaves = list(theta.values())
    first = torch.autograd.grad(loss(theta, made.sequences).sum(), leaves, create_graph=True)
    way = [torch.ones_like(leaf) for leaf in leaves]
    along = torch.stack([(g * w).sum() for g, w in zip(first, way, strict=True)]).sum()
    curved = torch.autograd.grad(along, leaves)
    step = 1e-5
    sides = []
    for sign in (1, -1):
        moved = {n: (t.detach() + sign * step).requires_grad_(True) for n, t in theta.items()}
        sides.append(torch.autograd.grad(loss(moved, made.sequences).sum(), list(moved.values())))
    there, back = sides
    for exact, a, b in zip(curved, there, back, strict=True):
        numeric = (a - b) / (2 * step)
        assert (exact - numeric).norm().item() < 1e-5 * exact.norm().item()


# -- what is stored ----------------------------------------------------------------


def test_saved_activations_are_at_most_a_third_of_prompting_among_the_tokens() -> None:
    made = vision_kit(count=8, dtype=torch.float32, size=14, width=48, layers=2)
    batch, sizes = made.sequences, {}
    rival = InSequence(made.model, queries=SMALL.queries)
    for name, model in (("queries", made.model), ("in sequence", rival)):
        backbone: Backbone = model  # type: ignore[assignment]
        sequencer = model.sequencer(TEMPLATE, made.sequencer.target)
        start = rows_by_span(model.embed(sequencer.prompt_ids), sequencer.spans)
        loss = Loss(backbone, parts(), sequencer.target, start)
        sizes[name] = saved_bytes(loss, theta_of(start), batch)
    assert 0 < sizes["queries"] <= 0.35 * sizes["in sequence"], sizes


def test_an_image_is_read_once_and_alone() -> None:
    made = vision_kit(dtype=torch.float32)
    cache = made.model.prefix_cache
    assert (cache.misses, len(cache)) == (12, 12)  # by the class means
    whole = made.model.outcome(made.start, made.sequences).logprobs_BC
    assert cache.misses == 12
    cold = vision_kit(dtype=torch.float32, count=3)
    alone = cold.model.outcome(made.start, made.sequences[:1])
    keys = [model.prefix_cache.get(made.sequences[0].prefix) for model in (made.model, cold.model)]
    assert keys[0] is not None
    assert keys[1] is not None
    assert torch.equal(keys[0].keys, keys[1].keys)  # to the bit, in whatever company
    assert torch.allclose(alone.logprobs_BC, whole[:1], atol=1e-5)


# -- the same loop, objectives, artifact and report --------------------------------


def test_training_makes_the_classes_likelier_inside_the_region() -> None:
    made = vision_kit(count=24)
    refined = train(made, training=replace(QUICK, steps=30))
    first, *_, last = refined.best.history
    assert last["log_loss"] < 0.5 * first["log_loss"]
    prompt = refined.prompt
    assert [span.text for span in prompt.spans] == ["queries", "synthesis", "readout", "classes"]
    assert prompt.spans[-1].tokens == CLASSES
    assert prompt.drift[prompt.places()["span 1"]].min().item() > 0
    assert TrustRegion().holds(prompt.rows, prompt.start_rows)


@pytest.mark.parametrize(
    "changes", [{}, {"objective": OWA("shade")}, {"parameterization": LowRank(rank=2)}]
)
def test_a_resumed_training_gives_the_same_bits(changes: dict[str, Any]) -> None:
    made = vision_kit(dtype=torch.float32)
    rows = [
        replace(s, example=s.example.with_extra(shade=s.example.answer)) for s in made.sequences
    ]
    made = replace(made, sequences=rows)
    kept: list[Checkpoint] = []
    whole = train(made, parts=parts(**changes), keep=kept.append)
    assert not torch.equal(whole.prompt.rows, whole.prompt.start_rows)
    again = vision_kit(dtype=torch.float32)
    again = replace(again, sequences=rows)
    resumed = train(again, parts=parts(**changes), checkpoint=kept[0])
    assert torch.equal(resumed.prompt.rows, whole.prompt.rows)


def test_accumulating_gives_the_same_gradient() -> None:
    made = vision_kit()
    loss = Loss(made.model, parts(), made.sequencer.target, noisy(made.start))
    whole, split = (loss.gradient(theta_of(made.start), made.sequences, n) for n in (1, 5))
    for name, gradient in whole.gradients.items():
        assert (gradient - split.gradients[name]).abs().max().item() < 1e-10


def test_what_is_saved_is_what_was_scored(tmp_path: Path) -> None:
    made = vision_kit(count=24)
    prompt = train(made).prompt
    eg.save(prompt, tmp_path / "prompt")
    read = artifact.load(tmp_path / "prompt")
    other = vision_kit(count=24)
    read = fit_to_model(read, other.model.info, other.model.embed)
    assert torch.equal(read.rows, prompt.rows.float())
    evaluator = eg.Evaluator(other.model, other.sequencer)
    comparison = evaluate(evaluator, read, other.sequences, eg.quiet)
    ours = eg.Evaluator(made.model, made.sequencer).score(prompt.rows.float(), made.sequences)
    assert [a.loss for a in comparison.refined_answers] == pytest.approx([a.loss for a in ours])
    assert comparison.refined.accuracy > comparison.text.accuracy
    assert comparison.refined.greedy_is_choice is None


# -- bad input ---------------------------------------------------------------------


def test_other_images_are_refused() -> None:
    made = vision_kit(count=3)
    pixels, labels = pictures(2, size=5)
    with pytest.raises(DataError, match=r"^image:1: an image of 25 numbers, but .* 36"):
        made.sequencer.build(image_examples(pixels, labels))
    with pytest.raises(DataError, match="3 images and 2 answers"):
        image_examples(pictures(3)[0], labels)
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"image:1: column 'images' holds 'nan'"):
        image_examples(pixels, labels)
    with pytest.raises(DataError, match=r"'grey' is not a choice"):
        made.sequencer.build(image_examples(pictures(1)[0], ["grey"]))
    with pytest.raises(DataError, match="holds no image"):
        made.sequencer(eg.Example({"text": "A film."}, "dark", "a.csv:1"))


def test_what_a_vision_transformer_cannot_do_is_said() -> None:
    made = vision_kit(count=3)
    with pytest.raises(DataError, match=r"target\.choices: lists none"):
        made.model.sequencer(TEMPLATE, Target())
    with pytest.raises(ModelError, match="writes no text"):
        made.model.generate(made.start, made.sequences)
    with pytest.raises(ModelError, match=r"\[197, 32\] rows; expected 198 of 32"):
        made.model.outcome(torch.zeros(197, 32), made.sequences)
