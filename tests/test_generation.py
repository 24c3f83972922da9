"""Sampling, stop strings and streaming: what is drawn, where answers end, what is shown when."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from embedgrad.errors import EmbedgradError, ModelError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.answer_batch import choose
from embedgrad.model.decoding import Decoding, Generation, GrowingText, draw
from embedgrad.model.generation import Reply, replies, stream
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.registry import build
from embedgrad.prompt.sequence import Target
from kit import LABELS, Kit, cut, kit, noisy, plain_logits
from run_kit import Command, Done

pytest_plugins = ["tiny_runs"]

FREE = Target()
# The last two take no stored prefixes.
ARCHITECTURES = ("llama", "qwen2-sliding", "gemma3", "gpt2", "mamba", "llama-dynamic")
ALONE = ARCHITECTURES[-2:]
SAMPLED = Decoding(6, temperature=1.0, top_p=0.9, samples=3, seed=5)
TEXTS = (
    "The film is great. I saw it, didn't I?\n\nReview: 12 , it ' s cold",
    "\u00e9t\u00e9 \U0001f600\U0001f44d\U0001f3fd\n\u20ac 5\u4e2d\u6587\n",
    "  two spaces \n \n",
)
GARBAGE = "\ufffd"


@functools.cache
def made_of(architecture: str, rows: int = 5, **options: Any) -> Kit:
    return kit(architecture, target=FREE, rows=rows, tie=False, **options)


def answers(made: Kit, decoding: Decoding, **options: Any) -> list[tuple[Reply, ...]]:
    arguments = {"end_ids": (), "batch_size": 4, **options}
    return replies(made.model, noisy(made.start), made.sequences, decoding, **arguments)


def streamed(made: Kit, decoding: Decoding, end_ids: tuple[int, ...] = ()) -> tuple[list[str], Any]:
    """Pieces of the first row's answer, and what the stream returned."""
    pieces = stream(made.model, noisy(made.start), made.sequences[0], decoding, end_ids=end_ids)
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_its_company(architecture: str) -> None:
    made = made_of(architecture, 3 if architecture in ALONE else 5)
    expected = answers(made, SAMPLED)
    texts = [reply.text for samples in expected for reply in samples]
    assert len(set(texts)) > 6
    assert {len(samples) for samples in expected} == {3}
    for size in () if architecture in ALONE else (1, 2, 15):
        assert answers(made, SAMPLED, batch_size=size) == expected
    few = answers(made, Decoding(6, temperature=1.0, top_p=0.9, samples=1, seed=5))
    assert few == [samples[:1] for samples in expected]
    for i, sequence in enumerate(made.sequences):
        (lone,) = replies(
            made.model, noisy(made.start), [sequence], SAMPLED, end_ids=(), numbers=[i]
        )
        assert lone == expected[i]


@pytest.mark.parametrize("architecture", ARCHITECTURES[:-1])
def test_a_token_is_drawn_behind_those_before_it(architecture: str) -> None:
    made = made_of(architecture, 2)
    found = replies(made.model, made.start, made.sequences, SAMPLED, end_ids=())
    for i, sequence in enumerate(made.sequences):
        for sample in range(2):
            context = cut(sequence, made.sequencer.span.ids)
            numbers = random.Random(f"5:{i}:{sample}")
            spoken: list[int] = []
            for _ in range(6):
                logits_V = plain_logits(made.loaded, [*context, *spoken])[-1]
                spoken += draw(logits_V[None], SAMPLED, [numbers.random()]).tolist()
            text = made.loaded.tokenizer.decode(spoken, skip_special_tokens=True)
            assert found[i][sample] == (text, True, tuple(spoken))


