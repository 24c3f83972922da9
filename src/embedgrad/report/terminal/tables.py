"""Results as terminal tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, final

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import (
    break_line,
    duration,
    encodable,
    percent,
    pluralize,
    size,
    visible,
    with_interval,
)
from embedgrad.report.figures.series import is_number
from embedgrad.report.figures.theme import NO_GAIN
from embedgrad.report.terminal.groups_table import describe_worst, groups_table
from embedgrad.report.terminal.progress import ENDINGS, describe_engine

NOTHING_BETTER = (
    "no step scored better than the text prompt on dev: the saved rows are the text prompt's own"
)
LEVEL = 0.05  # the p-value below which a difference counts
# Norm over the vocabulary's mean norm. Of SmolLM2's 49,152 embeddings 99.97 % lie between.
TYPICAL = (0.5, 2.0)
FREE_ENOUGH = 0.9  # share of greedy replies that are a choice, below which a warning is due
NARROWEST = 40  # columns of a terminal; a smaller one wraps lines, where cells would be cut
OF_FILES = 80  # columns at least where the output is no terminal
LONGEST_CELL = 1000  # characters; more than any terminal is wide

Row = Mapping[str, Any]


def comparison_table(result: Row) -> RenderableType:
    """Text prompt against refined prompt, what else a result holds, and the verdict.

    Of `result.json` every part may be missing: an interrupted run has no scores, scores of other
    rows ("split" says which, if not test) come without drift and training.
    """
    parts: list[RenderableType] = []
    if "difference" in result:
        parts += [_scores(result), ""]
    if groups := result.get("groups"):
        parts += [groups_table(groups), sentence(describe_worst(groups)), ""]
    parts += [sentence(line) for line in _facts(result)]
    if kept_text(result):
        parts.append(sentence(NOTHING_BETTER, "bold"))
    share = result.get("refined", {}).get("greedy_is_choice")
    if is_number(share):
        parts.append(sentence(describe_greedy(share), "bold yellow" if share < FREE_ENOUGH else ""))
    if "difference" in result:
        parts.append(sentence(verdict(result["difference"]), "bold"))
    elif "train" in result:
        parts.append(sentence("no test rows were scored", "bold"))
    return Group(*parts)


def describe_sampled(sampled: Row) -> str:
    """Avg@k with its interval, and pass@k."""
    k, mean = sampled["samples"], with_interval(sampled["accuracy"], sampled["interval"])
    passed = percent(sampled["pass_at"][str(k)])
    return f"mean over {k} sampled answers a row {mean}, pass@{k} {passed}"


def describe_greedy(share: float) -> str:
    """How often a client that asks for free text gets a choice, and what to do if it is rare."""
    line = f"the refined prompt's greedy reply is a choice in {percent(share)} of rows"
    if share >= FREE_ENOUGH:
        return line
    return (
        f"warning: {line}; train longer (cross-entropy: with objective.over = 'both'), or "
        "restrict the engine to the choices, as `embedgrad serve` does"
    )


def describe_regret(found: Row) -> list[str]:
    """What both prompts' decisions cost over the best ones, and the verdict on the difference."""
    if not found:
        return []
    text, refined = (
        f"{scores['pessimistic']:.4g} with the {name} prompt"
        + (f" ({percent(share)})" if is_number(share := scores["normalized"]) else "")
        for name, scores in ((name, found[name]) for name in ("text", "refined"))
    )
    difference = found["difference"]
    low, high = difference["interval"]
    return [
        f"mean regret of {found['decisions']} decisions: {text}, {refined}; the best cost "
        f"{found['best']:.4g} each",
        f"regret {difference['verdict']}: {difference['regret']:+.4g} (95 % interval {low:+.4g} to "
        f"{high:+.4g}), p {difference['p_value']:.3f}",
    ]


