"""What a run tells: the progress display, the files of events, the tables at the end."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad.errors import RunError
from embedgrad.evaluation import verdict as evaluation
from embedgrad.formatting import duration, encodable, size, visible
from embedgrad.report.event_files import EventLog, fan_out
from embedgrad.report.terminal import tables
from embedgrad.report.terminal.methods_table import methods_table
from embedgrad.report.terminal.progress import Progress, TimeLeft
from embedgrad.report.terminal.tables import changes_table, comparison_table, drift_table, show
from terminal import Screen

Event = dict[str, Any]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n[bold red]x[/] :smile: \u202e\u2028\x9b\ud800"


# -- a simulated run -------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step_event(step: int, total: int, seconds: float = 1.0, **more: Any) -> Event:
    return {
        "event": "step",
        "step": step,
        "total": total,
        "loss": 0.4124,
        "gradient_norm": 0.5,
        "learning_rate": 0.01,
        "drift_mean": 0.12,
        "drift_max": 0.3,
        "cosine_min": 0.96,
        "examples": 16,
        "seconds": seconds,
        "prefix_cache_bytes": 88_000_000,
        "prefix_cache_hits": 512,
        **more,
    }


OWN_ANSWERS: Event = {
    "answers": 64,
    "answers_cut": 0.25,
    "answer_tokens": 96.4,
    "answers_per_second": 1.234,
    "reward": 0.3125,
    "groups_alive": 0.5,
}


def evaluation_event(step: int, total: int, **more: Any) -> Event:
    now: Event = {"step": step, "accuracy": 0.8125, "log_loss": 0.41, "macro_f1": 0.8}
    best: Event = {"step": step, "accuracy": 0.84375, "log_loss": 0.38, "macro_f1": 0.83}
    text: Event = {"step": 0, "accuracy": 0.71875, "log_loss": 0.56, "macro_f1": 0.7}
    for score, interval in ((now, (0.711, 0.883)), (best, (0.748, 0.908)), (text, (0.60, 0.81))):
        score["interval"] = interval
    scores = {**(text if step == 0 else now), "best": text if step == 0 else best, "text": text}
    return {"event": "evaluation", **scores, "metric": "accuracy", "total": total, **more}


def scoring_event(which: str, done: int, total: int) -> Event:
    return {"event": "scoring", "which": which, "done": done, "total": total}


def lines_of(*events: Event) -> list[str]:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for event in events:
            progress(event)
    return stream.getvalue().splitlines()


def test_prefixes_on_disk_are_shown_where_there_are_any() -> None:
    for spilled, told in (
        (0, "prefixes 88 MB, 512 hits"),
        (2e9, "prefixes 88 MB and 2.0 GB on disk, 512"),
    ):
        event = step_event(10, 10, prefix_cache_spilled_bytes=int(spilled))
        (line,) = lines_of(event)
        assert told in line


# -- piped: plain lines ----------------------------------------------------------------------------


def test_a_pipe_gets_a_plain_line_per_note_stage_and_evaluation() -> None:
    lines = lines_of(
        {"event": "note", "text": "the answer is in column 'label' (guessed)"},
        {"event": "stage", "text": "refining"},
        evaluation_event(0, 64),
        *(step_event(step, 64) for step in range(1, 17)),
        evaluation_event(16, 64),
        {"event": "end", "ended": "patience", "steps": 16, "seconds": 75.0},
    )
    assert [re.sub(r", \S+ \S+ left", "", line) for line in lines] == [
        "the answer is in column 'label' (guessed)",
        "refining",
        "step 0/64, dev accuracy 71.9 % (60 to 81) with the text prompt, 0 % done",
        "step 16/64, dev accuracy 81.2 % (71 to 88), best 84.4 % (75 to 91), "
        "text prompt 71.9 % (60 to 81), 25 % done, loss 0.412, drift 0.120, "
        "prefixes 88 MB, 512 hits",
        "stopped early, dev did not get better: 16 steps in 1.2 min",
    ]
    assert ", 48 s left," in lines[3]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("macro_f1", "dev macro-F1 0.800, best 0.830, text prompt 0.700"),
        ("log_loss", "dev log-loss 0.410, best 0.380, text prompt 0.560"),
    ],
)
def test_the_metric_that_decides_is_the_one_shown(metric: str, words: str) -> None:
    (line,) = lines_of(evaluation_event(16, 64, metric=metric))
    assert words in line


def test_the_models_own_answers_are_shown_beside_their_reward() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress(step_event(1, 10, **OWN_ANSWERS))
    shown = "reward 0.31, 50.0 % alive, 96 tokens, 25.0 % cut, 1.2 answers/s, drift 0.120"
    assert stream.getvalue().startswith(f"step 1/10, {shown}")
    far = {**OWN_ANSWERS, "mismatch": 0.0123}
    assert "1.2 answers/s, engine off by 0.012, drift" in lines_of(step_event(1, 10, **far))[0]


def test_without_dev_rows_a_line_per_tenth() -> None:
    lines = lines_of(*(step_event(step, 64) for step in range(1, 65)))
    assert len(lines) == 10
    assert lines[0].startswith("step 7/64, loss 0.412, drift 0.120")
    assert lines[-1].startswith("step 64/64")


def test_a_download_shows_its_bytes() -> None:
    event = {"event": "download", "which": "owner/tiny", "done": 27_000_000, "total": 270_000_000}
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    for seconds in (0.0, 20.0):
        clock.now += seconds
        progress(event)
    assert stream.getvalue() == "fetching owner/tiny 27 MB of 270 MB, 3.0 min left\n"


def test_scoring_says_little_when_piped() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    for which in ("text prompt", "refined prompt"):
        for done in range(10, 501, 10):
            clock.now += 1.0
            progress(scoring_event(which, done, 500))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10  # 100 seconds
    assert lines[0] == "scoring text prompt 100/500, 40 s left"
    assert lines[-1] == "scoring refined prompt 500/500"


def test_a_pipe_gets_no_control_characters_whatever_the_environment_says() -> None:
    code = """
        import sys
        from embedgrad.report.terminal.progress import Progress
        with Progress() as progress:
            progress({"event": "stage", "text": "loading \\x1b[31mred\\rmodel"})
            progress({"event": "note", "text": "a\\x07b\\nc"})
            progress({"event": "scoring", "which": "text prompt", "done": 1, "total": 2})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        env={**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"},
        check=True,
    )
    assert done.stderr == b"loading \\x1b[31mred\\rmodel\na\\x07b\\nc\n".replace(
        b"\n", os.linesep.encode()
    )
    assert done.stdout == b""


