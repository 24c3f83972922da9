"""Generate client code that runs without embedgrad.

A check runs an exported file only if it is, byte for byte, what this module generates, so that a
folder from elsewhere runs nothing.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import read_text
from embedgrad.data.markup import Piece, parse
from embedgrad.deploy.base_model import Base, model_at
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.formats.chat_template import uncut_rows
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.programs import fill, to_source
from embedgrad.errors import EngineError, ExportError
from embedgrad.model.loading.quiet import model_errors
from embedgrad.prompt.boundaries import CuttingTokenizer, alike
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import END_MARK, SPAN_MARK

TEMPLATE_FILE = "chat_template.jinja"
EXAMPLE_FILE = "example.py"
EXAMPLE_TEXT = "This is an example."  # for every column; the user's data stay private


def only_prompt(job: Job, destination: str) -> ExportedPrompt:
    """The job's one prompt. Raises `ExportError` for several."""
    if len(job.prompts) != 1:
        raise ExportError(
            f"--to {destination}: an export holds one prompt, and {len(job.prompts)} were given; "
            "export each run into its own folder, or to vocabulary or gguf"
        )
    return job.prompts[0]


def chat_template_file(sequencer: Sequencer) -> dict[str, bytes]:
    """The chat template as a file if training froze a date in it, else no file."""
    template = frozen_template(sequencer)
    return {} if template is None else {TEMPLATE_FILE: template.encode()}


def frozen_template(sequencer: Sequencer) -> str | None:
    """Training's chat template, or None if it is the tokenizer's own."""
    renderer = sequencer.renderer
    if renderer.template.text is not None:
        return None
    frozen, own = renderer.chat_template, sequencer.tokenizer.chat_template
    default = own.get("default") if isinstance(own, dict) else own
    return None if frozen == default else frozen


def _token_ids_values(exported: ExportedPrompt) -> dict[str, Any]:
    """What the program's function `token_ids` is made of."""
    sequencer, template = exported.sequencer, exported.prompt.template
    plain = template.text is not None
    bos = CuttingTokenizer(sequencer.tokenizer, adds_bos=plain).bos("")
    messages = [
        f'{{"role": "{m.role}", "content": {pieces_source(parse(m.content, m.role))}}}'
        for m in template.messages
    ]
    return {
        "text": pieces_source(parse(template.text or "", "template")),
        "messages": None if plain else messages,
        "opened": not plain and template.messages[-1].role == "assistant",
        "end_mark": END_MARK,
        "template_file": "" if frozen_template(sequencer) is None else TEMPLATE_FILE,
        "variables": dict(template.variables),
        "spans": exported.spans,
        "drawn": any(span.drawn_left or span.drawn_right for span in exported.spans),
        "bos": list(bos),
        "bos_token": sequencer.tokenizer.convert_ids_to_tokens(bos[0]) if bos else "",
    }


def pieces_source(pieces: Sequence[Piece]) -> str:
    """The pieces of a text as a Python expression of `columns` and MARK."""
    kinds = {"text": "{}", "span": "MARK", "column": "columns[{}]"}
    return " + ".join(kinds[p.kind].format(to_source(p.text)) for p in pieces) or '""'


def command_line(columns: Sequence[str]) -> str:
    """Python that reads the columns from the command line."""
    return f"dict(zip([{', '.join(map(to_source, columns))}], sys.argv[1:], strict=True))"


def usage(file: str, columns: Sequence[str]) -> str:
    """A command that runs an exported file, free of characters special to shells and Python."""
    return " ".join(["python", file, *(re.sub(r"\W+", "-", name).upper() for name in columns)])


def program_source(
    name: str, file: str, exported: ExportedPrompt, base: Base, *, dtype: str = "", **more: Any
) -> str:
    """The text of a generated program: the asset of that name, with the prompt's own parts.

    What may come from elsewhere becomes literals.
    """
    columns, choices = exported.prompt.template.columns, Choices.of(exported)
    pairs = zip(choices.names, map(list, choices.tokens), strict=True) if choices else ()
    values: dict[str, Any] = {
        "usage": usage(file, columns),
        "source": base.source,
        "base": base.arguments,
        "mark": SPAN_MARK,
        "dtype": dtype,
        "lengths": [len(span.ids) for span in exported.spans],
        "columns": command_line(columns),
        "choices": dict(pairs),
        "normalize": exported.prompt.target.normalize,
        "most": max_new_tokens(exported),
    }
    return fill(f"{name}.py", **{**_token_ids_values(exported), **values, **more})


def write_example(name: str, folder: Path, job: Job, exported: ExportedPrompt) -> dict[str, Any]:
    """Write a program as example.py, with its chat template; returns entries of `export.json`."""
    base, dtype = job.base, job.model.info.dtype
    source = program_source(name, EXAMPLE_FILE, exported, base, dtype=dtype)
    files = {EXAMPLE_FILE: source.encode(), **chat_template_file(exported.sequencer)}
    for file, content in files.items():
        write_file(folder / file, content)
    columns = list(exported.prompt.template.columns)
    return {
        **base._asdict(),
        "dtype": dtype,
        "columns": columns,
        "notes": base.notes(job.model.info),
    }


def open_example(
    name: str, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
) -> Any:
    """The module that `write_example` wrote. Raises `EngineError` for another one."""
    base = Base.read(written, job.model.info, job.settings)
    dtype = str(written["dtype"])
    source = program_source(name, EXAMPLE_FILE, exported, base, dtype=dtype)
    return run_generated(folder / EXAMPLE_FILE, source, job)


def max_new_tokens(exported: ExportedPrompt) -> int:
    """Longest answer that the prompt was scored with, in tokens."""
    decoding = exported.prompt.provenance.get("decoding")
    most = decoding.get("max_new_tokens") if isinstance(decoding, dict) else None
    return most if isinstance(most, int) else 256


def run_generated(path: Path, source: str, job: Job) -> Any:
    """Import a file that must hold exactly `source`, with the job's model. Raises `EngineError`."""
    try:
        content = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); export again") from error
    if content != source:
        raise EngineError(
            f"{path}: is not what embedgrad writes for this prompt, so it is not run; export again"
        )
    spec = importlib.util.spec_from_file_location(f"embedgrad_generated_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with model_errors(f"{path}: does not run", EngineError), model_at(job.model.info.path):
        spec.loader.exec_module(module)
    return module


def check_token_ids(path: Path, module: Any, exported: ExportedPrompt) -> None:
    """Raise `ExportError` if a generated program tokenizes an example unlike training."""
    for sequence in uncut_rows(exported):
        texts = module.token_ids(dict(sequence.example.columns))
        both = texts, exported.texts(sequence)
        one, other = (tuple(i for ids in parts for i in (*ids, -1)) for parts in both)
        if one != other:
            raise ExportError(
                f"{path.name}: makes other tokens of {sequence.example.source} than training, from "
                f"token {alike(one, other)} on; export to vocabulary or gguf instead"
            )
