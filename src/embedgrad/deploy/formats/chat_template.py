"""The chat template of an export: plain messages in.

The model's template stays as it is. What stands around it (`chat_jinja`) builds the messages of
training and puts the new tokens where the span stood.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.deploy.formats.chat_jinja import AFTER, BEFORE
from embedgrad.deploy.formats.token_names import token_names
from embedgrad.deploy.job import Exported
from embedgrad.deploy.query import plain_messages, surroundings
from embedgrad.errors import DataError, ExportError
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Message

_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def exported_template(prompts: Sequence[Exported], tag: str, system: str) -> str:
    """A chat template that puts refined prompts where they were trained; the first by default.

    A request names another by the variable `prompt`, or by `<<prompt:NAME>>` at its beginning, in a
    system message. `system` says what becomes of a client's own system message: "append" it to the
    prompt's, or "refuse" it. The tag is replaced by a space in every content, and a text that holds
    it elsewhere is refused. Raises `ExportError` and `TemplateError`.
    """
    names = [exported.name for exported in prompts]
    if len(set(names)) < len(names):
        raise ExportError(f"two prompts have one name ({', '.join(names)}); name them apart")
    # Both begin with a letter that is nowhere else in them, so that no text before them can make
    # them be found a little too early.
    mark, end = f"X{tag}Z", f"Z{tag}X"
    constants = {
        "embedgrad_tag": tag,
        "embedgrad_mark": mark,
        "embedgrad_end": end,
        "embedgrad_default": names[0],
        "embedgrad_names": ", ".join(names),
        "embedgrad_system": system,
        "embedgrad_prompts": {e.name: _described(e, tag, mark) for e in prompts},
    }
    written = [f"{{%- set {name} = {jinja(value)} -%}}\n" for name, value in constants.items()]
    for option in dict.fromkeys(n for e in prompts for n in e.prompt.template.options):
        # Set, and not only where it is unset: llama.cpp sets enable_thinking in every request.
        key = jinja(option)
        written.append(
            f"{{%- if {key} in embedgrad_prompt.options -%}}"
            f"{{%- set {option} = embedgrad_prompt.options[{key}] -%}}{{%- endif -%}}\n"
        )
    for token in ("bos_token", "eos_token"):
        if getattr(prompts[0].sequencer.tokenizer, token) is None:
            # Where a file names none, llama.cpp makes one up.
            written.append(f'{{%- set {token} = "" -%}}\n')
    first = len(constants)
    return "".join((*written[:first], BEFORE, *written[first:], _captured(prompts), AFTER))


def exported_tokenizer(prompts: Sequence[Exported], tokenizer: Any, tag: str, system: str) -> Any:
    """A copy of the tokenizer with a token per refined row, and the exported chat template.

    The new ids go on from its length, prompt by prompt. Raises `ExportError` where it refuses them.
    """
    from tokenizers import AddedToken

    made = copy.deepcopy(tokenizer)
    names = [name for e in prompts for name in token_names(tag, e.name, len(e.prompt.span.ids))]
    length = len(tokenizer)
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    added = made.add_tokens(tokens, special_tokens=True)
    if added != len(names) or made.convert_tokens_to_ids(names) != list(range(length, len(made))):
        raise ExportError(
            f"the model's tokenizer refuses new tokens ({added} of {len(names)} were added behind "
            f"its {length}); export prompt embeddings (--to vllm) instead"
        )
    made.chat_template = exported_template(prompts, tag, system)
    return made


def check_rendering(prompts: Sequence[Exported], tokenizer: Any, tag: str) -> None:
    """See that an exported tokenizer gives training's tokens for the plain query of every row.

    Raises `ExportError` that names the first row and the place where they differ.
    """
    for number, exported in enumerate(prompts):
        names = token_names(tag, exported.name, len(exported.prompt.span.ids))
        new = tuple(tokenizer.convert_tokens_to_ids(list(names)))
        # The first prompt is what a request without a name gets.
        asked = {} if number == 0 else {"prompt": exported.name}
        for row in askable(exported):
            messages = plain_messages(exported.prompt.template, row.example.columns)
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **asked
                )
            except Exception as error:  # a program from elsewhere: it may fail in any way
                raise ExportError(
                    f"{row.example.source}: the exported chat template refuses a plain user "
                    f"message: {error}"
                ) from error
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            expected = row.prefix + new + row.suffix
            if ids != expected:
                raise ExportError(_difference(row, ids, expected, len(row.prefix), len(new)))


def askable(exported: Exported) -> list[TokenSequence]:
    """The prompt's rows that a plain query can stand for: those that training did not cut."""
    made = exported.sequencer
    if made.truncate is None:
        return list(exported.sequences)
    whole = Sequencer(made.renderer, made.tokenizer, made.target, spans=made.spans)
    return [row for row in exported.sequences if _same(whole, row)]


def jinja(value: Any) -> str:
    """A plain JSON value as a Jinja expression."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        for character, escaped in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r")):
            value = value.replace(character, escaped)
        return f'"{value}"'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{jinja(str(k))}: {jinja(v)}' for k, v in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(jinja, value))}]"
    return repr(value)


def _described(exported: Exported, tag: str, mark: str) -> dict[str, Any]:
    """What the exported template knows of a prompt."""
    template, span = exported.prompt.template, exported.prompt.span
    around = surroundings(template, mark)
    turn = around.before + around.after + "".join(m.content for m in around.following)
    return {
        "system": around.system,
        "leading": _as_dicts(around.leading),
        "before": around.before,
        "after": around.after,
        "following": _as_dicts(around.following),
        "opening": around.opening,
        "in_turn": mark in turn,
        "in_opening": mark in (around.opening or ""),
        "left": span.drawn_left,
        "right": span.drawn_right,
        "tokens": "".join(token_names(tag, exported.name, len(span.ids))),
        "options": dict(template.options),
    }


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _captured(prompts: Sequence[Exported]) -> str:
    """The model's own template, whose text goes into a variable.

    Prompts that were trained on different days have different templates where they show the day.
    """
    own: dict[str, list[str]] = {}
    for exported in prompts:
        # Jinja reads any line break as a line feed, and so do files that are opened as text.
        body = "\n".join(_LINE_BREAK.split(exported.sequencer.renderer.chat_template))
        own.setdefault(body, []).append(exported.name)
    bodies: list[str] = []
    for body, names in own.items():
        which = f"{{% {'elif' if bodies else 'if'} embedgrad.name in {jinja(names)} %}}\n"
        # Jinja drops one line feed at the end of a template, and none at the end of a block; what
        # is put behind it keeps spaces there from being taken for those of a block's own line.
        bodies.append(f'{which}{body.removesuffix(chr(10))}{{{{ "" }}}}')
    return "{%- set embedgrad_text %}" + "".join(bodies) + "{%- endif %}{%- endset -%}"


def _same(whole: Sequencer, row: TokenSequence) -> bool:
    try:
        again = whole(row.example)
    except DataError:
        return False
    return (again.prefix, again.suffix) == (row.prefix, row.suffix)


def _difference(
    row: TokenSequence, ids: Sequence[int], expected: Sequence[int], prefix: int, span: int
) -> str:
    """Where the tokens of an exported template part from training's."""
    pairs = enumerate(zip(ids, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(expected)))
    place = (
        "before the span" if at < prefix else "in the span" if at < prefix + span else "behind it"
    )
    return (
        f"{row.example.source}: the exported chat template gives other tokens than training, from "
        f"token {at} of {len(expected)} ({place}); the model's chat template cannot hold this "
        "prompt, put the span into another message"
    )
