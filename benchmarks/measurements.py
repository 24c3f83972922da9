"""What the accuracy benchmarks measure: recipes with the settings of every row.

`benchmarks/run.py` runs them. SST-2, IMDb, SVAMP, GSM8K and causal judgement come from local files,
as their rows, splits or columns are not on the Hub as they were measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measurement:
    """A results file: a recipe, and the settings of each row."""

    recipe: str
    rows: dict[str, list[str]]
    local: list[str] = field(default_factory=list)
    """Settings that replace the Hub's data by files below --data; needed if there are any."""
    one_process: bool = False
    """Whether all rows share one loaded model and its stored prefixes."""
    dev_only: bool = False
    """Whether only the dev scores count; then no test scores are kept."""


def seeds(*numbers: int, settings: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {f"seed {n}": [f"training.seed={n}", *settings] for n in numbers}


def files(folder: str) -> list[str]:
    names = ("train", "dev", "test")
    # The files have no duplicates, and were measured before the recipes dropped those of the Hub.
    drop = "data.drop_duplicates=false"
    return [*(f'data.{name}="{{data}}/{folder}/{name}.jsonl"' for name in names), drop]


@dataclass(frozen=True)
class Compared:
    """A results file of `embedgrad compare`."""

    recipe: str
    settings: list[str]
    local: list[str] = field(default_factory=list)
    """Settings that replace the Hub's data by files below --data; needed if there are any."""
    prepare: Callable[[Path], Path] | None = None
    """Turns --data into the folder that the local settings name."""


def svamp_equations(data: Path) -> Path:
    """SVAMP with equations as people write them, in a separate folder; test is left as it is."""
    folder = ROOT / "runs" / "data"
    (folder / "svamp").mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        text = (data / "svamp" / f"{split}.jsonl").read_text(encoding="utf-8")
        if split != "test":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = [{**row, "equation": plain_equation(row["equation"])} for row in rows]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "svamp" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def plain_equation(equation: str) -> str:
    """ "( ( 16.0 - 11.0 ) + 12.0 )" as "(16 - 11) + 12"."""
    text = re.sub(r"(\d)\.0\b", r"\1", equation.strip())
    text = re.sub(r"\( +| +\)", lambda match: match[0].strip(), text)
    inside = text[1:-1]
    depths = [inside[:end].count("(") - inside[:end].count(")") for end in range(len(inside) + 1)]
    return inside if text.startswith("(") and text.endswith(")") and min(depths) >= 0 else text


PROMPTS = """compare.prompts=[
    "Sentiment, positive or negative:",
    "Would you say that the writer liked it? Reply with positive or negative:",
    "Classify the review as positive or negative. The class is",
]"""
LONGER = (
    'template={user="{text}\\n\\n[[Is this review positive or negative? A review is positive if '
    "its writer liked the film and would tell others to see it, and negative if its writer was "
    'bored, annoyed or disappointed. Answer with one word, positive or negative:]]"}'
)
AFTER = (
    'template={user="{text}\\n\\n[[Is this review positive or negative? Answer with one word:]]"}'
)
# What was measured before the step size 0.1 became the default, and before that the loss over both.
SMALL_STEPS = 'optimizer={name="adamw", learning_rate=0.03}'
RANKED = 'objective={name="cross_entropy", over="choices"}'
FORMER = (RANKED, SMALL_STEPS)
EQUATIONS = [
    *files("svamp"),
    'data.answer="answer"',
    'data.solution="{equation} = {answer}"',
    "template.user={template}",
]
CAUSAL = ['data.answer="label"', "template.user={template}"]
COMPARISONS = {
    "compare-demo-smollm2-135m": Compared("demo.toml", [*FORMER, "training.epochs=4"]),
    "compare-sst2-smollm2-135m": Compared("sst2.toml", [*FORMER, PROMPTS], files("sst2")),
    # The same words after the query.
    "compare-sst2-after-smollm2-135m": Compared(
        "sst2.toml", [*FORMER, AFTER, PROMPTS], files("sst2")
    ),
    # Few rows and many, with today's step; the text prompt's place is the recipe's.
    **{
        f"compare-sst2-{rows}-rows-smollm2-135m": Compared(
            "sst2.toml",
            [
                f"data.limit={{train={rows}, dev=200}}",
                f"training={{steps={steps}, evaluate_every={steps // 4}}}",
                'compare.methods=["text", "embedgrad", "peft-prompt-tuning-text", "peft-lora", '
                '"linear-probe"]',
            ],
            files("sst2"),
        )
        for rows, steps in ((32, 32), (100, 32), (256, 64), (1000, 128))
    },
    "compare-imdb-smollm2-135m": Compared(
        "imdb.toml",
        [
            *FORMER,
            'compare.methods=["text", "embedgrad", "peft-prompt-tuning-text"]',
            "compare.seeds=[0]",
        ],
        [*files("imdb"), 'data.answer="label_text"', "data.labels={}"],
    ),
    "compare-causal-judgement-smollm2-135m": Compared(
        "causal-judgement.toml",
        [*FORMER, "compare.seeds=[0, 1, 2, 3, 4]"],
        [*files("bbh_causal_judgement_grouped"), 'data.group="group"', *CAUSAL],
    ),
    "compare-causal-judgement-random-split-smollm2-135m": Compared(
        "causal-judgement.toml",
        [*FORMER, "compare.seeds=[0, 1, 2, 3, 4]"],
        [*files("bbh_causal_judgement"), *CAUSAL],
    ),
    "compare-operation-smollm2-135m": Compared(
        "operation.toml",
        ['compare.methods=["text", "embedgrad", "batch-calibration"]'],
        [*files("svamp"), 'data.answer="type"', "data.dev_share=0", "template.user={template}"],
    ),
    "compare-gsm8k-qwen2.5-coder-0.5b": Compared(
        "gsm8k.toml",
        [
            SMALL_STEPS,
            'model={name="qwen.gguf", dtype="bfloat16"}',
            'solutions.source="column"',
            "data.limit={train=192, dev=32, test=400}",
            "evaluation.max_new_tokens=320",
            "compare.seeds=[0]",
        ],
        [*files("gsm8k"), 'data.solution="solution"'],
    ),
    # LoRA is trained on the same solutions.
    "compare-gsm8k-self-written-qwen2.5-coder-0.5b": Compared(
        "gsm8k.toml",
        [
            SMALL_STEPS,
            'model={name="qwen.gguf", dtype="bfloat16"}',
            "solutions.samples=2",
            "data.limit={train=192, dev=64, test=200}",
            "training={steps=24, evaluate_every=12}",
            "evaluation.max_new_tokens=320",
            "compare.seeds=[0]",
        ],
        files("gsm8k"),
    ),
    "compare-svamp-smollm2-135m": Compared(
        "svamp.toml",
        # The model solves too few questions to be trained on its own solutions.
        [SMALL_STEPS, 'solutions.source="answer"', "compare.seeds=[0, 1, 2]"],
        [*files("svamp"), 'data.answer="answer"', "template.user={template}"],
    ),
    # The recipe with half its samples; the model writes the solutions.
    "compare-svamp-self-written-smollm2-135m": Compared(
        "svamp.toml",
        [SMALL_STEPS, "solutions.samples=4", "compare.seeds=[0, 1, 2]"],
        [*files("svamp"), 'data.answer="answer"', "template.user={template}"],
    ),
    # The equation in the data is the solution: "(16 - 11) + 12 = 17".
    "compare-svamp-equations-smollm2-135m": Compared(
        "svamp.toml",
        [
            SMALL_STEPS,
            'solutions.source="column"',
            "data.limit={train=499, dev=100}",
            "training.epochs=3",
            "compare.seeds=[0, 1, 2]",
        ],
        EQUATIONS,
        svamp_equations,
    ),
    # The default step, a wider region and a pass more.
    "compare-svamp-equations-radius-0.6-smollm2-135m": Compared(
        "svamp.toml",
        [
            'solutions.source="column"',
            "data.limit={train=499, dev=100}",
            "training.epochs=4",
            "trust_region.radius=0.6",
            "compare.seeds=[0, 1, 2]",
        ],
        EQUATIONS,
        svamp_equations,
    ),
}
MEASUREMENTS = {
    "demo": Measurement("demo.toml", seeds(0, 1, 2)),
    "sst2": Measurement("sst2.toml", seeds(0, settings=FORMER), files("sst2")),
    "sst2-radius-0.3": Measurement(
        "sst2.toml",
        seeds(0, settings=(*FORMER, AFTER, "trust_region.radius=0.3")),
        files("sst2"),
    ),
    "sst2-span": Measurement(
        "sst2.toml",
        {
            f"{words} words, seed 0": [
                *FORMER,
                *settings,
                "data.limit={train=1000, dev=872, test=1}",
            ]
            for words, settings in (("few", [AFTER]), ("many", [LONGER]))
        },
        files("sst2"),
        dev_only=True,
    ),
    "causal-judgement": Measurement(
        "causal-judgement.toml",
        seeds(0, 1, 2, 3, 4, settings=FORMER),
        [
            *files("bbh_causal_judgement_grouped"),
            'data.answer="label"',
            'data.group="group"',
            "template.user={template}",
        ],
        one_process=True,
    ),
}
# Results that other programs write: the program, and its arguments.
OTHERS = {
    "speed": ("benchmarks.speed", ""),
    "causal-curves": ("benchmarks.causal", "--data FOLDER"),
    "context": ("benchmarks.context", "--data FOLDER"),
    "elicit": ("benchmarks.elicit", "--data FOLDER"),
    "part-cost": ("benchmarks.part_cost", ""),
    "large-batch": ("benchmarks.large_batch", "--data FOLDER"),
    "masked-thought": ("benchmarks.masked_thought", "--data FOLDER"),
    "objective": ("benchmarks.objective", "--data FOLDER"),
    "plan": ("benchmarks.plan", "--data FOLDER"),
    "policy": ("benchmarks.policy", "--data FOLDER"),
    "parity": ("benchmarks.parity", "NAME=RUN"),
    "vision": ("benchmarks.vision", "--test"),
    "serving": ("benchmarks.serving", "RUN"),
}
