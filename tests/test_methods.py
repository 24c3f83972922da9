"""Methods of a comparison: each does what its name says, and leaves the model as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from embedgrad import ModelError, Recipe
from embedgrad.data.examples import Example
from embedgrad.data.markup import literal, parse
from embedgrad.experiments.baselines import METHODS, Task, Trained
from embedgrad.experiments.baselines.embedgrad import random_rows
from embedgrad.experiments.baselines.peft_loop import Padded, PeftMethod
from embedgrad.experiments.baselines.prompt_tuning import prompt_first, rows_of
from embedgrad.experiments.baselines.prompting import with_span
from embedgrad.model.backbone import join_spans
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.template import Renderer, Template
from embedgrad.prompt.worked_examples import with_examples
from embedgrad.recipe.settings import COMPARED, CompareSettings
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.demonstrations import draw
from embedgrad.training.optimize import optimize
from embedgrad.training.selection import Best
from embedgrad.training.settings import Training
from kit import DAY, LABELS, LONG_CHOICES, PLACEMENTS, Kit, kit
from refusals import refused
from run_kit import save_model, values

PROMPTS = ("peft-prompt-tuning-text", "peft-prompt-tuning-random", "peft-cpt")


def small(**options: Any) -> Kit:
    return kit(**{"rows": 14, "dtype": torch.float32, **options})


def task_of(made: Kit, **sections: Any) -> Task:
    """Eight rows to train on, six to choose by."""
    sections = {"training": {"steps": 5, "batch_size": 3, "evaluate_every": 2}, **sections}
    recipe = Recipe.from_dict(values(Path("tiny"), Path("data"), **sections))
    rows = made.sequences
    return Task(recipe, made.model, made.sequencer, rows[:8], rows[8:], lambda event: None)


def test_all_methods_choose_by_the_metric_of_the_recipes_own_training() -> None:
    made = small(target=Target())
    for objective, metric in (("reward", "accuracy"), ("cross_entropy", "log_loss")):
        task = task_of(made, target={"choices": []}, objective={"name": objective})
        assert task.metric == metric


def peft(name: str) -> PeftMethod:
    method = METHODS[name]
    assert isinstance(method, PeftMethod)
    return method


def weights(model: Any) -> dict[str, Any]:
    """Digest of everything that a model computes with, by name, and how it is set."""
    found: dict[str, Any] = {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    found["gradients"] = [name for name, value in model.named_parameters() if value.requires_grad]
    found["training"] = [name for name, module in model.named_modules() if module.training]
    found["modules"] = [(name, type(module).__name__) for name, module in model.named_modules()]
    return found


def test_the_methods_are_those_a_recipe_may_name() -> None:
    assert tuple(METHODS) == COMPARED


# -- other templates -------------------------------------------------------------------------------


@given(st.text(alphabet="ab{}[]\n ", max_size=30))
def test_literal_text_is_parsed_as_itself(text: str) -> None:
    pieces = parse(literal(text), "text")
    assert "".join(piece.text for piece in pieces) == text
    assert {piece.kind for piece in pieces} <= {"text"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_another_span_stands_where_the_old_one_stood(placement: str) -> None:
    template = PLACEMENTS[placement]
    changed = with_span(template, "Good {or} [[bad]]?")
    assert changed.span == "Good {or} [[bad]]?"
    assert changed.columns == template.columns
    assert with_span(changed, template.span) == template


def test_worked_examples_are_turns_of_the_chat() -> None:
    template = Template.chat(
        system="You are {{brief}}.", user="Review: {review}\n\n[[Good or bad?]]"
    )
    shots = [({"review": "Dull [[x]] {y}."}, "negative"), ({"review": "Great."}, "positive")]
    made = with_examples(template, LABELS, shots)
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), tiny.CHATML)
    rendered = Renderer(made, tokenizer, date=DAY)({"review": "Warm."})
    expected = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "You are {brief}."},
            {"role": "user", "content": "Review: Dull [[x]] {y}.\n\nGood or bad?"},
            {"role": "assistant", "content": "negative"},
            {"role": "user", "content": "Review: Great.\n\nGood or bad?"},
            {"role": "assistant", "content": "positive"},
            {"role": "user", "content": "Review: Warm.\n\nGood or bad?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered.text == expected
    assert rendered.texts[0].count("Good or bad?") == 2


def test_worked_examples_keep_the_opening_of_the_answer() -> None:
    template = Template.chat(user="Review: {review}", assistant="[[It is]] clearly")
    made = with_examples(template, LABELS, [({"review": "Dull."}, "negative")])
    contents = [(m.role, m.content) for m in made.messages]
    assert contents == [
        ("user", "Review: Dull."),
        ("assistant", "It is clearly negative"),
        ("user", "Review: {review}"),
        ("assistant", "[[It is]] clearly"),
    ]


def test_worked_examples_of_a_plain_text_are_blocks() -> None:
    made = with_examples(PLACEMENTS["plain"], LABELS, [({"review": "Dull."}, "negative")])
    assert made.text == (
        "Review: Dull.\nIs it positive or negative?\nAnswer: negative\n\n"
        "Review: {review}\n[[Is it positive or negative?]]\nAnswer:"
    )
    prefixed = Target(choices=("a", "b"), answer_prefix="\n")
    made = with_examples(PLACEMENTS["plain"], prefixed, [({"review": "x"}, "a")])
    assert "Answer:\na\n\n" in str(made.text)


# -- methods that train nothing --------------------------------------------------------------------


def test_drawn_examples_are_balanced_and_follow_the_seed() -> None:
    examples = tiny.reviews(40)
    picked = draw(examples, 6, seed=3)
    assert len(set(picked)) == 6
    answers = [examples[i].answer for i in picked]
    assert answers.count("positive") == answers.count("negative") == 3
    assert draw(examples, 6, seed=3) == picked
    assert draw(examples, 6, seed=4) != picked
    assert sorted(draw(examples, 100, seed=0)) == list(range(40))
    free = [replace(example, answer=str(i)) for i, example in enumerate(examples)]
    assert len(set(draw(free, 5, seed=0))) == 5


def test_best_of_n_takes_the_text_that_dev_likes_best() -> None:
    made = small()
    texts = ["Cold or warm?", "Is it terrible or great?", "What was it?"]
    task = task_of(made, compare={"prompts": texts})
    trained = METHODS["best-of-n"].train(task, 0)
    candidates = trained.facts["settings"]["candidates"]
    own = made.sequencer.renderer.template.span
    assert [candidate["prompt"] for candidate in candidates] == [own, *texts]
    # By the evaluator alone, text by text.
    scores = {}
    for text in (own, *texts):
        sequencer = task.sequencer_of(with_span(made.sequencer.renderer.template, text))
        rows = sequencer.build(s.example for s in task.dev)
        answered = task.evaluator().score_text_prompt(made.model.embed(sequencer.span.ids), rows)
        right = sum(a.correct for a in answered)
        scores[text] = right, -sum(a.loss for a in answered)
    assert trained.facts["settings"]["prompt"] == max(scores, key=lambda text: scores[text])
    assert len(set(scores.values())) == 4


def test_best_of_n_needs_rows_to_choose_by() -> None:
    task = replace(task_of(small(), compare={"prompts": ["Warm?"]}), dev=())
    with refused("best-of-n", "dev"):
        METHODS["best-of-n"].train(task, 0)


def test_few_shot_puts_its_examples_before_the_question() -> None:
    made = small(tokenizer="bytelevel")
    task = task_of(made, compare={"shots": 2})
    trained = METHODS["few-shot"].train(task, 1)
    assert trained.facts["settings"]["shots"] == 2
    few = METHODS["few-shot"].answer(task, trained, task.dev)
    text = METHODS["text"].answer(task, METHODS["text"].train(task, 0), task.dev)
    extra = {a - b for a, b in zip(few.tokens, text.tokens, strict=True)}
    assert len(extra) == 1  # the same examples before every row
    assert extra.pop() > 20
    assert [a.loss for a in few.answered] != [a.loss for a in text.answered]


def test_few_shot_says_what_it_would_need() -> None:
    made = small()
    info = replace(made.loaded.info, context=120)
    model = LanguageModel(LoadedModel(made.loaded.model, made.loaded.tokenizer, info))
    task = replace(task_of(made, compare={"shots": 7}), model=model)
    with refused("few-shot: with 7 examples", "takes 120", "compare.shots"):
        METHODS["few-shot"].train(task, 0)


def test_few_shot_shows_no_question_twice() -> None:
    twice = [Example({"q": str(n // 2)}, str(n // 2), f"r:{n}", solution=str(n)) for n in range(8)]
    for seed in range(30):
        shown = [twice[i].columns["q"] for i in draw(twice, 4, seed)]
        assert sorted(shown) == ["0", "1", "2", "3"]
    assert len(draw(twice, 9, 0)) == 4


def test_few_shot_says_where_it_takes_room_from_a_row() -> None:
    made = small()
    info = replace(made.loaded.info, context=176)
    model = LanguageModel(LoadedModel(made.loaded.model, made.loaded.tokenizer, info))
    told: list[Any] = []
    task = replace(task_of(made, compare={"shots": 3}), model=model, report=told.append)
    examples = [sequence.example for sequence in task.train]
    template = made.sequencer.renderer.template
    sequencer = model.sequencer(template, LABELS, examples, date=DAY, truncate="review")
    task = replace(task, sequencer=sequencer)
    METHODS["few-shot"].train(task, 0)
    (note,) = (event["text"] for event in told if "is cut in" in str(event.get("text")))
    assert note == "few-shot: after 3 examples column 'review' is cut in rows that do not fit"


# -- EmbedGrad and its variants --------------------------------------------------------------------


def test_random_rows_are_spread_like_the_vocabulary() -> None:
    model = small().model
    rows = random_rows(model, 4000, 0)
    table = model.vocabulary_rows()
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.02)
    assert torch.allclose(rows.std(0), table.std(0), rtol=0.1)
    assert torch.equal(random_rows(model, 5, 7), random_rows(model, 5, 7))
    assert not torch.equal(random_rows(model, 5, 7), random_rows(model, 5, 8))


def test_variants_differ_where_their_names_say() -> None:
    made = small()
    task = task_of(made, optimizer={"learning_rate": 0.5}, trust_region={"radius": 0.05})
    start = made.start
    kept = {n: METHODS[n].train(task, 0) for n in ("embedgrad", "embedgrad-no-region")}
    drift = {n: t.facts["settings"]["drift_max"] for n, t in kept.items()}
    assert drift["embedgrad"] <= 0.05 + 1e-6
    assert kept["embedgrad-no-region"].facts["settings"]["radius"] is None
    for trained in kept.values():
        assert trained.facts["examples_seen"] == 3 + 3 + 2 + 3 + 3
        assert trained.facts["trained_numbers"] == start.numel()
    random = METHODS["random-init"].train(replace(task, dev=()), 0)
    # Rows that never went far from random ones are far from the words.
    assert ((random.tensors["rows"] - start).norm(dim=1) > 0.5 * start.norm(dim=1)).all()


def test_ctrl_c_in_the_loop_ends_the_comparison_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    task = task_of(small())
    monkeypatch.setattr(type(task.model), "outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        METHODS["embedgrad"].train(task, 0)


def stopping(step: int) -> Callable[[dict[str, Any]], None]:
    """A report that is interrupted after a step."""

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise KeyboardInterrupt

    return report


OWN_LOOP = ("embedgrad", "random-init")


@pytest.mark.parametrize("name", [*OWN_LOOP, *PROMPTS, "peft-lora"])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    task, method = task_of(small()), METHODS[name]
    whole = method.train(task, 3)
    kept = replace(task, state=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        method.train(replace(kept, report=stopping(5)), 3)  # the last look at dev was at 4
    state = Checkpoint.find(tmp_path / "state")
    assert state is not None
    # Our own loop keeps a state however it ends.
    assert (state.step, state.seconds > 0) == (5 if name in OWN_LOOP else 4, True)
    replace(state, seconds=1000).keep(tmp_path / "state")
    events: list[dict[str, Any]] = []
    again = method.train(replace(kept, report=events.append), 3)
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == ([] if name in OWN_LOOP else [5])
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(value, again.tensors[n]) for n, value in whole.tensors.items())
    assert 1000 < again.facts["train_seconds"] < 2000
    facts = (dict(trained.facts) for trained in (whole, again))
    first, second = ({**one, "train_seconds": None} for one in facts)
    assert first == second


@pytest.mark.parametrize("name", ["embedgrad", "peft-cpt"])
def test_a_training_cut_off_at_the_end_of_its_patience_makes_no_more_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, method = task_of(small(), training={"patience": 1}), METHODS[name]
    monkeypatch.setattr(Best, "_is_better", lambda best, score: False)
    whole = method.train(replace(task, state=tmp_path / "state"), 3)
    assert whole.facts["ended"] == "patience"
    events: list[dict[str, Any]] = []
    again = method.train(replace(task, state=tmp_path / "state", report=events.append), 3)
    assert not [event for event in events if event["event"] == "step"]
    facts = (dict(trained.facts) for trained in (whole, again))
    first, second = ({**one, "train_seconds": None} for one in facts)
    assert first == second
    assert all(torch.equal(value, again.tensors[n]) for n, value in whole.tensors.items())


@pytest.mark.parametrize("name", ["embedgrad", "peft-cpt"])
def test_a_state_that_cannot_be_read_is_told_and_not_used(name: str, tmp_path: Path) -> None:
    task, method, folder = task_of(small()), METHODS[name], tmp_path / "state"
    whole = method.train(replace(task, state=folder), 0)
    kept = sorted(folder.iterdir())
    for state in kept:
        (state / "checkpoint.safetensors").write_bytes(b"no tensors")
    events: list[dict[str, Any]] = []
    again = method.train(replace(task, state=folder, report=events.append), 0)
    notes = [event for event in events if event["event"] == "note"]
    lines = [n["text"] for n in notes if "the checkpoint cannot be read" in n["text"]]
    assert len(lines) == len(kept) == 2
    assert all(torch.equal(value, again.tensors[n]) for n, value in whole.tensors.items())


# -- PEFT ------------------------------------------------------------------------------------------


def test_peft_gets_the_batches_of_our_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    ours: list[list[str]] = []
    plain = LanguageModel.outcome

    def spy(self: Any, prompt: Any, sequences: Sequence[TokenSequence], **options: Any) -> Any:
        if join_spans(prompt).requires_grad:
            ours.append([s.example.source for s in sequences])
        return plain(self, prompt, sequences, **options)

    monkeypatch.setattr(LanguageModel, "outcome", spy)
    training = Training(steps=7, batch_size=3, seed=5)
    optimize(made.model, made.sequencer, made.sequences[:8], training=training)
    batches = training.batches(training.units([None] * 8), 7)
    theirs = [[made.sequences[i].example.source for i in batch] for batch in batches]
    assert ours == theirs
    assert len(ours) == 7


def test_long_rows_take_more_passes_and_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    task, method = task_of(small(), training={"steps": 1}), peft("peft-prompt-tuning-text")
    lines = [method.line(task, sequence) for sequence in task.train[:3]]
    longest = max(len(question) + len(answer) for question, answer in lines)
    passes: list[int] = []
    plain = Padded.of
    monkeypatch.setattr(
        Padded, "of", lambda part, device: passes.append(len(part)) or plain(part, device)
    )

    def gradients() -> tuple[float, list[Tensor]]:
        with method.wrap(task) as model:
            loss = method._gradients(task, model, lines, 1)
            return loss, [p.grad for p in model.parameters() if p.grad is not None]

    whole, (expected,) = gradients()
    limit = 2 * longest * task.model.info.vocabulary
    monkeypatch.setattr("embedgrad.experiments.baselines.peft_loop.MOST_LOGITS", limit)
    parts, (found,) = gradients()
    assert passes == [3, 2, 1]
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_is_padded_on_the_right() -> None:
    batch = Padded.of([((1, 2), (3,)), ((4,), (5,))], torch.device("cpu"))
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, -100, 3], [-100, 5, -100]]


@torch.no_grad()
def peft_logprobs(method: PeftMethod, task: Task, model: Any) -> Tensor:
    """Log-probability of each row's right answer by PEFT's own forward, in one padded batch."""
    lines = [method.line(task, sequence) for sequence in task.dev]
    batch = Padded.of(lines, torch.device("cpu"))
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    logprobs = logits[:, -batch.ids.shape[1] :].log_softmax(-1)
    sums = []
    for row, (question, answer) in enumerate(lines):
        places = torch.arange(len(question), len(question) + len(answer)) - 1
        sums.append(logprobs[row, places, torch.tensor(answer)].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("placement", ["user-after", "system", "plain"])
def test_prompt_rows_score_as_in_pefts_own_forward(name: str, placement: str) -> None:
    choices = replace(LABELS, choices=LONG_CHOICES)
    made = small(template=placement, target=choices)
    task, method = task_of(made), peft(name)
    lengths = {len(s.prefix + s.suffix + s.targets[s.gold]) for s in task.dev}
    assert len(lengths) > 1  # some rows are padded
    with torch.random.fork_rng(), method.wrap(task) as model:
        torch.manual_seed(0)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.05 * torch.randn_like(value)
        expected = peft_logprobs(method, task, model)
        rows = rows_of(model)
    ours = made.model.outcome(rows, [prompt_first(s) for s in task.dev]).answer_logprobs_B
    assert torch.allclose(ours, expected, atol=2e-4)
    elsewhere = made.model.outcome(rows, task.dev).answer_logprobs_B
    if placement != "plain":
        assert not torch.allclose(elsewhere, expected, atol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_scores_as_in_pefts_own_forward(architecture: str) -> None:
    made = small(architecture=architecture)
    task, method = task_of(made), peft("peft-lora")
    with torch.random.fork_rng(), method.wrap(task) as model:
        torch.manual_seed(0)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.1 * torch.randn_like(value)
        model.eval()
        expected = peft_logprobs(method, task, model)
        kept = method.copy_trained(model)
    plain = [a.loss for a in METHODS["text"].answer(task, Trained({}, {}), task.dev).answered]
    ours = method.answer(task, Trained(kept, {}), task.dev).answered
    assert [a.loss for a in ours] != plain
    # The loss of choices is among themselves, so compare the log-probabilities themselves.
    with torch.random.fork_rng(), method.wrap(task) as model, torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(kept[name])
        model.eval()
        loaded = LoadedModel(made.model.model, made.model.tokenizer, made.model.info)
        fresh = LanguageModel(loaded, prefix_cache_budget=0)
        again = fresh.outcome(made.start, task.dev).answer_logprobs_B
    assert torch.allclose(again, expected, atol=2e-4)


def test_the_text_start_is_pefts_own(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    folder = save_model(tmp_path / "tiny")
    made = small()
    method, task = peft("peft-prompt-tuning-text"), task_of(made)
    with method.wrap(task) as model:
        ours = rows_of(model)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=made.sequencer.span.text,
        num_virtual_tokens=len(made.sequencer.span.ids),
        tokenizer_name_or_path=str(folder),
    )
    with pytest.warns(FutureWarning):
        theirs = rows_of(get_peft_model(made.loaded.model, config))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, made.start)


@pytest.mark.parametrize("name", [*PROMPTS, "peft-lora"])
def test_peft_trains_and_gives_the_model_back_bit_for_bit(name: str) -> None:
    made = small()
    task, method = task_of(made), peft(name)
    before = weights(made.loaded.model)
    trained = method.train(task, 0)
    assert weights(made.loaded.model) == before
    again = method.train(task, 0)
    assert all(torch.equal(value, again.tensors[n]) for n, value in trained.tensors.items())
    other = method.train(task, 1)
    assert any(not torch.equal(value, other.tensors[n]) for n, value in trained.tensors.items())
    assert trained.facts["examples_seen"] == 3 + 3 + 2 + 3 + 3
    assert [score["step"] for score in trained.facts["history"]] == [0, 2, 4, 5]
    numbers = sum(value.numel() for value in trained.tensors.values())
    assert trained.facts["trained_numbers"] == numbers
    answers = method.answer(task, trained, task.dev)
    assert weights(made.loaded.model) == before
    summary = task.dev_score(answers.answered, trained.facts["dev"]["step"])
    assert summary["log_loss"] == pytest.approx(trained.facts["dev"]["log_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["peft-cpt", "peft-lora"])
def test_an_interrupted_training_gives_the_model_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small()
    before = weights(made.loaded.model)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        peft(name).train(task_of(made), 0)
    assert weights(made.loaded.model) == before


def test_training_lowers_the_loss_of_each_peft_method() -> None:
    made = small()
    steps = {"steps": 30, "batch_size": 8, "metric": "log_loss", "evaluate_every": 30}
    rates = {"lora_learning_rate": 0.02, "prompt_tuning_learning_rate": 0.03}
    task = task_of(made, training=steps, compare=rates)
    # On the rows that it learns from.
    task = replace(task, dev=task.train)
    for name in ("peft-prompt-tuning-text", "peft-lora"):
        facts = peft(name).train(task, 0).facts
        assert facts["dev"]["log_loss"] < facts["history"][0]["log_loss"] - 0.05, name


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    made = small(target=replace(LABELS, choices=LONG_CHOICES))
    method = peft("peft-prompt-tuning-text")
    task = task_of(made)
    lines = [method.line(task, sequence) for sequence in task.train]
    assert len({len(answer) for _, answer in lines}) > 1
    found = []
    with method.wrap(task) as model:
        for parts in (1, 3):
            loss = method._gradients(task, model, lines, parts)
            (leaf,) = (value for value in model.parameters() if value.requires_grad)
            assert leaf.grad is not None
            found.append((loss, leaf.grad.clone()))
            leaf.grad = None
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, method = small(), peft("peft-prompt-tuning-text")
    plain, steps = method._gradients, []

    def breaks(*arguments: Any) -> float:
        steps.append(plain(*arguments))
        return steps[-1] if len(steps) < 4 else float("nan")

    monkeypatch.setattr(method, "_gradients", breaks)
    facts = method.train(task_of(made), 0).facts
    assert facts["ended"] == "diverged"
    assert facts["settings"]["steps"] == 3
    assert facts["examples_seen"] == 3 + 3 + 2
    assert [score["step"] for score in facts["history"]] == [0, 2]


def test_an_architecture_without_lora_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft as library

    def unknown(*arguments: Any, **options: Any) -> None:
        raise ValueError("Please specify `target_modules` in `peft_config`")

    monkeypatch.setattr(library, "get_peft_model", unknown)
    with refused("peft-lora", "LlamaForCausalLM", "leave it out", error=ModelError):
        peft("peft-lora").train(task_of(small()), 0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"methods": ("peft-lorra",)}, ("compare.methods", "did you mean 'peft-lora'")),
        ({"methods": ("text", "text")}, ("compare.methods", "each one once")),
        ({"seeds": ()}, ("compare.seeds", "one or more")),
        ({"seeds": (0, -1)}, ("compare.seeds", "-1")),
        ({"prompts": ("",)}, ("compare.prompts",)),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refused(*parts):
        CompareSettings(**options)
