"""Training targets: worked solutions, the answer alone, and self-training by rejection sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from embedgrad import Evaluation, Example, LanguageModel, Recipe, Target, Template, run
from embedgrad.errors import DataError, RecipeError, RunError
from embedgrad.experiments import run as runs
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import Reply
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.scorers import Contains, Exact, Number, Scorer
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.build import read_data
from embedgrad.training.self_training import Solutions, source_of, training_examples
from embedgrad.training.settings import Training
from refusals import refused
from run_kit import Command, values, write_jsonl
from small_recipe import changed

pytest_plugins = ["tiny_runs"]

TEMPLATE = Template.chat(user="{question}\n\n[[Think first, then answer:]]")
NUMBERS = Evaluation(scorer=Number(), batch_size=4, max_new_tokens=24)
TWO = Solutions(samples=2)  # with `NUMBERS`: two questions a batch


def sums(count: int) -> list[Example]:
    """What is 3 plus 1? And so on."""
    rows = ((f"What is {i} plus 1?", str(i + 1)) for i in range(count))
    return [Example({"question": q}, a, f"sums.jsonl:{n}") for n, (q, a) in enumerate(rows, 1)]


class Writer:
    """A fake model: writes what `write` returns, and records what it was asked.

    A text that ends in "..." was cut.
    """

    def __init__(self, write: Callable[[str], Sequence[str]]):
        self.write = write
        self.asked: list[str] = []
        self.decodings: list[Decoding] = []
        self.shapes: list[tuple[int, int]] = []  # tokens of the prefix, rows of the prompt
        self.numbers: dict[str, int] = {}
        self.stop_before = 10**9

    def __call__(
        self,
        model: LanguageModel,
        rows_PD: torch.Tensor,
        sequences: Sequence[TokenSequence],
        decoding: Decoding,
        *,
        numbers: Sequence[int],
        **options: Any,
    ) -> list[tuple[Reply, ...]]:
        if len(self.asked) >= self.stop_before:
            raise KeyboardInterrupt
        questions = [sequence.example.columns["question"] for sequence in sequences]
        self.asked += questions
        self.numbers |= zip(questions, numbers, strict=True)
        self.decodings += [decoding] * len(sequences)
        self.shapes += [(len(sequence.prefix), len(rows_PD)) for sequence in sequences]
        made = [self.write(question) for question in questions]
        return [tuple(Reply(t.removesuffix("..."), t.endswith("...")) for t in ts) for ts in made]


def right(question: str) -> list[str]:
    """A right solution, and a wrong one."""
    first = int(question.split()[2])
    return [f"{first} and 1 make {first + 1}.", f"It is {first}."]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    made = Writer(right)
    real = LanguageModel.generate

    def write(
        model: LanguageModel, prompt: Any, sequences: Any, decoding: Decoding, **o: Any
    ) -> Any:
        answer = made if decoding.temperature else real  # which scores dev
        return answer(model, prompt, sequences, decoding, **o)

    monkeypatch.setattr(LanguageModel, "generate", write)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "solutions"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny.loaded(dtype=torch.float32))


Write = Callable[..., tuple[list[Example], dict[str, Any]]]


@pytest.fixture
def write(model: LanguageModel) -> Write:
    """`training_examples` for some rows; what it needs besides them is made here."""

    def made(
        rows: Sequence[Example],
        solutions: Solutions = TWO,
        evaluation: Evaluation = NUMBERS,
        *,
        template: Template = TEMPLATE,
        target: Target = Target(),
        using: LanguageModel = model,
        **options: Any,
    ) -> tuple[list[Example], dict[str, Any]]:
        sequencer = using.sequencer(template, target, rows, truncate=options.pop("truncate", None))
        return training_examples(
            using, sequencer, rows, solutions, evaluation=evaluation, **options
        )

    return made


@contextmanager
def header_of(path: Path) -> Iterator[dict[str, Any]]:
    """The header of a file of solutions, to be changed and written."""
    header, *entries = lines(path)
    yield header
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *entries)))


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# -- which source ----------------------------------------------------------------------------------

WORKED = [replace(row, solution=f"So {row.answer}") for row in sums(3)]
CHOICES = Target(("1", "2", "3"))


@pytest.mark.parametrize(
    ("rows", "target", "scorer", "source"),
    [
        (WORKED, Target(), Number(), "column"),
        (WORKED, Target(), Exact(), "column"),
        (WORKED, CHOICES, Number(), "answer"),
        (sums(3), CHOICES, Number(), "answer"),
        (sums(3), Target(), Exact(), "answer"),
        (sums(3), Target(), Number(), "self-written"),
        (sums(3), Target(), Contains(), "self-written"),
        ([Example({}, "a film {}", "f:1")], Target(), Contains(), "self-written"),
        ([], Target(), Number(), "answer"),
    ],
)
def test_auto_takes_solutions_where_there_are_any_and_writes_them_where_that_can_be_right(
    rows: list[Example], target: Target, scorer: Scorer, source: str
) -> None:
    assert source_of(Solutions(), rows, target, scorer) == source


def test_the_column_is_taken_as_it_is_and_the_answer_alone_leaves_it_out(
    write: Write, writer: Writer
) -> None:
    assert write(WORKED) == (WORKED, {"source": "column", "questions": 3, "kept": 3})
    made, told = write(WORKED, Solutions(source="answer"))
    assert made == sums(3)
    assert told == {"source": "answer", "questions": 3, "kept": 3}
    assert writer.asked == []


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"solutions": {"source": "column"}}, "solutions.source: 'column', but data.solution names"),
    (
        {"solutions": {"source": "self-written"}, "target": {"choices": ["a", "b"]}},
        "solutions.source: 'self-written', but with target.choices",
    ),
    (
        {
            "solutions": {"source": "column"},
            "target": {"choices": ["a", "b"]},
            "data": {"solution": "worked"},
        },
        "solutions.source: 'column', but with target.choices",
    ),
    (
        {"solutions": {"source": "self-written", "temperature": 0.0}},
        "solutions.temperature: 0, so that all 4 samples would be the same",
    ),
    ({"solutions": {"file": " "}}, "solutions.file: ''"),
    ({"solutions": {"source": "own"}}, "solutions.source: "),
    ({"solutions": {"top_p": 0.0}}, "solutions.top_p: "),
    ({"solutions": {"samples": 0}}, "solutions.samples: "),
]


@pytest.mark.parametrize(
    ("sections", "told"), CONTRADICTIONS, ids=[told for _, told in CONTRADICTIONS]
)
def test_settings_that_contradict_each_other_are_one_problem(
    sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed(**sections))
    (problem,) = caught.value.problems
    assert problem.startswith(told)


def test_settings_that_fit_together_are_accepted() -> None:
    greedy = {"source": "self-written", "temperature": 0.0, "samples": 1}
    assert Recipe.from_dict(changed(solutions=greedy)).solutions.samples == 1
    column = changed(solutions={"source": "column"}, data={"solution": "worked"})
    assert Recipe.from_dict(column).solutions.source == "column"
    with refused("solutions.temperature: 0"):  # as soon as it is clear what auto means
        source_of(Solutions(temperature=0.0), sums(2), Target(), Number())
    assert source_of(Solutions(temperature=0.0), sums(2), Target(), Exact()) == "answer"


def test_rows_are_chosen_by_accuracy_where_dev_has_bare_answers_only() -> None:
    def metric(source: str, choices: bool = False, **options: Any) -> str:
        return Training(**options).metric_for(CrossEntropy(), choices=choices, source=source)

    assert metric("self-written") == "accuracy"
    assert metric("self-written", metric="log_loss") == "log_loss"
    assert metric("column") == metric("answer") == "log_loss"
    assert metric("answer", choices=True) == "accuracy"
    assert metric("teacher", choices=True) == "log_loss"


# -- rejection sampling ----------------------------------------------------------------------------

REPLIES = {
    "What is 0 plus 1?": [" 0 + 1 = 1\n", "0 + 1 = 1", "so 1", "I say 1"],  # the first two: one
    "What is 1 plus 1?": ["1 + 1 = 3", "It is 3", "", "none"],
    "What is 2 plus 1?": ["2 + 1 = 3...", "It is 4", "well", "1 2 3..."],
    "What is 3 plus 1?": ["It is 5", "3 + 1 = 4...", "It is 4.", "5..."],
}


def test_what_is_right_and_ended_is_trained_on_and_counted(write: Write, writer: Writer) -> None:
    writer.write = REPLIES.__getitem__
    told: list[dict[str, Any]] = []
    rows = sums(4)
    made, facts = write(rows, Solutions(keep=2), report=told.append)
    assert made == [
        replace(rows[0], solution="0 + 1 = 1"),
        replace(rows[0], solution="so 1"),
        replace(rows[3], solution="It is 4."),
    ]
    counts = {"questions": 4, "solved": 2, "kept": 3, "tried": 16, "right": 8, "verified": 5}
    counts |= {"cut": 4, "too_long": 0, "sampled_questions": 4}
    assert {name: facts[name] for name in counts} == counts
    assert facts["source"] == "self-written"
    assert facts["mean_tokens"] > 3
    notes = [event["text"] for event in told if event["event"] == "note"]
    assert "4 solutions for each of 4 questions" in notes[0]
    assert "2 of 4 training questions are solved (5 of 16 replies" in notes[-1]
    assert notes[-1].endswith("2 questions are left out")
    assert {"event": "stage", "text": "sampling solutions with the text prompt"} in told
    assert len(set(writer.numbers.values())) == 4  # or else questions would share their draws
    bars = [(e["done"], e["total"]) for e in told if e["event"] == "scoring"]
    assert bars == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_model_samples_as_the_settings_say(write: Write, writer: Writer) -> None:
    solutions = Solutions(samples=2, temperature=1.5, top_p=0.5, seed=7)
    write(sums(1), solutions, replace(NUMBERS, stop=("\n\n",)))
    settled = {"max_new_tokens": 24, "temperature": 1.5, "top_p": 0.5, "samples": 2, "seed": 7}
    assert writer.decodings == [Decoding(stop=("\n\n",), **settled)]
    write(sums(1), replace(solutions, max_new_tokens=9), replace(NUMBERS, stop=("\n\n",)))
    assert writer.decodings[1] == replace(writer.decodings[0], max_new_tokens=9)


def test_a_solution_too_long_for_the_context_is_left_out(write: Write, writer: Writer) -> None:
    def first_is_long(question: str) -> list[str]:
        solution = right(question)[0]
        return [" ".join(["so"] * 600) + solution if " 0 " in question else solution] * 2

    writer.write = first_is_long
    rows = sums(2)
    made, told = write(rows)
    assert made == [replace(rows[1], solution="1 and 1 make 2.")]
    assert (told["solved"], told["too_long"], told["kept"]) == (2, 1, 1)
    with refused("none of 1 verified solutions fits into the model's 512 tokens"):
        write(rows[:1])


def test_the_answer_prefix_is_not_written_twice(
    write: Write, writer: Writer, model: LanguageModel
) -> None:
    writer.write = lambda question: ["Answer: it is 1.", "1"]
    target = Target(answer_prefix="Answer: ")
    (made, same), _ = write(sums(1), replace(TWO, keep=2), target=target)
    assert (made.solution, same.solution) == ("it is 1.", "1")
    plain = Template.plain("{question}\n[[Think first.]]\nAnswer:")
    writer.write = lambda question: [" it is 1.", "2"]
    ((made,), _) = write(sums(1), template=plain)
    sequence = model.sequencer(plain, Target(), sums(1))(made)
    assert model.tokenizer.decode(sequence.targets[0]).startswith(" it is 1.")


def test_equal_questions_are_asked_once_and_all_trained_on(write: Write, writer: Writer) -> None:
    rows = [*sums(2), replace(sums(1)[0], source="again.jsonl:1")]
    made, told = write(rows)
    assert sorted(writer.asked) == ["What is 0 plus 1?", "What is 1 plus 1?"]
    assert [example.source for example in made] == [row.source for row in rows]
    assert (told["questions"], told["solved"], told["tried"]) == (3, 3, 4)


def test_rows_that_merge_with_the_prompt_are_asked_by_their_plain_tokens(
    write: Write, writer: Writer, model: LanguageModel
) -> None:
    rows = sums(2)
    merging = replace(rows[1], columns={"question": "What is 1 plus 1? The fi"})
    template = Template.chat(user="{question}[[lm says it. Answer:]]")
    sequencer = model.sequencer(template, Target(), rows)
    merged = [sequencer(row).plain is not None for row in (rows[0], merging)]
    assert merged == [False, True]
    made, _ = write([rows[0], merging], template=template)
    assert len(made) == 2
    seen = dict(zip(writer.asked, writer.shapes, strict=True))
    assert seen["What is 1 plus 1? The fi"] == (0, 0)
    assert seen["What is 0 plus 1?"] == (len(sequencer(rows[0]).prefix), len(sequencer.span.ids))


def test_truncated_rows_are_counted_once(
    write: Write, writer: Writer, model: LanguageModel
) -> None:
    rows = [Example({"question": "What is 0 plus 1? " * 200}, "1", "long.jsonl:1")]
    sequencer = model.sequencer(TEMPLATE, Target(), rows, truncate="question")
    made, _ = training_examples(model, sequencer, rows, TWO, evaluation=NUMBERS)
    assert (len(made), sequencer.truncated) == (1, 0)
    sequencer.build(made)
    assert sequencer.truncated == 1


# -- what is kept, and used again ------------------------------------------------------------------


def test_the_file_says_how_the_solutions_were_made(
    write: Write, writer: Writer, model: LanguageModel, tmp_path: Path
) -> None:
    writer.write = REPLIES.__getitem__
    path = tmp_path / "folder" / "mine.jsonl"
    _, told = write(sums(4), Solutions(file=str(path)), keep_at=tmp_path / "run" / "copy.jsonl")
    header, *entries = lines(path)
    assert header["model"]["name"] == "tiny-llama"
    assert header["model"]["embedding_digest"] == model.info.embedding_digest
    assert header["prompt"]["spans"] == ["Think first, then answer:"]
    assert header["prompt"]["template"] == TEMPLATE.as_dict()
    settled = {"samples": 4, "temperature": 0.7, "top_p": 0.95, "seed": 0, "max_new_tokens": 24}
    assert header["decoding"] == {**settled, "stop": []}
    assert header["scorer"]["name"] == "number"
    assert header["data"]["questions"] == 4
    assert header["versions"]["torch"] == torch.__version__
    assert header["created"]
    by_source = {entry["source"]: entry for entry in entries}
    entry = by_source["sums.jsonl:1"]
    assert entry["solutions"] == ["0 + 1 = 1", "so 1", "I say 1"]
    assert (entry["answer"], entry["tried"], entry["right"], entry["verified"]) == ("1", 4, 4, 4)
    entry = by_source["sums.jsonl:3"]
    assert (entry["solutions"], entry["right"], entry["cut"]) == ([], 2, 2)
    assert entry["sample"] == "2 + 1 = 3"
    assert told["file"] == str(path)
    assert sorted(map(str, lines(path))) == sorted(map(str, lines(tmp_path / "run" / "copy.jsonl")))


def test_other_seeds_and_shuffles_of_a_recipe_use_what_was_sampled(
    write: Write, writer: Writer, cache: Path
) -> None:
    first, told = write(sums(4))
    (file,) = cache.iterdir()
    before, asked = file.read_bytes(), len(writer.asked)
    again, told_again = write(sums(4)[::-1], replace(TWO, keep=3))
    assert len(writer.asked) == asked == 4
    assert again == first[::-1]
    assert told_again == {**told, "sampled_questions": 0}
    assert file.read_bytes() == before
    write(sums(4), replace(TWO, seed=1))
    assert len(writer.asked) == 8
    assert len(list(cache.iterdir())) == 2


def test_an_interrupted_sampling_resumes_with_the_same_result(
    write: Write, writer: Writer, tmp_path: Path
) -> None:
    whole, parts = (replace(TWO, file=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    expected, _ = write(sums(7), whole)
    order = list(writer.asked)
    told: list[dict[str, Any]] = []
    writer.stop_before = len(writer.asked) + 4
    with pytest.raises(KeyboardInterrupt):
        write(sums(7), parts, report=told.append)
    assert told[-1]["text"].endswith(
        "b.jsonl keeps the solutions of 4 of 7 questions for the next run"
    )
    assert len(lines(tmp_path / "b.jsonl")) == 1 + 4
    writer.stop_before, writer.asked = 10**9, []
    made, facts = write(sums(7), parts)
    assert writer.asked == order[4:]
    assert (made, facts["sampled_questions"]) == (expected, 3)
    assert lines(tmp_path / "a.jsonl")[1:] == lines(tmp_path / "b.jsonl")[1:]


def test_an_unfinished_line_is_written_again(write: Write, writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    solutions = replace(TWO, file=str(path))
    write(sums(4), solutions)
    content, order = path.read_bytes(), list(writer.asked)
    path.write_bytes(content[:-20])
    writer.asked = []
    write(sums(4), solutions)
    assert writer.asked == order[3:]
    assert path.read_bytes() == content


def damage(path: Path, number: int, line: bytes) -> None:
    found = path.read_bytes().split(b"\n")
    found[number - 1] = line
    path.write_bytes(b"\n".join(found))


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"question": "x"}', b"\xff\xfe", b"", b'{"solutions": [3]}', b"[" * 100_000],
)
def test_a_damaged_line_is_named(line: bytes, write: Write, writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    solutions = replace(TWO, file=str(path))
    write(sums(3), solutions)
    damage(path, 3, line)
    with refused(f"{path}:3: is damaged; remove this line, and its question is sampled again"):
        write(sums(3), solutions)
    content = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(content[:2] + content[3:]))
    made, _ = write(sums(3), solutions)
    assert len(made) == 3


@pytest.mark.parametrize("line", [b"", b"{", b'{"question": "x"}', b"question,answer", b"\xff"])
def test_a_file_of_something_else_is_never_touched(
    line: bytes, write: Write, writer: Writer, tmp_path: Path
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(line + b"\n1\n")
    with refused(f"{path}: does not begin as a file of solutions does; name another file"):
        write(sums(3), replace(TWO, file=str(path)))
    assert path.read_bytes() == line + b"\n1\n"


def test_a_file_that_cannot_be_read_or_written_is_named(
    write: Write, writer: Writer, tmp_path: Path
) -> None:
    with refused(f"{tmp_path}: cannot be read"):
        write(sums(2), replace(TWO, file=str(tmp_path)))
    (tmp_path / "plain").write_text("")
    with pytest.raises((RunError, DataError), match="cannot be"):
        write(sums(2), replace(TWO, file=str(tmp_path / "plain" / "s.jsonl")))
    assert writer.asked == []


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": (
        {"solutions": replace(TWO, temperature=1.0)},
        "made with another decoding.temperature (0.7, now 1.0);",
    ),
    "samples and seed": (
        {"solutions": Solutions(samples=3, seed=2)},
        "another decoding.samples (2, now 3), decoding.seed (0, now 2);",
    ),
    "limit": (
        {"evaluation": replace(NUMBERS, max_new_tokens=25)},
        "another decoding.max_new_tokens (24, now 25);",
    ),
    "scorer": (
        {"evaluation": replace(NUMBERS, scorer=Number(relative_tolerance=0.5))},
        "another scorer.relative_tolerance (0.0, now 0.5);",
    ),
    "kind of scorer": (
        {"evaluation": replace(NUMBERS, scorer=Contains())},
        'another scorer.name ("number", now "contains")',
    ),
    "prompt": (
        {"template": Template.chat(user="{question}\n\n[[Think hard:]]")},
        'another prompt.spans (["Think first, then answer:"], now ["Think hard:"]), prompt',
    ),
    "data": ({"rows": sums(2)}, "another data.questions (3, now 2), data.sha256"),
    "answers": (
        {"rows": [replace(row, answer=f"{row.answer}.0") for row in sums(3)]},
        "another data.sha256 (",
    ),
}


@pytest.mark.parametrize(("change", "told"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_other_solutions_is_refused_with_what_differs(
    change: Mapping[str, Any], told: str, write: Write, writer: Writer, tmp_path: Path
) -> None:
    path = tmp_path / "s.jsonl"
    write(sums(3), replace(TWO, file=str(path)))
    before, writer.asked = path.read_bytes(), []
    given = {"rows": sums(3), "solutions": TWO, **change}
    given["solutions"] = replace(given["solutions"], file=str(path))
    with refused(f"{path}: holds solutions", told, "name another file in solutions.file"):
        write(**given)
    assert path.read_bytes() == before
    assert writer.asked == []


def test_a_file_of_another_model_is_refused(write: Write, writer: Writer, tmp_path: Path) -> None:
    solutions = replace(TWO, file=str(tmp_path / "s.jsonl"))
    write(sums(2), solutions)
    other = LanguageModel(tiny.loaded(dtype=torch.float32, seed=1))
    with refused("another model.embedding_digest (", "now ", "name another file"):
        write(sums(2), solutions, using=other)


def test_a_fine_tuned_model_with_the_same_embeddings_is_another_model(
    write: Write, writer: Writer, tmp_path: Path
) -> None:
    solutions = replace(TWO, file=str(tmp_path / "s.jsonl"))
    loaded = tiny.loaded(dtype=torch.float32, seed=3)
    other = LanguageModel(loaded)
    write(sums(2), solutions, using=other)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with refused("another model.weights (", "now ", "name another file"):
        write(sums(2), solutions, using=other)


def test_a_fine_tuned_model_writes_into_a_file_of_its_own(
    write: Write, writer: Writer, cache: Path
) -> None:
    loaded = tiny.loaded(dtype=torch.float32, seed=4)
    other = LanguageModel(loaded)
    _, first = write(sums(2), TWO, using=other)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    _, second = write(sums(2), TWO, using=other)
    assert (first["sampled_questions"], second["sampled_questions"]) == (2, 2)
    assert Path(second["file"]) != Path(first["file"])
    _, third = write(sums(2), TWO, using=other)
    assert (third["file"], third["sampled_questions"]) == (second["file"], 0)


def test_a_file_of_another_kind_of_template_is_refused(
    write: Write, writer: Writer, tmp_path: Path
) -> None:
    path = tmp_path / "s.jsonl"
    write(sums(2), replace(TWO, file=str(path)))
    with header_of(path) as header:
        header["prompt"]["template"] = {"text": "{question} [[Think:]]"}
    with refused("made with another prompt.template.messages"):
        write(sums(2), replace(TWO, file=str(path)))


def test_a_file_of_another_version_is_refused(write: Write, writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(sums(2), replace(TWO, file=str(path)))
    with header_of(path) as header:
        header["version"] = 1
    with refused(f"{path}: has version 1 of its format, not 2; name another file in solutions."):
        write(sums(2), replace(TWO, file=str(path)))


# -- when it does not work -------------------------------------------------------------------------


def test_sampling_that_verifies_nothing_says_so_and_what_to_try(
    write: Write, writer: Writer
) -> None:
    writer.write = lambda question: ["I\ndo not know", "It is 77."]
    for _ in range(2):
        with refused(
            "no self-written solution was verified: of 6 replies to 3 questions 0 have the right",
            "evaluation.scorer = 'number', 0 were cut at 24 tokens",
            "(one begins 'I\\ndo not know')",
            "try more solutions.samples, a higher solutions.temperature, another scorer, or "
            "solutions.source = 'answer'",
        ):
            write(sums(3))
    assert len(writer.asked) == 3  # what is known to fail is not tried again


def test_where_many_replies_were_cut_a_longer_limit_is_named(write: Write, writer: Writer) -> None:
    writer.write = lambda question: [f"{right(question)[0]}...", "no"]
    told = "2 have the right answer by evaluation.scorer = 'number', 2 were cut at "
    with refused(f"{told}24 tokens", "try a larger evaluation.max_new_tokens, more solutions"):
        write(sums(2))
    with refused(f"{told}9 tokens", "try a larger solutions.max_new_tokens, more solutions"):
        write(sums(2), replace(TWO, max_new_tokens=9))


def test_answers_that_the_scorer_cannot_read_are_named_before_sampling(
    write: Write, writer: Writer, cache: Path
) -> None:
    rows = [replace(row, answer="unknown") for row in sums(5)]
    with refused("sums.jsonl:1: the answer 'unknown' is none", "(sums.jsonl:2)", "(sums.jsonl:3)"):
        write(rows, Solutions(source="self-written"))
    assert writer.asked == []
    assert not cache.exists()


# -- a whole run -----------------------------------------------------------------------------------


def test_bare_answers_that_the_scorer_cannot_read_are_no_targets(
    write: Write, writer: Writer
) -> None:
    odd = [*sums(3), replace(sums(1)[0], answer="none at all", source="rows.csv:9")]
    with refused("rows.csv:9", "'none at all'", "evaluation.scorer = 'number'"):
        write(odd, Solutions(source="answer"))
    worked = [replace(example, solution="None at all.") for example in odd]
    assert len(write(worked, Solutions(source="column"))[0]) == 4  # there it is no target


@pytest.fixture
def task(model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe for sums, with `sections` changed."""
    rows = [
        {"question": f"What is {i} plus 1?", "answer": str(i + 1), "worked": f"We add 1: {i + 1}"}
        for i in range(30)
    ]
    file = write_jsonl(tmp_path / "sums.jsonl", rows)

    def made(**sections: Mapping[str, Any]) -> Recipe:
        recipe = values(
            model_folder,
            tmp_path,
            **{
                "data": {"train": str(file), "answer": "answer"},
                "template": {"user": "{question}\n\n[[Think first, then answer:]]"},
                "target": {"choices": []},
                "solutions": {"samples": 2},
                "evaluation": {"scorer": "number", "max_new_tokens": 4},
                "training": {"steps": 2},
                **sections,
            },
        )
        del recipe["data"]["dev"], recipe["data"]["test"]
        return Recipe.from_dict(recipe)

    return made


