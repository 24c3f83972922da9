"""`template.place`: the span moved to a named place, or to the one that does best on dev."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedgrad import Recipe, Template, run
from embedgrad.errors import DataError, RecipeError, RunError, TemplateError
from embedgrad.events import quiet
from embedgrad.experiments import choose_place as module
from embedgrad.experiments.choose_place import choose_place, describe_trial, read_places
from embedgrad.experiments.compare.compare import plan_parts
from embedgrad.experiments.plan import plan
from embedgrad.prompt.place import PLACES, place_of, place_span
from embedgrad.recipe.open_run import open_run
from embedgrad.report.terminal.tables import describe_place
from run_kit import Command, save_model, values

pytest_plugins = ["tiny_runs"]

WORDS = "Is it good? One word:"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def contents(template: Template) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in template.messages]


# ------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("place", "messages"),
    [
        ("system", [("system", f"[[{WORDS}]]"), ("user", "On {day}: {text} }}")]),
        ("before", [("user", f"[[{WORDS}]]\n\nOn {{day}}: {{text}} }}}}")]),
        ("after", [("user", f"On {{day}}: {{text}} }}}}\n\n[[{WORDS}]]")]),
        ("around", [("user", "[[Is it good?]]\n\nOn {day}: {text} }}\n\n[[One word:]]")]),
    ],
)
def test_the_span_moves_with_its_words_once(place: str, messages: list[tuple[str, str]]) -> None:
    written = Template.chat(user=f"On {{day}}: {{text}} }}}} \n [[{WORDS}]]")
    made = place_span(written, place)
    assert contents(made) == (contents(written) if place == "after" else messages)
    assert place_of(made) == place
    assert place_span(made, place) is made
    assert "".join(made.spans).replace(" ", "") == WORDS.replace(" ", "")


def test_other_texts_stay_and_an_emptied_message_goes() -> None:
    system = Template.chat(system="[[Judge it well]]", user="{text}", assistant="So:")
    assert contents(place_span(system, "after")) == [
        ("user", "{text}\n\n[[Judge it well]]"),
        ("assistant", "So:"),
    ]
    kept = Template.chat(system="Be brief.\n[[Judge it well]]", user="{text}")
    assert contents(place_span(kept, "around")) == [
        ("system", "Be brief."),
        ("user", "[[Judge]]\n\n{text}\n\n[[it well]]"),
    ]
    moved = place_span(Template.chat(system="Be brief.", user="{text} [[Judge it]]"), "system")
    assert contents(moved) == [("system", "Be brief.\n\n[[Judge it]]"), ("user", "{text}")]
    middle = Template.chat(user="A: {a}\n\n[[Judge it]]\nB: {b}")
    assert place_of(middle) is None
    assert contents(place_span(middle, "before")) == [("user", "[[Judge it]]\n\nA: {a}\n\nB: {b}")]


def test_plain_text_keeps_what_opens_the_answer_behind_the_span() -> None:
    written = Template.plain("[[Is it good? Say:]]\nReview: {text}!\nAnswer:")
    assert place_span(written, "after").text == "Review: {text}!\n\n[[Is it good? Say:]]\nAnswer:"
    assert place_span(written, "around").text == (
        "[[Is it good?]]\n\nReview: {text}!\n\n[[Say:]]\nAnswer:"
    )


@pytest.mark.parametrize(
    ("template", "place", "message"),
    [
        (Template.plain("{text} [[Good?]]"), "system", "plain text, which has no system message"),
        (Template.chat(user="{text} [[Good?]]"), "around", r"'Good\?' is one word"),
        (Template.chat(user="{a} [[b]] {c} [[d]]"), "system", "and the template has 2"),
        (Template.chat(user="[[Say it]]"), "before", "has no query"),
    ],
)
def test_what_cannot_move_says_why(template: Template, place: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        place_span(template, place)


def test_a_recipe_names_the_place_and_keeps_it(tmp_path: Path, data: Path) -> None:
    written = values(Path("tiny"), data, template={"place": "before"})
    recipe = Recipe.from_dict(written)
    assert place_of(recipe.template) == "before"
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    assert recipe.as_dict()["template"]["place"] == "before"
    plain = Recipe.from_dict(values(Path("tiny"), data))
    assert place_of(plain.template) == "after"
    assert "place" not in plain.as_dict()["template"]
    with pytest.raises(RecipeError, match=r"template\.place: 'left'; expected one of auto, system"):
        Recipe.from_dict(values(Path("tiny"), data, template={"place": "left"}))
    two = {"user": "{review} [[a]] [[b]]", "place": "auto"}
    with pytest.raises(RecipeError, match="2 spans"):
        Recipe.from_dict(values(Path("tiny"), data, template=two))


# ------------------------------------------------------------------------------------ the choice


@pytest.fixture
def auto(model_folder: Path, data: Path) -> Callable[..., Recipe]:
    def made(**sections: Any) -> Recipe:
        sections = {"template": {"place": "auto"}, "training": {"epochs": 4}, **sections}
        return Recipe.from_dict(values(model_folder, data, **sections))

    return made


def test_a_run_takes_the_best_place_and_is_a_run_of_that_template(
    auto: Callable[..., Recipe], tmp_path: Path, embedgrad: Command
) -> None:
    events: list[dict[str, Any]] = []
    result = run(auto(), tmp_path / "run", events.append)
    places = result["place"]
    assert list(places["trials"]) == ["after", "system", "before", "around"]
    scores = {
        place: (trial["refined"]["accuracy"], -trial["refined"]["log_loss"])
        for place, trial in places["trials"].items()
    }
    assert len(set(scores.values())) > 1
    assert places["chosen"] == max(scores, key=scores.__getitem__)
    for trial in places["trials"].values():
        assert trial["steps"] == 3  # a quarter of 4 epochs of 3 steps
        assert trial["seconds_per_step"] > 0
        assert describe_trial(trial) in " ".join(str(event.get("text")) for event in events)
    rows = {trial["rows"] for trial in places["trials"].values()}
    assert max(rows) - min(rows) <= 2
    opened = open_run(tmp_path / "run")
    assert opened.recipe.place == places["chosen"] == place_of(opened.prompt.template)
    # From then on it is the run that a recipe with that place gives.
    named = run(auto(template={"place": places["chosen"]}), tmp_path / "named", quiet)
    for name in ("text", "refined", "drift"):
        assert named[name] == result[name]  # type: ignore[literal-required]
    assert "place" not in named
    log = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")
    logged = [json.loads(line) for line in log.splitlines()]
    steps = [event["step"] for event in logged if event["event"] == "step"]
    assert steps == list(range(1, 13))
    # And it is finished for both spellings of its recipe.
    again = run(auto(), tmp_path / "run", quiet, resume=True)
    assert again["refined"] == result["refined"]
    told = embedgrad("resume", tmp_path / "run")
    assert f"place {places['chosen']}, chosen on dev after 3 steps in each:" in told.out
    assert embedgrad("report", tmp_path / "run", "--no-model").code == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"place {places['chosen']}, chosen on dev" in page


def test_the_choice_is_told_by_what_decides_it() -> None:
    def trial(accuracy: float, log_loss: float, answer_loss: float) -> dict[str, Any]:
        score = {"accuracy": accuracy, "log_loss": log_loss, "answer_loss": answer_loss}
        return {"rows": 4, "steps": 2, "refined": score, "seconds_per_step": 0.05}

    trials = {"system": trial(0.625, 0.619, 5.922), "before": trial(0.5, 0.685, 5.798)}
    assert describe_place({"place": {"chosen": "before", "trials": trials}}) == [
        "place before, chosen on dev after 2 steps in each:",
        "  system: 62.5 %, log-loss 0.619 + answer loss 5.922; 4 rows, 0.05 s a step",
        "  before: 50.0 %, log-loss 0.685 + answer loss 5.798; 4 rows, 0.05 s a step",
        "  within one standard error of the best, the lowest sum of losses is chosen",
    ]


def test_killed_trials_resume_to_the_same_choice(
    auto: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(auto(), tmp_path / "whole", quiet)["place"]
    tried: list[str] = []
    try_place = module._try

    def killed_in_the_third(recipe: Recipe, place: str, *rest: Any) -> Any:
        tried.append(place)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return try_place(recipe, place, *rest)

    monkeypatch.setattr(module, "_try", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(auto(), tmp_path / "run", quiet)
    assert list(read_places(tmp_path / "run")["trials"]) == tried[:2]
    found = run(auto(), tmp_path / "run", quiet, resume=True)["place"]
    assert tried[3:] == ["before", "around"]
    assert found["chosen"] == whole["chosen"]
    for place, trial in whole["trials"].items():
        for name in ("text", "refined", "rows"):
            assert found["trials"][place][name] == trial[name]  # type: ignore[literal-required]


def test_a_run_stopped_in_a_trial_keeps_the_finished_ones(
    auto: Callable[..., Recipe], tmp_path: Path
) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    events: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(auto(), tmp_path / "run", events.append, should_stop=should_stop)
    assert len(read_places(tmp_path / "run")["trials"]) == 1
    assert "embedgrad resume" in events[-1]["text"]


def test_without_a_system_role_auto_leaves_it_out_and_system_is_refused(
    data: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", template=NO_SYSTEM)
    recipe = Recipe.from_dict(values(model, data, template={"place": "auto"}))
    events: list[dict[str, Any]] = []
    chosen, _ = choose_place(recipe, tmp_path, events.append)
    found = read_places(tmp_path)
    assert sorted(found["trials"]) == ["after", "around", "before"]
    assert list(found["left_out"]) == ["system"]
    assert chosen.place == found["chosen"]
    notes = [str(event.get("text")) for event in events]
    assert any(n.startswith("place system is left out") and "not supported" in n for n in notes)
    named = Recipe.from_dict(values(model, data, template={"place": "system"}))
    with pytest.raises(TemplateError, match=r"template\.place: 'system', but .*not supported"):
        run(named, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_auto_needs_dev_rows(auto: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = auto(data={"dev": None, "dev_share": 0.0})
    with pytest.raises(DataError, match=r"template\.place: 'auto' chooses on dev rows"):
        run(recipe, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_another_place_is_another_run(auto: Callable[..., Recipe], tmp_path: Path) -> None:
    chosen = run(auto(), tmp_path / "run", quiet)["place"]["chosen"]
    other = next(place for place in PLACES if place != chosen)
    with pytest.raises(RunError, match=r"template\."):
        run(auto(template={"place": other}), tmp_path / "run", quiet, resume=True)


def test_a_plan_and_a_comparison_say_what_they_make_of_auto(auto: Callable[..., Recipe]) -> None:
    notes = plan(auto(), measure=False, report=quiet)["notes"]
    assert any(note.startswith("template.place = 'auto' comes first") for note in notes)
    with pytest.raises(RecipeError, match=r"template\.place: 'auto' is for `optimize`"):
        plan_parts(auto())


def test_trials_begin_at_a_warm_start_and_leave_out_where_its_words_are_parted(
    auto: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    on_dev = {"train": str(data / "dev.jsonl"), "dev": None, "dev_share": 0.0}
    long = auto(template={"place": "after"}, data=on_dev, training={"steps": 30})
    run(long, tmp_path / "earlier", quiet)
    events: list[dict[str, Any]] = []
    warm = {"epochs": 4, "warm_start": str(tmp_path / "earlier")}
    cold, chosen = (
        run(auto(training=training), tmp_path / name, events.append)["place"]
        for name, training in (("cold", {"epochs": 4}), ("warm", warm))
    )
    assert {"after", "system"} <= chosen["trials"].keys()
    assert "the words of both must be the same" in chosen["left_out"]["around"]
    assert cold["trials"]["after"]["text"] == chosen["trials"]["after"]["text"]
    assert cold["trials"]["after"]["refined"] != chosen["trials"]["after"]["refined"]
