"""Where a refined prompt could go, and what is in its way.

The rules are data: each names the destinations it is about, when it applies, and what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.data.examples import Example
from embedgrad.data.markup import parse
from embedgrad.deploy.job import Exported
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.template import Template

DESTINATIONS = ("safetensors", "vocabulary", "gguf", "peft", "vllm", "sglang")
MADE_UP = ("a.", "(b) c")  # quite other texts, of every column
TOKENS_OF_A_CHAT = ("vocabulary", "gguf")  # a plain query finds the span by the chat template


@dataclass(frozen=True)
class Facts:
    """What decides: the prefixes of all rows, the template, the model."""

    prefixes: frozenset[Ids]
    template: Template
    model_type: str
    embedding_scale: float
    from_gguf: bool = False
    """The model is loaded from a GGUF file, whose other tensors an export takes over."""

    @property
    def span_message(self) -> tuple[str, str]:
        """Role and content of the message that holds the span; both empty for plain text."""
        for message in self.template.messages:
            if any(p.kind == "span" for p in parse(message.content, message.role)):
                return message.role, message.content
        return "", ""

    @property
    def columns_on_both_sides(self) -> bool:
        """Whether a query would stand before and after the span at once."""
        role, content = self.span_message
        kinds = [p.kind for p in parse(content, role)] if role else []
        at = kinds.index("span") if role else 0
        return "column" in kinds[:at] and "column" in kinds[at:]

    @property
    def messages_with_columns(self) -> list[str]:
        """Roles of the messages that columns stand in."""
        return [
            m.role
            for m in self.template.messages
            if any(p.kind == "column" for p in parse(m.content, m.role))
        ]

    @property
    def folded(self) -> int:
        """Tokens before the span, where they are the same in all rows."""
        return len(next(iter(self.prefixes))) if len(self.prefixes) == 1 else 0


def facts_of(exported: Exported, model: LanguageModel, rows: Sequence[TokenSequence]) -> Facts:
    """What decides about a refined prompt: few rows may begin alike by chance, made-up ones not."""
    template, choices = exported.prompt.template, exported.prompt.target.choices
    answer = choices[0] if choices else "a"
    made_up = [Example(dict.fromkeys(template.columns, t), answer, "made up") for t in MADE_UP]
    return Facts(
        prefixes=frozenset(row.prefix for row in (*rows, *map(exported.sequencer, made_up))),
        template=template,
        model_type=model.model.config.model_type,
        embedding_scale=model.info.embedding_scale,
        from_gguf=model.info.kind in GGUF_KINDS,
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """For these destinations, where `applies`: no export if `refuses`, else a remark."""

    destinations: tuple[str, ...]
    refuses: bool
    applies: Callable[[Facts], bool]
    says: Callable[[Facts], str]


def _known_to_gguf(facts: Facts) -> bool:
    from gguf.constants import MODEL_ARCH_NAMES

    plain = facts.model_type.removesuffix("_text").replace("_", "").replace("-", "")
    names = {name.replace("_", "").replace("-", "") for name in MODEL_ARCH_NAMES.values()}
    return GGUF_NAMES.get(plain, plain) in names


def _written_by_us(facts: Facts) -> bool:
    from embedgrad.deploy.formats.gguf_from_checkpoint import FAMILIES

    return facts.model_type in FAMILIES


GGUF_KINDS = ("gguf", "package")  # of a model's source; see `ModelInfo.kind`
# Model types of transformers that llama.cpp runs by another's name.
GGUF_NAMES = {"mistral": "llama", "mixtral": "llama", "cohere": "commandr", "phi": "phi2"}

RULES = (
    Rule(
        ("peft",),
        True,
        lambda f: len(f.prefixes) > 1,
        lambda f: (
            f"PEFT puts a prompt before everything else, and here {len(f.prefixes)} different "
            "texts stand before it; put the span before the columns, or use another destination"
        ),
    ),
    Rule(
        ("peft",),
        False,
        lambda f: f.folded > 0,
        lambda f: f"the {f.folded} tokens before the span are folded in; queries leave them out",
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.template.text is not None,
        lambda f: (
            "plain text has no chat template that could hold the span; give chat messages "
            "(template.user), or send prompt embeddings"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.template.text is None and not f.template.columns,
        lambda f: (
            "it has no column, so a plain query has no place in it; put one into template.user"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.columns_on_both_sides,
        lambda f: (
            "columns stand on both sides of the span, so a plain query cannot be one message; "
            "put the span at an end of its message"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: len(f.messages_with_columns) > 1,
        lambda f: (
            f"columns stand in {len(f.messages_with_columns)} messages "
            f"({', '.join(f.messages_with_columns)}), and a plain query is one; put them into one"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: len(f.messages_with_columns) == 1 and f.messages_with_columns != ["user"],
        lambda f: (
            f"the columns stand in the {f.messages_with_columns[0]} message, and a plain query is "
            "a user message; put them into template.user"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        False,
        lambda f: f.embedding_scale != 1,
        lambda f: (
            f"the model scales its embeddings by {f.embedding_scale:g}: rows are divided by it and "
            "rounded, and scored after that"
        ),
    ),
    Rule(
        ("vocabulary",),
        False,
        lambda f: f.model_type.startswith("gemma"),
        lambda f: "vLLM insists on tied embeddings for Gemma; there use prompt embeddings",
    ),
    Rule(
        ("gguf",),
        True,
        lambda f: not _known_to_gguf(f),
        lambda f: f"llama.cpp's format knows no architecture {f.model_type}",
    ),
    Rule(
        ("gguf",),
        True,
        lambda f: _known_to_gguf(f) and not f.from_gguf and not _written_by_us(f),
        lambda f: (
            f"a checkpoint of {f.model_type} is not converted here; name its GGUF file as the "
            "model, or convert the vocabulary export with llama.cpp's own converter"
        ),
    ),
    Rule(
        ("vllm",),
        False,
        lambda f: True,
        lambda f: "the server must run with --enable-prompt-embeds, for trusted users only",
    ),
    Rule(
        ("sglang",),
        False,
        lambda f: True,
        lambda f: "the server must run with --disable-radix-cache",
    ),
)


def exportability(facts: Facts, rules: Sequence[Rule] = RULES) -> list[dict[str, Any]]:
    """Every destination: whether an export is possible, and what there is to say."""
    found = []
    for name in DESTINATIONS:
        applying = [r for r in rules if name in r.destinations and r.applies(facts)]
        refused = [r.says(facts) for r in applying if r.refuses]
        remarks = refused or [r.says(facts) for r in applying]
        found.append({"destination": name, "possible": not refused, "remarks": remarks})
    return found