def describe_teacher(found: Row) -> list[str]:
    """What a distilled prompt saves, how far it agrees with its teacher, and if it is as good."""
    if not found:
        return []
    tokens, same, far = found["tokens"], found["agreement"], found["divergence"]
    judged = found["non_inferiority"]
    margin, difference, lower = (100 * judged[n] for n in ("margin", "difference", "lower"))
    word = "not inferior" if judged["holds"] else "may be inferior"
    return [
        f"{tokens['refined']:.0f} tokens per query instead of {tokens['teacher']:.0f} with the "
        f"teacher's prompt: {tokens['saved']:.0f} saved",
        f"the teacher's own answer in {percent(same['refined'])} of rows (text prompt: "
        f"{percent(same['text'])}); KL to the teacher {far['refined']:.3f} nats (text prompt: "
        f"{far['text']:.3f})",
        f"{word} to the teacher ({percent(found['scores']['accuracy'])}) by a margin of "
        f"{margin:.3g} points: {difference:+.1f} points, one-sided 95 % limit {lower:+.1f} "
        f"({judged['test']})",
    ]


def verdict(difference: Row) -> str:
    """The verdict's word and the numbers that it rests on.

    "test" names the test; results without it are of an older version, which always said McNemar.
    """
    low, high = (100 * edge for edge in difference["interval"])
    points, p = 100 * difference["accuracy"], difference["p_value"]
    name = "sign-flip" if difference.get("test") == "sign-flip" else "McNemar"
    value = ("< 0.001" if p < 0.001 else f"= {p:.3f}") if is_number(p) else "unknown"
    rows = f"{difference['fixed']} fixed, {difference['broken']} broken"
    return (
        f"{verdict_word(difference)}: {points:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}), {name} p {value}; {rows}"
    )


def verdict_word(difference: Row) -> str:
    """The word of `evaluation.verdict` for a run's difference: "improved", "worse" or `NO_GAIN`.

    A p-value that is damaged, and no number, is no reliable gain.
    """
    p = difference["p_value"]
    if not (is_number(p) and p < LEVEL):
        return NO_GAIN
    return "improved" if difference["accuracy"] > 0 else "worse"


def drift_table(rows: Sequence[Row]) -> RenderableType:
    """Where every row went, the farthest of a span first, with a warning for unlikely rows.

    A row is a `TokenDrift` as a dict; where it has a "worth" (`row_worth`), what is lost when this
    row alone goes back to text is shown too. The warning is for norms outside 0.5 to 2 times the
    vocabulary's mean, where next to no real embedding lies.
    """
    measured = any(row.get("worth") for row in rows)
    numbered = sorted(enumerate(rows, 1), key=lambda item: -item[1]["distance"])
    spans = sorted({row["span"] for row in rows})
    parts: list[RenderableType] = []
    for span in spans:
        parts += [sentence(f"span {span}", "bold")] * (len(spans) > 1)
        own = [item for item in numbered if item[1]["span"] == span]
        parts.append(_drift_of_span(own, measured=measured))
    parts.append(
        sentence("distance in norms of the start row; norm in mean norms of the vocabulary")
    )
    if measured:
        parts.append(
            sentence(
                "points and log-loss: lost when this row alone goes back to text; "
                "measured one at a time, not additive, not tested for significance"
            )
        )
    low, high = TYPICAL
    outside = [(n, row["typical"]) for n, row in numbered if not low <= row["typical"] <= high]
    if outside:
        named = ", ".join(f"row {n} ({typical:.2f})" for n, typical in sorted(outside))
        parts.append(
            sentence(
                "warning: outside the cloud of real embeddings, with a norm not within "
                f"{low:g} to {high:g} of the vocabulary's mean: {named}; "
                "a smaller trust_region.radius keeps rows closer to their words",
                "bold yellow",
            )
        )
    return Group(*parts)


