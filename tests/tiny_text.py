"""Tokenizers, chat templates and examples for tests; import them from `tiny`."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from embedgrad.data.examples import Example

# --------------------------------------------------------------------------------- examples

_SUBJECTS = {
    "film": ("The film", "This movie", "The acting", "The last scene", "The story"),
    "book": ("The book", "This novel", "The plot", "The first chapter", "The writing"),
    "meal": ("The meal", "This soup", "The service", "The small table by the door", "The bread"),
}
_WORDS = {
    "positive": ("wonderful", "great", "funny", "warm", "a delight from start to end", "perfect"),
    "negative": ("terrible", "boring", "cold", "dull", "a waste of time and money", "awful"),
}
_JOINS = (" is ", " was ", " felt ", " seemed ")
_ASIDES = ("", "", " I saw it with my sister.", " We came on a rainy day, and we left at nine.")


def _review(rng: random.Random, group: str, answer: str) -> str:
    clauses = [
        rng.choice(_SUBJECTS[group]) + rng.choice(_JOINS) + rng.choice(_WORDS[answer])
        for _ in range(rng.randint(1, 3))
    ]
    return ". ".join(clauses) + "." + rng.choice(_ASIDES)


def reviews(n: int, seed: int = 0) -> list[Example]:
    """Make `n` labelled reviews of mixed lengths; columns "review" and "label"."""
    from embedgrad.data.examples import Example

    rng = random.Random(seed)
    made = []
    for row in range(n):
        group = rng.choice(tuple(_SUBJECTS))
        answer = rng.choice(tuple(_WORDS))
        columns = {"review": _review(rng, group, answer), "label": answer}
        made.append(Example(columns, answer=answer, source=f"reviews.csv:{row + 2}", group=group))
    return made


def _corpus() -> list[str]:
    """Text that the tokenizers are trained on: chats about reviews, and what the tests write."""
    rng = random.Random(0)
    texts = [
        "Is the review positive or negative?\nAnswer with one word.\n\nReview: ",
        "You are a helpful assistant. Today is 12 Mar 2024.\nUSER: What is this?\nASSISTANT: ",
        "system\nuser\nassistant\nmodel\n1 + 2 = 3, isn't it? He said: 'the end'.\n",
    ]
    for _ in range(60):
        answer = rng.choice(tuple(_WORDS))
        review = _review(rng, rng.choice(tuple(_SUBJECTS)), answer)
        texts.append(f"Review: {review}\nIs it positive or negative?\n{answer}\n")
    return texts * 2  # every piece is seen at least twice, so that merges exist for it


# ------------------------------------------------------------------------------- tokenizers

_CHAT = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
# As Qwen 2: a mark takes the line breaks behind it, a word takes the space before it.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytelevel() -> PreTrainedTokenizerFast:
    core = Tokenizer(token_models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", *_CHAT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=list(_CHAT),
    )


def _metaspace(prepend: str) -> PreTrainedTokenizerFast:
    # Trained on lines, split into words; then used as Llama is: not split, line breaks as bytes.
    trained = Tokenizer(token_models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    lines = [line for text in _corpus() for line in text.splitlines()]
    trained.train_from_iterator(lines, trainer)
    learned = json.loads(trained.to_str())["model"]

    special = ["<unk>", "<s>", "</s>", "<pad>", *_CHAT]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    core = Tokenizer(
        token_models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_CHAT),
    )


def _wordpiece() -> PreTrainedTokenizerFast:
    # Not trained: the trainer's result differs from run to run. Whole words, then letters.
    words = sorted(set(re.findall(r"\w+", " ".join(_corpus()))))
    letters = sorted(set("".join(_corpus()).replace(" ", "").replace("\n", "")))
    special = ["<unk>", "<pad>", "</s>", *_CHAT]
    pieces = dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])
    core = Tokenizer(
        token_models.WordPiece(
            vocab={piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_CHAT),
    )


_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytelevel": _bytelevel,
    "metaspace": functools.partial(_metaspace, "first"),
    "metaspace-always": functools.partial(_metaspace, "always"),
    "wordpiece": _wordpiece,
}
TOKENIZERS = tuple(_TOKENIZERS)


@functools.lru_cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of at most 600 tokens. Shared: change a `copy.deepcopy` of it.

    - "bytelevel": GPT-2, Qwen, SmolLM2. No BOS, lossless; "?" and a line break are one token.
    - "metaspace": Llama 2 and Mistral. BOS, byte fallback; a first space is lost in decoding.
    - "metaspace-always": the same in its legacy form: a space before every piece of text, also
      after a special token.
    - "wordpiece": BERT. No BOS; white space is lost, characters outside the corpus are <unk>.
    """
    return _TOKENIZERS[kind]()


# ---------------------------------------------------------------------------- chat templates

# As SmolLM2: a system message of its own where none is given.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3: BOS in the text, every message trimmed.
TRIMMING = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma: no system message, the assistant is called model, every message trimmed.
NO_SYSTEM = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No special token anywhere: text can merge across every boundary.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{{ message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As Llama 3.1: the day on which it is rendered, before the system message.
DATED = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(base: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """Copy a tokenizer and give the copy a chat template."""
    changed = copy.deepcopy(base)
    changed.chat_template = template
    return changed