def test_quiet_writes_nothing() -> None:
    stream = io.StringIO()
    with Progress(quiet=True, stream=stream) as progress:
        progress({"event": "note", "text": "a note"})
        progress(evaluation_event(0, 64))
    assert stream.getvalue() == ""


# -- time left -------------------------------------------------------------------------------------


def shown_time_left(line: str) -> float:
    match = re.search(r"([\d.]+) (s|min|h) left", line)
    assert match, line
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def simulated_run(
    total: int, every: int, evaluation_seconds: float, seed: int
) -> list[tuple[float, Event]]:
    """Seconds and events: uneven steps, a slow start, a first evaluation that fills a cache."""
    chance = random.Random(seed)
    events = [
        (5.0, {"event": "stage", "text": "refining"}),
        (evaluation_seconds * 1.3, evaluation_event(0, total, every=every)),
    ]
    for step in range(1, total + 1):
        seconds = 2.0 * math.exp(chance.gauss(0, 0.3)) * (5 if step <= 2 else 1)
        events.append((seconds, step_event(step, total, seconds)))
        if step % every == 0:
            seconds = evaluation_seconds * chance.uniform(0.9, 1.1)
            events.append((seconds, evaluation_event(step, total, every=every)))
    return events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("evaluation_seconds", [0.5, 30.0])
