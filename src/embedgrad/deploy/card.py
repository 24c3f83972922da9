"""Write an export's README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.rules import TOKENS_OF_A_CHAT
from embedgrad.formatting import percent, size, visible

CHECK = "What was checked"
UNCHECKED = "Nothing: it was exported without a check. `embedgrad verify` checks it now."
_RAW = (
    "The chat template removes text that spells the new tokens from every message. It cannot "
    "guard raw completions (`/v1/completions`, or a prompt you build yourself): whoever may send "
    "them and knows the tokens' names, which contain a random tag, can use the refined rows."
)
_EMBEDDINGS = (
    "Prompt embeddings are for trusted users only: a server that accepts them "
    "(`--enable-prompt-embeds`) accepts any, and a wrong shape can crash it. Keep it behind your "
    "own service, which makes the requests. Payloads are written from safetensors, and nothing "
    "here is ever unpickled."
)
_ROWS = "The rows are plain numbers in safetensors; nothing in this folder is unpickled."
_SECURITY = {
    "vocabulary": _RAW,
    "gguf": _RAW,
    "vllm": _EMBEDDINGS,
    "sglang": _EMBEDDINGS.replace("(`--enable-prompt-embeds`) ", ""),
}


def build_card(
    title: str,
    entries: Mapping[str, Any],
    job: Job,
    checked: Mapping[str, Any] | None,
    *,
    commands: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Markdown with a model card's front matter; `entries` are those of `export.json`."""
    destination, model = entries["destination"], entries["model"]
    more = checked["versions"] if checked else {}
    revision = f", revision {code(model['revision'])}" if model["revision"] else ""
    sections = {
        "Serve it": "\n\n".join(
            f"{_fence(command, 3)}\n{command}\n{_fence(command, 3)}" for command in commands
        ),
        "Prompts": _prompts(job.prompts, destination),
        CHECK: format_check(checked),
        "Security": _SECURITY.get(destination, _ROWS),
        "Notes": _list(notes),
        "Smaller exports": _list(smaller_ways(destination, job)),
        "Base model and licenses": _list(
            [
                f"Base model: {code(model['name'])}{revision}, {model['architecture']}.",
                f"Its embedding table: {code(model['embedding_digest'])}.",
                *_licenses(job.prompts),
            ]
        ),
        "Data": _list(_data(job.prompts)),
        "Versions": _list(map(" ".join, {**entries["versions"], **more}.items())),
        "Files": _table(("file", "SHA-256"), entries["files"].items()),
    }
    body = "\n".join(f"## {name}\n\n{text}\n" for name, text in sections.items() if text)
    front = ["---", "tags: [embedgrad, prompt-tuning]"]
    if model["license"]:
        front.append(f"license: {json.dumps(model['license'])}")
    if job.base.public:
        front.append(f"base_model: {json.dumps(model['name'])}")
    return "\n".join([*front, "---", ""]) + (
        f"\n# {_plain(title)}\n\n"
        f"A refined prompt for {code(model['name'])}, exported to `{destination}` by EmbedGrad on "
        f"{entries['created'][:10]}.\n\n{body}"
    )


def update_check(text: str, checked: Mapping[str, Any]) -> str:
    """A card with a new result of the check, otherwise unchanged."""
    section = re.compile(rf"(?ms)^## {CHECK}\n.*?(?=^## |\Z)")
    return section.sub(lambda _: f"## {CHECK}\n\n{format_check(checked)}\n\n", text, count=1)


def format_check(checked: Mapping[str, Any] | None) -> str:
    """The result of a check as a sentence and a table."""
    if checked is None:
        return UNCHECKED
    lead = "The check passed." if checked["passed"] else "**The check failed.**"
    problems = "".join(f"\n- {_plain(problem)}" for problem in checked["problems"])
    first, *_ = checked["prompts"].values()
    few = f"\n\nOn fewer rows than 32: {first['fewer_rows']}." if first["fewer_rows"] else ""
    return (
        f"{lead} It compared this export, by {checked['engine']}, with the training path, on rows "
        f"of the data.{few}{problems}\n\n{_table(('', ''), check_figures(checked))}"
    )


