"""Python that answers without embedgrad: the part of it that makes token ids of a query.

An exported file is this text with a prompt's own messages written into it. A check runs such a file
only where it is, byte for byte, what is made here, so that a folder from elsewhere runs nothing.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedgrad.data.markup import Piece, parse
from embedgrad.deploy.formats.chat_template import askable
from embedgrad.deploy.job import Exported, Job
from embedgrad.errors import EngineError, ExportError, ModelError
from embedgrad.model.loading.quiet import guarded
from embedgrad.prompt.boundaries import CuttingTokenizer, Ids
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import END_MARK, SPAN_MARK

TEMPLATE_FILE = "chat_template.jinja"
EXAMPLE_FILE = "example.py"
EXAMPLE_TEXT = "This is an example."  # of every column; rows of the data stay where they are


class Base(NamedTuple):
    """Where the frozen model is loaded from: a Hub id with its commit, or a folder."""

    model: str
    revision: str | None

    @property
    def arguments(self) -> str:
        """Of `from_pretrained`, as Python; the name MODEL stands for the model."""
        return "MODEL" + (f", revision={quoted(self.revision)}" if self.revision else "")

    @property
    def flags(self) -> str:
        """Of a command that serves it, after the model."""
        return f" --revision {shlex.quote(self.revision)}" if self.revision else ""


def base_of(job: Job) -> Base:
    """The job's model as other software finds it."""
    info = job.model.info
    return Base(info.name, info.revision) if info.kind == "hub" else Base(info.path, None)


def base_from(written: Mapping[str, Any], job: Job) -> Base:
    """The model that an export names. Raises `EngineError` where it is not the job's."""
    named, base = Base(str(written["model"]), written["revision"]), base_of(job)
    if named != base:
        raise EngineError(
            f"the export loads its model from {named.model} ({named.revision}), and here that is "
            f"{base.model} ({base.revision}); export again"
        )
    return base


def only_prompt(job: Job, destination: str) -> Exported:
    """The job's one prompt. Raises `ExportError` for several."""
    if len(job.prompts) != 1:
        raise ExportError(
            f"--to {destination}: an export holds one prompt, and {len(job.prompts)} were given; "
            "export each run into a folder of its own"
        )
    return job.prompts[0]


def chat_template_file(sequencer: Sequencer) -> dict[str, bytes]:
    """The chat template as a file, where training froze a date in it; else no file."""
    template = frozen_template(sequencer)
    if template is None:
        return {}
    return {TEMPLATE_FILE: template.encode()}


def frozen_template(sequencer: Sequencer) -> str | None:
    """The chat template of training where it is not the tokenizer's own."""
    renderer = sequencer.renderer
    if renderer.template.text is not None:
        return None
    frozen = renderer.chat_template
    return None if frozen == sequencer.tokenizer.get_chat_template() else frozen


def token_ids_source(sequencer: Sequencer) -> str:
    """The function `token_ids(columns)`: ids before and behind the refined rows.

    It uses the names MARK and tokenizer, and Path where there is a template file.
    """
    template = sequencer.renderer.template
    if template.text is not None:
        lines = [f"text = {text_source(template.text)}"]
    else:
        lines = [f"messages = {messages_source(sequencer)}", *_rendering(sequencer)]
    left, right = sequencer.span.drawn_left, sequencer.span.drawn_right
    if left or right:
        lines.append(f"text = text.replace({quoted(left)} + MARK + {quoted(right)}, MARK)")
    ids = 'tokenizer(text, add_special_tokens=False)["input_ids"]'
    bos = CuttingTokenizer(sequencer.tokenizer, adds_bos=template.text is not None).bos("")
    if bos:
        token = sequencer.tokenizer.convert_ids_to_tokens(bos[0])
        ids = f"([] if text.startswith({quoted(token)}) else {list(bos)}) + {ids}"
    lines += [
        f"ids = {ids}",
        "mark = tokenizer.convert_tokens_to_ids(MARK)",
        "(at,) = (i for i, token in enumerate(ids) if token == mark)  # a query must not hold it",
        "return ids[:at], ids[at + 1 :]",
    ]
    return "\n".join(["def token_ids(columns):", *(f"    {line}" for line in lines)])