@pytest.mark.parametrize("fault", ["raises", "forgets"])
def test_a_model_that_cannot_generate_answers_in_full_passes(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    made = made_of("mamba", 2)
    assert made.model.forward.can_generate
    expected = answers(made, SAMPLED)
    loaded, plain = made.loaded.model, made.loaded.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        if options.get("use_cache"):
            if fault == "raises":
                raise IndexError("list index out of range")
            options["cache_params"] = None
        return plain(*arguments, **options)

    monkeypatch.setattr(loaded, "forward", forward)
    model = LanguageModel(made.loaded)
    assert not model.forward.can_generate
    other = dataclasses.replace(made, model=model)
    assert answers(other, SAMPLED) == expected
    pieces, reply = streamed(other, SAMPLED)
    assert ("".join(pieces), reply) == (expected[0][0].text, expected[0][0])


def test_seed_number_and_sample_decide_what_is_drawn() -> None:
    made = made_of("llama")
    first, again = answers(made, SAMPLED), answers(made, SAMPLED)
    assert first == again
    other = answers(made, Decoding(6, temperature=1.0, top_p=0.9, samples=3, seed=6))
    assert all(a != b for a, b in zip(first, other, strict=True))
    row = made.sequences[:1] * 4
    apart = replies(made.model, made.start, row, SAMPLED, end_ids=())
    assert len({reply.text for samples in apart for reply in samples}) > 8
    alike = replies(made.model, made.start, row, SAMPLED, end_ids=(), numbers=[7, 7, 7, 7])
    assert len(set(alike)) == 1
    assert len(set(alike[0])) == 3


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
def test_the_likeliest_token_alone_is_greedy_decoding(architecture: str) -> None:
    made = made_of(architecture)
    greedy = answers(made, Decoding(6, samples=2))
    assert [samples[0] for samples in greedy] == [samples[1] for samples in greedy]
    assert greedy != answers(made, Decoding(6, temperature=1.0, samples=2))
    assert greedy == answers(made, Decoding(6, temperature=1.0, top_p=1e-9, samples=2))
    assert greedy == answers(made, Decoding(6, temperature=1e-300, samples=2))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    made = made_of("llama")
    count = 3000
    decoding = Decoding(1, temperature=0.5, samples=count)
    (samples,) = replies(
        made.model, made.start, made.sequences[:1], decoding, end_ids=(), batch_size=count
    )
    context = cut(made.sequences[0], made.sequencer.span.ids)
    shares_V = torch.softmax(plain_logits(made.loaded, context)[-1] / 0.5, dim=0)
    expected: Counter[str] = Counter()
    for token, share in enumerate(shares_V.tolist()):
        expected[made.loaded.tokenizer.decode([token], skip_special_tokens=True)] += share
    found = Counter(reply.text for reply in samples)
    frequent = [(text, share) for text, share in expected.items() if share * count >= 10]
    assert len(frequent) >= 3
    # Pearson's chi-square with as many degrees of freedom as frequent texts: mean n, variance 2n.
    spread = sum((found[t] - count * p) ** 2 / (count * p * (1 - p)) for t, p in frequent)
    assert spread < len(frequent) + 4 * (2 * len(frequent)) ** 0.5


def drawn(logits: Sequence[float], decoding: Decoding, count: int = 4096) -> Counter[int]:
    """What evenly spread numbers draw: each token its share of them, but for one at an end."""
    logits_V = torch.tensor(logits)
    uniform = [(n + 0.5) / count for n in range(count)]
    return Counter(draw(logits_V.expand(count, -1), decoding, uniform).tolist())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_what_is_drawn_follows_the_softmax(temperature: float) -> None:
    logits = [0.3, -1.0, 2.0, -torch.inf, 0.0, 1.1]
    found = drawn(logits, Decoding(temperature=temperature))
    shares = torch.softmax(torch.tensor(logits).double() / temperature, dim=0)
    for token, share in enumerate(shares.tolist()):
        assert found[token] == pytest.approx(4096 * share, abs=1)
    assert not found[3]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {2}),
        (0.5, {2}),
        (0.51, {2, 0}),
        (0.75, {2, 0}),
        (0.8, {2, 0, 3}),
        (1.0, {2, 0, 3, 1, 4}),
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_the_share(
    top_p: float, kept: set[int]
) -> None:
    shares = torch.tensor([0.25, 0.075, 0.5, 0.125, 0.05], dtype=torch.float64)
    found = drawn(shares.log().tolist(), Decoding(temperature=1.0, top_p=top_p))
    assert set(found) == kept
    mass = shares[sorted(kept)].sum().item()
    for token in kept:
        assert found[token] == pytest.approx(4096 * shares[token].item() / mass, abs=1)


