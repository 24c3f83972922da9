"""Vision: queries that read frozen tokens, against prompts that stand among the tokens.

    python -m benchmarks.vision [--seeds 0,1,2,3,4] [--variants queries,...] [--test]

The images are scikit-learn's digits (1,797 of 8 x 8; `pip install scikit-learn`). A small vision
transformer with a token per pixel is trained here on the digits 0 to 4, and then frozen. Every row
is one training on 160 images of the digits 5 to 9, with 160 others to choose rows by; the rest are
test images, scored once, with `--test`. The splits are drawn by the seed, the same for all.

queries      SynQT: 4 queries in every layer read the frozen tokens (`embedgrad.model.vision`)
in sequence  VPT-deep: 4 rows in every layer stand among the tokens, and class rows
probe        class rows alone, on the frozen model's class token
class means  the start of `queries`, nothing trained

Saved activations are the bytes that autograd keeps for one batch of 32 images, the model's own
weights left out. Rows in `benchmarks/results/vision.json` are not measured again; delete the file
and runs/vision to do so. It takes a few minutes on one thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

import embedgrad as eg
from benchmarks.speed.memory import saved
from embedgrad.data.images import image_examples
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.loading.vision import describe_vision
from embedgrad.model.outcome import Outcome
from embedgrad.model.vision import VisionModel
from embedgrad.prompt.images import Images, ImageSequencer
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.training.loss import Loss

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vision.json"
KEPT = ROOT / "runs" / "vision"
KNOWN, NEW = range(5), range(5, 10)  # digits to pretrain on, and to adapt to
TRAIN, DEV = 160, 160
WIDTH, LAYERS, QUERIES = 48, 3, 4
IMAGES = Images(queries=QUERIES, hidden=16, mixing=8)
VARIANTS = ("class means", "probe", "in sequence", "queries")
BATCH = 32
DRAWS = 2000


@final
class InSequence:
    """Prompting in the token sequence: each layer's rows stand among its tokens (VPT-deep).

    Its prompt is the queries [L, n, D] and the classes [C, D], compared with the class token.
    Source: Visual Prompt Tuning, Jia et al. 2022, https://arxiv.org/abs/2203.12119, section 3.2.
    """

    def __init__(self, vision: VisionModel, queries: int = QUERIES):
        self.vision, self.info, self.queries = vision, vision.info, queries

    def sequencer(self, template: eg.Template, target: Target) -> ImageSequencer:
        made = self.vision.sequencer(template, target)
        names = ("queries", "classes") if self.queries else ("classes",)
        counts = {"queries": self.vision.layers * self.queries, "classes": len(target.choices)}
        edges = np.cumsum([0, *(counts[name] for name in names)]).tolist()
        made.spans = tuple(
            Span(name, tuple(range(a, b)), ("row",) * (b - a))
            for name, a, b in zip(names, edges[:-1], edges[1:], strict=True)
        )
        made.prompt_ids = tuple(range(edges[-1]))
        return made

    def embed(self, ids: Sequence[int]) -> Tensor:
        queries = self.vision.layers * self.queries
        bound = self.vision.width**-0.5
        generator = torch.Generator().manual_seed(0)
        rows = torch.rand(max(ids) + 1, self.vision.width, generator=generator) * 2 - 1
        rows[queries:] *= bound
        return rows[list(ids)].to(self.vision.dtype)

    def feature(self, prompt_PD: Tensor, batch: Sequence[TokenSequence]) -> Tensor:
        model, own = self.vision.model, self.queries
        pixels = [
            torch.frombuffer(bytearray(s.example.extra["pixels"]), dtype=torch.float32)
            for s in batch
        ]
        stacked = torch.stack(pixels).view(-1, *self.vision.shape).to(self.vision.dtype)
        x_BTD = model.embeddings(stacked)
        for i, layer in enumerate(model.layers):
            rows = prompt_PD[i * own : (i + 1) * own].expand(len(batch), -1, -1)
            x_BTD = layer(torch.cat([x_BTD[:, :1], rows, x_BTD[:, 1 + (own if i else 0) :]], dim=1))
        feature: Tensor = model.layernorm(x_BTD[:, 0])
        return feature

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
    ) -> Outcome:
        prompt_PD = join_spans(prompt)
        classes_CD = prompt_PD[self.vision.layers * self.queries :]
        logprobs_BC = torch.log_softmax(self.feature(prompt_PD, batch) @ classes_CD.T, dim=1)
        gold_B = torch.tensor([s.gold for s in batch])
        if not choices:
            logprobs_BC, gold_B = logprobs_BC.gather(1, gold_B[:, None]), torch.zeros_like(gold_B)
        tokens_BC = torch.ones_like(logprobs_BC, dtype=torch.long)
        return Outcome(logprobs_BC, tokens_BC, gold_B, (None,) * len(batch), normalize)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError


def saved_bytes(loss: Loss, theta: dict[str, Tensor], batch: Sequence[TokenSequence]) -> int:
    """Bytes that autograd keeps for a batch's loss; the model's weights and theta left out."""
    model: Any = getattr(loss.model, "vision", loss.model)
    own = [*model.model.parameters(), *theta.values()]
    return saved(lambda: loss(theta, batch).sum(), own)


def digits() -> tuple[Tensor, list[int]]:
    """The digits as images [N, 1, 8, 8] from -1 to 1, and what each shows."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, [int(label) for label in found.target]


