"""Measure training steps and generation on one GPU, into `benchmarks/results/gpu.json`.

    python -m benchmarks.gpu [SIZE ...] [--minutes 10] [--fresh]
    python -m benchmarks.gpu --rehearse --out gpu.json      # tiny weights, on this CPU

Workloads A to C and G of `benchmarks.speed`, beside the same peers, with bf16 weights in the shapes
of Qwen2.5 0.5B, 1.5B, 7B and 14B. The weights are random, and the tokenizer has a token per byte,
so nothing is downloaded. Losses and gradients are compared, and a row in which they differ is void.

It ends within `--minutes`: every size has its share of the time that is left, in a process of its
own, and every workload its share of that. Each row is written as it is done; the same command
resumes after an interruption, or where the time ran out.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.speed import scoring, steps
from benchmarks.speed.bench import Bench
from benchmarks.speed.results import Results
from embedgrad import EmbedgradError, LanguageModel
from embedgrad.model.loading import LoadedModel, ModelInfo

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
WORKLOADS = "ABCG"
SIZES = {  # width, inner width, layers, heads, heads of keys, vocabulary
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
    "14B": (5120, 13_824, 48, 40, 8, 152_064),
}
TINY = {"tiny": (32, 64, 2, 4, 2, 512)}
TIED = ("0.5B", "1.5B")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class OutOfTime(BaseException):
    """A workload has had its share; no handler of a library's errors may keep it."""


def main() -> None:
    """Read the command line; measure every size in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--minutes", type=float, default=10.0, help="when to end at the latest")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run")
    parser.add_argument("--rehearse", action="store_true", help="tiny weights, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another results file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began, known = time.monotonic(), TINY if arguments.rehearse else SIZES
    sizes = arguments.sizes or list(known)
    if unknown := sorted(set(sizes) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.error("no GPU; --rehearse runs tiny weights on the CPU")
    if arguments.rehearse and arguments.out == RESULTS:
        parser.error("a rehearsal is no result; name another file by --out")
    if arguments.fresh:
        arguments.out.unlink(missing_ok=True)
    if arguments.here:
        (size,) = sizes
        measure(size, known[size], arguments.out, 60 * arguments.minutes, rehearse=known is TINY)
        return
    for place, size in enumerate(sizes):
        left = 60 * arguments.minutes - (time.monotonic() - began)
        share = left / (len(sizes) - place)
        print(f"{size}: {share:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", size, "--here", "--out", arguments.out]
        command += ["--minutes", str(0.9 * share / 60)]  # a little, to be ended by itself
        command += ["--rehearse"] if arguments.rehearse else []
        try:
            subprocess.run(command, cwd=ROOT, timeout=max(share, 0), check=False)
        except subprocess.TimeoutExpired:
            print(f"{size}: out of time; the same command continues", flush=True)
    results = Results(arguments.out, "")
    rows = {(row["model"], row["workload"]) for row in results.values["rows"]}
    if rows >= {(size, letter) for size in known for letter in WORKLOADS}:
        results.finish()


def measure(
    size: str, shape: Sequence[int], out: Path, seconds: float, *, rehearse: bool = False
) -> None:
    """The rows of one size that are not there yet."""
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(size, shape, folder, "cpu" if rehearse else "cuda")
        bench = Bench(model, Results(out, size), kept=True, shared=True)
        for place, letter in enumerate(WORKLOADS):
            share = (until - time.monotonic()) / (len(WORKLOADS) - place)
            model.prefix_cache.clear()
            try:
                with within(share):
                    if letter == "G":
                        scoring.generation(bench)
                    else:
                        steps.synthetic_rows(bench, letter)
            except OutOfTime:
                print(f"{size}, {letter}: out of time after {share:.0f} s", flush=True)
            except (EmbedgradError, torch.OutOfMemoryError) as error:
                print(f"{size}, {letter}: left out: {error}", flush=True)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in what takes longer."""

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    # Again every second, as what a collector's callback raises is ignored.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def random_model(size: str, shape: Sequence[int], folder: str, device: str) -> LanguageModel:
    """Random bf16 weights of a shape; the tokenizer is saved in `folder`, where peers find it."""
    words, config = byte_tokenizer(), configuration(size, shape)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    made = made.eval().requires_grad_(False)
    made.config._name_or_path = made.name_or_path = folder
    info = ModelInfo(
        name=f"Qwen2.5 {size}, random",
        revision=None,
        kind="folder",
        path=folder,
        architecture="Qwen2ForCausalLM",
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        dtype="bfloat16",
        embedding_digest="random",
        embedding_scale=1.0,
        tied=size in TIED,
        license=None,
        gguf_sha256=None,
    )
    return LanguageModel(LoadedModel(made, words, info))


def configuration(size: str, shape: Sequence[int]) -> Qwen2Config:
    """A shape as `transformers` has it."""
    width, inner, layers, heads, keys, vocabulary = shape
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=size in TIED,
        bos_token_id=None,
        eos_token_id=None,
    )


def byte_tokenizer() -> Any:
    """A token per byte, and those of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


if __name__ == "__main__":
    main()
