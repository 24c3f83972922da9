"""What a prompt scores where it is served: `benchmarks/results/parity.json`.

    python -m benchmarks.parity NAME=RUN ... [--rows 200]

Every run is scored on the same test rows five times: here (fp32), in its vocabulary export opened
by transformers in bf16, and in llama.cpp with weights of f16, Q8_0 and Q4_K_M. The text prompt is
asked by its plain tokens, of the same files. NAME+Q4_K_M=RUN gives a run that was trained with the
weights of NAME's Q4_K_M file; it is served by them alone. Cells that the results hold already are
not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantized import MIXTURES, quantize
from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.deploy.export import export
from embedgrad.deploy.query import plain_messages
from embedgrad.environment import versions
from embedgrad.evaluation.significance import wilson_interval
from embedgrad.model.llamacpp.server import LlamaCppServer
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import OpenRun, open_run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "parity.json"
HERE, VOCABULARY = "transformers fp32", "vocabulary bf16"
ON_SERVED = "+Q4_K_M"
SURE = 100.0  # added to the logits of all choices alike, so that the likeliest of them is generated
CONTEXT = 2048

Replies = Callable[[bool], Iterator[str]]  # whether refined -> a reply per row


@dataclass(frozen=True)
class Cells:
    """A run, and the rows that it is asked."""

    folder: Path
    run: OpenRun
    examples: Sequence[Example]
    sequences: Sequence[TokenSequence]

    @property
    def choice_ids(self) -> list[int]:
        """The token of every choice; empty for free answers."""
        if not self.run.prompt.target.choices:
            return []
        targets = self.sequences[0].targets
        assert all(len(ids) == 1 for ids in targets), "choices of one token each"
        return [ids[0] for ids in targets]

    @property
    def most_tokens(self) -> int:
        return 1 if self.choice_ids else self.run.recipe.evaluation.max_new_tokens

    def plain(self, sequence: TokenSequence) -> list[int]:
        """Ids of the text prompt."""
        cut = sequence.context(self.run.prompt.prompt_ids)
        return list(cut if sequence.plain is None else sequence.plain)

    def score(self, replies: Sequence[str]) -> dict[str, Any]:
        """Accuracy with its interval, and what each row scored."""
        score = self.run.recipe.evaluation.scorer.score
        if self.choice_ids:
            right = [float(r == e.answer) for r, e in zip(replies, self.examples, strict=True)]
        else:
            right = [score(r, e.answer) for r, e in zip(replies, self.examples, strict=True)]
        count = len(right)
        interval = wilson_interval(round(sum(right)), count)
        return {"accuracy": sum(right) / count, "interval": list(interval), "correct": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--rows", type=int, default=200, help="test rows of every cell")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    parser.add_argument("--out", type=Path, default=RESULT, help="the results file")
    arguments = parser.parse_args()
    results = read_results(arguments.out, {"rows": arguments.rows, "tasks": {}})
    for given in arguments.runs:
        name, _, folder = given.partition("=")
        task, on_served, _ = name.partition(ON_SERVED)
        cells = results["tasks"].setdefault(task, {"cells": {}})["cells"]
        for cell, found in measure(Path(folder), bool(on_served), cells, arguments):
            cells[cell] = found
            results["tasks"][task] |= {} if on_served else facts(Path(folder))
            results |= {
                "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
                "versions": {**versions(), "xllamacpp": importlib.metadata.version("xllamacpp")},
            }
            write_json(arguments.out, results)
            shown = {which: found[which]["accuracy"] for which in ("text", "refined")}
            print(task, cell, json.dumps(shown), flush=True)


def facts(folder: Path) -> dict[str, Any]:
    """What the run is about."""
    prompt = json.loads((folder / "prompt" / "prompt.json").read_text(encoding="utf-8"))
    return {
        "model": prompt["model"]["name"],
        "answers": "chosen" if prompt["target"]["choices"] else "generated",
        "data": prompt["data"]["test"]["sha256"],
        "where": prompt["recipe"]["data"]["where"],
        "text": "\n".join(span["text"] for span in prompt["spans"]),
    }


def measure(
    folder: Path, on_served: bool, known: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells of one run that are not known yet."""
    ours = {f"GGUF {mixture}": mixture for mixture in MIXTURES}
    if on_served:
        ours = {"GGUF q4_k_m, trained with it": "keep"}
        wanted = list(ours)
    else:
        wanted = [HERE, VOCABULARY, *ours]
    wanted = [cell for cell in wanted if cell not in known]
    if not wanted:
        return
    run = open_run(folder)
    examples = read_data(run.recipe).test[: arguments.rows]
    asked = Cells(folder, run, examples, run.sequencer.build(examples))
    with tempfile.TemporaryDirectory() as place:
        files = Path(place)
        for cell in wanted:
            if cell == HERE:
                yield cell, both(asked, partial(in_training, asked))
            elif cell == VOCABULARY:
                yield cell, both(asked, vocabulary(asked, files))
            else:
                file = gguf(asked, files, ours[cell])
                options: dict[str, Any] = {"n_ctx": CONTEXT, "threads": arguments.threads}
                with LlamaCppServer(file, **options) as server:
                    found = both(asked, partial(in_llamacpp, asked, server))
                yield cell, {**found, "bytes": file.stat().st_size}


