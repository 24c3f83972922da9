"""Splits: disjoint, complete, near their shares, the same for a seed, and nothing leaks."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.data.examples import Example
from embedgrad.data.problems import Problems
from embedgrad.data.splits import NAMES, Splits, label_balance, make_splits, read_splits
from embedgrad.errors import DataError
from refusals import refused

COLUMNS = ("text",)


def row(i: int, text: str, answer: str = "a", group: str | None = None, file: str = "a") -> Example:
    return Example({"text": text, "id": str(i)}, answer, f"{file}.csv:{i + 2}", group)


def rows(n: int, file: str = "a", answers: Sequence[str] = ("a", "b")) -> list[Example]:
    return [row(i, f"{file} {i}", answers[i % len(answers)], file=file) for i in range(n)]


def parts(splits: Splits) -> dict[str, tuple[Example, ...]]:
    return {"train": splits.train, "dev": splits.dev, "test": splits.test}


def sources(examples: Sequence[Example]) -> list[str]:
    return [example.source for example in examples]


def homes(splits: Splits, key: str) -> Mapping[str, set[str]]:
    """Splits in which each value of a key, "text" or "group", stands."""
    found: dict[str, set[str]] = {}
    for name, part in parts(splits).items():
        for example in part:
            value = example.group if key == "group" else example.columns["text"].casefold()
            found.setdefault(str(value), set()).add(name)
    return found


# ------------------------------------------------------------------------- laws of carving

# Few different texts and groups, so that chance makes duplicates and shared groups; enough rows
# in units of their own that no split stays empty.
LINKED = st.lists(
    st.tuples(
        st.sampled_from(["same", "SAME", "Same  ", "other", None, None, None]),
        st.sampled_from("aab"),
        st.sampled_from(["x", "y", "z", None]),
    ),
    max_size=40,
).map(
    lambda drawn: (
        [row(i, text or f"own {i}", answer, group) for i, (text, answer, group) in enumerate(drawn)]
        + [row(i, f"alone {i}", "ab"[i % 2], f"alone {i}") for i in range(40, 100)]
    )
)
SEEDS = st.integers(0, 2**32)
FRACTIONS = st.sampled_from([(0.2, 0.2), (0.1, 0.3), (0.3, 0.0), (0.0, 0.4), (0.25, 0.5)])


@given(LINKED, SEEDS, FRACTIONS)
def test_one_list_is_dealt_out_whole_and_nothing_crosses(
    examples: list[Example], seed: int, fractions: tuple[float, float]
) -> None:
    splits = make_splits(examples, columns=COLUMNS, fractions=fractions, seed=seed)
    dealt = [source for part in parts(splits).values() for source in sources(part)]
    assert sorted(dealt) == sorted(sources(examples))  # complete, and each row once
    for key in ("text", "group"):
        crossing = {v for v, names in homes(splits, key).items() if len(names) > 1}
        assert not crossing - {"None"}


@given(st.lists(st.integers(1, 6), min_size=30, max_size=60), SEEDS, FRACTIONS)
def test_sizes_are_within_four_thirds_of_a_group(
    sizes: list[int], seed: int, fractions: tuple[float, float]
) -> None:
    groups = [str(g) for g, size in enumerate(sizes) for _ in range(size)]
    examples = [row(i, f"own {i}", group=group) for i, group in enumerate(groups)]
    splits = make_splits(examples, columns=COLUMNS, fractions=fractions, seed=seed)
    for part, share in zip((splits.dev, splits.test), fractions, strict=True):
        assert abs(len(part) - share * len(examples)) <= 4 / 3 * max(sizes)


@given(st.lists(st.sampled_from("aaaaabbc"), min_size=30, max_size=200), SEEDS)
def test_without_groups_every_answer_keeps_its_share(answers: list[str], seed: int) -> None:
    examples = [row(i, f"own {i}", answer) for i, answer in enumerate(answers)]
    splits = make_splits(examples, columns=COLUMNS, fractions=(0.2, 0.3), seed=seed)
    for part, share in ((splits.dev, 0.2), (splits.test, 0.3)):
        assert abs(len(part) - share * len(answers)) <= 4 / 3
        for answer, count in Counter(answers).items():
            # the difference of two running counts, each within 4/3
            assert abs(label_balance(part).get(answer, 0) - share * count) <= 8 / 3


@given(LINKED, SEEDS)
def test_same_seed_same_splits_whatever_the_order_of_columns(
    examples: list[Example], seed: int
) -> None:
    turned = [
        Example(dict(reversed(e.columns.items())), e.answer, e.source, e.group) for e in examples
    ]
    first = make_splits(examples, columns=("text", "id"), seed=seed)
    again = make_splits(turned, columns=("id", "text"), seed=seed)
    assert first == again


def test_other_seeds_make_other_splits_and_other_orders() -> None:
    made = [make_splits(rows(50), columns=COLUMNS, seed=seed) for seed in range(5)]
    assert len({frozenset(sources(splits.dev)) for splits in made}) == 5
    assert len({splits.digests["train"] for splits in made}) == 5
    given_all = [
        make_splits(rows(20), rows(5, "d"), rows(5, "t"), columns=COLUMNS, seed=seed)
        for seed in (0, 1)
    ]
    assert sources(given_all[0].train) != sources(given_all[1].train)
    assert sorted(sources(given_all[0].train)) == sorted(sources(given_all[1].train))


def test_every_row_of_a_generation_set_may_land_in_dev() -> None:
    """Answers that are all different are strata of one; their order must not decide."""
    examples = rows(10, answers=[str(i) for i in range(10)])
    landed = {
        source
        for seed in range(60)
        for source in sources(make_splits(examples, columns=COLUMNS, seed=seed).dev)
    }
    assert landed == set(sources(examples))


# ------------------------------------------------------------------------ what is carved


def test_dev_is_carved_from_train_when_test_is_given() -> None:
    splits = make_splits(rows(50), test=rows(10, "t"), columns=COLUMNS, fractions=(0.1, 0.2))
    assert [len(part) for part in parts(splits).values()] == [45, 5, 10]
    assert {source[0] for source in sources(splits.train + splits.dev)} == {"a"}
    assert sorted(sources(splits.test)) == sorted(sources(rows(10, "t")))
    assert splits.notes == ("Set aside 5 of 50 rows for dev (stratified by answer, seed 0).",)


def test_dev_is_carved_by_group_when_groups_are_given() -> None:
    examples = [row(i, f"own {i}", "ab"[i % 2], group=str(i // 5)) for i in range(100)]
    splits = make_splits(examples, test=rows(4, "t"), columns=COLUMNS)
    assert all(len(names) == 1 for g, names in homes(splits, "group").items() if g != "None")
    assert len(splits.dev) % 5 == 0
    assert "(by group, seed 0)" in splits.notes[0]


def test_fraction_zero_leaves_a_split_empty() -> None:
    splits = make_splits(rows(10), rows(4, "d"), columns=COLUMNS, fractions=(0.2, 0))
    assert (len(splits.train), len(splits.dev), splits.test) == (10, 4, ())
    assert splits.notes == ()


def test_a_test_file_changes_nothing_in_the_order_of_train() -> None:
    alone = make_splits(rows(20), rows(4, "d"), columns=COLUMNS, fractions=(0, 0))
    tested = make_splits(rows(20), rows(4, "d"), rows(4, "t"), columns=COLUMNS)
    assert alone.train == tested.train
    assert alone.dev == tested.dev


def test_repeats_in_one_list_stay_together_and_are_counted() -> None:
    examples = [row(i, f"text {i // 2}") for i in range(40)]
    splits = make_splits(examples, columns=COLUMNS)
    assert all(len(names) == 1 for names in homes(splits, "text").values())
    assert splits.notes[-1].endswith("20 rows that repeat another row's text.")


# -------------------------------------------------------------------------------- limits


def test_limit_cuts_after_shuffling() -> None:
    halves = [row(i, f"own {i}", "a" if i < 500 else "b") for i in range(1000)]
    full = make_splits(halves, rows(5, "d"), rows(5, "t"), columns=COLUMNS)
    few = make_splits(halves, rows(5, "d"), rows(5, "t"), columns=COLUMNS, limit={"train": 64})
    assert few.train == full.train[:64]
    assert few.dev == full.dev
    balance = label_balance(few.train)
    assert min(balance["a"], balance["b"]) >= 16  # not the prefix of a sorted file


@given(st.lists(st.sampled_from("aaaaabbc"), min_size=30, max_size=80), SEEDS, st.data())
def test_a_limit_keeps_the_share_of_every_answer(
    answers: list[str], seed: int, data: st.DataObject
) -> None:
    examples = [row(i, f"own {i}", answer) for i, answer in enumerate([*answers, "a", "b"])]
    whole = Counter(example.answer for example in examples)
    limit = data.draw(st.integers(2, len(examples)))

    def limited(limit: int, choices: str | None = "abc") -> tuple[Example, ...]:
        made = make_splits(
            rows(4, "d"), rows(4, "e"), examples, columns=COLUMNS, choices=choices, seed=seed,
            limit={"test": limit},
        )  # fmt: skip
        return made.test

    few = limited(limit)
    assert len(few) == limit
    for answer, count in label_balance(few).items():
        assert abs(count - whole[answer] * limit / len(examples)) <= 1
    assert few == limited(limit)
    assert set(sources(few)) <= set(sources(limited(min(limit + 1, len(examples)))))
    assert limited(limit, None) == limited(len(examples), None)[:limit]  # of free answers, plain


@pytest.mark.parametrize(
    ("limit", "kept"), [(2, {"a", "b"}), (3, {"a", "b", "c"}), (10, {"a", "b", "c"})]
)
def test_a_limit_of_train_loses_no_answer(limit: int, kept: set[str]) -> None:
    train = [row(i, f"own {i}", answer) for i, answer in enumerate("a" * 90 + "b" * 3 + "c")]
    held_out = (rows(4, "d"), rows(4, "e"))
    splits = make_splits(train, *held_out, columns=COLUMNS, choices="abc", limit={"train": limit})
    assert label_balance(splits.train).keys() == kept


@pytest.mark.parametrize("answers", ["choices", "free"])
def test_a_text_with_several_answers_is_mentioned(answers: str) -> None:
    train = [*rows(20), row(20, "A 3", "b"), row(21, "a  3", "a"), row(22, "caf\u00e9", "a")]
    train.append(row(23, "cafe\u0301", "b"))
    choices = "ab" if answers == "choices" else None
    splits = make_splits(train, columns=COLUMNS, choices=choices)
    (note,) = [note for note in splits.notes if "different answers" in note]
    assert note == (
        "2 texts have different answers in different rows (first: 'b' in a.csv:5, 'a' in a.csv:23);"
        " correct them or remove the rows."
    )
    assert not any(
        "different answers" in note for note in make_splits(rows(20), columns=COLUMNS).notes
    )


def test_splits_of_data_frames_carry_the_notes_on_how_they_were_read() -> None:
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(20)], "label": [0, 1] * 10})
    splits = read_splits(frame, columns=["text"], answer="label", choices=["0", "1"])
    assert sorted(sources([*splits.train, *splits.dev, *splits.test]))[0] == "DataFrame:1"
    names = datasets.ClassLabel(names=["no", "yes"])
    data = datasets.Dataset.from_pandas(frame).cast_column("label", names)
    splits = read_splits(data, columns=["text"], answer="label")
    assert 'labels = { "0" = "no", "1" = "yes" }' in splits.notes[0]


def test_limit_beyond_the_rows_is_noted() -> None:
    splits = make_splits(
        rows(8), rows(4, "d"), rows(4, "t"), columns=COLUMNS, limit={"dev": 9, "test": 4}
    )
    assert len(splits.dev) == 4
    assert splits.notes == ("Limit 9 for dev: it has only 4 rows, all used.",)


def test_limit_that_is_none_of_the_kind_is_refused() -> None:
    with refused("data.limit.dev: is 0; expected at least 1"):
        make_splits(rows(9), columns=COLUMNS, limit={"dev": 0})
    with refused("data.limit: unknown split 'tets'", "did you mean 'test'"):
        make_splits(rows(9), columns=COLUMNS, limit={"tets": 1})


# ------------------------------------------------------------------------------- refused


def test_texts_in_two_splits_are_refused_with_their_number_and_first_pair() -> None:
    train = [*rows(9), row(9, "A  shared\ttext"), row(10, "another")]
    test = [row(i, text, file="t") for i, text in enumerate(["own", "a SHARED text ", "Another"])]
    dev = [row(0, "OWN", file="d")]
    with refused("data: 1 row repeats the text", "first: dev d.csv:2 and test t.csv:2"):
        make_splits(rows(9), dev, test, columns=COLUMNS)
    with refused("2 rows repeat", "train a.csv:11 and test t.csv:3", "data.drop_duplicates"):
        make_splits(train, rows(4, "d"), test, columns=COLUMNS)
    with refused("1 row repeats", "first: train a.csv:11 and test t.csv:3"):
        make_splits(train, test=test[:2], columns=COLUMNS)  # where dev is yet to be carved


def test_texts_in_two_splits_may_be_allowed_and_are_noted() -> None:
    splits = make_splits(rows(9), rows(3), rows(3, "t"), columns=COLUMNS, allow_duplicates=True)
    assert [len(part) for part in parts(splits).values()] == [9, 3, 3]
    assert splits.notes[0].startswith("Allowed by data.allow_duplicates: 3 rows repeat the text")


def test_texts_of_later_splits_are_dropped_before_any_limit_and_noted() -> None:
    train = [*rows(9), row(9, "D 0"), row(10, "t  1"), row(11, "t 2")]
    dev = [*rows(3, "d"), row(3, "T 2", file="d")]
    splits = make_splits(
        train, dev, rows(3, "t"), columns=COLUMNS, limit={"train": 9}, drop_duplicates=True
    )
    assert sorted(sources(splits.train)) == sorted(sources(rows(9)))
    assert sorted(sources(splits.dev)) == sorted(sources(rows(3, "d")))
    assert sorted(sources(splits.test)) == sorted(sources(rows(3, "t")))
    assert splits.notes == (
        "Left out by data.drop_duplicates: 3 rows of train also in dev or test.",
        "Left out by data.drop_duplicates: 1 row of dev also in test.",
    )
    plain = make_splits(rows(9), rows(3, "d"), rows(3, "t"), columns=COLUMNS)
    assert plain.digests == splits.digests  # nothing else of the splits has changed


def test_what_is_dropped_is_not_carved_either() -> None:
    train = [*rows(50), *rows(10, "t")]
    splits = make_splits(train, test=rows(10, "t"), columns=COLUMNS, drop_duplicates=True)
    assert len(splits.train) + len(splits.dev) == 50
    assert splits.notes[0] == "Left out by data.drop_duplicates: 10 rows of train also in test."
    assert splits.notes[1].startswith("Set aside 10 of 50 rows for dev")


def test_repeats_inside_a_split_are_not_dropped() -> None:
    examples = [*rows(9), row(9, "a 0")]
    given_rows = examples, rows(3, "d"), rows(3, "t")
    dropped = make_splits(*given_rows, columns=COLUMNS, drop_duplicates=True)
    assert len(dropped.train) == 10
    assert dropped == make_splits(*given_rows, columns=COLUMNS)


def test_a_split_of_which_nothing_is_left_is_refused() -> None:
    with refused("data.dev: every row has a text of test", "data.drop_duplicates"):
        make_splits(rows(9), rows(3, "d"), rows(3, "d"), columns=COLUMNS, drop_duplicates=True)
    with refused("data.train: every row has a text of dev or test"):
        make_splits(rows(2), rows(1), rows(2)[1:], columns=COLUMNS, drop_duplicates=True)


def test_duplicates_are_judged_by_the_columns_of_the_template() -> None:
    train = [Example({"q": "same", "a": f"{i}", "id": "1"}, "x", f"a:{i}") for i in range(4)]
    test = [Example({"q": "same", "a": "9", "id": "1"}, "x", "t:1")]
    assert len(make_splits(train, test=test, columns=("q", "a")).test) == 1
    with refused("1 row repeats"):
        make_splits(train, test=test, columns=("q",))


def test_groups_in_two_splits_are_refused_by_name() -> None:
    train = [row(i, f"own {i}", group=f"story {i}") for i in range(5)]
    test = [row(i, f"test {i}", group=f"story {i + 4}", file="t") for i in range(5)]
    with refused("group 'story 4' is in train (a.csv:6) and in test (t.csv:2)", "by group"):
        make_splits(train, test=test, columns=COLUMNS)


def test_single_class_training_set_is_refused() -> None:
    held_out = rows(4, "d"), rows(4, "t")
    with refused("data.train: all 9 rows have the answer 'a' (first: a.csv:", "at least two"):
        make_splits(rows(9, answers="a"), *held_out, columns=COLUMNS, choices="ab")
    with refused("data.train: its 1 row has the answer"):  # the limit made it so
        make_splits(rows(9), *held_out, columns=COLUMNS, choices="ab", limit={"train": 1})


def test_one_answer_is_no_fault_without_choices() -> None:
    assert len(make_splits(rows(10, answers=[""]), columns=COLUMNS).train) == 6


def test_choices_that_a_split_lacks_are_noted() -> None:
    splits = make_splits(
        rows(8), rows(4, "d", "a"), rows(4, "t"), columns=COLUMNS, choices=["a", "b", "c"]
    )
    assert splits.notes == (
        "No row of train has the answer 'c'.",
        "No row of dev has the answer 'b' or 'c'.",
        "No row of test has the answer 'c'.",
    )


@pytest.mark.parametrize("name", NAMES)
def test_given_split_without_rows_is_refused(name: str) -> None:
    given_rows = {"train": rows(9), "dev": rows(4, "d"), "test": rows(4, "t")} | {name: []}
    with refused(f"data.{name}: holds no rows", "at least one"):
        make_splits(**given_rows, columns=COLUMNS)


def test_split_too_small_to_carve_is_refused() -> None:
    with refused(
        "data.test: would be empty: a share of 0.2 of 2 rows; give",
        "data.dev_share and data.test_share",
    ):
        make_splits(rows(2), columns=COLUMNS)
    one_group = [row(i, f"own {i}", group="only") for i in range(50)]
    with refused(
        "data.dev: would be empty: a share of 0.2 of 50 rows, which are 1 part (rows of",
        "one group",
    ):
        make_splits(one_group, columns=COLUMNS)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.2), (0.2, 1.5), (float("nan"), 0.1)])
def test_fractions_that_leave_no_train_are_refused(fractions: tuple[float, float]) -> None:
    with refused(
        "data.dev_share, data.test_share: are",
        f"{fractions[1]} for test",
        "expected numbers from 0 to 1",
    ):
        make_splits(rows(50), columns=COLUMNS, fractions=fractions)


def test_fractions_of_given_splits_do_not_matter() -> None:
    splits = make_splits(rows(9), rows(4, "d"), rows(4, "t"), columns=COLUMNS, fractions=(9, 9))
    assert len(splits.train) == 9


# -------------------------------------------------------------------------------- digests


def test_digests_tell_texts_answers_and_order_apart_and_nothing_else() -> None:
    def digest(examples: list[Example]) -> str:
        given_dev = rows(2, "d")
        return make_splits(
            examples, given_dev, given_dev, columns=COLUMNS, allow_duplicates=True
        ).digests["train"]

    base = digest(rows(9))
    renamed = [Example({"text": e.columns["text"]}, e.answer, "elsewhere") for e in rows(9)]
    assert digest(renamed) == base
    assert digest(rows(10)) != base
    assert digest(rows(9, answers=["b", "a"])) != base
    assert digest([*rows(8), row(8, "changed")]) != base
    assert digest(rows(9)[::-1]) != base


def test_label_balance_counts_answers_in_order() -> None:
    assert list(label_balance(rows(5, answers=["b", "a"])).items()) == [("a", 2), ("b", 3)]


def test_a_hundred_thousand_rows_take_about_two_seconds() -> None:
    examples = rows(100_000)
    start = time.process_time()
    splits = make_splits(examples, columns=COLUMNS)
    assert time.process_time() - start < 8  # measured 1.5 s; the rest is for slow machines
    assert [len(part) for part in parts(splits).values()] == [60_000, 20_000, 20_000]


def test_problems_are_collected_where_what_failed_can_be_left_out() -> None:
    train = [row(i, f"text {i}", "a", group=f"group {i}") for i in range(4)]
    dev = [row(9, "text 0", "a", group="group 1", file="b")]
    problems = Problems()
    choices = ("a", "b")
    splits = make_splits(
        train, dev, [row(8, "z")], columns=COLUMNS, choices=choices, problems=problems
    )
    assert (len(splits.train), len(splits.dev)) == (4, 1)
    groups, texts, answers = problems.lines
    assert "group 'group 1' is in train" in groups
    assert "1 row repeats the text of a row in another split" in texts
    assert "all 4 rows have the answer 'a'" in answers


def test_labels_that_are_no_choices_are_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"film {i},{('good', 'bad', 'Good')[i % 3]}" for i in range(40)]
    path.write_text("\n".join(["text,label", *lines]))
    problems = Problems()
    splits = read_splits(
        str(path), columns=COLUMNS, answer="label", choices=["good", "bad"], problems=problems
    )
    (line,) = problems.lines
    assert "of 13 such rows" in line
    assert 'data.labels = { "Good" = "good" }' in line
    assert len([*splits.train, *splits.dev, *splits.test]) == 27


def test_rows_that_cannot_be_used_are_collected_and_the_others_split(tmp_path: Path) -> None:
    lines = [{"text": f"Text {i}", "label": "ab"[i % 2]} for i in range(9)]
    bad = [{"text": "", "label": "a"}, *({"text": f"Bad {i}", "label": "c"} for i in range(7))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, *bad]), encoding="utf-8")
    problems = Problems()
    options = {"columns": COLUMNS, "answer": "label", "choices": ("a", "b"), "dev_share": 0.0}
    splits = read_splits(
        str(path), str(tmp_path / "none"), test_share=0.0, problems=problems, **options
    )
    assert (len(splits.train), len(splits.dev)) == (9, 0)  # a named split is not carved
    assert len(problems.lines) == 7
    assert "column 'text' is empty" in problems.lines[0]
    assert problems.lines[5] == "... and 3 more problems like the last one"
    assert "no such file" in problems.lines[6]
    with pytest.raises(DataError, match="column 'text' is empty"):
        read_splits(str(path), **options)
