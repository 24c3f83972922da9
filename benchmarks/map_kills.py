"""Prompts mapped while a worker is killed every few seconds, and what is lost.

    python -m benchmarks.map_kills [--prompts 1000] [--every 10] [--workers 2] [--keep FOLDER]

`embedgrad map` refines `--prompts` tiny prompts of one tiny random model, and every `--every`
seconds one of its workers, drawn at random, gets SIGKILL. `retries` are the kills that hit a row
at work, `lost` the rows without a prompt at the end; `different` are rows that were hit, of
`compared`, whose prompt is not that of a run that nobody killed, to the bit. The same command
continues in `--keep`; `benchmarks/results/map-kills.json` counts all its calls together.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import embedgrad as eg
from embedgrad.atomic_files import write_json
from embedgrad.data.bounded_reads import read_json
from embedgrad.environment import versions
from embedgrad.experiments.map import Job, read_jobs, work
from embedgrad.recipe.paths import MAPPED

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "map-kills.json"
MOST_COMPARED = 10
RECIPE = """
model = { name = "model", device = "cpu" }
data = { train = "rows.csv", dev_share = 0.3, test_share = 0.3, answer = "label" }
template = { text = "Review: {text} [[Is it good?]]" }
target = { choices = [" yes", " no"] }
training = { steps = 3, batch_size = 4 }
"""


def prepare(folder: Path, prompts: int) -> tuple[Path, Path]:
    """A recipe of a tiny model and a table over it, in a folder; those that are there are kept."""
    recipe, table = folder / "recipe.toml", folder / "table.csv"
    if not table.is_file():
        texts = [f"{how} film number {i}" for i, how in enumerate(["A good", "A bad"] * 6)]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>"])
        make: Any = PreTrainedTokenizerFast
        fast = make(tokenizer_object=tokenizer._tokenizer, eos_token="<s>")
        fast.save_pretrained(folder / "model")
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(fast), bos_token_id=0, eos_token_id=0, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        labels = [" yes", " no"] * 6
        rows = "".join(f"{t},{label}\n" for t, label in zip(texts, labels, strict=True))
        (folder / "rows.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
        recipe.write_text(RECIPE, encoding="utf-8")
        seeds = "".join(f"row-{i},{i}\n" for i in range(prompts))
        table.write_text(f"name,training.seed\n{seeds}", encoding="utf-8")
    return recipe, table


def kill_one(driver: int, jobs: list[Job], out: Path) -> tuple[bool, str]:
    """Kill a worker of the map; whether there was one, and which row it had at work."""
    workers = []
    with suppress(psutil.Error):
        children = psutil.Process(driver).children()  # one of them forks the workers
        workers = [worker for child in children for worker in child.children()]
    if not workers:
        return False, ""
    victim = random.choice(workers)
    with suppress(psutil.Error):
        victim.send_signal(signal.SIGSTOP)  # or it may end the row meanwhile
        at_work = [j.name for j in jobs if j.state(out)[1].endswith(f" {victim.pid}")]
        victim.kill()
        return True, "".join(at_work)
    return False, ""


def run_killed(folder: Path, prompts: int, every: float, workers: int, result: Path) -> None:
    """Map all rows under kills, going on with what an earlier call left, and write the counts."""
    recipe, table = prepare(folder, prompts)
    jobs, out = read_jobs(recipe, table, check=False), folder / "out"
    kept = read_json(result) if result.is_file() else {}
    counts = {"prompts": prompts, "every_seconds": every, "workers": workers}
    counts |= {name: kept.get(name, 0) for name in ("calls", "kills", "retries", "seconds")}
    counts["calls"] += 1
    hit: list[str] = kept.get("hit", [])
    command = ["-m", "embedgrad", "map", str(recipe), "--over", str(table), "--out", str(out)]
    before, began = counts["seconds"], time.monotonic()
    with subprocess.Popen([sys.executable, *command, "--workers", str(workers)]) as driver:
        try:
            while driver.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    driver.wait(every)
                    break
                killed, row = kill_one(driver.pid, jobs, out)
                counts["kills"] += killed
                counts["retries"] += bool(row)
                hit += [row] if row else []
                counts["seconds"] = round(before + time.monotonic() - began, 1)
                write_json(result, {**counts, "hit": hit})
        finally:
            driver.terminate()
    counts["seconds"] = round(before + time.monotonic() - began, 1)
    with (out / MAPPED).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    finished = {row["name"] for row in rows if row["status"] == "finished"}
    counts["failed"] = sum(row["status"] == "failed" for row in rows)
    counts["lost"] = prompts - len(finished)
    again = [job for job in jobs if job.name in dict.fromkeys(hit)][:MOST_COMPARED]
    work(again, folder / "alone")
    same = [
        torch.equal(*(eg.load(at / job.name / "prompt").rows for at in (out, folder / "alone")))
        for job in again
        if job.name in finished
    ]
    counts |= {"compared": len(same), "different": same.count(False)}
    machine = {"cores": os.cpu_count(), "versions": versions()}
    write_json(result, {**counts, "hit": hit, **machine})


def main(arguments: list[str] | None = None) -> None:
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="map-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    run_killed(folder, given.prompts, given.every, given.workers, given.result)


if __name__ == "__main__":
    main()
