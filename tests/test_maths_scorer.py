r"""Mathematical equality: what is right, what is wrong, and how long either may take."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import psutil
import pytest

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, RecipeError
from embedgrad.parts.scorers import Math, maths
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sandbox import end_workers
from embedgrad.prompt.sequence import Target


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "sandbox_child.py" in " ".join(p.cmdline())]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("1/2", "0.5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", "1/2"),
        ("0.333333", "1/3"),
        (r"Thus $\boxed{\frac{3}{4}}$, in $2$ steps.", "0.75"),
        ("so she has 18 eggs.", "18"),
        ("The answer is 1,234.", "1234"),
        ("She makes $18 every day.", "16 - 3 - 4 = 9.\n9 * 2 = 18\n#### 18"),
        ("9 * 2 = 18\n#### 18\n", "18"),
        ("#### 12. Add\nIt is 3.", "3"),
        ("y + x", "x + y"),
        ("It is $y+x$.", "x + y"),
        (r"\boxed{(x-1)(x+1)}", "x^2 - 1"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{-5i + 6}", "6 - 5i"),
        (r"\boxed{2xy}", "2yx"),
        (r"\boxed{5}", "x = 5"),
        ("x = 5", "5"),
        (r"\boxed{5, 7}", "x=5 or x=7"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{[1, 2)}", "[1,2)"),
        (r"\boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{10000}", r"10,\!000"),
        (r"\boxed{\$5.40}", "5.4"),
        (r"\boxed{5\text{ cm}}", "5"),
        (r"\boxed{145}", r"145^\circ"),
        (r"\boxed{50\%}", "50"),  # math-verify takes a percentage for either
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{C}", r"\text{(C)}"),
    ],
)
def test_equal(reply: str, answer: str) -> None:
    assert Math().score(reply, answer) == 1.0


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("1/3", "0.5"),
        ("0.33", "1/3"),
        ("-5", "5"),
        ("3x+2", "3"),
        (r"\boxed{18}, not 19", "19"),
        ("18 eggs, 2 of them broken", "18"),
        ("16 + 2 = 18\n#### 18", "16"),
        ("y - x", "x - y"),
        (r"\boxed{x+1}", "y+1"),
        (r"\boxed{y=5}", "x=5"),
        (r"\boxed{5}", "x=5 or x=7"),
        (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}"),
        (r"\boxed{[1, 2]}", "[1,2)"),
        (r"\boxed{(2, 1)}", "(1,2)"),
        (r"\boxed{5\%}", "50"),
        (r"\boxed{\text{Lynne}}", "Evelyn"),
        ("seat", "east"),
        (r"\boxed{18", "18"),
        ("no number", "18"),
        ("18", ""),
    ],
)
def test_unequal(reply: str, answer: str) -> None:
    assert Math().score(reply, answer) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{10^{10^{10}}}",
        r"\boxed{99999999!}",
        "9**9**9**9",
        "2^2^2^2^2^2^2",
        "{" * 4000 + "1" + "}" * 4000,
        r"\sqrt{" * 2000 + "2" + "}" * 2000,
        "(" * 10_000,
        "7" * 2**20,
        r"\boxed{" * 9000,
    ],
    ids=lambda text: text[:20],
)
def test_a_bomb_scores_nothing_in_bounded_time(text: str) -> None:
    scorer = Math(timeout=0.5)
    assert scorer.score(r"\boxed{6}", "6") == 1.0  # a worker is there
    started = time.monotonic()
    assert scorer.score(text, "6") == 0.0
    assert time.monotonic() - started < 5
    assert scorer.score(r"\boxed{6}", "6") == 1.0  # and there again


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "\udfff 7 \0", "\N{SNOWMAN}", "\u202e7"])
def test_odd_characters_are_no_mathematics(text: str) -> None:
    assert Math().score(f"\\boxed{{{text}}}", "6") == 0.0
    assert Math().score("\\boxed{6}", text) == 0.0


def test_threads_share_one_worker() -> None:
    """Also the first start, and a call that has to be stopped, off the main thread."""
    end_workers()
    replies = [rf"\boxed{{{n}}}" for n in range(8)] + [r"\boxed{10^{10^{10}}}"]
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda reply: Math(timeout=1).score(reply, "3"), replies))
    assert scores == [float(n == 3) for n in range(9)]
    assert len(workers()) <= 1


def test_a_worker_that_was_killed_is_replaced() -> None:
    assert Math().score(r"\boxed{6}", "6.0") == 1.0
    (before,) = workers()
    before.kill()
    assert Math().score(r"\boxed{6}", "6.0") == 1.0
    (after,) = workers()
    assert after.pid != before.pid


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_a_worker_cannot_take_all_memory() -> None:
    assert Math().score(r"\boxed{6}", "6.0") == 1.0
    (worker,) = workers()
    assert worker.rlimit(psutil.RLIMIT_AS)[0] == 2**31


def test_the_same_text_is_right_without_a_worker() -> None:
    end_workers()
    assert Math().score(" It is said. ", "It is said.") == 1.0
    assert Math().score(" ", "6") == 0.0
    assert workers() == []


@pytest.mark.parametrize("missing", ["math_verify", "antlr4"])
def test_without_the_library_one_line_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> object:
        return None if name == missing else find_spec(name)

    maths._require_library.cache_clear()
    monkeypatch.setattr(maths, "find_spec", found)
    rows = [Example({}, "6", "rows.csv:2")]
    with pytest.raises(RecipeError, match=r"evaluation.scorer: .*'embedgrad\[math\]'") as raised:
        check_answers(rows, Target(), Math())
    assert "\n" not in str(raised.value)
    with pytest.raises(RecipeError):
        Math().score("6", "6")
    monkeypatch.undo()
    check_answers(rows, Target(), Math())


def test_an_answer_without_mathematics_is_refused_before_anything_is_spent() -> None:
    usable = ["18", "x + y", r"\text{Evelyn}", "Evelyn", "She has 9 * 2 = 18.\n#### 18"]
    check_answers([Example({}, answer, "a.csv:2") for answer in usable], Target(), Math())
    rows = [Example({}, answer, "a.csv:3") for answer in ("It may well be blue.", "  ")]
    with pytest.raises(DataError, match=r"a\.csv:3: the answer 'It may well be blue\.' is none"):
        check_answers(rows, Target(), Math())