def pretrained(folder: Path) -> tuple[VisionModel, dict[str, Any]]:
    """The vision transformer, trained on the known digits once, and what that came to."""
    settings = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        image_size=8,
        patch_size=1,
        num_channels=1,
    )
    torch.manual_seed(0)
    vit: Any = ViTModel(settings, add_pooling_layer=False)
    file, facts = folder / "vit.safetensors", {}
    if file.exists():
        vit.load_state_dict(load_file(file))
    else:
        facts = _pretrain(vit)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(vit.state_dict(), file)
    return VisionModel(vit, describe_vision(vit, "digits 0 to 4"), IMAGES), facts


def _pretrain(vit: Any, epochs: int = 40) -> dict[str, Any]:
    began, (images, labels) = time.perf_counter(), digits()
    own = [i for i, label in enumerate(labels) if label in KNOWN]
    x, y = images[own], torch.tensor([labels[i] for i in own])
    order = torch.randperm(len(own))
    held, used = order[:150], order[150:]
    head = torch.nn.Linear(WIDTH, len(KNOWN))
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
    steps = epochs * (len(used) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + epochs)
    for epoch in range(epochs):
        vit.train()
        for some in used[torch.randperm(len(used))].split(BATCH):
            if len(some) < BATCH:
                continue
            shift = (random.Random(epoch * 1000 + int(some[0])).choice((-1, 0, 1)), 0)
            pixels = torch.roll(x[some], shift, dims=(3, 2))
            logits = head(vit(pixels).last_hidden_state[:, 0])
            loss = torch.nn.functional.cross_entropy(logits, y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    vit.eval()
    with torch.no_grad():
        right = head(vit(x[held]).last_hidden_state[:, 0]).argmax(1) == y[held]
    accuracy = right.float().mean().item()
    return {"held_out_accuracy": accuracy, "seconds": time.perf_counter() - began}


def splits_of(seed: int) -> dict[str, list[eg.Example]]:
    """The new digits, shuffled by the seed."""
    images, labels = digits()
    own = [i for i, label in enumerate(labels) if label in NEW]
    random.Random(seed).shuffle(own)
    parts = {"train": own[:TRAIN], "dev": own[TRAIN : TRAIN + DEV], "test": own[TRAIN + DEV :]}
    return {
        name: image_examples(images[part], [str(labels[i]) for i in part], f"digits {name}")
        for name, part in parts.items()
    }
