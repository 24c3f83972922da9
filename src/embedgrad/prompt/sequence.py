"""Filled template -> token ids: prefix | prompt | suffix | target.

The text around the spans is tokenized exactly as exported tokens will cut it, and every row is
compared with the tokens of the uncut text. Rows whose own text merges with a span keep their uncut
tokens in `plain`, by which the text prompt is scored.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from embedgrad.data.examples import Example
from embedgrad.data.labels import advise_mapping, closest, escape, map_twins
from embedgrad.errors import DataError, TemplateError
from embedgrad.formatting import pluralize
from embedgrad.prompt.boundaries import CuttingTokenizer, Ids, alike
from embedgrad.prompt.row_checks import check_ids, open_thought
from embedgrad.prompt.span import Span, find_spans
from embedgrad.prompt.template import Rendered, Renderer, only
from embedgrad.prompt.truncation import longest_fit

MEAN, ZERO, DROPPED = -1, -2, -3  # as `inputs`: the table's mean row, zeros, zeros none sees


@final
@dataclass(frozen=True)
class Target:
    """What the model is to answer: one of `choices`, or free text when there are none."""

    choices: tuple[str, ...] = ()
    """The answers to choose from, as the model is to write them."""
    answer_prefix: str | None = None
    """Text before the answer. Unset: a space after text that does not end in white space."""
    normalize: bool = False
    """Compare choices by log-probability per token instead of the sum."""
    end: bool | None = None
    """Whether the end of the turn belongs to the answer. Unset: for free text it does; for choices
    `objective.over = "both"` trains it, but they are compared without it."""

    def __post_init__(self) -> None:
        repeated = [choice for choice, n in Counter(self.choices).items() if n > 1]
        if repeated or len(self.choices) == 1 or "" in self.choices:
            raise DataError(
                f"target.choices: {list(self.choices)!r}; expected two or more different texts"
            )

    def text_before(self, text: str, *, opened: bool) -> str:
        """What goes between `text` and the answer; `opened`: the answer continues that text."""
        if self.answer_prefix is not None:
            return self.answer_prefix
        return " " if opened and not text[-1:].isspace() else ""

    def without_prefix(self, reply: str) -> str:
        """A reply without blanks around it and the prefix, which comes before every answer."""
        return reply.strip().removeprefix((self.answer_prefix or "").strip()).strip()


@final
@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One row in token ids.

    The first span begins behind the prefix; everything after it is the suffix, where the positions
    `later` hold zeros that take the rows of the second and further spans, in order.

    `targets` holds the ids of every choice, or of the one answer; `gold` is the right one's index.
    `plain` holds the uncut ids of prefix, spans and suffix where they differ from the cut ones,
    else None. The first `shared` ids of the prefix come from the template: many rows share them.
    `inputs` is what the model reads instead of the targets, which are the labels; None: these.
    `reasoning` counts the first tokens of the right target that are a worked solution up to its
    final answer. `end` is what the model is to write behind a choice, though it does not count in
    comparing them. `rows` are those of the prompt that the row has, in order; None: all.
    """

    prefix: Ids
    suffix: Ids
    targets: tuple[Ids, ...]
    gold: int
    plain: Ids | None
    example: Example
    shared: int = 0
    later: tuple[int, ...] = ()
    reasoning: int = 0
    inputs: tuple[Ids, ...] | None = None
    end: Ids = ()
    rows: tuple[int, ...] | None = None

    def inputs_of(self, target: Ids) -> Ids:
        """What the model reads instead of one of the targets."""
        return target if self.inputs is None else self.inputs[self.targets.index(target)]

    def with_end(self) -> TokenSequence:
        """The row with one target more: the right one and the end of the turn behind it."""
        ended = self.targets[self.gold] + self.end
        inputs = self.inputs and (*self.inputs, self.inputs[self.gold] + self.end)
        return replace(self, targets=(*self.targets, ended), inputs=inputs, end=())

    def uncut(self) -> TokenSequence:
        """The row by its plain tokens, without a place for rows: how the text prompt is scored."""
        assert self.plain is not None
        alone = replace(self, prefix=(), suffix=self.plain, plain=None, shared=0)
        return replace(alone, later=(), inputs=None, rows=None)

    def length(self, prompt: int) -> int:
        """Tokens of the row before its answer, with `prompt` rows over all spans."""
        return len(self.prefix) + prompt + len(self.suffix) - len(self.later)

    def context(self, prompt_ids: Ids) -> Ids:
        """The row before its answer, with one id per row of the prompt in the prompt's places."""
        first = len(prompt_ids) - len(self.later)
        suffix = list(self.suffix)
        for position, token in zip(self.later, prompt_ids[first:], strict=True):
            suffix[position] = token
        return (*self.prefix, *prompt_ids[:first], *suffix)


