"""Where a refined prompt can be exported, and why not.

The rules are data: each has its destinations, a condition, and a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.data.examples import Example
from embedgrad.data.markup import parse
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.template import Message, Template

# Names of all destinations, and of their classes in `destinations`.
DESTINATIONS = {
    "safetensors": "FilesOnly",
    "vocabulary": "Vocabulary",
    "gguf": "Gguf",
    "peft": "PeftAdapter",
    "vllm": "VllmBodies",
    "sglang": "SglangBodies",
}
MADE_UP = ("a.", "(b) c")  # values of every column that differ as much as users' may
TOKENS_OF_A_CHAT = ("vocabulary", "gguf")  # the chat template puts the span into a plain query


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the prefixes of all rows, the template, the model."""

    prefixes: frozenset[Ids]
    template: Template
    model_type: str
    embedding_scale: float
    from_gguf: bool = False
    """The model is loaded from a GGUF file, whose other tensors an export copies."""

    @property
    def _kinds(self) -> list[tuple[str, list[str]]]:
        """Every message: its role, and the kinds of its pieces."""
        messages = [Message("", self.template.text or ""), *self.template.messages]
        return [(m.role, [p.kind for p in parse(m.content, m.role)]) for m in messages]

    @property
    def spans(self) -> int:
        return sum(kinds.count("span") for _, kinds in self._kinds)

    @property
    def columns_on_both_sides(self) -> bool:
        """Whether a span is between two columns of one message."""
        return any(
            "column" in kinds[:i] and "column" in kinds[i:]
            for _, kinds in self._kinds
            for i, kind in enumerate(kinds)
            if kind == "span"
        )

    @property
    def messages_with_columns(self) -> list[str]:
        """Roles of the messages that have columns."""
        return [role for role, kinds in self._kinds if "column" in kinds]

    @property
    def folded(self) -> int:
        """Tokens before the span, if they are the same in all rows."""
        return len(next(iter(self.prefixes))) if len(self.prefixes) == 1 else 0


def gather_facts(
    exported: ExportedPrompt, model: LanguageModel, rows: Sequence[TokenSequence]
) -> Facts:
    """Facts about a refined prompt. Few rows may begin alike by chance, so made-up ones count."""
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
    """If it `applies`, these destinations are impossible (`refuses`) or get a remark."""

    destinations: tuple[str, ...]
    refuses: bool
    applies: Callable[[Facts], bool]
    says: Callable[[Facts], str]


def _known_to_gguf(facts: Facts) -> bool:
    from gguf.constants import MODEL_ARCH_NAMES

    plain = facts.model_type.removesuffix("_text").replace("_", "").replace("-", "")
    names = {name.replace("_", "").replace("-", "") for name in MODEL_ARCH_NAMES.values()}
    return GGUF_NAMES.get(plain, plain) in names


GGUF_KINDS = ("gguf", "package")  # kinds of a model's source; see `ModelInfo.kind`
# Model types whose checkpoints `formats/gguf_from_checkpoint` converts.
CONVERTED_TO_GGUF = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# Model types of transformers that llama.cpp knows by another name.
GGUF_NAMES = {"mistral": "llama", "mixtral": "llama", "cohere": "commandr", "phi": "phi2"}

RULES = (
    Rule(
        ("peft",),
        True,
        lambda f: f.spans > 1,
        lambda f: (
            f"PEFT puts all rows before the text, and this prompt has {f.spans} spans; use another "
            "destination, or train one span"
        ),
    ),
    Rule(
        ("peft",),
        True,
        lambda f: len(f.prefixes) > 1,
        lambda f: (
            f"PEFT puts a prompt before everything else, and here {len(f.prefixes)} different "
            "texts come before it; put the span before the columns, or use another destination"
        ),
    ),
    Rule(
        ("peft",),
        False,
        lambda f: f.folded > 0,
        lambda f: f"the {f.folded} tokens before the span become rows too; queries leave them out",
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.template.text is not None,
        lambda f: (
            "plain text has no chat template that could hold the span; write chat messages "
            "(template.user), or send prompt embeddings"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.template.text is None and not f.template.columns,
        lambda f: (
            "it has no column, so there is no place for a plain query; put one into template.user"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: f.columns_on_both_sides,
        lambda f: (
            "columns are on both sides of the span, so a plain query cannot be one message; "
            "put the span at an end of its message"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: len(f.messages_with_columns) > 1,
        lambda f: (
            f"columns are in {len(f.messages_with_columns)} messages "
            f"({', '.join(f.messages_with_columns)}), but a plain query is one; put them into one"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        True,
        lambda f: len(f.messages_with_columns) == 1 and f.messages_with_columns != ["user"],
        lambda f: (
            f"the columns are in the {f.messages_with_columns[0]} message, but a plain query is a "
            "user message; put them into template.user"
        ),
    ),
    Rule(
        TOKENS_OF_A_CHAT,
        False,
        lambda f: f.embedding_scale != 1,
        lambda f: (
            f"the model scales its embeddings by {f.embedding_scale:g}: rows are divided by that "
            "and rounded before the check"
        ),
    ),
    Rule(
        ("vocabulary",),
        False,
        lambda f: f.model_type.startswith("gemma"),
        lambda f: "vLLM ties Gemma's embeddings; use prompt embeddings there (--to vllm)",
    ),
    Rule(
        ("gguf",),
        True,
        lambda f: not _known_to_gguf(f),
        lambda f: f"llama.cpp's format has no architecture for {f.model_type}",
    ),
    Rule(
        ("gguf",),
        True,
        lambda f: _known_to_gguf(f) and not f.from_gguf and f.model_type not in CONVERTED_TO_GGUF,
        lambda f: (
            f"checkpoints of {f.model_type} are not converted here; use its GGUF file as the "
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
    """Every destination: whether an export is possible, and remarks."""
    entries = []
    for name in DESTINATIONS:
        applying = [r for r in rules if name in r.destinations and r.applies(facts)]
        refused = [r.says(facts) for r in applying if r.refuses]
        remarks = refused or [r.says(facts) for r in applying]
        entries.append({"destination": name, "possible": not refused, "remarks": remarks})
    return entries
