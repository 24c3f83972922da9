"""A plan as text for a terminal, from the dict that `plan` gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import duration, size, visible

Row = Mapping[str, Any]

PARTS = {
    "start": "starting Python",
    "load": "loading the model",
    "tokenize": "tokenizing",
    "solutions": "writing solutions",
    "prefixes": "building prefixes",
    "steps": "steps",
    "dev": "evaluations on dev",
    "test": "scoring test with both prompts",
}
MANY = 6  # answers that are listed with their counts


def plan_table(found: Row) -> RenderableType:
    """Data, tokens, work, memory and time, exports, and what fits a budget.

    Where a recipe has problems the plan may end early, and what is missing is left out.
    """
    parts: list[RenderableType] = []
    for title, said in _sections(found):
        if lines := list(said):
            parts += [Text(title, style="bold"), *(_line(line) for line in lines)]
    if "seconds" in found:
        parts.append(_budget(found))
    return Group(*parts)


def operations(count: float) -> str:
    """Floating-point operations: 3.2 GFLOP, 41 TFLOP."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PFLOP"


def _sections(found: Row) -> Iterator[tuple[str, Iterable[str]]]:
    yield "model", _model(found["model"])
    data = found["data"]
    if data:
        yield "data", [*_data(data), *found.get("notes", [])]
    if "span" in found:
        yield "span", _span(found["span"])
    if "tokens" in found:
        yield (
            "tokens and work",
            [*_tokens(found), *_work(found["flops"]), *_prefixes(found["prefixes"])],
        )
        yield "exports", _exports(found["exports"], found["sizes"])
    if "seconds" in found:
        yield "time here", _time(found)
        yield "memory", _memory(found["memory"])


def _model(model: Row) -> list[str]:
    count = f"{model['parameters'] / 1e6:,.0f} M numbers, {size(model['bytes'])}"
    kind = f"{model['architecture']} in {model['dtype']} on {model['device']}"
    return [f"{model['name']}: {kind}, {count}"]


def _data(data: Row) -> Iterator[str]:
    for name in ("train", "dev", "test"):
        part = data[name]
        answers = part["answers"]
        if not part["rows"]:
            yield f"{name}: no rows"
            continue
        if isinstance(answers, Mapping):
            listed = [f"{n} {a}" for a, n in answers.items()]
            more = [f"{len(listed) - MANY} more answers"] if len(listed) > MANY else []
            answers = ", ".join([*listed[:MANY], *more])
        else:
            answers = f"{answers} different answers"
        limit = f" of {data['context']}" if data["context"] else ""
        row = f"{part['rows']} rows ({answers}), the longest {part['longest']}{limit} tokens"
        yield f"{name}: {row}"
    repeats = data["duplicates"]
    if repeats["between_splits"]:
        first = " and ".join(repeats["first"])
        yield f"{repeats['between_splits']} rows repeat a text of another split (first: {first})"
    else:
        yield "no text stands in two splits"
    if repeats["within_a_split"]:
        yield f"{repeats['within_a_split']} rows repeat a text of their own split"


def _span(span: Row) -> Iterator[str]:
    yield f"{len(span['ids'])} tokens: {' '.join(span['tokens'])}"
    if span["merged_rows"]:
        yield f"{span['merged_rows']} rows merge with it (first: {span['merged_first']})"
    else:
        yield "no row merges with it"


def _tokens(found: Row) -> Iterator[str]:
    tokens, course = found["tokens"], found["course"]
    yield (
        f"an epoch: {tokens['prefix']:,} prefix, {tokens['prompt']:,} prompt, {tokens['suffix']:,} "
        f"suffix, {tokens['target']:,} target tokens"
    )
    yield (
        f"a step computes {tokens['per_step']:,.0f} tokens; without prefix reuse "
        f"{tokens['per_step_without_reuse']:,.0f}"
    )
    yield (
        f"{course['steps']} steps ({course['steps_per_epoch']} an epoch), "
        f"{course['evaluations']} evaluations"
    )


