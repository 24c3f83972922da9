"""Which destinations suit a prompt, and why others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from embedgrad.data.examples import Example
from embedgrad.data.markup import parse
from embedgrad.deploy.job import DESTINATIONS, ExportedPrompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.template import Template

GGUF_KINDS = ("gguf", "package")  # kinds of a model's source; see `ModelInfo.kind`
# Model types whose checkpoints `formats/gguf_from_checkpoint` converts.
CONVERTED_TO_GGUF = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# Model types of transformers that llama.cpp knows by another name.
GGUF_NAMES = {"mistral": "llama", "mixtral": "llama", "cohere": "commandr", "phi": "phi2"}
MADE_UP = ("a.", "(b) c")  # values of every column that differ as much as users' may
TOKENS_OF_A_CHAT = ("vocabulary", "gguf")  # the chat template puts the span into a plain query


@final
@dataclass(frozen=True)
class Facts:
    """What decides: the prefixes of all rows, the template, the model."""

    prefixes: frozenset[Ids]
    template: Template
    model_type: str
    embedding_scale: float
    from_gguf: bool = False
    """The model is loaded from a GGUF file, whose other tensors an export copies."""


def gather_facts(exported: ExportedPrompt, model: LanguageModel) -> Facts:
    """Facts about a refined prompt. Few rows may begin alike by chance, so made-up ones count."""
    more = map(exported.sequencer, made_up(exported.prompt))
    sequences = (*exported.sequences, *exported.checks, *more)
    return Facts(
        prefixes=frozenset(row.prefix for row in sequences),
        template=exported.prompt.template,
        model_type=model.model.config.model_type,
        embedding_scale=model.info.embedding_scale,
        from_gguf=model.info.kind in GGUF_KINDS,
    )


def made_up(prompt: PromptEmbedding) -> list[Example]:
    """Rows that nobody wrote, with `MADE_UP` in every column."""
    columns, choices = prompt.template.columns, prompt.target.choices
    answer = choices[0] if choices else "a"
    return [Example(dict.fromkeys(columns, text), answer, "made up") for text in MADE_UP]


def exportability(facts: Facts) -> list[dict[str, Any]]:
    """Every destination: whether an export is possible, and remarks."""
    entries = []
    for name in DESTINATIONS:
        problems = list(_PROBLEMS[name](facts)) if name in _PROBLEMS else []
        remarks = problems or list(_remarks(name, facts))
        entries.append({"destination": name, "possible": not problems, "remarks": remarks})
    return entries


def plain_query_problem(template: Template) -> str | None:
    """Why a plain user message cannot be this template's query; None if it can."""
    if template.text is not None:
        return (
            "plain text has no chat template that could hold the span; write chat messages "
            "(template.user), or send prompt embeddings"
        )
    kinds = [(m.role, [p.kind for p in parse(m.content, m.role)]) for m in template.messages]
    roles = [role for role, message in kinds if "column" in message]
    if not roles:
        return "it has no column, so there is no place for a plain query; put one in template.user"
    if len(roles) > 1:
        return (
            f"columns are in {len(roles)} messages ({', '.join(roles)}), but a plain query is one; "
            "put them into one"
        )
    if roles != ["user"]:
        return (
            f"the columns are in the {roles[0]} message, but a plain query is a user message; put "
            "them into template.user"
        )
    for _, message in kinds:
        spans = [i for i, kind in enumerate(message) if kind == "span"]
        if any("column" in message[:i] and "column" in message[i:] for i in spans):
            return (
                "columns are on both sides of a span, so a plain query cannot be one message; put "
                "the span at an end of its message"
            )
    return None


def _chat_problems(facts: Facts) -> Iterator[str]:
    problem = plain_query_problem(facts.template)
    if problem:
        yield problem


def _peft_problems(facts: Facts) -> Iterator[str]:
    texts = [m.content for m in facts.template.messages] or [facts.template.text or ""]
    spans = sum(p.kind == "span" for text in texts for p in parse(text, "template"))
    if spans > 1:
        yield (
            f"PEFT puts all rows before the text, and this prompt has {spans} spans; use another "
            "destination, or train one span"
        )
    elif len(facts.prefixes) > 1:
        yield (
            f"PEFT puts a prompt before everything else, and here {len(facts.prefixes)} different "
            "texts come before it; put the span before the columns, or use another destination"
        )


def _gguf_problems(facts: Facts) -> Iterator[str]:
    from gguf.constants import MODEL_ARCH_NAMES

    yield from _chat_problems(facts)
    plain = facts.model_type.removesuffix("_text").replace("_", "").replace("-", "")
    names = {name.replace("_", "").replace("-", "") for name in MODEL_ARCH_NAMES.values()}
    if GGUF_NAMES.get(plain, plain) not in names:
        yield f"llama.cpp's format has no architecture for {facts.model_type}"
    elif not facts.from_gguf and facts.model_type not in CONVERTED_TO_GGUF:
        yield (
            f"checkpoints of {facts.model_type} are not converted here; use its GGUF file as the "
            "model, or convert the vocabulary export with llama.cpp's own converter"
        )


_PROBLEMS: dict[str, Callable[[Facts], Iterator[str]]] = {
    "vocabulary": _chat_problems,
    "gguf": _gguf_problems,
    "peft": _peft_problems,
}


def _remarks(name: str, facts: Facts) -> Iterator[str]:
    """What to know about a possible export."""
    folded = max(map(len, facts.prefixes), default=0)  # for PEFT, there is one prefix
    if name == "peft" and folded:
        yield f"the {folded} tokens before the span become rows too; queries leave them out"
    if name in TOKENS_OF_A_CHAT and facts.embedding_scale != 1:
        yield (
            f"the model scales its embeddings by {facts.embedding_scale:g}: rows are divided by "
            "that and rounded before the check"
        )
    if name == "vocabulary" and facts.model_type.startswith("gemma"):
        yield "vLLM ties Gemma's embeddings; use prompt embeddings there (--to vllm)"
    if name == "vllm":
        yield "the server must run with --enable-prompt-embeds, for trusted users only"
    if name == "sglang":
        yield "the server must run with --disable-radix-cache"
