"""The card of an export: how to serve it, and what was verified."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.rules import TOKENS_OF_A_CHAT
from embedgrad.formatting import percent, size, visible

CHECK = "What was verified"
UNCHECKED = "Nothing: it was exported without a check. `embedgrad verify` does it now."
_RAW = (
    "In a chat, text that spells the new tokens is taken out of every message by the chat "
    "template. Raw completions (`/v1/completions`, or a prompt of your own making) cannot be "
    "guarded: whoever may send them and knows the tokens' names can use the refined rows. The "
    "names hold a random tag."
)
_EMBEDDINGS = (
    "Prompt embeddings are for trusted users only: a server that takes them "
    "(`--enable-prompt-embeds`) takes any, and a wrong shape can stop it. Keep it behind your own "
    "service, which makes the requests. Payloads are written from safetensors, and nothing here "
    "is ever read back by unpickling."
)
_ROWS = "The rows are plain numbers in safetensors; nothing in this folder is unpickled."
_SECURITY = {
    "vocabulary": _RAW,
    "gguf": _RAW,
    "vllm": _EMBEDDINGS,
    "sglang": _EMBEDDINGS.replace("(`--enable-prompt-embeds`) ", ""),
}


def card(
    title: str,
    entries: Mapping[str, Any],
    job: Job,
    checked: Mapping[str, Any] | None,
    *,
    commands: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Markdown with the front matter of a model card; `entries` are those of `export.json`."""
    destination, model = entries["destination"], entries["model"]
    revision = f", revision {code(model['revision'])}" if model["revision"] else ""
    sections = {
        "Serve it": "\n\n".join(_block(command) for command in commands),
        "Prompts": _prompts(job.prompts, destination),
        CHECK: check_text(checked),
        "Security": _SECURITY.get(destination, _ROWS),
        "To know": _list(notes),
        "Smaller ways": _list(smaller_ways(destination, job)),
        "Base model and licenses": _list(
            [
                f"Base model: {code(model['name'])}{revision}, {model['architecture']}.",
                f"Its embedding table: {code(model['embedding_digest'])}.",
                *_licenses(job.prompts),
            ]
        ),
        "Data": _list(_data(job.prompts)),
        "Versions": _list(
            [f"{name} {version}" for name, version in _versions(entries, checked).items()]
        ),
        "Files": _table(("file", "SHA-256"), entries["files"].items()),
    }
    body = "\n".join(f"## {name}\n\n{text}\n" for name, text in sections.items() if text)
    return (
        f"{_front_matter(model)}\n# {_plain(title)}\n\n"
        f"A refined prompt for {code(model['name'])}, exported to `{destination}` by EmbedGrad on "
        f"{entries['created'][:10]}.\n\n{body}"
    )


def with_check(text: str, checked: Mapping[str, Any]) -> str:
    """A card with what was verified brought up to date, and all else as it was."""
    section = re.compile(rf"(?ms)^## {CHECK}\n.*?(?=^## |\Z)")
    return section.sub(lambda _: f"## {CHECK}\n\n{check_text(checked)}\n\n", text, count=1)


def check_text(checked: Mapping[str, Any] | None) -> str:
    """What a check found, as a table."""
    if checked is None:
        return UNCHECKED
    lead = "The check passed." if checked["passed"] else "**The check failed.**"
    problems = "".join(f"\n- {_plain(problem)}" for problem in checked["problems"])
    few = "".join(
        f"\n\nOn fewer rows than 32: {p['fewer_rows']}."
        for p in list(checked["prompts"].values())[:1]
        if p["fewer_rows"]
    )
    return (
        f"{lead} It asked this export in {engine_of(checked['destination'])}, and the training "
        f"path, on rows of the data.{few}{problems}\n\n{_table(('', ''), check_rows(checked))}"
    )


def engine_of(destination: str) -> str:
    """What a check asked: the destination's own engine, or what stands for it."""
    server = {"vllm": "vLLM", "sglang": "SGLang"}.get(destination)
    if server is None:
        return "its own engine"
    return f"a stand-in that enforces {server}'s documented contract ({server} itself was not run)"