def test_a_nucleus_of_many_tokens() -> None:
    found = drawn([0.0] * 1024, Decoding(temperature=1.0, top_p=0.5))
    assert len(found) == 512
    assert set(found.values()) == {8}


def test_the_least_and_the_greatest_number_draw_tokens_that_can_be() -> None:
    never = torch.full((3,), -torch.inf)
    logits = torch.cat([never, torch.zeros(7), never])
    ends = [0.0, 1 - 2**-53]
    assert draw(logits.expand(2, -1), Decoding(temperature=1.0), ends).tolist() == [3, 9]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(odd: float) -> None:
    with pytest.raises(ModelError, match=r"logits are not finite; set model\.dtype"):
        draw(torch.tensor([[0.0, odd, 1.0]]), Decoding(temperature=1.0), [0.5])


@pytest.mark.parametrize("target", [FREE, LABELS], ids=["free", "choices"])
def test_a_model_that_gives_no_numbers_is_refused_and_not_scored(target: Target) -> None:
    made = kit("llama", target=target, rows=4)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(max_new_tokens=2))
    assert len(evaluator.score(made.start, made.sequences)) == 4
    with pytest.raises(ModelError, match=r"logits are not finite; set model\.dtype"):
        evaluator.score(made.start * torch.nan, made.sequences)


