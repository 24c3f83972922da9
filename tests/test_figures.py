"""Figures show the numbers they were given, and draw whatever words they hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from embedgrad.errors import RunError
from embedgrad.report.figures import comparison
from embedgrad.report.figures import run as figures
from embedgrad.report.figures.comparison import count
from embedgrad.report.figures.series import MOST_POINTS, smooth, thin
from embedgrad.report.figures.theme import SIGNS, image, inline_svg, style
from made_runs import HOSTILE, answered_rows, events, made_interpolation, made_results


def lines(figure: Any, axes: int) -> list[tuple[list[float], list[float]]]:
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in figure.axes[axes].get_lines()
    ]


def words(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_curves_show_every_loss_and_dev_score() -> None:
    told = events(32)
    figure = figures.curves(told)
    losses = [e["loss"] for e in told if e["event"] == "step"]
    scores = [(e["step"], 100 * e["accuracy"]) for e in told if e["event"] == "evaluation"]
    assert lines(figure, 0)[0] == (list(range(1, 33)), pytest.approx(losses))
    assert (list(range(0, 33, 8)), [score for _, score in scores]) in lines(figure, 1)
    best = max(scores, key=lambda score: score[1])
    assert ([best[0]], [best[1]]) in lines(figure, 1)
    assert figure.axes[1].get_title("left") == "dev accuracy, best 68.3 % (58.3 to 78.3) at step 16"
    assert any(y == [60, 60] for _, y in lines(figure, 1))  # the text prompt


def test_curves_leave_out_what_is_no_number() -> None:
    told = events(8)
    told[3]["loss"] = None  # diverged
    told.append({"event": "evaluation", "step": None})
    told.append({"event": "step"})
    drawn = lines(figures.curves(told), 0)[0]
    assert drawn[0] == [e["step"] for e in told if e.get("loss") is not None]


def test_where_no_kept_step_is_told_the_lowest_log_loss_is_the_best() -> None:
    told = [
        {"event": "evaluation", "step": step, "metric": "log_loss", "log_loss": loss}
        for step, loss in ((0, 0.7), (4, 0.5), (8, 0.6))
    ]
    title = figures.curves(told).axes[0].get_title("left")
    assert title == "dev log-loss, best 0.500 at step 4"


def test_curves_of_half_a_run_and_of_nothing() -> None:
    told = events(8)
    only_steps = figures.curves([e for e in told if e["event"] == "step"])
    only_scores = figures.curves([e for e in told if e["event"] == "evaluation"])
    assert len(only_steps.axes) == len(only_scores.axes) == 1
    with pytest.raises(RunError, match="no step and no evaluation"):
        figures.curves([{"event": "note", "text": "hello"}])


def test_rewards_are_drawn_with_the_form_of_the_answers() -> None:
    told = events(8)
    for e in (e for e in told if e["event"] == "step"):
        e |= {"reward": e["step"] / 8, "groups_alive": 0.5, "answers_cut": 0.25}
        e["answer_tokens"] = 100 + e["step"]
    figure = figures.curves(told)
    rewards, shares, lengths, scores = (lines(figure, i) for i in range(4))
    assert rewards[0] == (list(range(1, 9)), [step / 8 for step in range(1, 9)])
    assert [y for _, y in shares[::2]] == [[50] * 8, [25] * 8]
    assert lengths[0][1] == list(range(101, 109))
    assert figure.axes[3].get_title("left").startswith("dev accuracy")
    assert scores


def test_a_long_run_is_a_short_line() -> None:
    told = events(100_000)
    figure = figures.curves(told)
    for x, y in [*lines(figure, 0), *lines(figure, 1)]:
        assert len(x) == len(y) <= MOST_POINTS
    assert len(image(figure, "svg")) < 100_000


def test_the_interpolation_shows_every_place() -> None:
    interpolation = made_interpolation()
    figure = figures.interpolation_figure(interpolation)
    places = [point["t"] for point in interpolation["points"]]
    assert (places, [100 * p["accuracy"] for p in interpolation["points"]]) in lines(figure, 0)
    assert (places, [p["log_loss"] for p in interpolation["points"]]) in lines(figure, 1)
    assert figure.axes[0].get_title("left") == "accuracy on 40 dev rows with 95 % interval, %"
    ticks = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert ticks == ["0\ntext", "0.5", "1\nrefined", "1.5"]


def test_reliability_shows_bins_of_both_prompts() -> None:
    rows = answered_rows(200)
    figure = figures.reliability(rows)
    _, text, refined = lines(figure, 0)
    for name, (x, y) in (("text", text), ("refined", refined)):
        assert len(x) == 5  # a choice of two is at least half sure
        sure = [max(row[name]["probabilities"]) for row in rows]
        inside = [row[name]["correct"] for row, s in zip(rows, sure, strict=True) if s >= 0.9]
        assert y[-1] == pytest.approx(100 * sum(inside) / len(inside))
        assert 90 <= x[-1] <= 100
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert all(", ECE " in label for label in labels)
    bars = [bar.get_height() for bar in figure.axes[1].patches]
    assert sum(bars) == pytest.approx(200)  # percent, of two prompts


def test_reliability_is_for_choices() -> None:
    with pytest.raises(RunError, match="free answers have no probabilities"):
        figures.reliability(answered_rows(5, free=True))


def test_a_heat_strip_colors_by_distance_and_breaks_lines() -> None:
    tokens = [{"token": f"\u00b7word{i}", "distance": 0.01 * i} for i in range(30)]
    tokens[3]["token"] = "\u21b5"
    figure = figures.heat_strip(tokens, radius=0.3)
    boxes = [patch.get_alpha() for patch in figure.axes[0].patches]
    assert boxes == pytest.approx([0.85 * i / 30 for i in range(30)])
    placed = figure.axes[0].texts
    assert [text.get_text() for text in placed] == [token["token"] for token in tokens]
    assert placed[4].get_position()[1] == placed[3].get_position()[1] + 1
    assert max(text.get_position()[0] for text in placed) < figures.LINE_OF_TOKENS


def test_a_forest_has_a_line_per_method() -> None:
    results = made_results()
    figure = comparison.forest(results)
    others = sorted(results["methods"][1:], key=lambda entry: -entry["difference"])
    shown = words(figure)
    assert shown[::2] == [entry["method"] for entry in others]
    drawn = lines(figure, 0)
    for y, entry in enumerate(others):
        low, high = (100 * edge for edge in entry["difference_interval"])
        assert ([low, high], [y, y]) in drawn
        assert ([100 * entry["difference"]], [y]) in drawn
        seeds = [r["difference"] for r in results["rows"] if r["method"] == entry["method"]]
        if len(seeds) > 1:
            assert ([100 * s for s in seeds], [y] * 3) in drawn
        assert shown[2 * y + 1].startswith(f"{100 * entry['difference']:+.1f}  (")
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts[1::2]}
    assert len(set(colors.values())) == 3  # improved, worse, no reliable gain
    for label, entry in zip(shown[1::2], others, strict=True):
        assert label.endswith(f" {SIGNS[entry['verdict']]} {entry['verdict']}")


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.curves(events(32)),
        lambda: figures.reliability(answered_rows(200)),
        lambda: figures.interpolation_figure(made_interpolation()),
        lambda: comparison.forest(made_results()),
        lambda: comparison.accuracy_against_cost(made_results()),
    ],
    ids=["curves", "reliability", "interpolation", "forest", "cost"],
)
def test_no_legend_and_no_label_covers_what_is_drawn(figure: Callable[[], Any]) -> None:
    with style():
        drawn = figure()
        drawn.draw_without_rendering()
    covers = [legend.get_window_extent() for legend in drawn.legends]
    assert not any(axes.get_legend() for axes in drawn.axes)
    for axes in drawn.axes:
        assert not any(legend.overlaps(axes.bbox) for legend in covers)
        labels = [text.get_window_extent() for text in axes.texts]
        for line in axes.lines:
            if line.get_transform() != axes.transData:  # a line across the axes
                continue
            points = axes.transData.transform(line.get_xydata())
            assert not any(label.contains(*point) for label in labels for point in points)


def test_accuracy_against_cost_places_every_method() -> None:
    results = made_results()
    figure = comparison.accuracy_against_cost(results)
    drawn = lines(figure, 0)
    for entry in results["methods"]:
        assert ([entry["train_seconds"]], [100 * entry["accuracy"]]) in drawn
    shown = words(figure)
    assert "\u25b2 embedgrad, 7.49k numbers" in shown
    assert "text" in shown
    left, right = figure.axes[0].get_xlim()
    assert left < 0 < 700 < right


def test_labels_of_equal_methods_do_not_stand_on_each_other() -> None:
    results = made_results()
    for entry in results["methods"]:
        entry.update(accuracy=0.7, min=0.7, max=0.7, train_seconds=10.0)
    labels = comparison.accuracy_against_cost(results).axes[0].texts
    heights = sorted(label.xy[1] for label in labels)
    assert len({round(height, 6) for height in heights}) == len(labels)


def test_comparisons_without_numbers_are_refused() -> None:
    results = {"rows": [], "methods": [{"method": "text", "accuracy": 0.5, "difference": 0.0}]}
    with pytest.raises(RunError, match="no method with a difference"):
        comparison.forest(results)
    with pytest.raises(RunError, match="no method with an accuracy and training seconds"):
        comparison.accuracy_against_cost(results)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_words_can_be_drawn(name: str) -> None:
    results = made_results()
    results["methods"][1]["method"] = results["rows"][1]["method"] = HOSTILE[name]
    drawn = [
        figures.heat_strip([{"token": HOSTILE[name], "distance": 0.1, "cosine": 1.0}]),
        comparison.forest(results),
        comparison.accuracy_against_cost(results),
    ]
    for figure in drawn:
        svg = inline_svg(figure, "name", HOSTILE[name])
        assert "<script" not in svg
        assert "\u202e" not in svg.partition(">")[2]


def test_the_same_figure_is_the_same_file() -> None:
    one, other = (
        image(figures.interpolation_figure(made_interpolation()), "svg") for _ in range(2)
    )
    assert one == other
    assert image(figures.interpolation_figure(made_interpolation()), "png").startswith(
        b"\x89PNG\r\n"
    )


def test_figures_heed_no_settings_of_the_user() -> None:
    import matplotlib

    before = inline_svg(figures.interpolation_figure(made_interpolation()), "interpolation", "")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert (
            inline_svg(figures.interpolation_figure(made_interpolation()), "interpolation", "")
            == before
        )


def test_series() -> None:
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert thin([1.0, 2.0]) == [1, 2]
    assert thin([]) == []
    long = [float(i) for i in range(1_001)]
    short = thin(long)
    assert len(short) <= MOST_POINTS
    assert math.isclose(sum(short[:-1]) * 3 + sum(long[-2:]), sum(long))


@pytest.mark.parametrize(
    ("numbers", "told"), [(0, "0"), (576, "576"), (7_488, "7.49k"), (1.2e6, "1.2M"), (5e9, "5G")]
)
def test_counts_as_people_say_them(numbers: float, told: str) -> None:
    assert count(numbers) == told