def _rendering(sequencer: Sequencer) -> list[str]:
    """Lines that make `text` of `messages`, as `Renderer` does."""
    template = sequencer.renderer.template
    opened = template.messages[-1].role == "assistant"
    more = ""
    if frozen_template(sequencer) is not None:
        more += f', chat_template=Path(__file__).with_name("{TEMPLATE_FILE}").read_text("utf-8")'
    if template.options:
        more += f", **{dict(template.options)!r}"
    rendering = (
        f"text = tokenizer.apply_chat_template(messages, tokenize=False, "
        f"add_generation_prompt={not opened}{more})"
    )
    if not opened:
        return [rendering]
    # What the chat template puts behind the opening of the answer is left out.
    return [
        f'messages[-1]["content"] += "{END_MARK}"',
        f'{rendering}.partition("{END_MARK}")[0]',
    ]


def messages_source(sequencer: Sequencer) -> str:
    """The template's messages as a Python list; the name MARK stands for the span."""
    messages = [
        f'{{"role": "{m.role}", "content": {text_source(m.content)}}}'
        for m in sequencer.renderer.template.messages
    ]
    return f"[{', '.join(messages)}]"


def text_source(marked: str) -> str:
    """A text with marks as a Python expression of `columns` and MARK."""
    return pieces_source(parse(marked, "template"))


def pieces_source(pieces: Sequence[Piece]) -> str:
    """The same, of a text in pieces."""
    kinds = {"text": "{}", "span": "MARK", "column": "columns[{}]"}
    return " + ".join(kinds[p.kind].format(quoted(p.text)) for p in pieces) or '""'


def quoted(text: str) -> str:
    """A text as Python."""
    return json.dumps(text, ensure_ascii=False)


def command_line(columns: Sequence[str]) -> str:
    """The columns from a command line, as Python; without columns there is nothing to ask."""
    return f"dict(zip([{', '.join(map(quoted, columns))}], sys.argv[1:], strict=True))"


def usage(file: str, columns: Sequence[str]) -> str:
    """A command that runs an exported file, in letters that no shell and no Python reads."""
    return " ".join(["python", file, *(re.sub(r"\W+", "-", name).upper() for name in columns)])


def example_source(program: str, exported: Exported, base: Base, dtype: str) -> str:
    """The text of a destination's `program`, with a prompt's own parts written into it."""
    columns = exported.prompt.template.columns
    return program.format(
        usage=usage(EXAMPLE_FILE, columns),
        model=quoted(base.model),
        mark=SPAN_MARK,
        base=base.arguments,
        dtype=quoted(dtype),
        token_ids=token_ids_source(exported.sequencer),
        max_new_tokens=max_new_tokens(exported),
        columns=command_line(columns),
    )


def example_source_of(
    program: str, exported: Exported, job: Job, written: Mapping[str, Any]
) -> str:
    """The same, for an export that was written before."""
    return example_source(program, exported, base_from(written, job), str(written["dtype"]))


def max_new_tokens(exported: Exported) -> int:
    """The longest answer that the prompt was scored with."""
    decoding = exported.prompt.provenance.get("decoding")
    most = decoding.get("max_new_tokens") if isinstance(decoding, dict) else None
    return most if isinstance(most, int) else 256


def run_written(path: Path, source: str) -> Any:
    """The module in a file that holds exactly `source`. Raises `EngineError` for another one."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); export again") from error
    if content != source:
        raise EngineError(
            f"{path}: is not what embedgrad writes for this prompt, so it is not run; export again"
        )
    spec = importlib.util.spec_from_file_location(f"embedgrad_written_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with guarded(f"{path}: does not run"):
            spec.loader.exec_module(module)
    except ModelError as error:
        raise EngineError(str(error)) from error
    return module


def check_token_ids(path: Path, module: Any, exported: Exported) -> None:
    """Refuse a file that makes other tokens of a row than training. Raises `ExportError`."""
    for sequence in askable(exported):
        made = tuple(tuple(ids) for ids in module.token_ids(dict(sequence.example.columns)))
        if made != (sequence.prefix, sequence.suffix):
            where = _first_difference(
                (*made[0], -1, *made[1]), (*sequence.prefix, -1, *sequence.suffix)
            )
            raise ExportError(
                f"{path.name}: makes other tokens of {sequence.example.source} than training, from "
                f"token {where} on; export to vocabulary or gguf instead"
            )


def _first_difference(one: Ids, other: Ids) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