def test_samples_of_a_row_share_its_prefix_and_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit("llama", target=FREE, rows=4, tie=False, budget=0)
    prefixes = len({s.prefix for s in made.sequences})
    passes: list[tuple[int, ...]] = []
    plain = made.model.forward.logits

    def logits(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(tuple(embeds.shape[:2]))
        return plain(embeds, *rest)

    monkeypatch.setattr(made.model.forward, "logits", logits)
    before = made.model.prefix_cache.misses
    for size in (4, 12, 2):  # more samples than a batch takes, whole rows, fewer
        expected = answers(made, SAMPLED, batch_size=size)
        assert made.model.prefix_cache.misses - before == prefixes
        before = made.model.prefix_cache.misses
        assert expected == answers(made_of("llama", 4), SAMPLED)
    passes.clear()
    answers(made, SAMPLED, batch_size=12)
    assert passes[0][0] == 4
    assert passes[0][1] > len(made.start)
    assert passes[1:] == [(12, 1)] * 5


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "gpt2"])
def test_answers_that_are_over_are_left_out_of_the_passes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(architecture)
    ends = tuple(range(0, made.model.info.vocabulary, 8))  # an eighth of what may be drawn
    decoding = Decoding(12, temperature=1.0, samples=3, seed=5)
    alone = answers(made, decoding, end_ids=ends, batch_size=1)
    assert {reply.cut for samples in alone for reply in samples} == {False, True}
    sizes: list[int] = []
    plain = made.model.forward.logits

    def logits(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(embeds))
        return plain(embeds, *rest)

    monkeypatch.setattr(made.model.forward, "logits", logits)
    assert answers(made, decoding, end_ids=ends, batch_size=15) == alone
    rows, *decoded = sizes
    assert (rows, decoded[0], len(decoded)) == (5, 15, 11)
    assert decoded == sorted(decoded, reverse=True)
    assert len(set(decoded)) > 3
    assert decoded[-1] < 8


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "gpt2"])
def test_answers_that_wait_take_the_rows_of_those_that_are_over(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(architecture, 9)
    ends = tuple(range(0, made.model.info.vocabulary, 6))
    decoding = Decoding(16, temperature=1.0, samples=2, seed=5)
    alone = answers(made, decoding, end_ids=ends, batch_size=1)
    sizes: list[tuple[int, ...]] = []
    plain = made.model.forward.logits

    def logits(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(tuple(embeds.shape[:2]))
        return plain(embeds, *rest)

    monkeypatch.setattr(made.model.forward, "logits", logits)
    assert answers(made, decoding, end_ids=ends, batch_size=6) == alone
    read = [i for i, (_, tokens) in enumerate(sizes) if tokens > 1]
    decoded = [rows for rows, tokens in sizes if tokens == 1]
    assert len(read) > 3  # batches of three questions, then others one or two at a time
    assert max(decoded) == 6
    assert any(sizes[i + 1][0] > 2 * sizes[i][0] for i in read[1:-1])  # beside those that go on


# -- stop strings ----------------------------------------------------------------------------------


@functools.cache
def words(kind: str) -> Any:
    """A tokenizer; "wordpiece-clean" takes away the spaces before marks."""
    found = copy.deepcopy(tiny.tokenizer(kind.removesuffix("-clean")))
    found.clean_up_tokenization_spaces = kind.endswith("-clean")
    return found


KINDS = (*tiny.TOKENIZERS, "wordpiece-clean")


def ids_of(kind: str, text: str) -> list[int]:
    return list(words(kind)(text, add_special_tokens=False)["input_ids"])


def decoded(kind: str, ids: Sequence[int]) -> str:
    return str(words(kind).decode(ids, skip_special_tokens=True))


def watched(kind: str, *stop: str) -> Generation:
    decoding = Decoding(stop=stop)
    return Generation(words(kind), decoding, end_ids=(), most=10_000, number=(0,), watched=True)


def check_stop_string(kind: str, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Compare every step with decoding all tokens so far; returns whether the answer ended."""
    answer = watched(kind, *stop)
    for n in range(1, len(ids) + 1):
        answer.add(ids[n - 1])
        text = decoded(kind, ids[:n])
        found = [text.find(s) for s in stop if s in text]
        assert answer.over == answer.ended == bool(found)
        if found:
            assert answer.text == text[: min(found)]
            break
    shown = watched(kind, *stop)
    for token in ids[:n]:
        shown.add(token)
        assert answer.text.startswith(shown.certain)
    return answer.over


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_before_a_stop_string_wherever_it_stands(kind: str) -> None:
    crossing = ended = 0
    for ids in (ids_of(kind, text) for text in TEXTS):
        whole = decoded(kind, ids)
        stops = {whole[at:][:length] for at in range(len(whole)) for length in (1, 2, 3, 7)}
        for stop in stops:
            if GARBAGE not in stop:
                ended += check_stop_string(kind, ids, (stop,))
                crossing += all(stop not in decoded(kind, [token]) for token in ids)
    assert ended > 50
    assert crossing > 20


def test_the_first_of_several_stop_strings_counts() -> None:
    ids = ids_of("bytelevel", "one two three four")
    for stop in (("three", "two"), ("two", "three"), ("two", "wo")):
        answer = watched("bytelevel", *stop)
        for token in ids:
            answer.add(token)
        assert answer.text == "one "
        assert answer.ended


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_that_is_a_special_token_ends_an_answer(kind: str) -> None:
    tokenizer = words(kind)
    special = next(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    answer = watched(kind, "never", tokenizer.added_tokens_decoder[special].content)
    ids = ids_of(kind, "one two")
    for token in (*ids, special, *ids):
        answer.add(token)
    assert answer.ended
    assert answer.text == decoded(kind, ids)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    answer = watched("bytelevel", "\n\nQ", "two four")
    shown = []
    for token in ids_of("bytelevel", "a\n\nb two f"):
        answer.add(token)
        shown.append(answer.certain)
    assert shown[-1] == "a\n\nb "
    assert "a\n" not in shown
    assert "a" in shown
    answer = watched("bytelevel", "\n\nQ")
    for token in ids_of("bytelevel", "a\n\nb two f"):
        answer.add(token)
    assert answer.certain == "a\n\nb two f"


def test_tokens_behind_the_end_are_dropped() -> None:
    answer = watched("bytelevel", "b")
    for token in ids_of("bytelevel", "abcabc"):
        answer.add(token)
    assert answer.text == "a"
    assert decoded("bytelevel", answer.ids) in ("ab", "abc", "abca", "abcab")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_strings_end_rows_of_a_batch_alone(architecture: str, temperature: float) -> None:
    made = made_of(architecture)
    plain = answers(made, Decoding(10, temperature=temperature, samples=2))
    texts = [reply.text for samples in plain for reply in samples]
    stop = tuple({text[at : at + 3] for text in texts[:4] for at in (2, 6)} - {""})
    stop = tuple(s for s in stop if GARBAGE not in s)
    assert stop
    found = answers(made, Decoding(10, temperature=temperature, samples=2, stop=stop))
    ended = 0
    for reply, text in zip((r for samples in found for r in samples), texts, strict=True):
        at = min((text.find(s) for s in stop if s in text), default=None)
        assert reply[:2] == (text[:at], at is None)
        ended += at is not None
    assert ended
    assert ended < len(texts) or architecture == "mamba"


def test_nothing_is_computed_behind_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit("llama", target=FREE, rows=1, tie=False)
    ((reply,),) = answers(made, Decoding(10))
    steps = []
    plain = made.model.forward.logits
    monkeypatch.setattr(made.model.forward, "logits", lambda *a: steps.append(1) or plain(*a))
    ids: list[int] = []
    end = 0
    for end in range(1, 11):
        ((part,),) = answers(made, Decoding(end))
        if len(part.text) >= 5 and GARBAGE not in part.text:
            ids.append(end)
            break
    stop = part.text[-2:]
    assert reply.text.startswith(part.text)
    steps.clear()
    ((found,),) = answers(made, Decoding(10, stop=(stop,)))
    assert found[:2] == (reply.text[: reply.text.find(stop)], False)
    assert len(steps) <= end


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_an_end_token_still_ends_an_answer(architecture: str) -> None:
    made = made_of(architecture)
    everything = tuple(range(made.loaded.info.vocabulary))
    for decoding in (SAMPLED, Decoding(6, stop=("x",))):
        found = answers(made, decoding, end_ids=everything)
        assert found == [(Reply("", False),) * decoding.samples] * 5


@pytest.mark.parametrize("stop", [("",), ("a", ""), "\n"])
def test_a_stop_string_that_ends_everything_is_refused(stop: Any) -> None:
    given = repr(stop if isinstance(stop, str) else list(stop))
    told = (
        f"{given}; expected a list of texts, none of them empty, "
        r'as in ["\n\n", "Question:"]'
    )
    for cls, option in ((Decoding, "decoding.stop"), (Evaluation, "evaluation.stop")):
        with pytest.raises(EmbedgradError) as raised:
            cls(stop=stop)
        assert str(raised.value) == f"{option}: {told}"
    problems: list[str] = []
    if not isinstance(stop, str):
        assert build(Evaluation, {"stop": list(stop)}, "evaluation", problems) is None
        assert problems == [f"evaluation.stop: {told}"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("samples", 0),
        ("seed", -1),
    ],
)
def test_settings_that_cannot_be_are_refused(option: str, value: float) -> None:
    problems: list[str] = []
    assert build(Decoding, {option: value}, "decoding", problems) is None
    assert len(problems) == 1
    assert problems[0].startswith(f"decoding.{option}: ")


def test_the_evaluation_stops_at_its_stop_strings() -> None:
    made = made_of("llama")
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(max_new_tokens=10))
    evaluator.end_ids = ()
    whole = evaluator.score(made.start, made.sequences)
    stop = whole[0].predicted[4:6]
    evaluator.evaluation = Evaluation(max_new_tokens=10, stop=(stop,))
    found = evaluator.score(made.start, made.sequences)
    for before, after in zip(whole, found, strict=True):
        prefix, ended, _ = before.predicted.partition(stop)
        assert (after.predicted, after.cut) == (prefix, not ended)
    assert not found[0].cut


# -- text that grows -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_growing_text_is_that_of_all_tokens(kind: str, data: st.DataObject) -> None:
    size = len(words(kind))
    pieces = st.one_of(
        st.integers(0, size - 1).map(lambda token: [token]),
        st.sampled_from([ids_of(kind, text) for text in TEXTS]),
        st.text(max_size=4).map(lambda text: ids_of(kind, text)),
    )
    ids = [token for piece in data.draw(st.lists(pieces, max_size=8)) for token in piece]
    grown = GrowingText(words(kind))
    whole = decoded(kind, ids)
    seen = ""
    for n, token in enumerate(ids, start=1):
        grown.add(token)
        assert grown.text == decoded(kind, ids[:n])
        assert grown.certain.startswith(seen)
        assert whole.startswith(grown.certain)
        seen = grown.certain


@pytest.mark.parametrize(
    "tokens",
    [
        # Bytes are one text across a special token.
        ("\u2581", "a", "<0x0A>", "<s>", "<0xE2>", "<0x82>", "<0xAC>", "b"),
        # The first word loses its space, but not the first behind a token that has no text.
        ("\u2581", "a", None, "\u2581The", "b"),
    ],
)
def test_tokens_without_text(tokens: tuple[str | None, ...]) -> None:
    tokenizer = words("metaspace")
    nothing = len(tokenizer) + 5  # a model may have more embeddings than its tokenizer tokens
    ids = [nothing if t is None else tokenizer.convert_tokens_to_ids(t) for t in tokens]
    assert tokenizer.unk_token_id not in ids
    grown = GrowingText(tokenizer)
    for n, token in enumerate(ids, start=1):
        grown.add(token)
        assert grown.text == decoded("metaspace", ids[:n])
    assert grown.certain == grown.text
    assert grown.text in ("a\n\u20acb", "a Theb")


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
def test_half_a_character_is_held_back(kind: str) -> None:
    ids = ids_of(kind, "a\U0001f600b")
    assert len(ids) >= 6
    grown = GrowingText(words(kind))
    shown = []
    for token in ids:
        grown.add(token)
        shown.append(grown.certain)
    assert not any(GARBAGE in text for text in shown)
    assert shown[0] == "a"
    assert shown[3] == "a"
    assert shown[-1] == "a\U0001f600b"


def test_a_token_costs_no_more_in_a_long_text() -> None:
    tokenizer = words("bytelevel")
    sizes: list[int] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **options: Any) -> Any:
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    grown = GrowingText(Counted())
    ids = ids_of("bytelevel", TEXTS[0] * 20)
    for token in ids:
        grown.add(token)
    assert grown.text == decoded("bytelevel", ids)
    assert max(sizes) <= 4
    assert len(sizes) <= 2 * len(ids)


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "bytelevel"),
        ("gemma3", "metaspace"),
        ("gpt2", "wordpiece"),
        ("mamba", "bytelevel"),
        ("llama-dynamic", "metaspace"),
    ],
)
def test_pieces_make_the_reply(architecture: str, kind: str) -> None:
    chat = {"bytelevel": tiny.CHATML, "metaspace": tiny.TRIMMING, "wordpiece": tiny.PLAIN}[kind]
    made = made_of(architecture, 1, tokenizer=kind, chat=chat)
    pieces = 0
    for seed, temperature in ((0, 0.0), (1, 1.5), (2, 1.5)):
        decoding = Decoding(12, temperature=temperature, seed=seed)
        ((reply,),) = answers(made, decoding)
        for stop in ((), (reply.text[5:8] or "?",)):
            decoding = Decoding(12, temperature=temperature, seed=seed, stop=stop)
            ((expected,),) = answers(made, decoding)
            found, returned = streamed(made, decoding)
            assert "".join(found) == expected.text
            assert returned == expected
            assert "" not in found
            pieces += len(found)
    assert pieces > 15


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_an_answer_that_ends_at_once_has_no_pieces(architecture: str) -> None:
    made = made_of(architecture)
    everything = tuple(range(made.loaded.info.vocabulary))
    assert streamed(made, Decoding(5), everything) == ([], Reply("", False))


def test_a_piece_comes_before_the_next_token_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit("llama", target=FREE, rows=1, tie=False)
    steps = []
    plain = made.model.forward.logits
    monkeypatch.setattr(made.model.forward, "logits", lambda *a: steps.append(1) or plain(*a))
    pieces = stream(made.model, made.start, made.sequences[0], Decoding(30), end_ids=())
    assert not steps
    made_at = []
    for _ in pieces:
        made_at.append(len(steps))
    assert made_at[0] < 4
    assert len(set(made_at)) > 15


def running() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("leave", ["close", "interrupt", "forget"])
@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_stream_can_be_left(
    architecture: str, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(architecture, 3)
    before = running()
    rows = noisy(made.start).requires_grad_()
    expected = made.model.outcome(rows, made.sequences).logprobs_BC
    greedy = answers(made, Decoding(6))
    steps = []
    for module in ("answer_batch", "generation"):
        where = f"embedgrad.model.{module}.choose"
        monkeypatch.setattr(where, lambda *a: steps.append(1) or choose(*a))
    pieces = stream(made.model, rows, made.sequences[0], Decoding(300), end_ids=())
    next(pieces)
    # The consumer's own modes are untouched while the stream waits.
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    if leave == "close":
        pieces.close()
    elif leave == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt())
    else:
        del pieces
    assert running() <= before
    assert len(steps) < 100
    found = made.model.outcome(rows, made.sequences).logprobs_BC
    assert torch.equal(found, expected)
    found.sum().backward()
    assert rows.grad is not None
    assert answers(made, Decoding(6)) == greedy


def test_what_goes_wrong_in_the_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of("mamba", 1)

    def fail(*_: object) -> None:
        raise ModelError("no more")

    monkeypatch.setattr("embedgrad.model.generation.choose", fail)
    with pytest.raises(ModelError, match="no more"):
        streamed(made, Decoding(5))


# -- the command line ------------------------------------------------------------------------------

QUERY = "What is 1 plus 1?"
WARM = ("--temperature", "1.5")


@pytest.fixture
def ask(embedgrad: Command, generated: Path) -> Callable[..., Done]:
    """`ask("--samples", 2)` -> what `generate` left for the query."""
    return lambda *arguments: embedgrad("generate", generated, QUERY, "--quiet", *arguments)


def test_options_change_the_recipes_decoding(ask: Callable[..., Done]) -> None:
    short = ask("--json").json
    assert short.keys() == {"answer", "cut", "columns"}
    longer = ask("--json", "--max-new-tokens", 40).json
    assert longer["answer"].startswith(short["answer"])
    assert len(longer["answer"]) > len(short["answer"])
    stop = longer["answer"][3:5]
    ended = ask("--json", "--max-new-tokens", 40, "--stop", "never", "--stop", stop).json
    assert ended["answer"] == longer["answer"].partition(stop)[0]
    assert not ended["cut"]
    assert ask("--json", *WARM, "--max-new-tokens", 40).json != longer
    assert ask("--json", *WARM, "--top-p", "1e-9", "--max-new-tokens", 40).json == longer
    as_set = ask("--json", "--set", f"evaluation.stop={json.dumps([stop])}")
    assert as_set.json["answer"] == short["answer"].partition(stop)[0]


def test_samples_are_a_list_and_printed_one_by_one(ask: Callable[..., Done]) -> None:
    found = ask("--json", *WARM, "--samples", 3).json
    assert found.keys() == {"answers", "columns"}
    assert [sample.keys() for sample in found["answers"]] == [{"answer", "cut"}] * 3
    assert len({sample["answer"] for sample in found["answers"]}) == 3
    assert ask("--json", *WARM, "--samples", 3).json == found
    assert ask("--json", *WARM, "--samples", 3, "--seed", 1).json != found
    one = ask("--json", *WARM, "--samples", 1).json
    assert {"answer": one["answer"], "cut": one["cut"]} == found["answers"][0]
    printed = ask(*WARM, "--samples", 3).out
    assert [printed.count(f"[{n}] ") for n in (1, 2, 3)] == [1, 1, 1]
    assert printed.count(" [cut]\n") == sum(sample["cut"] for sample in found["answers"])


@pytest.mark.parametrize("flags", [[], ["--text-prompt"]])
def test_samples_for_many_queries_do_not_depend_on_batches(
    flags: list[str], embedgrad: Command, generated: Path
) -> None:
    stdin = "".join(f'"What is {n} plus {n}?"\n' for n in range(7))
    command = ("generate", generated, "--quiet", *WARM, "--samples", 2, *flags)
    found = [
        embedgrad(*command, "--set", f"evaluation.batch_size={size}", stdin=stdin).out
        for size in (1, 3, 20)
    ]
    assert found[0] == found[1] == found[2]
    lines = [json.loads(line)["answers"] for line in found[0].splitlines()]
    assert len(lines) == 7
    assert len({sample["answer"] for samples in lines for sample in samples}) > 7


@pytest.mark.parametrize(
    "options", [(), ("--max-new-tokens", 30), (*WARM, "--seed", 3, "--max-new-tokens", 30)]
)
@pytest.mark.parametrize("flags", [[], ["--text-prompt"]])
def test_the_stream_prints_what_is_printed_without(
    flags: list[str], options: tuple[Any, ...], ask: Callable[..., Done]
) -> None:
    assert ask("--stream", *flags, *options).out == ask(*flags, *options).out


def test_what_is_streamed_cannot_drive_a_terminal(
    ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces(*_: object, **__: object) -> Any:
        yield "one\x1b"
        yield "[2J\n"
        yield "two\r"
        return Reply("", True)

    monkeypatch.setattr("embedgrad.inference.answer.stream", pieces)
    assert ask("--stream").out == "one\\x1b[2J\ntwo\\r [cut]\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens: Input should be greater than 0 (given: 0)"),
        (("--temperature", "-1"), "--temperature: Input should be greater than or equal to 0"),
        (("--temperature", "nan"), "--temperature: nan; expected a finite number"),
        ((*WARM, "--top-p", "0"), "--top-p: Input should be greater than 0"),
        ((*WARM, "--top-p", "1.5"), "--top-p: Input should be less than or equal to 1"),
        (("--samples", "0"), "--samples: Input should be greater than 0"),
        (("--seed", "-1"), "--seed: Input should be greater than or equal to 0"),
        (("--stop", ""), "--stop: ['']; expected a list of texts, none of them empty"),
        (("--stop", "\udcff"), "--stop: '\\udcff' is not UTF-8 text"),
        (("--samples", "2"), "--samples: decoding is greedy, so there is one answer; give"),
        (("--top-p", "0.5"), "--top-p: decoding is greedy, so there is one answer; give"),
        (("--at", "nan"), "--at: nan; expected a finite number, such as 0.8"),
        (("--stream", "--json"), "--stream: prints plain text; leave out --json"),
        (
            ("--stream", *WARM, "--samples", "2"),
            "--stream: prints one answer; leave out --samples",
        ),
    ],
    ids=lambda value: (
        " ".join(value).encode("ascii", "replace").decode() if isinstance(value, tuple) else ""
    ),
)
def test_options_that_make_no_sense_are_told_in_a_line(
    arguments: tuple[str, ...], told: str, ask: Callable[..., Done]
) -> None:
    done = ask(*arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.lines) == 1
    assert done.err.startswith(f"error: {told}")


def test_a_stream_of_standard_input_is_refused(embedgrad: Command, generated: Path) -> None:
    done = embedgrad("generate", generated, "--quiet", "--stream", stdin='"What?"\n')
    assert (done.code, done.out) == (2, "")
    assert done.lines == [
        "error: --stream: needs the query as an argument; leave it out for standard input"
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "3"),
        ("--temperature", "1"),
        ("--top-p", "0.5"),
        ("--samples", "2"),
        ("--stop", "x"),
        ("--seed", "0"),
        ("--stream", None),
    ],
)
def test_choices_take_none_of_it(
    option: str, value: str | None, embedgrad: Command, finished: tuple[Path, Any]
) -> None:
    arguments = [option] if value is None else [option, value]
    done = embedgrad("generate", finished[0], "A film.", "--quiet", *arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.lines) == 1
    assert done.err.startswith(f"error: {option}: this run's answers are ")
    assert "leave it out" in done.err