@final
class Sequencer:
    """Turns examples into `TokenSequence`s for one template, tokenizer and target.

    `rows` are examples that decide, once, what must be drawn into the spans; the `spans` of a saved
    prompt are taken as they are. `context` is the model's longest sequence in tokens, `vocabulary`
    the rows of its embedding table (0: unknown).
    `merges` is "report" or "refuse", for rows whose own text merges with a span. `truncate` names
    the column of which only the beginning is kept, in whole characters, where a row does not fit;
    without it such a row is refused.
    Raises `TemplateError` and `DataError`.
    """

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Any,
        target: Target,
        *,
        rows: Sequence[Example] = (),
        spans: Sequence[Span] = (),
        context: int = 0,
        vocabulary: int = 0,
        merges: str = "report",
        truncate: str | None = None,
    ):
        self.renderer = renderer
        self.tokenizer = tokenizer
        self.target = target
        self.context = context
        self.vocabulary = vocabulary or len(tokenizer)
        self.merges = merges
        self.truncate = truncate
        self.truncated = 0
        self.emptied = 0
        self._spaced = False
        self._told_apart = False
        self._in_thought = ""
        adds_bos = renderer.template.text is not None
        self._cutting = CuttingTokenizer(tokenizer, adds_bos=adds_bos)
        self._answer_ids = functools.lru_cache(maxsize=4096)(self._tokenize_answer)
        self.end_ids = self._end_of_turn()
        if target.end and not self.end_ids:
            raise TemplateError(
                "target.end: this model's tokenizer has no token that ends an answer"
            )
        self.spans = tuple(spans) or find_spans(renderer, self._cutting, rows)
        texts = [span.text for span in self.spans]
        words = renderer.template.spans
        pairs = zip(self.spans, words, strict=False)
        prepared = [span.drawn_left + text + span.drawn_right for span, text in pairs]
        if len(texts) != len(words) or texts != prepared:
            raise TemplateError(
                f"template: the spans {', '.join(map(repr, words))} are not those it was prepared "
                f"for ({', '.join(map(repr, texts))})"
            )
        self.prompt_ids: Ids = tuple(token for span in self.spans for token in span.ids)

    @property
    def span(self) -> Span:
        """The only span. Raises `TemplateError` where there are several."""
        return only(self.spans)

    def __call__(self, example: Example) -> TokenSequence:
        """Tokenize one example."""
        try:
            rendered = self.renderer(example.columns)
        except TemplateError as error:
            raise TemplateError(f"{error} (first in {example.source})") from None
        sequence = self._sequence(rendered, example)
        check_ids(sequence, self.prompt_ids, self.tokenizer, self.vocabulary)
        excess = self._excess(sequence)
        if not excess:
            return sequence
        if self.truncate is None:
            raise DataError(
                f"{example.source}: {self.context + excess} tokens, but the model takes "
                f"{self.context}; shorten the row, drop it, or set data.truncate to the column "
                "that may be cut"
            )
        return self._shorten(example, self.truncate, excess)

    def build(self, examples: Iterable[Example]) -> list[TokenSequence]:
        """Tokenize all examples; keep or refuse those whose text merges with a span."""
        sequences = [self(example) for example in examples]
        merged = [s for s in sequences if s.plain is not None]
        if merged and self.merges == "refuse":
            raise TemplateError(
                f"template: in {len(merged)} of {len(sequences)} rows the text next to a span "
                f"merges with it (first: {merged[0].example.source}); put a line feed between "
                "them, or set template.merges = 'report'"
            )
        return sequences

    def notes(self, sequences: Sequence[TokenSequence]) -> list[str]:
        """What the user should know of these rows, one sentence each."""
        notes = [
            f"the span became {span.text!r}: its ends merge with the text next to it"
            for span in self.spans
            if span.drawn_left or span.drawn_right
        ]
        merged = sum(s.plain is not None for s in sequences)
        if merged:
            notes.append(
                f"in {merged} of {len(sequences)} rows the text next to a span merges with it; "
                "the text prompt is scored with its plain tokens there"
            )
        if self._spaced:
            notes.append("answers follow a space, as the text before them has none at its end")
        if self._told_apart:
            notes.append("one choice begins another, so each is scored with the end of the turn")
        if not self.target.choices and not self.end_ids:
            notes.append(
                "this model has no end token: free answers run to evaluation.max_new_tokens"
            )
        if self._in_thought and self.target.choices:
            notes.append(
                f"the text before the answer ends inside a thought ({self._in_thought!r}), so the "
                "choices are scored as its first words; close it, by an option of the chat "
                "template such as enable_thinking = false, or by template.assistant"
            )
        if self.truncated:
            nothing = f", and nothing of it is left in {self.emptied}" if self.emptied else ""
            notes.append(
                f"column {self.truncate!r} was cut in {pluralize(self.truncated, 'row')} that did "
                f"not fit{nothing}"
            )
        return notes

    def _sequence(self, rendered: Rendered, example: Example) -> TokenSequence:
        before, *between, after = self._outer(rendered)
        prefix = self._cutting.prefix(before, rendered.text)
        suffix: list[int] = []
        later: list[int] = []
        for text, span in zip(between, self.spans[1:], strict=True):
            suffix += self._answer_ids(text, "")[0]
            later += range(len(suffix), len(suffix) + len(span.ids))
            suffix += [0] * len(span.ids)
        suffix += self._answer_ids(after, "")[0]
        opening = self._answer_prefix(rendered)
        self._in_thought = open_thought(rendered.text)
        answers = self.target.choices or (example.written,)
        targets = tuple(self._answer_ids(after, opening + answer)[1] for answer in answers)
        if self.target.choices and (() in targets or len(set(targets)) < len(targets)):
            twins = map_twins(dict.fromkeys(answers, 0))
            keep = ", ".join(escape(answer) for answer in answers if answer not in twins)
            advice = (
                f"keep {keep} and set {advise_mapping(twins)}" if twins else "choose other words"
            )
            raise DataError(
                f"target.choices: {', '.join(map(escape, answers))} are not different texts for "
                f"this model's tokenizer; {advice}"
            )
        end = self.end_ids if self.target.choices and self.target.end is None else ()
        if self._ends(targets):
            targets, end = tuple(ids + self.end_ids for ids in targets), ()
        gold = 0
        if self.target.choices and example.answer:
            if example.answer not in self.target.choices:
                raise DataError(
                    f"{example.source}: the answer {example.answer!r} is not a choice; "
                    f"{closest(example.answer, self.target.choices)}"
                )
            gold = self.target.choices.index(example.answer)
        reasoning = 0
        if not self.target.choices and example.answer:
            worked, found, _ = example.written.rpartition(example.answer)
            if found and worked:
                begun = self._answer_ids(after, opening + worked)[1]
                reasoning = alike(begun, targets[0])
        plain = self._cutting.plain(rendered.text)
        shared = alike(prefix, self._opening)
        sequence = TokenSequence(
            prefix,
            tuple(suffix),
            targets,
            gold,
            plain,
            example,
            shared=shared,
            later=tuple(later),
            reasoning=reasoning,
            end=end,
        )
        same = sequence.context(self.prompt_ids) == plain
        return replace(sequence, plain=None) if same else sequence

    @functools.cached_property
    def _opening(self) -> Ids:
        """Ids that every prefix begins with."""
        columns = self.renderer.template.columns
        prefixes = []
        for filling in "ab":
            rendered = self.renderer(dict.fromkeys(columns, filling))
            prefixes.append(self._cutting.prefix(self._outer(rendered)[0], rendered.text))
        return prefixes[0][: alike(*prefixes)]

    def _ends(self, targets: Sequence[Ids]) -> bool:
        """Whether the end of the turn belongs to the answers."""
        begins = any(a != b and b[: len(a)] == a for a in targets for b in targets)
        if not begins or self.target.normalize:
            free = not self.target.choices
            return free if self.target.end is None else self.target.end
        # A text is never more likely than its own beginning: only its end tells them apart.
        if self.target.end is False or not self.end_ids:
            raise DataError(
                f"target.choices: {list(self.target.choices)!r}: one begins another, so the longer "
                "can never win; reword them, or set target.normalize = true"
            )
        self._told_apart = True
        return True

    def _outer(self, rendered: Rendered) -> tuple[str, ...]:
        """The texts around the spans, without what was drawn into them."""
        for number, span in enumerate(self.spans):
            left, right = span.drawn_left, span.drawn_right
            before, after = rendered.texts[number : number + 2]
            if not (before.endswith(left) and after.startswith(right)):
                raise TemplateError(
                    f"template: the text next to the span {span.text!r} is not the one it was "
                    f"prepared for ({left!r} before it, {right!r} after it)"
                )
            rendered = rendered.draw_in(number, len(left), len(right))
        return rendered.texts

    def _answer_prefix(self, rendered: Rendered) -> str:
        template = self.renderer.template
        opened = template.text is not None or template.messages[-1].role == "assistant"
        before = self.target.text_before(rendered.text, opened=opened)
        self._spaced |= self.target.answer_prefix is None and before == " "
        return before

    def _tokenize_answer(self, suffix: str, answer: str) -> tuple[Ids, Ids]:
        """Ids of text after a cut, and of an answer after that text."""
        suffix_ids = self._cutting.suffix(suffix)
        if not answer:
            return suffix_ids, ()
        joint = self._cutting.suffix(suffix + answer)
        if joint[: len(suffix_ids)] == suffix_ids and len(joint) > len(suffix_ids):
            return suffix_ids, joint[len(suffix_ids) :]
        # The answer would merge with the suffix, but the suffix is fixed before the model answers.
        return suffix_ids, self._cutting.cut("", suffix, answer)[2]

    def _end_of_turn(self) -> Ids:
        """The token that ends an answer: the chat template's, else the tokenizer's."""
        after = self.tokenizer(self.renderer.after_answer(), add_special_tokens=False)["input_ids"]
        # Gemma 3 names <end_of_turn> nowhere but among its added tokens.
        added = self.tokenizer.added_tokens_decoder
        if after and after[0] in added and added[after[0]].special:
            return (int(after[0]),)
        end = self.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    def _excess(self, sequence: TokenSequence) -> int:
        """Tokens over the context."""
        longest = max((len(ids) for ids in sequence.targets), default=0)
        length = sequence.length(len(self.prompt_ids)) + longest
        return max(0, length - self.context) if self.context else 0

    def _shorten(self, example: Example, name: str, excess: int) -> TokenSequence:
        """The row with the longest beginning of a column's text that fits."""
        text = example.columns.get(name, "")

        @functools.cache
        def fit(end: int) -> TokenSequence | None:
            columns = {**example.columns, name: text[:end]}
            sequence = self._sequence(self.renderer(columns), example)
            return None if self._excess(sequence) else sequence

        end = longest_fit(self.tokenizer, text, excess, lambda end: fit(end) is not None)
        sequence = fit(end)
        if sequence is None:
            raise DataError(
                f"{example.source}: does not fit into the model's {self.context} tokens "
                f"even without column {name!r}; shorten the template"
            )
        self.truncated += 1
        self.emptied += end == 0
        return sequence
