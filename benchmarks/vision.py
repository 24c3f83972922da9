"""Vision: queries that read frozen tokens, against prompts that stand among the tokens.

    python -m benchmarks.vision [--seeds 0,1,2,3,4] [--variants queries,...] [--test]

The images are scikit-learn's digits (1,797 of 8 x 8; `pip install scikit-learn`). A small vision
transformer with a token per pixel is trained here on mirrored ones, and then frozen: it knows
strokes, and none of these digits. Every row is one training on 320 images as they are, with 160
others to choose rows by, drawn by the seed from those that the pretraining had. The 597 test images
are new, and scored once, with `--test`.

queries      SynQT: 4 queries in every layer read the frozen tokens (`embedgrad.model.vision`)
in sequence  VPT-deep: 4 rows in every layer stand among the tokens, and class rows
probe        class rows alone, on the frozen model's class token
class means  the start of `queries`, nothing trained

Saved activations are the bytes that autograd keeps for one batch of 32 images, the model's own
weights left out. Rows in `benchmarks/results/vision.json` are not measured again; delete the file
and runs/vision to do so. It takes a few minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

import embedgrad as eg
from benchmarks.run import read_results
from benchmarks.speed.memory import saved
from embedgrad.atomic_files import write_json
from embedgrad.data.images import image_examples
from embedgrad.environment import versions
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.loading.vision import describe_vision
from embedgrad.model.outcome import Outcome
from embedgrad.model.vision import VisionModel, class_means
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.optimizers import AdamW
from embedgrad.prompt.images import TEMPLATE, Images, ImageSequencer
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.span import Span, rows_by_span
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vision.json"
KEPT = ROOT / "runs" / "vision"
TEST, TRAIN, DEV = 597, 320, 160
WIDTH, LAYERS, QUERIES = 48, 3, 4
IMAGES = Images(queries=QUERIES, hidden=16, mixing=8)
PRETRAINING, STEPS, BATCH = 2500, 240, 32
VARIANTS = ("class means", "probe", "in sequence", "queries")
# Step size and radius of the trust region, by dev accuracy on seeds 0 and 1.
SETTINGS: dict[str, tuple[float, float | None]] = {
    "class means": (0.1, None),
    "probe": (0.3, None),
    "in sequence": (0.3, None),
    "queries": (0.05, None),
}
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

    @torch.no_grad()
    def start(self, sequencer: ImageSequencer, train: Sequence[TokenSequence]) -> Prompt:
        rows_PD = self.embed(sequencer.prompt_ids)
        classes = slice(sequencer.spans[-1].ids[0], None)
        gold_N = torch.tensor([s.gold for s in train])
        rows_PD[classes] = class_means(self.feature(rows_PD, train), gold_N, rows_PD[classes])
        return rows_by_span(rows_PD, sequencer.spans)

    def feature(self, prompt_PD: Tensor, batch: Sequence[TokenSequence]) -> Tensor:
        """What the class token becomes, [B, D]; without rows in the layers it has no gradient."""
        model, own = self.vision.model, self.queries
        with torch.set_grad_enabled(torch.is_grad_enabled() and own > 0):
            x_BTD = model.embeddings(torch.cat([self.vision.pixels(s.example) for s in batch]))
            for i, layer in enumerate(model.layers):
                rows_BND = prompt_PD[i * own : (i + 1) * own].expand(len(batch), -1, -1)
                tokens_BTD = x_BTD[:, 1 + (own if i else 0) :]
                x_BTD = layer(torch.cat([x_BTD[:, :1], rows_BND, tokens_BTD], dim=1))
            feature_BD: Tensor = model.layernorm(x_BTD[:, 0])
        return feature_BD

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
        raise NotImplementedError("pictures are classified, and nothing is written")


def saved_bytes(loss: Loss, theta: dict[str, Tensor], batch: Sequence[TokenSequence]) -> int:
    """Bytes that autograd keeps for a batch's loss; the model's weights and theta left out."""
    model: Any = getattr(loss.model, "vision", loss.model)
    own = [*model.model.parameters(), *theta.values()]
    return saved(lambda: loss(theta, batch).sum(), own)


def digits() -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Images [N, 1, 8, 8] from -1 to 1, what each shows, and which are to train on and to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    order = list(range(len(images)))
    random.Random(0).shuffle(order)
    return images, torch.tensor(found.target), order[TEST:], order[:TEST]


def pretrained(folder: Path) -> tuple[VisionModel, dict[str, Any]]:
    """The vision transformer, trained on mirrored digits once, and what that came to."""
    settings = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        image_size=8,
        patch_size=1,
        num_channels=1,
        initializer_range=0.12,
    )
    torch.manual_seed(0)
    vit: Any = ViTModel(settings, add_pooling_layer=False)
    file, about = folder / "vit.safetensors", folder / "pretraining.json"
    if not about.exists():
        found = _pretrain(vit)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(vit.state_dict(), file)
        write_json(about, found)
    vit.load_state_dict(load_file(file))
    facts: dict[str, Any] = json.loads(about.read_text())
    return VisionModel(vit, describe_vision(vit, "mirrored digits"), IMAGES), facts


def _pretrain(vit: Any) -> dict[str, Any]:
    began, (images, labels, pool, test) = time.perf_counter(), digits()
    mirrored = images.flip(3)
    head = torch.nn.Linear(WIDTH, 10)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=PRETRAINING + 1)
    generator = torch.Generator().manual_seed(0)
    vit.train()
    for _ in range(PRETRAINING):
        some = torch.tensor(pool)[torch.randint(len(pool), (BATCH,), generator=generator)]
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pixels = torch.roll(mirrored[some], shift, dims=(2, 3))
        logits = head(vit(pixels).last_hidden_state[:, 0])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[some]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    vit.eval()
    found = {}
    with torch.no_grad():
        for name, seen in (("mirrored", mirrored), ("as they are", images)):
            right = head(vit(seen[test]).last_hidden_state[:, 0]).argmax(1) == labels[test]
            found[name] = right.float().mean().item()
    return {"test_accuracy": found, "seconds": time.perf_counter() - began}


def splits_of(seed: int) -> dict[str, list[eg.Example]]:
    """Images to train on and to choose by, drawn by the seed, and the test images of all seeds."""
    images, labels, pool, test = digits()
    own = random.Random(seed).sample(pool, TRAIN + DEV)
    parts = {"train": own[:TRAIN], "dev": own[TRAIN:], "test": test}
    return {
        name: image_examples(images[part], [str(int(labels[i])) for i in part], name)
        for name, part in parts.items()
    }


def measure(vision: VisionModel, variant: str, seed: int, splits: Sequence[str]) -> dict[str, Any]:
    """Train a variant, and score it."""
    target = Target(choices=tuple(map(str, range(10))))
    others = {"in sequence": QUERIES, "probe": 0}
    model: Any = InSequence(vision, others[variant]) if variant in others else vision
    sequencer = model.sequencer(TEMPLATE, target)
    parts = {name: sequencer.build(rows) for name, rows in splits_of(seed).items()}
    start = model.start(sequencer, parts["train"])
    rate, radius = SETTINGS[variant]
    settings = Parts(
        objective=CrossEntropy(over="choices"),
        optimizer=AdamW(learning_rate=rate),
        trust_region=eg.TrustRegion(radius),
    )
    found: dict[str, Any] = {"variant": variant, "seed": seed}
    rows: Prompt = start
    if variant != "class means":
        training = eg.Training(steps=STEPS, batch_size=BATCH, evaluate_every=STEPS // 8, seed=seed)
        began = time.process_time()
        refined = eg.optimize(
            *(model, sequencer, parts["train"], parts["dev"]),
            training=training,
            parts=settings,
            start=start,
            report=eg.quiet,
        )
        rows = refined.best.prompt
        theta = {n: torch.zeros_like(r, requires_grad=True) for n, r in start.items()}
        loss = Loss(model, settings, target, start)
        found |= {
            "best_step": refined.best.step,
            "processor_seconds": time.process_time() - began,
            "trained_numbers": sum(value.numel() for value in theta.values()),
            "saved_bytes": saved_bytes(loss, theta, parts["train"][:BATCH]),
        }
    for split in splits:
        answers = eg.Evaluator(model, sequencer).score(rows, parts[split])
        found[split] = "".join(f"{answer.correct:.0f}" for answer in answers)  # of each image
    return found


def summarize(rows: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Accuracy of each variant over seeds, and its difference to prompting among the tokens.

    The interval (95 %) is of a bootstrap over seeds and images, the same for both.
    """
    right: dict[str, dict[int, Any]] = {}
    for row in rows.values():
        if split in row:
            right.setdefault(row["variant"], {})[row["seed"]] = np.array([*map(float, row[split])])
    generator = np.random.default_rng(0)
    rival, summary = right.get("in sequence", {}), dict[str, Any]()
    for variant, own in right.items():
        entry: dict[str, Any] = {
            "seeds": sorted(own),
            "accuracy": fmean(scores.mean() for scores in own.values()),
        }
        for name in ("saved_bytes", "trained_numbers", "processor_seconds"):
            known = [r[name] for r in rows.values() if r["variant"] == variant and name in r]
            if known:
                entry[name] = fmean(known)
        both = sorted(set(own) & set(rival))
        if variant != "in sequence" and both:
            change_SN = np.stack([own[seed] - rival[seed] for seed in both])
            drawn = [
                change_SN[generator.integers(len(both), size=len(both))][
                    :, generator.integers(change_SN.shape[1], size=change_SN.shape[1])
                ].mean()
                for _ in range(DRAWS)
            ]
            low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
            difference = change_SN.mean().item()
            entry["over_in_sequence"] = {"difference": difference, "interval": [low, high]}
        summary[variant] = entry
    if {"queries", "in sequence"} <= summary.keys():
        saved_by = [summary[name]["saved_bytes"] for name in ("queries", "in sequence")]
        summary["saved_ratio"] = saved_by[0] / saved_by[1]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--test", action="store_true", help="score test images too")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of the pretrained model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = read_results(arguments.out, {"versions": versions(), "rows": {}})
    splits = ("dev", "test") if arguments.test else ("dev",)
    vision, facts = pretrained(arguments.kept)
    results["pretraining"] = facts
    for seed in map(int, arguments.seeds.split(",")):
        for variant in arguments.variants.split(","):
            row = f"{variant}, seed {seed}"
            if not all(split in results["rows"].get(row, {}) for split in splits):
                results["rows"][row] = measure(vision, variant, seed, splits)
            results["summary"] = {split: summarize(results["rows"], split) for split in splits}
            write_json(arguments.out, results)
            print(row, json.dumps(results["summary"][splits[-1]][variant]), flush=True)
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