def _drift_of_span(rows: Sequence[tuple[int, Row]], *, measured: bool) -> Table:
    table = new_table()
    table.add_column("row", justify="right")
    table.add_column("token", min_width=10)
    for name in ("distance", "cosine", "norm", *(["points", "log-loss"] * measured)):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("nearest tokens", min_width=12)
    for number, row in rows:
        numbers = [f"{row['distance']:.3f}", f"{row['cosine']:.3f}", f"{row['typical']:.2f}"]
        if measured:
            worth = row.get("worth") or {}
            numbers.append(_number(worth.get("accuracy"), "{:+.1f}", 100))
            numbers.append(_number(worth.get("log_loss"), "{:+.3f}"))
        nearest = _cell("  ".join(row["nearest"]))
        table.add_row(str(number), _cell(row["token"]), *numbers, nearest)
    return table


def changes_table(rows: Sequence[Row], first: int = 5) -> RenderableType:
    """The first rows that the refined prompt fixed, and the first that it broke.

    Rows are those of `predictions.jsonl`: "source", "answer", "change", what both prompts
    "predicted", and, where it is to be shown, the example's "columns". Cells are cut to the width.
    """
    parts: list[RenderableType] = []
    for change in ("fixed", "broken"):
        changed = [row for row in rows if row["change"] == change]
        if not changed:
            parts.append(sentence(f"no rows {change}"))
            continue
        shown = changed[:first]
        with_text = any(row.get("columns") for row in shown)
        names = ("row", "answer", "text prompt", "refined prompt", *(["text"] * with_text))
        table = new_table(*names, left=names)
        for row in shown:
            cells = [row["source"], row["answer"]]
            cells += [row["text"]["predicted"], row["refined"]["predicted"]]
            if with_text:
                texts = {name: text[:LONGEST_CELL] for name, text in row["columns"].items()}
                named = [f"{name}: {text}" for name, text in texts.items()]
                cells.append("  ".join(named if len(named) > 1 else texts.values()))
            table.add_row(*(_cell(cell, cut=True) for cell in cells))
        count = f"{pluralize(len(changed), 'row')} {change}"
        if len(shown) < len(changed):
            count += f", the first {len(shown)}"
        parts += [sentence(f"{count}:"), table]
    return Group(*parts)


def show(renderable: RenderableType, file: TextIO | None = None) -> None:
    """Print to a file (default: stdout), in ASCII where its encoding has no more."""
    file = sys.stdout if file is None else file
    console = Console(file=file, markup=False, emoji=False, highlight=False, force_jupyter=False)
    console.width = max(console.width, NARROWEST if file.isatty() else OF_FILES)
    with console.capture() as capture:
        console.print(renderable, crop=False)
    file.write(encodable(capture.get(), console.encoding))
    file.flush()


