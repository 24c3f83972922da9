"""Prompts of tiny models on their way to a destination."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny
from embedgrad import Target, Template, load_model
from embedgrad.data.examples import Example
from embedgrad.deploy.destinations.vocabulary import Vocabulary
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.verify.engine import Query
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.quiet import silence_libraries
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.settings import ExportSettings

TAG = "k3v9x0q7t2ma"
USER = "Review: {review}\n\n[[Is the review positive or negative?]]"
CHOICES = ("negative", "positive")
LAST = ("o_proj", "down_proj", "out_proj", "dense", "fc2")  # what a layer adds is their output


def quiet(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """Change a tiny model in place so that one token, which no text has, is never likely.

    A random model has no such token. Here every embedding has the same first number, no layer
    changes it, and the token's output row is a large negative multiple of it.
    """
    with torch.no_grad():
        table, prefix = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        table[:, 0] = 1.0
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if last in LAST:
                module.weight[0] = 0
            elif last == "c_proj":  # GPT-2 has its matrices the other way round
                module.weight[:, 0] = 0
            bias = getattr(module, "bias", None)
            if bias is not None and last in (*LAST, "c_proj"):
                bias[0] = 0
        prefix[token] = 0
        prefix[token, 0] = -100.0
    return model


def save_base(folder: Path, architecture: str = "llama", *, padding: int = 0, **how: Any) -> Path:
    """Save a tiny model with a quiet token, in float32, and its tokenizer.

    `padding` rows stand behind those of the tokenizer; "phi" has an output layer with a bias.
    """
    shards = how.pop("shards", "1GB")
    kind, template = how.pop("tokenizer_kind", "bytelevel"), how.pop("template", tiny.CHATML)
    words = tiny.with_template(tiny.tokenizer(kind), template)
    how = {"dtype": torch.float32, "attention": "sdpa", **how}
    if architecture == "gemma2":
        how["attention"] = "eager"
    if architecture == "phi":
        model = _phi(len(words) + padding)
    else:
        model = tiny.model(architecture, len(words) + padding, **how)
    unused = "<|im_start|>" if "<start_of_turn>" in (template or "") else "<start_of_turn>"
    quiet(model, words.convert_tokens_to_ids(unused))
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = words.eos_token_id, words.pad_token_id
    with silence_libraries():
        model.save_pretrained(folder, max_shard_size=shards)
        words.save_pretrained(folder)
    return folder


def _phi(vocabulary: int) -> PreTrainedModel:
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "initializer_range": 0.2, "vocab_size": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = AutoConfig.for_model("phi", **settings, **ends)
        model = AutoModelForCausalLM.from_config(config)
        model.lm_head.bias.data.normal_()
    return model.eval().requires_grad_(False)


def opened(folder: Path) -> LanguageModel:
    """Load it as a user would, on the CPU in float32."""
    return load_model(str(folder), device="cpu", dtype="float32", prefix_cache_budget="64 MiB")


def exported(
    model: LanguageModel,
    *,
    name: str = "sentiment",
    template: Template | None = None,
    target: Target = Target(CHOICES),
    examples: Sequence[Example] = (),
    move: float = 0.3,
    seed: int = 0,
    settings: ExportSettings = ExportSettings(),
) -> ExportedPrompt:
    """A prompt whose rows are moved by `move` of their norm in random directions."""
    template = template or Template.chat(user=USER)
    examples = list(examples) or tiny.reviews(12)
    if target.choices != CHOICES:  # any will do
        answers = itertools.cycle(target.choices or ("a b",))
        examples = [dataclasses.replace(e, answer=next(answers)) for e in examples]
    date = datetime.date(2024, 3, 12)
    sequencer = model.sequencer(template, target, examples, date=date)
    start_PD = model.embed(sequencer.prompt_ids)
    rows_PD = start_PD + move * start_PD.norm(dim=1, keepdim=True) * _directions(start_PD, seed)
    prompt = PromptEmbedding(template, target, sequencer.spans, date, start_PD, rows_PD)
    return ExportedPrompt(name, prompt, sequencer, sequencer.build(examples), settings)


def job_of(model: LanguageModel, *prompts: ExportedPrompt) -> Job:
    """A job with a fixed tag; without prompts: of one."""
    return Job(prompts or (exported(model),), model, TAG)


def asked(prompt: ExportedPrompt, *, marker: str = "") -> list[Query]:
    """What a client would send for each row; `marker`: the prompt's name in a system message."""
    first = [{"role": "system", "content": f"<<prompt:{marker}>>"}] if marker else []
    template = prompt.prompt.template
    return [
        Query(s, [*first, *plain_messages(template, s.example.columns)]) for s in prompt.sequences
    ]


def written(folder: Path, job: Job) -> dict[str, Any]:
    """Export to a checkpoint; returns what `export.json` keeps, through JSON."""
    folder.mkdir()
    values: dict[str, Any] = json.loads(json.dumps(Vocabulary().write(job, folder)))
    return values


def small(folder: Path, settings: ExportSettings = ExportSettings(), **base: Any) -> Job:
    """A job of one prompt whose model lies in `folder`/base; `base` goes to `save_base`."""
    model = opened(save_base(folder / "base", **base))
    return job_of(model, exported(model, settings=settings))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a folder."""
    values: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return values


def _directions(like_PD: Tensor, seed: int) -> Tensor:
    drawn = torch.randn(like_PD.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)