def check_figures(checked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A check's figures with their names, formatted."""
    figures = (
        ("rows", "rows", "d"),
        ("unrefined rows against the plain text, log-probabilities", "step_zero_difference", ".1e"),
        ("refined rows against training, log-probabilities", "max_logprob_difference", ".1e"),
        ("allowed there", "tolerance", ".1e"),
        ("mean of these", "mean_logprob_difference", ".1e"),
        ("the engine's own rounding, on plain text", "rounding", ".1e"),
        ("probability of the new tokens together", "added_mass", ".1e"),
        ("the same greedy texts as in training", "greedy_agreement", ".1%"),
        ("the same choices as in training", "choice_agreement", ".1%"),
    )
    return [(name, format(checked[k], form)) for name, k, form in figures if checked[k] is not None]


def smaller_ways(destination: str, job: Job) -> list[str]:
    """Exports of the same prompts that take kilobytes, where this one holds a whole model."""
    if destination not in TOKENS_OF_A_CHAT:
        return []
    rows = max(e.rows_PD.nbytes for e in job.prompts)
    longest = max(s.length(len(e.rows_PD)) for e in job.prompts for s in e.sequences)
    sent = longest * job.model.info.width * 2
    return [
        f"the artifact takes {size(2 * rows)}: `embedgrad.load(RUN).generate(...)`, or "
        "`--to safetensors` with a script that needs transformers only",
        f"prompt embeddings take up to about {size(sent)} per request on this data, in 16 bits: "
        "`--to vllm`; several times as much as text: `--to sglang`",
    ]


def _prompts(prompts: Sequence[ExportedPrompt], destination: str) -> str:
    lines = []
    for exported in prompts:
        scores = exported.prompt.provenance.get("scores") or {}
        texts = ", ".join(code(span.text) for span in exported.spans)
        line = f"`{exported.name}`: {texts}, {len(exported.prompt.prompt_ids)} rows"
        if "refined" in scores and "text" in scores:
            line += (
                f"; {percent(scores['refined']['accuracy'])} right on {scores['test_rows']} test "
                f"rows, its text {percent(scores['text']['accuracy'])}"
            )
        lines.append(f"{line}.")
    if len(prompts) > 1 and destination in TOKENS_OF_A_CHAT:
        other = prompts[1].name
        lines.append(
            f"The first answers unless a request asks for another: "
            f'`"chat_template_kwargs": {{"prompt": "{other}"}}`, or `<<prompt:{other}>>` in the '
            "system message."
        )
    return _list(lines)


def _licenses(prompts: Sequence[ExportedPrompt]) -> list[str]:
    lines: dict[str, None] = {}
    for exported in prompts:
        licenses = exported.prompt.provenance.get("licenses") or {}
        for what in ("model", "data"):
            name = code(licenses[what]) if licenses.get(what) else "not stated; ask its authors"
            lines[f"License of the {what}: {name}."] = None
    return list(lines)


def _data(prompts: Sequence[ExportedPrompt]) -> list[str]:
    lines: dict[str, None] = {}
    for exported in prompts:
        for split, entry in (exported.prompt.provenance.get("data") or {}).items():
            if entry.get("rows"):
                digest = f", SHA-256 {code(entry['sha256'])}" if entry.get("sha256") else ""
                lines[f"{split}: {entry['rows']} rows of {code(entry['source'])}{digest}."] = None
    return list(lines)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    cells = [header, ("---", "---"), *rows]
    return "\n".join(f"| {a.replace('|', ' ')} | {b.replace('|', ' ')} |" for a, b in cells)


def code(text: str) -> str:
    """Foreign text in a code span that it cannot end."""
    shown = visible(text)
    fence = _fence(shown, 1)
    return f"`{shown}`" if fence == "`" and shown.strip() == shown else f"{fence} {shown} {fence}"


def _fence(text: str, least: int) -> str:
    """Longer than any run of backticks in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def _plain(text: str) -> str:
    """A line of text without Markdown or HTML in it."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", visible(text))
