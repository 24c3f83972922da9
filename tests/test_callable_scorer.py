"""A user's function as a scorer: named in a recipe, in a child process; decorated, in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import functions_to_call
from embedgrad import Evaluation, Recipe
from embedgrad.data.examples import Example
from embedgrad.errors import RecipeError
from embedgrad.parts.registry import build_part
from embedgrad.parts.scorers import SandboxedFunction, Scorer, scorer
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sandbox import end_workers
from embedgrad.prompt.sequence import Target
from functions_to_call import close_enough
from small_recipe import changed

TESTS = Path(__file__).parent
posix = pytest.mark.skipif(os.name != "posix", reason="process groups, fork and SIGKILL")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    process = psutil.Process()
    end_workers()
    files = process.num_fds() if os.name == "posix" else 0
    yield
    end_workers()
    assert workers() == []
    assert (process.num_fds() if os.name == "posix" else 0) == files


def test_a_fingerprint_is_of_the_file_and_not_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "judges" / "fair.py"
    module.parent.mkdir()
    module.write_text("def right(reply, answer):\n    return 1\n")
    once = SandboxedFunction("judges.fair:right", 1.0).fingerprint()
    assert SandboxedFunction("judges.fair:right", 9.0).fingerprint() == once
    assert str(once["source"]).startswith("sha256:")
    module.write_text("def right(reply, answer):\n    return 0\n")
    assert SandboxedFunction("judges.fair:right", 1.0).fingerprint() != once
    assert SandboxedFunction("nowhere:right").fingerprint()["source"] is None


def called(function: str, timeout: float = 30) -> SandboxedFunction:
    return SandboxedFunction(function=f"functions_to_call:{function}", timeout=timeout)


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "sandbox_child.py" in " ".join(p.cmdline())]


def refusal(scorer: SandboxedFunction, reply: str = "a reply", answer: str = "an answer") -> str:
    with pytest.raises(RecipeError) as raised:
        scorer.score(reply, answer)
    told = str(raised.value)
    assert told.isprintable()
    assert len(told) < 600
    return told


def test_its_value_is_the_score() -> None:
    assert called("same").score("7", "7") == 1.0
    assert called("same").score("7", "8") == 0.0
    assert called("share").score("the red car", "a red bus or car") == 0.4


def test_any_text_arrives_as_it_was_sent() -> None:
    for text in ("\0", "\ud800", "a\u2028\n\rb", "\N{SNOWMAN}", '"}\n{"', "x" * 2**20):
        assert called("same").score(text, text) == 1.0
        assert called("same").score(text, f"{text}.") == 0.0


def test_one_process_serves_all_calls() -> None:
    assert [called("count").score("", "") for _ in range(3)] == [0.01, 0.02, 0.03]
    assert len(workers()) == 1
    assert called("same").score("7", "7") == 1.0
    assert len(workers()) == 2  # one per function


def test_what_it_prints_is_no_score(capfd: pytest.CaptureFixture[str]) -> None:
    assert called("loud").score("7", "7") == 1.0
    assert called("loud").score("7", "8") == 0.0
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.count("seen '7'") == 2
    assert told.err.count('{"value": 0.25}') == 4


def test_it_has_no_input_to_read() -> None:
    assert "raised EOFError" in refusal(called("curious"))


def test_modules_are_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, value in (("one", 1), ("other", 0)):
        (tmp_path / folder / "checks").mkdir(parents=True)
        (tmp_path / folder / "checks" / "answers.py").write_text(f"right = lambda r, a: {value}\n")
        monkeypatch.chdir(tmp_path / folder)
        assert SandboxedFunction(function="checks.answers:right").score("7", "8") == value


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("functions_to_cal:same", "function: there is no module 'functions_to_cal' for"),
        ("functions_to_call.deep:same", "function: there is no module 'deep' for"),
        ("embedgrad.parts.scorer:same", "did you mean 'scorers'? known: "),
        ("functions_to_call:sane", "has no function 'sane'; did you mean 'same' or"),
        ("functions_to_call:NUMBER", "has no function 'NUMBER'"),
        ("functions_to_call", "names no function; expected 'package.module:function'"),
        ("", "'' names no function"),
        ("./functions.py:same", "names no function"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_problem_of_the_recipe(path: str, told: str) -> None:
    rows = [Example({}, "7", "rows.csv:2")]
    with pytest.raises(RecipeError) as raised:
        check_answers(rows, Target(), SandboxedFunction(function=path))
    assert str(raised.value).startswith("recipe: evaluation.scorer.function: ")
    assert told in str(raised.value)
    assert workers() == []


def test_a_module_nearby_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checks.py").write_text("right = max")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'checks'?" in refusal(SandboxedFunction(function="check:right"))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("def right(:", "SyntaxError: "),
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero (broken.py:2)"),
        ("raise SystemExit('no')", "SystemExit: no (broken.py:1)"),
        ("import os; os._exit(7)", "its process ended with exit status 7"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    message = refusal(SandboxedFunction(function="broken:right"))
    assert f"evaluation.scorer.function: 'broken' cannot be imported: {told}" in message


@pytest.mark.parametrize(
    ("function", "reply", "told"),
    [
        (
            "careless",
            "so 7\n",
            "ValueError: could not convert string to float: 'so 7\\n' (fun",
        ),
        ("careless", "so 7", "(functions_to_call.py:"),
        ("careless", "\x1b\ud800", "on the reply '\\x1b\\ud800'; it must score any text"),
        ("careless", "9 " * 99, "on the reply '9 9 "),
        ("unprintable", "7", "raised Silent (functions_to_call.py:"),
        ("lines", "7", "raised KeyError: 'one"),
        ("quits", "7", "raised SystemExit: 3"),
        ("dies", "7", "functions_to_call:dies ended its process with exit status 3 on the reply"),
        ("value", "none", "returned NoneType None on the reply 'none'; expected a number from 0"),
        ("value", "text", "returned str '1' "),
        ("value", "two", "returned int 2 "),
        ("value", "less", "returned float -0.1 "),
        ("value", "nan", "returned float nan "),
    ],
)
def test_a_function_that_fails_says_what_it_did(function: str, reply: str, told: str) -> None:
    message = refusal(called(function), reply)
    assert message.startswith("recipe: evaluation.scorer: ")
    assert f"functions_to_call:{function}" in message
    assert told in message


def test_a_failure_is_no_end() -> None:
    refusal(called("careless"), "seven")
    assert called("careless").score("7", "7.0") == 1.0
    refusal(called("dies"))
    assert called("same").score("7", "7") == 1.0


@pytest.mark.parametrize("function", ["slow", "stuck"])
def test_a_function_that_hangs_is_stopped(function: str) -> None:
    """Also one that lets no other thread of its process run."""
    reply = {"slow": "99", "stuck": "stuck"}[function]
    assert called(function).score("0", "") == 1.0
    (before,) = workers()
    started = time.monotonic()
    told = refusal(called(function, timeout=0.3), reply)
    assert 0.3 <= time.monotonic() - started < 2
    assert f"functions_to_call:{function} took longer than 0.3 s on the reply '{reply}'" in told
    assert "raise evaluation.scorer.timeout" in told
    assert not before.is_running()
    assert called(function).score("0", "") == 1.0


@posix
def test_what_a_function_started_is_stopped_with_it() -> None:
    """A fork of its process holds the same pipes, and must not be waited for."""
    assert called("forks").score("0", "") == 1.0
    (worker,) = workers()
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(refusal, called("forks", timeout=1), "60")
        while not (children := worker.children()) and not hung.done():
            time.sleep(0.01)
        (fork,) = children
        assert "took longer than 1 s" in hung.result(timeout=20)
    assert gone(fork.pid, 5)


def test_threads_take_turns_and_one_that_hangs_is_stopped_there_too() -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = [str(n) for n in range(40)]
        scores = list(pool.map(lambda text: called("same").score(text, "7"), texts))
        hung = pool.submit(refusal, called("slow", timeout=0.3), "99")
        assert "took longer than 0.3 s" in hung.result(timeout=60)
    assert scores == [float(n == 7) for n in range(40)]


def test_a_process_that_was_killed_is_replaced() -> None:
    """Also when its end is not known yet as the next call begins, which chance decides."""
    for _ in range(6):
        assert called("count").score("", "") == 0.01
        (before,) = workers()
        before.kill()
        assert called("count").score("", "") == 0.01
        assert not before.is_running()
        end_workers()


def test_a_process_without_work_stays() -> None:
    assert called("count", timeout=0.1).score("", "") == 0.01
    time.sleep(2.5)  # longer than a call may take
    assert called("count").score("", "") == 0.02


def test_answers_are_tried_before_anything_is_spent() -> None:
    rows = [Example({}, answer, f"rows.csv:{n}") for n, answer in enumerate(("7", "seven"), 2)]
    check_answers(rows, Target(), called("same"))
    with pytest.raises(RecipeError, match=r"ValueError: .* on the reply 'seven'"):
        check_answers(rows, Target(), called("careless"))
    # That the bare answer is no right reply by its rules is the function's own affair.
    check_answers(rows, Target(), called("share"))


def test_a_recipe_names_the_function() -> None:
    scorer = {"name": "callable", "function": "checks:right", "timeout": 2}
    recipe = Recipe.from_dict(changed(evaluation={"scorer": scorer}))
    assert recipe.evaluation.scorer == SandboxedFunction("checks:right", 2.0)
    for broken, told in (
        ({"name": "callable"}, "scorer.function: Field required"),
        ({**scorer, "timeout": 0}, "scorer.timeout: Input should be greater than 0"),
        ({**scorer, "timeout": 1e9}, "scorer.timeout: Input should be less than or equal"),
    ):
        problems: list[str] = []
        assert build_part("scorer", broken, "scorer", problems) is None
        (problem,) = problems
        assert problem.startswith(told)


# -- one decorated function ------------------------------------------------------------------------


def test_a_decorated_function_is_a_scorer_in_this_process() -> None:
    assert isinstance(close_enough, Scorer)
    evaluation = Evaluation(scorer=close_enough)
    assert evaluation.scorer.score("7", "8") == 0.5
    assert close_enough("7", "7") == 1.0  # still a function
    check_answers([Example({}, "7", "rows.csv:2")], Target(), close_enough)
    assert not close_enough.is_unread("no number")
    assert workers() == []


def test_a_recipe_names_a_decorated_function() -> None:
    assert called("close_enough").score("7", "8") == 0.5
    assert len(workers()) == 1
    assert "has no function 'close_enuf'; did you mean 'close_enough'" in refusal(
        called("close_enuf")
    )


@pytest.mark.parametrize(
    ("function", "reply", "told"),
    [
        (functions_to_call.careless, "so 7", "raised ValueError: could not convert string to flo"),
        (functions_to_call.quits, "7", "raised SystemExit: 3 (functions_to_call.py:"),
        (functions_to_call.value, "text", "returned str '1' on the reply 'text'; expected a numbe"),
        (functions_to_call.value, "two", "returned int 2 on the reply 'two'; expected a number fr"),
        (functions_to_call.value, "nan", "returned float nan "),
    ],
)
def test_a_decorated_function_that_fails_says_what_it_did(
    function: Any, reply: str, told: str
) -> None:
    message = refusal(scorer(function), reply)
    assert message.startswith(f"scorer: functions_to_call:{function.__name__} {told}")


def test_ctrl_c_in_a_decorated_function_is_no_failure() -> None:
    @scorer
    def interrupted(reply: str, answer: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.score("7", "7")


async def answers_later(reply: str, answer: str) -> float:
    return 1.0


def test_the_decorator_may_have_parentheses() -> None:
    @scorer()
    def fair(reply: str, answer: str) -> float:
        return 0.5

    assert fair.score("a", "b") == 0.5


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda reply: 1.0, "does not take two texts, the reply and the answer: too many position"),
        (lambda reply, answer, more: 1.0, "missing a required argument: 'more'"),
        (lambda *, reply, answer: 1.0, "does not take two texts"),
        ("checks:right", "'checks:right' does not take two texts, the reply and the answer: it is"),
        (3, "3 does not take two texts"),
        (lambda self, answer: 1.0, "the answer: it is a method"),
        (answers_later, "the answer: it is no plain function"),
    ],
)
def test_what_takes_no_two_texts_is_refused_where_it_is_decorated(function: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=r"^scorer: ") as raised:
        scorer(function)
    assert told in str(raised.value)


def test_the_fingerprint_of_a_decorated_function_is_of_its_code() -> None:
    @scorer
    def fair(reply: str, answer: str) -> float:
        return 1.0

    once = fair.fingerprint()

    @scorer
    def fair(reply: str, answer: str) -> float:
        return 0.0

    assert once["function"] == fair.fingerprint()["function"]
    assert once["source"] != fair.fingerprint()["source"]


# -- the process itself ----------------------------------------------------------------------------


def script(code: str) -> subprocess.Popen[str]:
    """A Python process that scores, in a group of its own; it prints the pid of its worker."""
    start = (
        "import os, psutil, signal, sys, time\n"
        # A shell starts what runs in its background deaf to it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from embedgrad.parts.scorers import SandboxedFunction\n"
        "same, slow = (SandboxedFunction(f'functions_to_call:{n}') for n in ('same', 'slow'))\n"
        "def pid(): return psutil.Process().children()[0].pid\n"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "dev", "-c", start + code],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """Process pools run the script again in every child, and so fail without one."""
    (tmp_path / "checks.py").write_text("def right(reply, answer):\n    return 1\n")
    (tmp_path / "script.py").write_text(
        "from embedgrad.parts.scorers import SandboxedFunction\n"
        "print(SandboxedFunction('checks:right').score('7', '7'))\n"
    )
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_it_ends_with_the_program_and_without_a_word() -> None:
    process = script("print(same.score('7', '7'), pid())")
    out, err = process.communicate(timeout=60)
    score, pid = out.split()
    assert (score, err, process.returncode) == ("1.0", "", 0)
    assert gone(int(pid))


def test_it_ends_with_the_program_in_the_middle_of_a_call() -> None:
    process = script(
        "import threading\n"
        "slow.score('0', '')\nprint(pid())\n"
        "threading.Thread(target=slow.score, args=('60', ''), daemon=True).start()\ntime.sleep(0.2)"
    )
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert gone(int(out), 1)


@posix
@pytest.mark.parametrize("work", ["time.sleep(60)", "slow.score('60', '')"])
def test_it_ends_when_the_program_is_killed(work: str) -> None:
    """Waiting, or in the middle of a call: then its own timer ends it."""
    process = script(
        "slow = SandboxedFunction(slow.function, 0.5)\n"
        f"slow.score('0', '')\nprint(pid(), flush=True)\n{work}"
    )
    with process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.2)
        process.kill()
    assert gone(pid)


@posix
def test_ctrl_c_in_the_middle_of_a_call_ends_it_without_a_word() -> None:
    process = script(
        "slow = SandboxedFunction(slow.function, 100)\n"
        "same.score('7', '7')\nslow.score('0', '')\n"
        "try: print(pid(), flush=True); slow.score('90', '')\n"
        "except KeyboardInterrupt: print('interrupted', slow.score('0', ''))"
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("interrupted 1.0\n", "")
    assert gone(pid)


@posix
def test_a_forked_copy_starts_its_own() -> None:
    process = script(
        "import warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "same.score('7', '7')\n"
        "before, files = pid(), psutil.Process().num_fds()\n"
        "child = os.fork()\n"
        "if child == 0: assert psutil.Process().num_fds() == files - 2\n"
        "scores = [same.score(str(n), '7') for n in range(5, 9)]\n"
        "own = pid() if child == 0 else before\n"
        "if child: _, status = os.waitpid(child, 0); assert status == 0; assert pid() == before\n"
        "else: assert own != before\n"
        "assert scores == [0, 0, 1, 0], scores\n"
        "print(own, flush=True)"
    )
    out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("", 0)
    pids = [int(pid) for pid in out.split()]
    assert len(set(pids)) == 2
    assert all(gone(pid) for pid in pids)
