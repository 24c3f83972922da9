"""Write what a version of embedgrad leaves, for later versions to read: tests/assets/VERSION.zip.

    PYTHONPATH=tests python -m old_files

A tiny model, its run, and an export to every destination. What is in `tests/assets` stays as it is
and stays readable: a release adds a file and changes none.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import embedgrad
import tiny
from embedgrad.deploy.job import DESTINATIONS
from export_kit import quiet
from run_kit import ROWS, values, write_jsonl

ASSETS = Path(__file__).resolve().parent / "assets"


def main() -> None:
    """Write the file of this version, with the rows in plain sight beside it."""
    place = ASSETS / f"{embedgrad.__version__}.zip"
    if place.exists():
        raise SystemExit(f"{place} is there; old files are never written again")
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        folder = Path()  # so that paths are relative, and the run can move
        save_model(folder / "model")
        rows = list({e.columns["review"]: dict(e.columns) for e in tiny.reviews(120)}.values())
        for split, count in ROWS.items():
            write_jsonl(folder / f"{split}.jsonl", rows[:count])
            rows = rows[count:]
        recipe = values(
            folder / "model",
            folder,
            template={"user": "[[Is the review positive or negative?]]\n\n{review}"},  # for PEFT
            training={"metric": "log_loss"},  # accuracy hardly moves
            objective={"name": "cross_entropy", "over": "choices"},
        )
        embedgrad.run(embedgrad.Recipe.from_dict(recipe), folder / "run")
        for name in DESTINATIONS:
            embedgrad.export(folder / "run", name, folder / name)
        prompt = embedgrad.load(folder / "run")
        rows_PD = prompt.rows
        assert not torch.equal(rows_PD, prompt.start_rows)
        ASSETS.mkdir(exist_ok=True)
        place.with_suffix(".json").write_text(json.dumps(rows_PD.tolist()) + "\n")
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    packed.write(path, path.relative_to(folder))
    print(f"{place}: {place.stat().st_size / 1e3:.0f} kB")


def save_model(folder: Path) -> None:
    """One layer of width 8, which makes a few kilobytes."""
    words = tiny.with_template(tiny.tokenizer("bytelevel"), tiny.CHATML)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    quiet(model, words.convert_tokens_to_ids("<start_of_turn>"))
    model.save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    main()
