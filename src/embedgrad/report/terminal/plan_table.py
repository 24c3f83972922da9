"""A plan as a terminal table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from embedgrad.formatting import BLANKS, duration, operations, pluralize, size
from embedgrad.report.expectation import describe
from embedgrad.report.terminal.tables import sentence

Values = Mapping[str, Any]

PARTS = ("start", "load", "tokenize", "solutions", "prefixes", "sampling", "steps", "dev", "test")
MANY = 6  # answers that are listed with their counts


def plan_table(plan: Values) -> RenderableType:
    """Data, tokens, work, memory and time, exports, and what fits a budget.

    Where a recipe has problems the plan may end early; then what is missing is left out.
    """
    parts: list[RenderableType] = []
    for key, title, lines in SECTIONS:
        if plan.get(key):
            parts += [Text(title, style="bold"), *map(_line, lines(plan))]
    return Group(*parts, *_budget(plan.get("budget", {})))


def plan_and_problems(plan: Values) -> RenderableType:
    """What would keep a run from starting, which a command says as its error, and the plan."""
    return Group(*(sentence(text, "bold") for text in plan["problems"]), plan_table(plan))


def _model(plan: Values) -> Iterator[str]:
    model = plan["model"]
    kind = f"{model['architecture']} in {model['dtype']} on {model['device']}"
    numbers = f"{model['parameters'] / 1e6:,.0f} M numbers"
    yield f"{model['name']}: {kind}, {numbers}, {size(model['bytes'])}"


def _data(plan: Values) -> Iterator[str]:
    data = plan["data"]
    limit = f" of {data['context']}" if data["context"] else ""
    for name in ("train", "dev", "test"):
        rows, answers, longest = (data[name][n] for n in ("rows", "answers", "longest"))
        if isinstance(answers, Mapping):
            listed = [f"{n} {answer}" for answer, n in answers.items()]
            more = [f"{len(listed) - MANY} more answers"] if len(listed) > MANY else []
            words = ", ".join([*listed[:MANY], *more])
        else:
            words = pluralize(answers, "different answer")
        line = f"{pluralize(rows, 'row')} ({words}), the longest {longest}{limit} tokens"
        yield f"{name}: {line if rows else 'no rows'}"
    yield data["duplicates"] or "no text is in two splits"
    yield from plan["notes"]


def _spans(plan: Values) -> Iterator[str]:
    for span in plan["spans"]:
        count, words = pluralize(len(span["ids"]), "token"), " ".join(span["tokens"])
        yield f"{count}: {words.translate(BLANKS)}"
    rows, first = plan["merged"]["rows"], plan["merged"]["first"]
    merging = "1 row merges" if rows == 1 else f"{rows} rows merge"
    yield f"{merging} with it (first: {first})" if rows else "no row merges with it"


def _work(plan: Values) -> Iterator[str]:
    tokens, flops, course, prefixes = (plan[n] for n in ("tokens", "flops", "course", "prefixes"))
    counts = (f"{tokens[kind]:,} {kind}" for kind in ("prefix", "prompt", "suffix", "target"))
    yield f"an epoch: {', '.join(counts)} tokens"
    step, without = (
        f"{tokens[name]:,.0f} tokens, about {operations(flops[name])}"
        for name in ("per_step", "per_step_without_reuse")
    )
    yield f"a step computes {step}; without prefix reuse {without}"
    steps = f"{pluralize(course['steps'], 'step')} ({course['steps_per_epoch']} an epoch)"
    sampled = f", {course['answers']:,} answers sampled" if "answers" in course else ""
    yield f"{steps}, {pluralize(course['evaluations'], 'evaluation')}{sampled}"
    if prefixes["reason"]:
        yield f"prefixes are not reused: {prefixes['reason']}"
        return
    need, room, slower = (prefixes[n] for n in ("bytes", "room_bytes", "slower_room_bytes"))
    places = f" and for {size(slower)} in slower places" if slower else ""
    short = "; the others are computed again each time" if need > room + slower else ""
    room_words = f"room for {size(room)} (prefix_cache.budget){places}{short}"
    yield f"prefixes of all rows are {size(need)}, {room_words}"


def _exports(plan: Values) -> Iterator[str]:
    for export in plan["exports"]:
        remarks = f" ({'; '.join(export['remarks'])})" if export["remarks"] else ""
        yield f"{export['destination']}: {'yes' if export['possible'] else 'no'}{remarks}"


def _time(plan: Values) -> Iterator[str]:
    seconds, replies = plan["seconds"], plan["replies"]
    parts = (f"{name} {duration(seconds[name])}" for name in PARTS if seconds[name])
    yield f"about {duration(seconds['all'])}: {', '.join(parts)}"
    if replies["read"]:
        ended = f"{replies['read'] - replies['cut']} of {replies['read']} answers that were read"
        expected = f"{replies['text']} tokens from the text prompt and {replies['refined']}"
        yield f"{ended} ended in {replies['upto']} tokens; expected are {expected} from the refined"
        yield f"at most {duration(seconds['at_most'])}, if every answer runs to its limit"


def _memory(plan: Values) -> Iterator[str]:
    names = ("peak", "loaded", "loading", "prefixes", "step", "scoring")
    peak, loaded, loading, prefixes, step, scoring = (size(plan["memory"][n]) for n in names)
    model = f"{loaded} with the model loaded ({loading} while loading)"
    yield f"about {peak}: {model}, prefixes {prefixes}, a step {step}, scoring {scoring}"


def _budget(budget: Values) -> Iterator[RenderableType]:
    if budget.get("memory_bytes") is None and budget.get("seconds") is None:
        return
    over = f"over the budget in {' and '.join(budget['over'])}"
    yield Text("fits the budget" if budget["fits"] else over, style="bold")
    if not budget["fits"] and not any(knob["fits"] for knob in budget["knobs"]):
        yield _line("no single setting brings it under")
    for knob in budget["knobs"]:
        fits = "fits" if knob["fits"] else "not enough"
        results = "same results" if knob["exact"] else "other results"
        taken = f"{size(knob['memory_bytes'])}, {duration(knob['seconds'])}"
        yield _line(f"{knob['setting']} = {knob['value']}: {fits}, {results}, {taken}")


def _line(text: str) -> RenderableType:
    return sentence(text, indent=2)


# What must be there, a title, and the lines.
SECTIONS = (
    ("elicitation", "what there is to elicit", lambda plan: describe(plan["elicitation"])),
    ("model", "model", _model),
    ("data", "data", _data),
    ("spans", "span", _spans),
    ("tokens", "tokens and work", _work),
    ("exports", "exports", _exports),
    ("seconds", "time here", _time),
    ("memory", "memory", _memory),
)
