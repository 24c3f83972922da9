"""Write an export's README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embedgrad.deploy.choices import Choices
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.programs import fill
from embedgrad.deploy.requests import example_requests
from embedgrad.deploy.rules import TOKENS_OF_A_CHAT
from embedgrad.evaluation.significance import wilson_interval
from embedgrad.formatting import percent, size, visible, with_interval
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.report.terminal.tables import describe_greedy, verdict

CHECK = "What was checked"
AGREEMENTS = {
    "greedy_agreement": "the same greedy texts as in training",
    "choice_agreement": "the same choices as `evaluate`, ranked by log-probability",
    "limited_agreement": "the same choices as `evaluate`, by the answers that clients get",
}
ENOUGH = 0.9  # the share of rows in agreement below which a check is a warning
UNCHECKED = (
    "Nothing: it was exported without a check. `embedgrad verify` checks it now, with `--run RUN` "
    "if it was made from a prompt alone."
)
_RANKING = dict.fromkeys(
    ("gguf", "vocabulary"), "rank the choices by log-probability, as the last request does"
)
_RANKED_ELSEWHERE = "exports to safetensors, gguf and vocabulary can rank the choices"
ASKED = {  # of destinations that take plain messages: the engine, its server, and its address
    "gguf": ("llamacpp", "llama-server", "http://127.0.0.1:8080/v1"),
    "vocabulary": ("vllm", "vLLM", "http://127.0.0.1:8000/v1"),
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
    choices = Choices.of(job.prompts[0])
    engine, server, url = ASKED.get(destination, ("", "", ""))
    lists = {
        "Notes": notes,
        "Smaller exports": smaller_ways(destination, job),
        "Base model and licenses": [
            f"Base model: {code(model['name'])}{revision}, {model['architecture']}.",
            f"Its embedding table: {code(model['embedding_digest'])}.",
            *licenses([exported.prompt for exported in job.prompts]),
        ],
        "Data": data_lines([exported.prompt for exported in job.prompts]),
        "Versions": [*map(" ".join, {**entries["versions"], **more}.items())],
    }
    return fill(
        "card.md",
        code=code,
        fence=fence,
        plain=plain,
        title=title,
        destination=destination,
        model=model,
        public=job.base.public,
        created=entries["created"][:10],
        commands=commands,
        server=server,
        url=url,
        requests=example_requests(engine, url, title, choices) if engine else (),
        choices=choices,
        prompts=_prompts(job.prompts, destination),
        check_title=CHECK,
        check=format_check(checked),
        lists=lists,
        files=_table(("file", "SHA-256"), entries["files"].items()),
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
    problems = "".join(f"\n- {plain(problem)}" for problem in checked["problems"])
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
    )
    shown = [
        (name, format(checked[k], form)) for name, k, form in figures if checked[k] is not None
    ]
    return shown + [
        (name, agreement(checked[k], checked["rows"]))
        for k, name in AGREEMENTS.items()
        if checked.get(k) is not None
    ]


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """A prompt's test scores with intervals and verdict, and how free its greedy replies are."""
    refined, text = (
        with_interval(s["accuracy"], s["interval"]) for s in (scores["refined"], scores["text"])
    )
    free = scores["refined"].get("greedy_is_choice")
    return [
        f"{refined} right on {scores['test_rows']} test rows, its text {text}: "
        f"{verdict(scores['difference'])}",
        *([] if free is None else [describe_greedy(free)]),
    ]


def agreement(share: float, rows: int) -> str:
    """A share of a check's rows with its interval (95 %, Wilson)."""
    return with_interval(share, wilson_interval(round(share * rows), rows))


def agreements(checked: Mapping[str, Any]) -> dict[str, float]:
    """The shares of a check's rows that agree."""
    return {key: checked[key] for key in AGREEMENTS if isinstance(checked.get(key), float)}


def low_agreement(checked: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    """Warnings of a check, each with its remedy; `entries` are those of `export.json`."""
    shares, warnings = agreements(checked), []
    for key, share in shares.items():
        if share < ENOUGH:
            remedy = _remedy(entries)
            if key == "limited_agreement" and shares.get("choice_agreement", 0) >= ENOUGH:
                remedy = _RANKING.get(entries["destination"], _RANKED_ELSEWHERE)
            warnings.append(f"{AGREEMENTS[key]} in only {percent(share)} of the rows; {remedy}")
    return warnings


def _remedy(entries: Mapping[str, Any]) -> str:
    """How to serve what training computed."""
    written = entries["written"]
    if "types" in written and set(written["types"]) != {"F32"}:
        return "serve the run with --set export.gguf=f32, or train with the weights that you serve"
    if written.get("rows_dtype", "float32") != "float32" and not written.get("quantized"):
        return "serve the run with --set export.dtype=float32"
    return "serve it with --engine llamacpp --set export.gguf=f32, or train with the served weights"


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


def _prompts(prompts: Sequence[ExportedPrompt], destination: str) -> list[str]:
    lines = []
    for exported in prompts:
        scores = exported.prompt.provenance.get("scores") or {}
        texts = ", ".join(code(span.text) for span in exported.spans)
        line = f"`{exported.name}`: {texts}, {len(exported.prompt.prompt_ids)} rows"
        if "refined" in scores and "text" in scores:
            line += f"; {'; '.join(score_lines(scores))}"
        lines.append(f"{line}.")
    if len(prompts) > 1 and destination in TOKENS_OF_A_CHAT:
        other = prompts[1].name
        lines.append(
            f"The first answers unless a request asks for another: "
            f'`"chat_template_kwargs": {{"prompt": "{other}"}}`, or `<<prompt:{other}>>` in the '
            "system message."
        )
    return lines


def licenses(prompts: Sequence[PromptEmbedding]) -> list[str]:
    """A line for each license that prompts name, or lack."""
    lines: dict[str, None] = {}
    for prompt in prompts:
        known = prompt.provenance.get("licenses") or {}
        for what in ("model", "data"):
            name = code(known[what]) if known.get(what) else "not stated; ask its authors"
            lines[f"License of the {what}: {name}."] = None
    return list(lines)


def data_lines(prompts: Sequence[PromptEmbedding]) -> list[str]:
    """A line for each file of rows that prompts were made from."""
    lines: dict[str, None] = {}
    for prompt in prompts:
        for split, entry in (prompt.provenance.get("data") or {}).items():
            if entry.get("rows"):
                digest = f", SHA-256 {code(entry['sha256'])}" if entry.get("sha256") else ""
                lines[f"{split}: {entry['rows']} rows of {code(entry['source'])}{digest}."] = None
    return list(lines)


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    cells = [header, ("---", "---"), *rows]
    return "\n".join(f"| {a.replace('|', ' ')} | {b.replace('|', ' ')} |" for a, b in cells)


def code(text: str) -> str:
    """Foreign text in a code span that it cannot end."""
    shown = visible(text)
    fence = _fence(shown, 1)
    return f"`{shown}`" if fence == "`" and shown.strip() == shown else f"{fence} {shown} {fence}"


def fence(text: str) -> str:
    """A block of code."""
    return f"{_fence(text, 3)}\n{text}\n{_fence(text, 3)}"


def _fence(text: str, least: int) -> str:
    """Longer than any run of backticks in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def plain(text: str) -> str:
    """A line of text without Markdown or HTML in it."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", visible(text))
