"""Live progress of a run.

    ━━━━━━━━━━╺━━━━━━━━━━━━━━━ 26/64  loss 0.412  drift 0.120  prefixes 88 MB, 512 hits
    dev accuracy 81.2 % (71 to 88), best 84.4 % (75 to 91), 41 % done, 52 s left

Two lines in a terminal, renewed in place and gone at the end; elsewhere plain lines.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Any, TextIO, final

from rich.console import Console

from embedgrad.formatting import (
    duration,
    encodable,
    eta,
    join_nonempty,
    percent,
    pluralize,
    size,
    visible,
    with_interval,
)
from embedgrad.report.figures.series import METRICS
from embedgrad.report.terminal.display import OF_TEXT, Display, View

RECENT = 20  # steps that the time left is judged by
QUIET_SECONDS = 10.0  # between two plain lines about scoring
ENDINGS = {
    "finished": "all steps done",
    "patience": "stopped early, dev did not get better",
    "stopped": "stopped as asked",
    "interrupted": "interrupted",
    "diverged": "stopped, the loss was not finite",
    "failed": "stopped by an error",
}


@final
class Progress(AbstractContextManager["Progress"]):
    """Takes a run's events and shows on `stream` (default: stderr) how far it is.

    In a terminal two lines are renewed in place, with notes printed above them; leaving the
    context restores the terminal. Anywhere else a note, a stage and an
    evaluation are one plain line each, and scoring one line in ten seconds at most; a run without
    dev rows gets a line per tenth. `quiet` writes nothing.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._quiet, self._clock = quiet, clock
        self._stream = stream = sys.stderr if stream is None else stream
        # FORCE_COLOR in the environment makes no terminal of a pipe.
        self._console = Console(file=stream, force_terminal=stream.isatty(), force_jupyter=False)
        self._display: Display | None = None
        self._forecast = TimeLeft()
        self._last = clock()  # the last event but notes
        self._status = ""  # of the last step
        self._score = ""  # of the last evaluation
        self._scoring = ("", 0)
        self._scoring_since = self._scoring_said = 0.0

    def __str__(self) -> str:
        return "the progress display"

    def __exit__(self, *exception: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event."""
        if self._quiet:
            return
        if self._display is None and self._console.is_interactive:
            self._display = Display(self._console, self._clock)
        now = self._clock()
        match event["event"]:
            case "note":
                self._say(event["text"])
                return
            case "stage":
                self._status = self._score = ""  # of another training, where several follow
                self._forecast = TimeLeft()
                self._show(View(first=event["text"], since=now))
                self._say_plainly(event["text"])
            case "step":
                self._step(event, now)
            case "evaluation":
                self._evaluation(event, now)
            case "scoring":
                done = f"{event['done']}/{event['total']}"
                self._show_done(event, f"scoring {event['which']} {done}", now)
            case "download":
                done = f"{size(event['done'])} of {size(event['total'])}"
                self._show_done(event, f"fetching {event['which']} {done}", now)
            case "end":
                ending, took = ENDINGS[event["ended"]], duration(event["seconds"])
                self._say(f"{ending}: {pluralize(event['steps'], 'step')} in {took}")
        self._last = now

    def _step(self, event: dict[str, Any], now: float) -> None:
        drift = f"drift {event['drift_mean']:.3f}" if "drift_mean" in event else ""
        learned = f"loss {event['loss']:.3f}"
        if "answers" in event:  # sampled by the model itself
            learned = _answers(event)
        self._status = join_nonempty(learned, drift)
        if event.get("prefix_cache_bytes") or event.get("prefix_cache_hits"):
            held, hits = size(event["prefix_cache_bytes"]), event["prefix_cache_hits"]
            spilled = event.get("prefix_cache_spilled_bytes", 0)
            disk = f" and {size(spilled)} on disk" if spilled else ""
            self._status += f", prefixes {held}{disk}, {hits} hits"
        seconds = self._forecast.step(event)
        step, total = event["step"], event["total"]
        first = join_nonempty(f"{step}/{total}", self._status)
        self._show_share(first, step, total, now, seconds, self._score)
        if not self._score and step * 10 // total > (step - 1) * 10 // total:
            # Without dev rows no evaluation says where the run is.
            self._say_plainly(join_nonempty(f"step {step}/{total}", self._status, eta(seconds)))

    def _evaluation(self, event: dict[str, Any], now: float) -> None:
        seconds = self._forecast.evaluation(event, now - self._last)
        self._score = describe_score(event)
        step, total = event["step"], event["total"]
        first = join_nonempty(f"{step}/{total}", self._status)
        share = self._show_share(first, step, total, now, seconds, self._score)
        place = f"step {step}/{total}"
        self._say_plainly(join_nonempty(place, self._score, share, eta(seconds), self._status))

    def _show_done(self, event: dict[str, Any], text: str, now: float) -> None:
        which, done, total = event["which"], event["done"], event["total"]
        if which != self._scoring[0] or done < self._scoring[1]:
            self._scoring_since = self._scoring_said = self._last
        self._scoring = (which, done)
        seconds = (now - self._scoring_since) * (total - done) / done if done else None
        self._show_share(text, done, total, now, seconds)
        if now - self._scoring_said >= QUIET_SECONDS:
            self._scoring_said = now
            self._say_plainly(join_nonempty(text, eta(seconds)))

    def _show_share(
        self, first: str, done: int, total: int, now: float, seconds: float | None, score: str = ""
    ) -> str:
        """Show how far something is and return that in words; `seconds` are those left."""
        share = f"{100 * done // max(total, 1)} % done"
        until = None if seconds is None else now + seconds
        self._show(View(first, join_nonempty(score, share), done, total, until=until))
        return share

    def _show(self, view: View) -> None:
        if self._display is not None:
            self._display.view = view

    def _say(self, text: str) -> None:
        """Print a line, in a terminal above the two."""
        if self._display is None:
            self._say_plainly(text)
        else:
            self._display.say(text)

    def _say_plainly(self, text: str) -> None:
        """Print a line where there is no terminal."""
        if self._display is None:
            self._stream.write(encodable(visible(text), self._console.encoding) + "\n")
            self._stream.flush()


def describe_score(event: dict[str, Any]) -> str:
    """Dev score now, the best one and the text prompt's, with intervals where there are any."""
    metric: str = event["metric"]
    now, best = (dev_score(metric, score) for score in (event, event["best"]))
    if event["step"] == 0 and not (event.get("warm_start") and event["text"]):
        rows = "its warm start" if event.get("warm_start") else "the text prompt"
        return f"dev {METRICS[metric]} {now} with {rows}"
    text = f"{OF_TEXT}{dev_score(metric, event['text'])}" if event["text"] else ""
    return f"dev {METRICS[metric]} {now}, best {best}{text}"


def _answers(event: dict[str, Any]) -> str:
    """What the model's own answers of a step were like."""
    reward = f"reward {event['reward']:.2f}" if "reward" in event else f"loss {event['loss']:.3f}"
    alive = f"{percent(event['groups_alive'])} alive" if "groups_alive" in event else ""
    return join_nonempty(
        reward,
        alive,
        f"{event['answer_tokens']:.0f} tokens, {percent(event['answers_cut'])} cut",
        f"{event['answers_per_second']:.1f} answers/s",
        f"engine off by {event['mismatch']:.3f}" if "mismatch" in event else "",
    )


def describe_engine(result: Mapping[str, Any]) -> list[str]:
    """How far the engine that sampled answers was from the model that learned from them."""
    found = result.get("sampling")
    if not found:
        return []
    return [
        "another engine sampled the answers; its log-probabilities differ from ours by "
        f"{found['mismatch']:.3f} nats a token, {found['mismatch_max']:.3f} in the worst step; "
        f"{percent(found['mismatch_cut'])} of the tokens had their weight cut"
    ]


def dev_score(metric: str, score: dict[str, Any]) -> str:
    """One score, an accuracy with its interval."""
    if metric != "accuracy":
        return f"{score[metric]:.3f}"
    return with_interval(score[metric], score.get("interval"), digits=0)


@final
class TimeLeft:
    """Seconds that the steps and evaluations of a run still take.

    A step takes the median of the recent ones, so that a few slow ones (a warm-up, a long batch) do
    not count for all. An evaluation takes what the last one took: the first, which also fills the
    prefix cache, is forgotten as soon as there is another.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._evaluation = 0.0
        self._evaluated = 0
        self._every: int | None = None

    def step(self, event: dict[str, Any]) -> float:
        """Seconds left after a step."""
        self._steps.append(event["seconds"])
        return self._estimate(event["step"], event["total"])

    def evaluation(self, event: dict[str, Any], seconds: float) -> float | None:
        """Seconds left after an evaluation that took `seconds`; None before any step."""
        step: int = event["step"]
        # Until two are seen, only the one at the end is certain, unless the event says more.
        self._every = event.get("every") or (step - self._evaluated) or None
        self._evaluation, self._evaluated = seconds, step
        return self._estimate(step, event["total"]) if self._steps else None

    def _estimate(self, step: int, total: int) -> float:
        every = self._every or total
        evaluations = 0
        if self._evaluated < total:
            evaluations = math.ceil(total / every) - self._evaluated // every
        return median(self._steps) * (total - step) + self._evaluation * evaluations