def _work(flops: Row) -> Iterator[str]:
    parts = ("solutions", "prefixes", "steps", "evaluations", "test")
    listed = ", ".join(f"{name} {operations(flops[name])}" for name in parts if flops[name])
    plain = operations(flops["steps_without_reuse"])
    yield f"{operations(flops['all'])}: {listed}; steps without prefix reuse would be {plain}"


def _prefixes(prefixes: Row) -> Iterator[str]:
    if not prefixes["reuse"]:
        yield f"prefixes are not reused: {prefixes['reason']}"
        return
    slower = prefixes["slower_room_bytes"]
    room = f"room for {size(prefixes['room_bytes'])} (prefix_cache.budget)"
    room += f" and for {size(slower)} in slower places" if slower else ""
    fits = prefixes["bytes"] <= prefixes["room_bytes"] + slower
    short = "" if fits else "; the others are computed anew"
    yield f"prefixes of all rows are {size(prefixes['bytes'])}, {room}{short}"


def _exports(exports: Sequence[Row], sizes: Row) -> Iterator[str]:
    for export in exports:
        said = "; ".join(export["remarks"])
        state = "yes" if export["possible"] else "no"
        yield f"{export['destination']}: {state}{f' ({said})' if said else ''}"
    yield (
        f"saved rows {size(sizes['prompt.safetensors'])}, vocabulary export "
        f"{size(sizes['vocabulary'])}, prompt embeddings of the longest query "
        f"{size(sizes['prompt_embeddings_of_a_query'])}"
    )


def _time(found: Row) -> Iterator[str]:
    seconds, replies = found["seconds"], found["replies"]
    listed = ", ".join(
        f"{words} {duration(seconds[n])}" for n, words in PARTS.items() if seconds[n]
    )
    yield f"about {duration(seconds['all'])}: {listed}"
    if replies["read"]:
        read = f"{replies['read']} answers of the text prompt were read up to {replies['upto']}"
        ended = f"{replies['read'] - replies['cut']} had ended"
        yield (
            f"{read} tokens, {ended}; expected at most {replies['text']} tokens from the text "
            f"prompt and {replies['refined']} from the refined one"
        )
        yield f"at most {duration(seconds['at_most'])}, where answers go on to their limit"


def _memory(memory: Row) -> Iterator[str]:
    parts = (
        f"{size(memory['loaded'])} with the model loaded ({size(memory['loading'])} while loading)",
        f"prefixes {size(memory['prefixes'])}",
        f"a step {size(memory['step'])}",
        f"scoring {size(memory['scoring'])}",
    )
    yield f"about {size(memory['peak'])} at its peak: {', '.join(parts)}"


def _budget(found: Row) -> RenderableType:
    budget = found["budget"]
    if budget["memory_bytes"] is None and budget["seconds"] is None:
        return Text("")
    if budget["fits"]:
        return Text("fits the budget", style="bold")
    over = Text(f"over the budget in {' and '.join(budget['over'])}", style="bold")
    if budget["together"]:
        sets = " ".join(f"--set {k['setting']}={_toml(k['value'])}" for k in budget["together"])
        last = budget["together"][-1]
        words = f"no single setting brings it under; together these do: {sets} {_then(last)}"
        return Group(over, _line(words), _knobs(budget["knobs"]))
    table = [_knobs(budget["knobs"])] if budget["knobs"] else []
    if not any(knob["fits"] for knob in budget["knobs"]):
        return Group(over, _line("no setting brings it under"), *table)
    return Group(over, *table)


def _knobs(knobs: Sequence[Row]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("setting", "fits", "results", "memory", "time"):
        table.add_column(name, no_wrap=True)
    for knob in knobs:
        seconds = knob["seconds"]
        table.add_row(
            f"{knob['setting']} = {_toml(knob['value'])}",
            "yes" if knob["fits"] else "no",
            "the same" if knob["exact"] else "change",
            size(knob["memory_bytes"]),
            "not measured" if seconds is None else duration(seconds),
        )
    return table


def _then(knob: Row) -> str:
    return f"({size(knob['memory_bytes'])}, {duration(knob['seconds'])})"


def _toml(value: object) -> str:
    return f"'\"{value}\"'" if isinstance(value, str) else str(value)


def _line(text: str) -> Text:
    return Text(f"  {visible(text)}", no_wrap=True, overflow="ignore")
