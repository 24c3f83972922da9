"""Columns of chat messages (OpenAI's fine-tuning format)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from embedgrad.data.table import Row, Table, data_error

COLUMNS = ("text", "answer", "system", "history")


def add_chat_columns(table: Table, used: Collection[str] | None) -> Table:
    """A table with a column `messages` gets the columns that it has not yet of `COLUMNS`.

    `text` is the last user message, `answer` the assistant's after it, `system` the system message,
    `history` the turns in between, "user: ...". A table whose `messages` are something else, or of
    whose new columns none is `used` (None: perhaps all), is left as it is. Raises DataError.
    """
    new = [name for name in COLUMNS if name not in table.columns]
    if used is not None and not set(new) & set(used):
        return table
    if not any(_is_chat(row.get("messages")) for row in table.rows):
        return table
    rows, longer = [], 0
    for row, source in zip(table.rows, table.sources, strict=True):
        parts = _parts(row.get("messages"), source)
        longer += "history" in parts
        rows.append({**{name: parts[name] for name in new if name in parts}, **row})
    present = [name for name in new if any(name in row for row in rows)]
    notes = list(table.notes)
    if longer:
        notes.append(
            f"{table.name}: {longer} of {len(rows)} chats have earlier turns, which are in the "
            "column 'history'."
        )
    return replace(table, columns=(*present, *table.columns), rows=rows, notes=tuple(notes))


def _is_chat(messages: object) -> bool:
    return isinstance(messages, Sequence) and any(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
    )


def _parts(messages: object, source: str) -> Row:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise data_error(source, "messages: expected a list of messages with role and content")
    roles = [message.get("role") for message in messages]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    if last < 0 or roles[-1] != "assistant":
        raise data_error(
            source, "messages: expected one of the user and, at the end, the assistant's answer"
        )
    parts: Row = {"answer": _text(messages[-1], source), "text": _text(messages[last], source)}
    system = [i for i, role in enumerate(roles) if role in ("system", "developer")]
    if system:
        parts["system"] = "\n\n".join(_text(messages[i], source) for i in system)
    between = [i for i in range(len(roles) - 1) if i != last and i not in system]
    if between:
        turns = (f"{roles[i]}: {_text(messages[i], source)}" for i in between)
        parts["history"] = "\n\n".join(turns)
    return parts


def _text(message: Mapping[str, object], source: str) -> str:
    """A message's content, a text or a list of parts that are all text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    calls = [message.get(name) for name in ("tool_calls", "function_call")]
    if any(calls) or not all(isinstance(text, str) for text in texts):
        raise data_error(
            source,
            f"messages: one of role {message.get('role')!r} holds other than text (a call of a "
            "tool, an image); expected texts alone",
        )
    return "".join(map(str, texts))