def check_rows(checked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A check's figures for people."""
    differences = {
        "unrefined rows against the plain text, log-probabilities": "step_zero_difference",
        "refined rows against training, log-probabilities": "max_logprob_difference",
        "allowed there": "tolerance",
        "in the mean": "mean_logprob_difference",
        "the engine's own rounding, on plain text": "rounding",
        "probability of the new tokens together": "added_mass",
    }
    agreements = {
        "the same greedy texts as in training": "greedy_agreement",
        "the same choices as in training": "choice_agreement",
    }
    figures = [
        *((name, checked[key], "{:.1e}") for name, key in differences.items()),
        *((name, checked[key], "{:.1%}") for name, key in agreements.items()),
    ]
    shown = [(name, form.format(value)) for name, value, form in figures if value is not None]
    return [("rows", str(checked["rows"])), *shown]


def smaller_ways(destination: str, job: Job) -> list[str]:
    """Ways to use the same prompts that take kilobytes, for an export that holds a whole model."""
    if destination not in TOKENS_OF_A_CHAT:
        return []
    rows = max(e.rows_PD.nbytes for e in job.prompts)
    longest = max(
        len(e.rows_PD) + len(s.prefix + s.suffix) for e in job.prompts for s in e.sequences
    )
    sent = longest * job.model.info.width * 2
    return [
        f"the artifact itself takes {size(2 * rows)}: `embedgrad.load(RUN).generate(...)`, or "
        "`--to safetensors` with a script that needs transformers only",
        f"prompt embeddings take up to about {size(sent)} a request like those of the data, in 16 "
        "bits: `--to vllm`; as text some times that: `--to sglang`",
    ]


# -- parts -----------------------------------------------------------------------------------------


def _front_matter(model: Mapping[str, Any]) -> str:
    lines = ["tags: [embedgrad, prompt-tuning]"]
    if model["license"]:
        lines.append(f"license: {json.dumps(model['license'])}")
    if model["kind"] == "hub":
        lines.append(f"base_model: {json.dumps(model['name'])}")
    return "\n".join(["---", *lines, "---", ""])


def _prompts(prompts: Sequence[Exported], destination: str) -> str:
    lines = []
    for exported in prompts:
        prompt, scores = exported.prompt, exported.prompt.provenance.get("scores") or {}
        told = f"`{exported.name}`: {code(prompt.span.text)}, {len(prompt.span.ids)} rows"
        if "refined" in scores and "text" in scores:
            told += (
                f"; on {scores['test_rows']} test rows {percent(scores['refined']['accuracy'])}, "
                f"its text {percent(scores['text']['accuracy'])}"
            )
        lines.append(f"{told}.")
    if len(prompts) > 1 and destination in TOKENS_OF_A_CHAT:
        other = prompts[1].name
        lines.append(
            f"The first answers unless a request asks for another: "
            f'`"chat_template_kwargs": {{"prompt": "{other}"}}`, or `<<prompt:{other}>>` in the '
            "system message."
        )
    return _list(lines)


def _licenses(prompts: Sequence[Exported]) -> list[str]:
    found: dict[str, None] = {}
    for exported in prompts:
        licenses = exported.prompt.provenance.get("licenses") or {}
        for what, key in (("model", "model"), ("data", "data")):
            named = licenses.get(key)
            told = code(named) if named else "not stated; ask its authors"
            found[f"License of the {what}: {told}."] = None
    return list(found)


def _data(prompts: Sequence[Exported]) -> list[str]:
    found: dict[str, None] = {}
    for exported in prompts:
        for split, entry in (exported.prompt.provenance.get("data") or {}).items():
            if entry.get("rows"):
                digest = f", SHA-256 {code(entry['sha256'])}" if entry.get("sha256") else ""
                found[f"{split}: {entry['rows']} rows of {code(entry['source'])}{digest}."] = None
    return list(found)


def _versions(entries: Mapping[str, Any], checked: Mapping[str, Any] | None) -> dict[str, str]:
    return {**entries["versions"], **(checked["versions"] if checked else {})}


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    cells = [header, ("---", "---"), *rows]
    return "\n".join(f"| {a.replace('|', ' ')} | {b.replace('|', ' ')} |" for a, b in cells)


def _block(command: str) -> str:
    fence = _fence(command, 3)
    return f"{fence}\n{command}\n{fence}"


def code(text: str) -> str:
    """Foreign text in a code span, which nothing in it can end."""
    shown = visible(text)
    fence = _fence(shown, 1)
    return f"`{shown}`" if fence == "`" and shown.strip() == shown else f"{fence} {shown} {fence}"


def _fence(text: str, least: int) -> str:
    """Backticks, more than stand together in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def _plain(text: str) -> str:
    """A line of text without Markdown or HTML in it."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", visible(text))
