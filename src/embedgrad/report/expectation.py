"""What to expect of training, in one sentence.

    rows < 10                                  unclear
    accuracy >= 95 %                           saturated
    choices: rows of one answer                unclear
    choices: AUC's interval holds 0.5          no signal; unclear if it reaches 0.75 as well
    free text: form >= 25 %, pass@k >= 50 %    form
    free text: pass@k - pass@1 < 5 points      no signal
    else                                       signal

`form` is the share of answers that are cut or hold no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from embedgrad.formatting import percent, with_interval

FEWEST_ROWS = 10
SATURATED = 0.95
OPEN = 0.75  # an interval from chance to here says nothing
BAD_FORM = 0.25
KNOWN = 0.5  # pass@k from which the answers are there, and their form is what is missing
LEAST_GAP = 0.05  # pass@k less pass@1

Values = Mapping[str, Any]


def expect(values: Values) -> tuple[str, str]:
    """One of "saturated", "signal", "no signal", "form" and "unclear", and why in a sentence."""
    rows, text = values["rows"], values["text"]
    if rows < FEWEST_ROWS:
        return "unclear", f"{rows} rows are too few to tell what there is to bring out"
    if text["accuracy"] >= SATURATED:
        right = percent(text["accuracy"])
        return "saturated", f"the text prompt is right on {right} of these rows: little is left"
    return _of_samples(values) if values["sampled"] else _of_scores(text)


def _of_scores(text: Values) -> tuple[str, str]:
    if text["auc"] is None:
        return "unclear", "all these rows have the same answer, so scores cannot be ranked"
    low, high = text["auc_interval"]
    auc = f"AUC {text['auc']:.2f} ({low:.2f} to {high:.2f})"
    if low <= 0.5 <= high:
        if high >= OPEN:
            return "unclear", f"these rows are too few to tell: {auc}"
        return "no signal", f"this model's scores on these rows carry no signal: {auc}"
    if high < 0.5:
        return "signal", f"this model's scores rank these rows' answers the wrong way round: {auc}"
    return "signal", (
        f"this model's scores on these rows carry signal: {auc}, while the text prompt is right on "
        f"{percent(text['accuracy'])}"
    )


def _of_samples(values: Values) -> tuple[str, str]:
    sampled, form = values["sampled"], values["text"]["form"]
    k = sampled["samples"]
    one, some = sampled["pass_at"]["1"], sampled["pass_at"][str(k)]
    both = f"pass@{k} {percent(some)} against pass@1 {percent(one)}"
    if form >= BAD_FORM and some >= KNOWN:
        return "form", (
            f"{percent(form)} of the answers are cut or hold no answer, while {both}: expect a "
            "gain of form first"
        )
    if some - one < LEAST_GAP:
        return "no signal", f"sampled answers are right no more often than single ones: {both}"
    return "signal", f"samples find answers that a single one misses: {both}"


def describe(values: Values) -> Iterator[str]:
    """The measurement, a line each, and the sentence first."""
    yield values["sentence"]
    names = {"text": "text prompt", "no_template": "no template", "few_shot": "demonstrations"}
    for key, name in names.items():
        prompted = values[key]
        if prompted.get("failed"):
            yield f"{name}: not measured ({prompted['failed']})"
            continue
        if "shots" in prompted:
            name = f"{prompted['shots']} {name}"
        line = f"{name}: {with_interval(prompted['accuracy'], prompted['interval'])} right"
        if prompted.get("auc") is not None:
            low, high = (f"{edge:.2f}" for edge in prompted["auc_interval"])
            line += f", AUC {prompted['auc']:.2f} ({low} to {high})"
        if prompted.get("form") is not None:
            missing = "are cut or hold no answer" if values["sampled"] else "are no choice"
            replies = "answers" if values["sampled"] else "greedy replies"
            line += f"; {percent(prompted['form'])} of {replies} {missing}"
        yield line
    if values["sampled"]:
        sampled = values["sampled"]
        *some, (k, most) = sampled["pass_at"].items()
        passed = [*(f"pass@{few} {percent(share)}" for few, share in some)]
        passed.append(f"pass@{k} {with_interval(most, sampled['pass_interval'])}")
        yield f"{sampled['samples']} samples a row: {', '.join(passed)}"
    yield f"on {values['rows']} {values['split']} rows"