@pytest.mark.parametrize("every", [4, 25])
def test_time_left_is_right_after_a_fifth(every: int, evaluation_seconds: float, seed: int) -> None:
    run = simulated_run(100, every, evaluation_seconds, seed)
    time_left, gone, said = TimeLeft(), 0.0, None
    for seconds, event in run:
        gone += seconds
        if event["event"] == "step":
            said = time_left.step(event)
        elif event["event"] == "evaluation":
            said = time_left.evaluation(event, seconds)
        if event.get("step") == 20:
            break
    truth = sum(seconds for seconds, _ in run) - gone
    assert said == pytest.approx(truth, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_time_left_as_shown_goes_by_the_clock(seed: int) -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    run = simulated_run(100, 10, 30.0, seed)
    end = clock.now + sum(seconds for seconds, _ in run)
    for seconds, event in run:
        clock.now += seconds
        progress({"event": "note", "text": "notes take no part"})
        progress(event)
        if event["event"] == "evaluation" and event["step"] == 20:
            break
    assert shown_time_left(stream.getvalue().splitlines()[-1]) == pytest.approx(
        end - clock.now, rel=0.25
    )


def test_time_left_learns_how_often_dev_is_scored() -> None:
    """From events that do not say it, and with an evaluation at the very end."""
    time_left = TimeLeft()
    for step in range(1, 11):
        time_left.step(step_event(step, 32, 1.0))
        if step % 5 == 0:
            said = time_left.evaluation(evaluation_event(step, 32), 7.0)
    assert said == pytest.approx(22 + 5 * 7)  # at 15, 20, 25, 30 and 32
    assert time_left.step(step_event(11, 32, 1.0)) == pytest.approx(21 + 5 * 7)


def test_no_time_is_left_at_the_end() -> None:
    time_left = TimeLeft()
    assert time_left.evaluation(evaluation_event(0, 3), 7.0) is None, "no step is known yet"
    assert time_left.step(step_event(3, 3, 1.0)) == 7.0
    assert time_left.evaluation(evaluation_event(3, 3), 7.0) == 0.0


# -- a terminal: two lines -------------------------------------------------------------------------

# A shell starts background jobs with SIGINT ignored, which children inherit.
FAST = """
import signal
import embedgrad.report.terminal.display as d
signal.signal(signal.SIGINT, signal.default_int_handler)
d.REFRESHES = 100
"""


def in_terminal(
    code: str, columns: int, interrupt_at: str | None = None, encoding: str = "utf-8"
) -> tuple[Screen, str]:
    """Run code in a pseudo-terminal; returns its screen and the raw text."""
    termios = pytest.importorskip("termios", reason="no pseudo-terminals here")
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    drop = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"}
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": encoding}
    child = subprocess.Popen(
        [sys.executable, "-c", FAST + textwrap.dedent(code)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    raw = b""
    try:
        while True:
            try:
                block = os.read(master, 65536)
            except OSError:  # how Linux tells that the other side has closed
                break
            if not block:
                break
            raw += block
            if interrupt_at is not None and interrupt_at.encode() in raw:
                interrupt_at = None
                child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 0, raw.decode(errors="replace")
    finally:
        child.kill()
        child.wait()
        os.close(master)
    text = raw.decode(encoding)
    screen = Screen(columns)
    screen.feed(text)
    return screen, text


WHOLE_RUN = f"""
    import time
    from embedgrad.report.terminal.progress import Progress
    def pause(): time.sleep(0.06)
    step = {step_event(0, 64)!r}
    score = {evaluation_event(16, 64)!r}
    with Progress() as progress:
        progress({{"event": "note", "text": "N" * 150}})
        progress({{"event": "stage", "text": "loading " + "a long name " * 12}}); pause()
        for n in range(1, 9):
            progress({{**step, "step": 8 * n}}); pause()
            if n == 4: progress(score); pause()
            if n == 5: print("N from elsewhere"); pause()
            if n == 6: progress({{"event": "note", "text": "N two"}}); pause()
        for done in (100, 200, 500):
            progress({{"event": "scoring", "which": "text prompt", "done": done, "total": 500}})
            pause()
"""


@pytest.mark.parametrize("columns", [120, 80, 21])
def test_a_terminal_shows_two_lines_at_most(columns: int) -> None:
    screen, text = in_terminal(WHOLE_RUN, columns)
    assert all(line.startswith("N") for line in screen.shown()), "the display is gone at the end"
    assert "".join(screen.shown()) == "N" * 150 + "N from elsewhere" + "N two"
    heights = [len([line for line in lines if line[0] != "N"]) for lines in screen.seen]
    assert max(heights) == 2
    assert screen.cursor_shown
    if columns == 120:
        assert "loss 0.412, drift 0.120, prefixes 88 MB, 512 hits" in text
        assert "text prompt 71.9 % (60 to 81), 75 % done, 16 s left" in text
        assert "scoring text prompt 200/500" in text
    if columns == 80:
        assert "best 84.4 % (75 to 91), 75 % done, 16 s left" in text


def test_ctrl_c_gives_the_terminal_back() -> None:
    code = f"""
        import sys, time
        from embedgrad.report.terminal.progress import Progress
        before = sys.stdout, sys.stderr
        try:
            with Progress() as progress:
                progress({step_event(3, 64)!r})
                time.sleep(20)
        except KeyboardInterrupt:
            print("after", before == (sys.stdout, sys.stderr))
    """
    screen, text = in_terminal(code, 80, interrupt_at="loss 0.412")
    assert "\x1b[?25l" in text, "the cursor was hidden"
    assert screen.cursor_shown
    assert screen.shown() == ["after True"]


def test_an_exception_gives_the_terminal_back() -> None:
    code = f"""
        from embedgrad.report.terminal.progress import Progress
        try:
            with Progress() as progress:
                progress({step_event(3, 64)!r})
                raise ValueError("broken")
        except ValueError as error:
            print(error)
    """
    screen, _ = in_terminal(code, 80)
    assert screen.cursor_shown
    assert screen.shown() == ["broken"]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    code = """
        import time
        from embedgrad.report.terminal.progress import Progress
        with Progress() as progress:
            progress({"event": "stage", "text": "loading mod\\u00e8le \\u6f22" + "x" * 90})
            progress({"event": "note", "text": "note \\u6f22"})
            progress({"event": "scoring", "which": "text prompt", "done": 1, "total": 3})
            time.sleep(0.1)
    """
    screen, _ = in_terminal(code, 80, encoding="ascii")
    assert screen.shown() == ["note ??"]
    assert max(len(lines) for lines in screen.seen) == 3, "the note and the display"


# -- event files -----------------------------------------------------------------------------------


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_log_holds_every_event_as_soon_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log({"event": "note", "text": HOSTILE})
        assert [event["text"] for event in read_events(path)] == [HOSTILE]
        log({"event": "step", "loss": math.nan, "more": [math.inf, {"x": (1, -math.inf)}]})
        events = read_events(path)
    assert events[1]["loss"] is None
    assert events[1]["more"] == [None, {"x": [1, None]}]
    assert "NaN" not in path.read_text()
    when = datetime.fromisoformat(events[0]["time"])
    assert when.utcoffset() == UTC.utcoffset(None)
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60


def test_a_torn_last_line_is_dropped_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "note", "n": 1}\n{"event": "note", "n": 2')
    with EventLog(path) as log:
        log({"event": "note", "n": 3})
    assert [event["n"] for event in read_events(path)] == [1, 3]


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"events\.jsonl: events cannot be written \(No such file"):
        EventLog(tmp_path / "missing" / "events.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_log_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[Event] = []
    with EventLog("/dev/full") as log:
        report = fan_out(log, got.append)
        for n in range(3):
            report({"event": "note", "n": n})
    assert [event["n"] for event in got] == [0, 1, 2]
    assert capsys.readouterr().err == (
        "warning: /dev/full gets no more events: "
        "/dev/full: events cannot be written (No space left on device)\n"
    )


def test_a_failing_report_is_dropped_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []

    def tracker(event: Event) -> None:
        calls.append("tracker")
        raise ValueError("line one\nline two")

    report = fan_out(tracker, lambda event: calls.append("good"))
    for _ in range(3):
        report({"event": "note", "text": "x"})
    assert calls == ["tracker", "good", "good", "good"]
    warned = "warning: tracker gets no more events: line one\\nline two\n"
    assert capsys.readouterr().err == warned


def test_a_closed_terminal_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning goes to the stream that has just failed."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    got: list[Event] = []
    with Progress(stream=stream) as progress:
        report = fan_out(progress, got.append)
        stream.close()
        report({"event": "note", "text": "x"})
        report({"event": "note", "text": "y"})
    assert [event["text"] for event in got] == ["x", "y"]


def test_ctrl_c_in_a_report_still_ends_the_run() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    report = fan_out(interrupted)
    with pytest.raises(KeyboardInterrupt):
        report({"event": "note"})


# -- tables ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def printed(renderable: Any, encoding: str = "utf-8", columns: int | None = None) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")
    with pytest.MonkeyPatch.context() as patch:
        if columns:
            patch.setenv("COLUMNS", str(columns))
        show(renderable, file)
    return raw.getvalue().decode(encoding)


def result(**difference: Any) -> dict[str, Any]:
    text, refined = (
        {"rows": 500, "accuracy": a, "interval": [a - 0.04, a + 0.04], "macro_f1": a, "log_loss": b}
        for a, b in ((0.72, 0.561), (0.862, 0.34))
    )
    found = {"accuracy": 0.142, "interval": [0.109, 0.175], "p_value": 1e-12}
    return {
        "text": text,
        "refined": refined,
        "difference": {**found, "fixed": 82, "broken": 11, **difference},
        "test_rows": 500,
        "drift": {"mean": 0.213, "max": 0.3},
        "cosine": {"mean": 0.978, "min": 0.954},
        "nearest_tokens_unchanged": 0.96,
        "train": {"steps": 64, "seconds": 92.3, "ended": "finished"},
        "peak_memory_bytes": 1_900_000_000,
        "prefix_cache": {"hits": 1024, "misses": 512, "bytes": 88_000_000},
        "artifact": "runs/demo/prompt",
    }


class Narrow(io.StringIO):
    """A terminal of few columns."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 60, 79, 80])
def test_a_narrow_terminal_wraps_cells_and_cuts_none(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    entry = {
        **{"method": "peft-prompt-tuning-random", "accuracy": 0.812, "interval": (0.711, 0.883)},
        **{"trained_numbers": 460_800, "stored_bytes": 2e6, "train_seconds": 3600, "runs": 2},
        **{"extra_tokens": 12, "min": 0.801, "max": 0.822, "verdict": "no reliable gain"},
        **{"difference": -0.125, "difference_interval": (-0.201, -0.101), "p_holm": 0.31},
    }
    shown = {"methods": [entry], "rows": [], "seeds": [0, 1], "test_rows": 80, "failed": {}}
    for table in (comparison_table(result()), methods_table(shown)):
        file = Narrow()
        show(table, file)
        lines = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).splitlines()
        assert max(map(len, lines)) <= columns
        wide = re.sub(r"[\s\u2500]", "", printed(table, columns=400))
        narrow = re.sub(r"[\s\u2500]", "", "".join(lines))
        assert sorted(narrow) == sorted(wide), "nothing is cut"


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_the_comparison_holds_both_prompts_and_the_facts() -> None:
    lines = printed(comparison_table(result())).splitlines()
    assert cells(lines[0]) == [
        *("on 500 test rows", "accuracy", "95 % interval", "macro-F1", "log-loss"),
    ]
    assert cells(lines[2]) == ["text prompt", "72.0 %", "68.0 to 76.0", "0.720", "0.561"]
    assert cells(lines[3]) == ["refined prompt", "86.2 %", "82.2 to 90.2", "0.862", "0.340"]
    assert lines[5:] == [
        "drift 0.213 mean, 0.300 max; cosine to the start rows 0.978 mean, 0.954 min; "
        "nearest token unchanged for 96 % of rows",
        "64 steps in 1.5 min (all steps done), peak memory 1.9 GB, "
        "prefix cache 1024 hits, 512 misses, 88 MB",
        "refined prompt saved in runs/demo/prompt",
        "improved: +14.2 points (95 % interval +10.9 to +17.5), McNemar p < 0.001; "
        "82 fixed, 11 broken",
    ]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (
            {"accuracy": 0.012, "interval": [-0.008, 0.031], "p_value": 0.31},
            "no reliable gain: +1.2 points (95 % interval -0.8 to +3.1), McNemar p = 0.310;",
        ),
        ({"p_value": 0.05}, "no reliable gain: +14.2 points"),
        (
            {"p_value": 0.049},
            "improved: +14.2 points (95 % interval +10.9 to +17.5), McNemar p = 0.049",
        ),
        (
            {"accuracy": -0.04, "interval": [-0.068, -0.012], "p_value": 0.004},
            "worse: -4.0 points (95 % interval -6.8 to -1.2), McNemar p = 0.004;",
        ),
        ({"accuracy": 0.0, "interval": [0, 0], "p_value": 1.0}, "no reliable gain"),
        (
            {"p_value": 0.004, "test": "sign-flip"},
            "improved: +14.2 points (95 % interval +10.9 to +17.5), sign-flip p = 0.004;",
        ),
        (
            {"p_value": 1e-9, "test": "McNemar"},
            "improved: +14.2 points (95 % interval +10.9 to +17.5), McN",
        ),
        (
            {"p_value": math.nan},
            "no reliable gain: +14.2 points (95 % interval +10.9 to +17.5), McNemar p unknown;",
        ),
    ],
)
def test_the_verdict_is_honest(difference: dict[str, Any], words: str) -> None:
    lines = printed(comparison_table(result(**difference))).splitlines()
    assert lines[-1].startswith(words)


def test_a_run_is_judged_as_a_method_is() -> None:
    """At the same level, and with the same words."""
    assert tables.LEVEL == evaluation.LEVEL
    for accuracy in (-0.1, 0.1):
        for p in (0.0, 0.049, 0.05, 1.0):
            word = tables.verdict_word({"accuracy": accuracy, "p_value": p})
            assert word == evaluation.word(accuracy, p)


def test_a_result_may_lack_parts() -> None:
    interrupted = {k: v for k, v in result().items() if k in ("train", "prefix_cache", "artifact")}
    interrupted["train"] = {"steps": 7, "seconds": 12.0, "ended": "interrupted"}
    lines = printed(comparison_table(interrupted)).splitlines()
    assert lines == [
        "7 steps in 12 s (interrupted), prefix cache 1024 hits, 512 misses, 88 MB",
        "refined prompt saved in runs/demo/prompt",
        "no test rows were scored",
    ]
    dev = {k: v for k, v in result().items() if k in ("text", "refined", "difference", "test_rows")}
    lines = printed(comparison_table({**dev, "split": "dev"})).splitlines()
    assert lines[0].startswith("on 500 dev rows")
    assert len(lines) == 6
    free_text = result()
    free_text["text"] |= {"macro_f1": None, "log_loss": None}
    assert cells(printed(comparison_table(free_text)).splitlines()[2])[-2:] == ["-", "-"]


def drift_row(token: str, distance: float, **more: Any) -> dict[str, Any]:
    return {
        "span": 1,
        "token": token,
        "distance": distance,
        "cosine": 0.97,
        "nearest": [token, "\u00b7other"],
        "unchanged": True,
        "typical": 1.0,
        **more,
    }


def test_drift_ranks_the_rows_that_moved_most_first() -> None:
    rows = [drift_row(f"token{n}", 0.25 if n in (2, 5) else 0.01) for n in range(1, 7)]
    text = printed(drift_table(rows))
    ranked = [cells(line) for line in text.splitlines()[2:8]]
    assert [line[0] for line in ranked] == ["2", "5", "1", "3", "4", "6"]
    assert ranked[0] == ["2", "token2", "0.250", "0.970", "1.00", "token2", "\u00b7other"]
    assert "warning" not in text
    assert "additive" not in text


def test_drift_of_several_spans_has_a_heading_for_each() -> None:
    rows = [drift_row(f"token{n}", 0.01 * n, span=1 + (n > 2)) for n in range(1, 5)]
    lines = printed(drift_table(rows)).splitlines()
    assert [lines[0], lines[5]] == ["span 1", "span 2"]
    assert [cells(line)[0] for line in (*lines[3:5], *lines[8:10])] == ["2", "1", "4", "3"]
    part = {"drift": {"mean": 0.1, "max": 0.2}, "cosine": {"mean": 0.99, "min": 0.98}}
    parts = [{**part, "nearest_tokens_unchanged": share} for share in (1.0, 0.5)]
    text = printed(comparison_table({**result(), "spans": parts}))
    assert "\nspan 1: drift 0.100 mean, 0.200 max; cosine" in text
    assert "unchanged for 50 % of rows" in text.split("span 2: ")[1]


def test_drift_shows_what_rows_are_worth_where_measured() -> None:
    rows = [
        drift_row("good", 0.2, worth={"accuracy": 0.032, "log_loss": 0.051}),
        drift_row("bad", 0.1, worth={"accuracy": -0.01, "log_loss": -0.002}),
    ]
    text = printed(drift_table(rows))
    assert "measured one at a time, not additive" in text
    assert [cells(line)[5:7] for line in text.splitlines()[2:4]] == [
        ["+3.2", "+0.051"],
        ["-1.0", "-0.002"],
    ]
    assert max(map(len, text.splitlines()[:4])) <= 80


@pytest.mark.parametrize(
    ("typical", "warned"), [(0.49, True), (0.5, False), (2, False), (2.1, True)]
)
def test_drift_warns_of_rows_unlike_embeddings(typical: float, warned: bool) -> None:
    rows = [drift_row("fine", 0.2), drift_row("far", 0.1, typical=typical)]
    text = printed(drift_table(rows))
    assert ("warning: outside the cloud of real embeddings" in text) is warned
    assert (f": row 2 ({typical:.2f});" in text) is warned


def change(kind: str, n: int, text: str = "a fine film", said: str = "negative") -> dict[str, Any]:
    return {
        "source": f"reviews.csv:{n}",
        "answer": "positive",
        "change": kind,
        "columns": {"review": text},
        "text": {"predicted": said},
        "refined": {"predicted": "positive"},
    }


def test_changes_show_the_first_rows_of_each_kind() -> None:
    rows = [change("fixed", n) for n in range(9)] + [change("same", 50), change("broken", 51)]
    text = printed(changes_table(rows, first=3))
    assert "9 rows fixed, the first 3:" in text
    assert "1 row broken:" in text
    assert re.findall(r"reviews\.csv:(\d+)", text) == ["0", "1", "2", "51"]
    assert cells(text.splitlines()[3]) == [
        *("reviews.csv:0", "positive", "negative", "positive", "a fine film"),
    ]
    assert "no rows broken" in printed(changes_table(rows[:2]))


def test_changes_without_columns_have_no_text_column() -> None:
    row = change("fixed", 1)
    del row["columns"]
    assert cells(printed(changes_table([row])).splitlines()[1]) == [
        *("row", "answer", "text prompt", "refined prompt"),
    ]


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_changes_are_cut_to_the_width(columns: int) -> None:
    rows = [change("fixed", 1, text="word " * 200_000, said="a long answer " * 1000)]
    lines = printed(changes_table(rows), columns=columns).splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) == columns
    assert lines[3].count("\u2026") == 2
    assert "reviews.csv:1" in lines[3]


# -- hostile text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp437"])
@pytest.mark.parametrize(
    "table",
    [
        lambda: changes_table([change("fixed", 1, HOSTILE, HOSTILE) | {"source": HOSTILE}]),
        lambda: drift_table([drift_row(HOSTILE, 0.1, nearest=[HOSTILE])]),
        lambda: comparison_table({**result(), "artifact": HOSTILE}),
    ],
)
def test_hostile_text_cannot_drive_the_terminal(table: Callable[[], Any], encoding: str) -> None:
    text = printed(table(), encoding, columns=800)
    assert all(line.isprintable() for line in text.split("\n"))
    for part in ("\\x1b]0;owned\\x07\\x1b[2J\\r\\n", "[bold red]x[/] :smile:", "\\u202e\\u2028"):
        assert part in text


def test_ascii_output_keeps_its_columns() -> None:
    rows = [change("fixed", n, text="\u6f22\u5b57 caf\u00e9 " * n) for n in (1, 2, 50)]
    wide, plain = (printed(changes_table(rows), name).splitlines() for name in ("utf-8", "ascii"))
    assert len(wide) == len(plain)
    assert {len(line) for line in plain[1:6]} == {80}
    assert "???? caf? " in plain[3]
    assert plain[5].endswith("~")


@given(st.text(st.characters()))
def test_visible_text_prints_and_printable_text_stays(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)
    if text.isprintable():
        assert visible(text) == text
    assert encodable(visible(text), "ascii").isascii()


def test_numbers_read_well() -> None:
    assert [duration(s) for s in (0.4, 45, 92.3, 3600, 11520)] == [
        *("0 s", "45 s", "1.5 min", "60 min", "3.2 h"),
    ]
    assert [size(n) for n in (0, 999, 1000, 88_000_000, 1_900_000_000)] == [
        *("0 B", "999 B", "1 kB", "88 MB", "1.9 GB"),
    ]


def test_importing_the_package_does_not_import_rich() -> None:
    code = "import sys, json, embedgrad; print(json.dumps('rich' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) is False


def test_a_run_that_found_nothing_better_says_so() -> None:
    result = {
        "train": {"steps": 2, "best_step": 0, "seconds": 1.0, "ended": "finished"},
        "prefix_cache": {"hits": 0, "misses": 0, "bytes": 0},
    }
    assert "the saved rows are the text prompt's own" in "\n".join(
        printed(comparison_table(result)).splitlines()
    )
    result["train"]["best_step"] = 2
    assert "the text prompt's own" not in printed(comparison_table(result))