def new_table(*columns: str, left: Collection[str] = ()) -> Table:
    """An empty table in the form of all tables; columns not named in left are of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def kept_text(result: Row) -> bool:
    """Whether a run kept the text prompt's own rows; a warm start's have moved at step 0 too."""
    best_step = (result.get("train") or {}).get("best_step")
    return best_step == 0 and not (result.get("drift") or {}).get("max")


def _scores(result: Row) -> Table:
    table = new_table()
    table.add_column(
        f"on {result['test_rows']} {result.get('split', 'test')} rows", overflow="fold"
    )
    for name in ("accuracy", "95 % interval", "macro-F1", "log-loss"):
        table.add_column(name, justify="right", overflow="fold")
    for name in ("text", "refined"):
        scores = result[name]
        low, high = scores["interval"]
        table.add_row(
            f"{name} prompt",
            percent(scores["accuracy"]),
            f"{100 * low:.1f} to {100 * high:.1f}",
            _number(scores["macro_f1"], "{:.3f}"),
            _number(scores["log_loss"], "{:.3f}"),
        )
    return table


def _facts(result: Row) -> list[str]:
    """A line for each of the rest: where the rows went, what it took, where they are."""
    lines = [*describe_place(result), *describe_demonstrations(result), *describe_engine(result)]
    failures = {
        "cut": "were cut at evaluation.max_new_tokens or the model's context",
        "unread": "hold no answer that the scorer finds",
    }
    for name in ("text", "refined"):
        scores = result.get(name, {})
        lines += [
            f"{scores[kind]} of {scores['rows']} replies to the {name} prompt {failure}"
            for kind, failure in failures.items()
            if scores.get(kind)
        ]
        if scores.get("sampled"):
            lines.append(f"{name} prompt: {describe_sampled(scores['sampled'])}")
    lines += describe_regret(result.get("regret") or {})
    lines += describe_teacher(result.get("teacher") or {})
    if "drift" in result:
        lines.append(_drift_line(result))
        spans = enumerate(result.get("spans", ()), 1)
        lines += [f"span {number}: {_drift_line(span)}" for number, span in spans]
    if "train" in result:
        train, prefixes = result["train"], result["prefix_cache"]
        line = f"{pluralize(train['steps'], 'step')} in {duration(train['seconds'])}"
        line += f" ({ENDINGS[train['ended']]})"
        if result.get("peak_memory_bytes"):
            line += f", peak memory {size(result['peak_memory_bytes'])}"
        line += f", prefix cache {prefixes['hits']} hits, {prefixes['misses']} misses"
        lines.append(f"{line}, {size(prefixes['bytes'])}")
    if "artifact" in result:
        lines.append(f"refined prompt saved in {result['artifact']}")
    return lines


def describe_place(result: Row) -> list[str]:
    """Which place of the prompt was chosen on dev, what each one scored there, and its cost."""
    place = result.get("place") or {}
    trials = place.get("trials", {})
    if place.get("chosen") not in trials:
        return []
    steps = trials[place["chosen"]]["steps"]
    lines = [f"place {place['chosen']}, chosen on dev after {pluralize(steps, 'step')} in each:"]
    for name, trial in trials.items():
        score = trial["refined"]
        losses = f"log-loss {score['log_loss']:.3f}"
        if "answer_loss" in score:  # see `Best`
            losses += f" + answer loss {score['answer_loss']:.3f}"
        lines.append(
            f"  {name}: {percent(score['accuracy'])}, {losses}; {trial['rows']} rows, "
            f"{trial['seconds_per_step']:.2f} s a step"
        )
    if any("answer_loss" in trial["refined"] for trial in trials.values()):
        lines.append("  within one standard error of the best, the lowest sum of losses is chosen")
    return [*lines, *(f"  {name}: {why}" for name, why in place.get("left_out", {}).items())]


def describe_demonstrations(result: Row) -> list[str]:
    """Which rows of train the prompt shows, and with which text prompt it is compared."""
    sources = (result.get("demonstrations") or {}).get("sources")
    if not sources:
        return []
    return [
        f"the span shows {len(sources)} demonstrations ({', '.join(sources)}); the text prompt is "
        "the few-shot prompt with the same"
    ]


def _drift_line(part: Row) -> str:
    drift, cosine = part["drift"], part["cosine"]
    return (
        f"drift {drift['mean']:.3f} mean, {drift['max']:.3f} max; "
        f"cosine to the start rows {cosine['mean']:.3f} mean, {cosine['min']:.3f} min; "
        f"nearest token unchanged for {100 * part['nearest_tokens_unchanged']:.0f} % of rows"
    )


def sentence(text: str, style: str = "", indent: int = 0) -> RenderableType:
    """A line that a terminal breaks between words, and that stays whole in a file."""
    return Sentence(visible(text), style, indent)


@final
class Sentence(NamedTuple):
    text: str
    style: str
    indent: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [self.text]
        if console.is_terminal:
            lines = break_line(self.text, max(1, options.max_width - self.indent))
        for line in lines:
            yield Text(f"{' ' * self.indent}{line}", self.style, no_wrap=True, overflow="ignore")


def _cell(text: str, *, cut: bool = False) -> Text:
    """Foreign text: never markup, never control characters; cut to one line or folded."""
    text = visible(text[:LONGEST_CELL])
    return Text(text, no_wrap=True, overflow="ellipsis") if cut else Text(text, overflow="fold")


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(factor * value)