def both(asked: Cells, replies: Replies) -> dict[str, Any]:
    """Scores of the text prompt and of the refined one."""
    return {
        "text": asked.score(list(replies(False))),
        "refined": asked.score(list(replies(True))),
    }


def in_training(asked: Cells, refined: bool) -> Iterator[str]:
    """As `embedgrad evaluate` scores."""
    prompt, evaluator = asked.run.prompt, asked.run.evaluator
    answer = evaluator.score if refined else evaluator.score_text_prompt
    for found in answer(prompt.rows if refined else prompt.start_rows, asked.sequences):
        yield found.predicted


def vocabulary(asked: Cells, files: Path) -> Replies:
    """By plain transformers, all weights in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = files / "vocabulary"
    export(asked.folder, "vocabulary", out, overrides=["export.dtype=bfloat16"], verify=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(out, dtype=torch.bfloat16).eval()
    allowed = torch.tensor(asked.choice_ids, dtype=torch.long)

    def ids_of(example: Example, sequence: TokenSequence, refined: bool) -> list[int]:
        if not refined:
            return asked.plain(sequence)
        messages = plain_messages(asked.run.prompt.template, example.columns)
        rendered: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        return list(rendered["input_ids"])

    @torch.no_grad()
    def replies(refined: bool) -> Iterator[str]:
        for example, sequence in zip(asked.examples, asked.sequences, strict=True):
            ids_1T = torch.tensor([ids_of(example, sequence, refined)])
            if asked.choice_ids:
                logits_V = model(input_ids=ids_1T).logits[0, -1]
                best = int(logits_V[allowed].float().argmax())
                yield asked.run.prompt.target.choices[best]
                continue
            made = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                do_sample=False,
                max_new_tokens=asked.most_tokens,
                eos_token_id=list(asked.run.evaluator.end_ids),
                pad_token_id=asked.run.evaluator.end_ids[0],
            )
            new_ids = made[0, ids_1T.shape[1] :]
            yield str(tokenizer.decode(new_ids, skip_special_tokens=True))

    return replies


def gguf(asked: Cells, files: Path, mixture: str) -> Path:
    """The run's GGUF export with a body of that mixture."""
    whole = files / "gguf" / "model.gguf"
    if not whole.exists():
        setting = "keep" if mixture == "keep" else "f32"
        export(
            asked.folder, "gguf", whole.parent, overrides=[f"export.gguf={setting}"], verify=False
        )
    if mixture == "keep":
        return whole
    file = files / f"{mixture}.gguf"
    quantize(whole, file, mixture)
    return file


def in_llamacpp(asked: Cells, server: LlamaCppServer, refined: bool) -> Iterator[str]:
    """Over HTTP: the refined prompt by plain messages, the text prompt by its tokens."""
    common: dict[str, Any] = {"temperature": 0, "max_tokens": asked.most_tokens}
    for example, sequence in zip(asked.examples, asked.sequences, strict=True):
        if refined:
            bias = {str(i): SURE for i in asked.choice_ids}
            messages = plain_messages(asked.run.prompt.template, example.columns)
            body = {**common, "messages": messages, "logit_bias": bias}
            reply = server.ask("/v1/chat/completions", body)
            yield reply["choices"][0]["message"]["content"]
        else:
            body = {**common, "n_predict": asked.most_tokens, "prompt": asked.plain(sequence)}
            body["logit_bias"] = [[i, SURE] for i in asked.choice_ids]
            yield server.ask("/completion", body)["content"]


if __name__ == "__main__":
    main()
