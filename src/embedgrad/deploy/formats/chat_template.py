"""Make an export's chat template, with its new tokens.

The model's own template is kept, and asset `chat.jinja` is around it: that builds the messages of
training, and puts the new tokens where the spans were.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

from embedgrad.deploy.formats.token_names import token_names
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.programs import fill_chat
from embedgrad.deploy.query import plain_messages, surroundings
from embedgrad.errors import ExportError
from embedgrad.prompt.boundaries import alike
from embedgrad.prompt.sequence import Sequencer, TokenSequence


def exported_template(prompts: Sequence[ExportedPrompt], tag: str, system: str) -> str:
    """A chat template that puts refined prompts where they were trained; the first by default.

    A request selects another prompt by the variable `prompt`, or by `<<prompt:NAME>>` in a system
    message. A client's own system message is appended to the prompt's or refused, as `system` says
    ("append" or "refuse"). The tag is replaced by a space in every message, and refused elsewhere.
    Raises `ExportError` and `TemplateError`.
    """
    names = [exported.name for exported in prompts]
    if len(set(names)) < len(names):
        raise ExportError(f"two prompts have the same name ({', '.join(names)}); rename one")
    constants = {
        "embedgrad_tag": tag,
        "embedgrad_end": f"Z{tag}X",
        "embedgrad_default": names[0],
        "embedgrad_names": ", ".join(names),
        "embedgrad_system": system,
        "embedgrad_prompts": {e.name: _prompt_constants(e, tag) for e in prompts},
    }
    tokenizer = prompts[0].sequencer.tokenizer
    # Prompts of different days have different templates if those show the day.
    templates: dict[str, list[str]] = {}
    for exported in prompts:
        # Jinja reads any line break as a line feed, and so do files that are opened as text.
        template = re.sub(r"\r\n?", "\n", exported.sequencer.renderer.chat_template)
        templates.setdefault(template.removesuffix("\n"), []).append(exported.name)
    return fill_chat(
        constants=constants,
        options=dict.fromkeys(n for e in prompts for n in e.prompt.template.variables),
        no_tokens=[t for t in ("bos_token", "eos_token") if getattr(tokenizer, t) is None],
        templates=templates,
    )


def exported_tokenizer(
    prompts: Sequence[ExportedPrompt], tokenizer: Any, tag: str, system: str
) -> Any:
    """A copy of the tokenizer with a token per refined row, and the exported chat template.

    New ids start at its length, prompt by prompt. Raises `ExportError` if it refuses them.
    """
    from tokenizers import AddedToken

    extended = copy.deepcopy(tokenizer)
    names = [name for e in prompts for name in token_names(tag, e.name, len(e.prompt.prompt_ids))]
    first = len(tokenizer)
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    added = extended.add_tokens(tokens, special_tokens=True)
    ids = list(range(first, len(extended)))
    if added != len(names) or extended.convert_tokens_to_ids(names) != ids:
        raise ExportError(
            f"the model's tokenizer refuses new tokens ({added} of {len(names)} were added after "
            f"its {first}); export prompt embeddings (--to vllm) instead"
        )
    extended.chat_template = exported_template(prompts, tag, system)
    return extended


def check_rendering(prompts: Sequence[ExportedPrompt], tokenizer: Any, tag: str) -> None:
    """Raise `ExportError` if a plain query does not get training's tokens.

    The message names the first example and token that differ.
    """
    for number, exported in enumerate(prompts):
        names = token_names(tag, exported.name, len(exported.prompt.prompt_ids))
        new = tokenizer.convert_tokens_to_ids(list(names))
        # A request without a name gets the first prompt.
        asked = {} if number == 0 else {"prompt": exported.name}
        for row in uncut_rows(exported):
            messages = plain_messages(exported.prompt.template, row.example.columns)
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **asked
                )
            except Exception as error:  # the model's template may fail in any way
                raise ExportError(
                    f"{row.example.source}: the exported chat template refuses a plain user "
                    f"message: {error}"
                ) from error
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            expected = row.context(new)
            if ids != expected:
                at = alike(ids, expected)
                end = len(row.prefix) + len(exported.spans[0].ids)
                where = "before" if at < len(row.prefix) else "in" if at < end else "after"
                raise ExportError(
                    f"{row.example.source}: the exported chat template gives other tokens than "
                    f"training, from token {at} of {len(expected)} ({where} the span); the model's "
                    "chat template cannot hold this prompt, put the span into another message"
                )


def uncut_rows(exported: ExportedPrompt) -> list[TokenSequence]:
    """The examples that training did not truncate, so that a plain query gives the same tokens."""
    trained = exported.sequencer
    if trained.truncate is None:
        return list(exported.sequences)
    whole = Sequencer(trained.renderer, trained.tokenizer, trained.target, spans=trained.spans)
    pairs = ((row, whole(row.example)) for row in exported.sequences)
    return [row for row, again in pairs if (again.prefix, again.suffix) == (row.prefix, row.suffix)]


def _prompt_constants(exported: ExportedPrompt, tag: str) -> dict[str, Any]:
    """A prompt's entry of embedgrad_prompts."""
    # A mark begins with a letter that is nowhere else in it, so that no text before it can make it
    # be found too early.
    marks = [f"X{tag}{number}Z" for number in range(len(exported.spans))]
    around = surroundings(exported.prompt.template, marks)
    following = [message["content"] for message in around["following"]]
    turn = "".join([around["before"], around["after"], *following])
    names = iter(token_names(tag, exported.name, len(exported.prompt.prompt_ids)))
    return {
        **around,
        "in_turn": any(mark in turn for mark in marks),
        "spans": [
            {
                "mark": mark,
                "in_opening": mark in (around["opening"] or ""),
                "left": span.drawn_left,
                "right": span.drawn_right,
                "tokens": "".join(itertools.islice(names, len(span.ids))),
            }
            for mark, span in zip(marks, exported.spans, strict=True)
        ],
        "options": dict(exported.prompt.template.variables),
    }