def test_a_run_trains_on_what_the_model_wrote_and_says_so(
    task: Callable[..., Recipe], writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write = lambda question: right(question) if int(question.split()[2]) % 2 else ["0", "0"]
    trained, metrics = list[Any](), list[str]()
    inner = runs.optimize

    def optimize(model: Any, sequencer: Sequencer, train: Any, *rest: Any, **options: Any) -> Any:
        trained.append([model.tokenizer.decode(row.targets[row.gold]) for row in train])
        metrics.append(options["training"].metric)
        return inner(model, sequencer, train, *rest, **options)

    monkeypatch.setattr(runs, "optimize", optimize)
    result = run(task(), tmp_path / "one")
    solutions = result["solutions"]
    odd = [q for q in writer.asked if int(q.split()[2]) % 2]
    assert sorted(trained[0]) == sorted(f"{right(q)[0]}<|im_end|>" for q in odd)
    assert solutions["source"] == "self-written"
    assert solutions["questions"] == len(writer.asked) == 18
    assert solutions["solved"] == solutions["kept"] == len(odd)
    assert json.loads((tmp_path / "one" / "result.json").read_text())["solutions"] == solutions
    saved = json.loads((tmp_path / "one" / "prompt" / "prompt.json").read_text("utf-8"))
    assert saved["solutions"] == {k: v for k, v in solutions.items() if k != "file"}
    assert str(tmp_path) not in json.dumps(saved["solutions"])
    assert len(lines(tmp_path / "one" / "solutions.jsonl")) == 1 + 18
    assert solutions["file"] == "solutions.jsonl"
    assert metrics == ["accuracy"]
    assert saved["scores"]["test_rows"] == 6
    # Another seed of the same recipe samples nothing.
    again = run(task(training={"steps": 2, "seed": 1}), tmp_path / "two")
    assert len(writer.asked) == 18
    assert again["solutions"] == {**solutions, "sampled_questions": 0}
    files = [tmp_path / name / "solutions.jsonl" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_on_worked_solutions_or_answers_alone_says_so_and_writes_none(
    task: Callable[..., Recipe], writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}
    for source in ("column", "answer"):
        data = {**task().as_dict()["data"], "solution": "worked"}
        recipe = task(data=data, solutions={"source": source})
        seen[source] = [row.solution for row in read_data(recipe).dev]
        result = run(recipe, tmp_path / source)
        assert result["solutions"] == {"source": source, "questions": 18, "kept": 18}
        assert not (tmp_path / source / "solutions.jsonl").exists()
    assert all(text.startswith("We add 1:") for text in seen["column"])
    assert set(seen["answer"]) == {None}  # or else dev would be scored by what is not trained on
    assert writer.asked == []


def test_a_run_without_any_solution_leaves_no_folder_but_what_was_sampled(
    task: Callable[..., Recipe],
    writer: Writer,
    embedgrad: Command,
    tmp_path: Path,
    cache: Path,
) -> None:
    writer.write = lambda question: ["no", "no"]
    (tmp_path / "r.toml").write_text(task().as_toml(), "utf-8")
    done = embedgrad("optimize", tmp_path / "r.toml", "--out", tmp_path / "run", "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert line.startswith("error: no self-written solution was verified: of 36 replies to 18")
    assert not (tmp_path / "run").exists()
    assert len(list(cache.iterdir())) == 1


# -- with the model itself -------------------------------------------------------------------------


def test_the_model_s_own_samples_are_the_same_after_an_interruption(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real decoding: every reply with an "e" counts as right, and ends there."""
    rows = [replace(row, answer="e") for row in sums(7)]
    evaluation = replace(NUMBERS, scorer=_HasLetter(), max_new_tokens=12)
    solutions = replace(TWO, temperature=1.0, source="self-written")
    whole, parts = (
        replace(solutions, file=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")
    )
    monkeypatch.setattr(LanguageModel, "generate", _all_ended(LanguageModel.generate))
    expected, told = write(rows, whole, evaluation)
    assert 0 < told["verified"] <= told["tried"] == 14
    kept = Path(whole.file or "").read_bytes().split(b"\n")
    Path(parts.file or "").write_bytes(b"\n".join(kept[:4]) + b'\n{"unfin')
    made, told_again = write(rows, parts, evaluation)
    assert told_again["sampled_questions"] == 4
    assert made == expected
    assert Path(parts.file or "").read_bytes() == Path(whole.file or "").read_bytes()
    others = replace(solutions, seed=1, file=str(tmp_path / "c.jsonl"))
    assert write(rows, others, evaluation)[0] != expected


class _HasLetter(Scorer):
    """The answer's letter stands in the reply."""

    def score(self, reply: str, answer: str) -> float:
        return float(answer in reply)


def _all_ended(inner: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **options: Any) -> Any:
        return [
            tuple(reply._replace(cut=False) for reply in row) for row in inner(*args, **options)
        ]

    return made
