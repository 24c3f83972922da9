"""`embedgrad play`: both prompts' answers, the line between them, judgements, and who is let in."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import embedgrad as eg
from browser import Browser, Page
from embedgrad.errors import EmbedgradError, OptionError
from embedgrad.inference.play import Playing, play
from embedgrad.inference.play import server as serving
from embedgrad.inference.play.app import build_app
from embedgrad.inference.play.player import KEPT, Player, open_runs
from embedgrad.report.page.safe_text import readable
from kit import reseal
from run_kit import CHOICES, Command, save_model, values

pytest_plugins = ["tiny_runs"]

TOKEN = "a-token"
HERE = "http://127.0.0.1:8000"
REVIEW = "The film was a waste of time."
HOSTILE = "<img src=x onerror='document.title = 1'></script>\u202ex"
Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def opened(finished: Finished, generated: Path) -> Player:
    """A classification and a generation, which write nothing."""
    return open_runs([finished[0], generated], ["evaluation.max_new_tokens=12"], lambda _: None)


@pytest.fixture(scope="module")
def client(opened: Player) -> Iterator[TestClient]:
    with TestClient(build_app(opened, TOKEN), base_url=HERE) as made:
        yield made


@pytest.fixture
def own(finished: Finished, tmp_path: Path, opened: Player) -> Player:
    """A player of a run that may be written to."""
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    run = eg.recipe.open_run.open_run(folder, model=opened.runs[0].model)
    return Player({folder: run})


def ask(player: Player, run: int, query: str, place: float) -> dict[str, Any]:
    """The last events of either side and of none, joined pieces among them."""
    (column,) = player.runs[run].prompt.template.columns
    _, events = player.ask({"run": run, "columns": {column: query}, "place": place})
    found: dict[str, Any] = {"text": {"pieces": ""}, "refined": {"pieces": ""}}
    for event in events:
        side = found.get(event.get("side", ""), found)
        if "piece" in event:
            side["pieces"] += event["piece"]
        else:
            side |= event
    return found


def ids_of(player: Player, run: int, query: str, place: float) -> tuple[int, ...]:
    (column,) = player.runs[run].prompt.template.columns
    return player._shown[run, ((column, query),), place].ids


# -- the answers -----------------------------------------------------------------------------------


def test_at_0_both_sides_are_plain_generate_token_by_token(opened: Player) -> None:
    run = opened.runs[1]
    tokenizer, model = run.model.tokenizer, run.model.model
    different = set()
    for i in range(20):
        query = f"What is {i} plus {3 * i}?"
        content = f"{query}\n\nGive the answer only:"
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(run.evaluator.end_ids),
            pad_token_id=0,
        )[0, ids.shape[1] :]
        kept = [token for token in written.tolist() if token not in run.evaluator.end_ids]
        found = ask(opened, 1, query, 0.0)
        assert ids_of(opened, 1, query, 0.0) == tuple(kept)
        for side in ("text", "refined"):
            assert found[side]["text"] == readable(tokenizer.decode(kept, skip_special_tokens=True))
            assert found[side]["pieces"] == found[side]["text"]
        assert not found["next"]["differ"]
        different.add(tuple(kept))
    assert len(different) > 5


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0, 1.2])
def test_answers_are_those_of_generate(
    place: float, opened: Player, embedgrad: Command, finished: Finished, generated: Path
) -> None:
    flags = ("--quiet", "--json", "--at", place)
    for query in ("What is 1 plus 1?", "Why?"):
        options = ("--max-new-tokens", 12)
        told = embedgrad("generate", generated, query, *flags, *options).json
        found = ask(opened, 1, query, place)["refined"]
        assert (found["text"], found["cut"]) == (readable(told["answer"]), told["cut"])
    told = embedgrad("generate", finished[0], REVIEW, *flags).json
    found = ask(opened, 0, REVIEW, place)
    assert found["refined"]["text"] == told["answer"]
    assert dict(found["refined"]["probabilities"]) == pytest.approx(told["probabilities"], abs=1e-6)
    assert list(dict(found["text"]["probabilities"])) == CHOICES
    same = found["text"]["probabilities"] == found["refined"]["probabilities"]
    assert same == (place == 0)


def test_at_1_answers_are_those_of_generate_without_a_place(
    opened: Player, embedgrad: Command, generated: Path
) -> None:
    query = "What is 2 plus 5?"
    options = ("--quiet", "--json", "--max-new-tokens", 12)
    found = ask(opened, 1, query, 1)
    for side, flags in (("refined", ()), ("text", ("--text-prompt",))):
        told = embedgrad("generate", generated, query, *options, *flags).json
        assert found[side]["text"] == readable(told["answer"])
    refused = embedgrad("generate", generated, query, "--text-prompt", "--at", 0)
    assert refused.lines == ["error: --text-prompt: is --at 0; give one of them"]


def test_the_next_tokens_are_those_where_the_answers_part(opened: Player) -> None:
    run, parted = opened.runs[1], 0
    for i in range(8):
        query = f"What is {i} plus 1?"
        found = ask(opened, 1, query, 1.2)["next"]
        text, refined = (ids_of(opened, 1, query, place) for place in (0.0, 1.2))
        same = 0
        while text[: same + 1] == refined[: same + 1] and same < len(text):
            same += 1
        assert found["differ"] == (text != refined)
        at = same if found["differ"] else 0
        parted += at > 0
        shown = opened._shown[1, (("question", query),), 0.0].sequence
        before = shown.context(run.prompt.prompt_ids) if shown.plain is None else shown.suffix
        logits = run.model.model(torch.tensor([[*before, *text[:at]]])).logits[0, -1]
        shares, likeliest = logits.softmax(0).topk(5)
        assert [share for _, share in found["text"]] == pytest.approx(shares.tolist(), abs=1e-5)
        assert int(likeliest[0]) == text[at]
        assert sum(share for _, share in found["refined"]) < 1
        assert (found["refined"][0][0] == found["text"][0][0]) == (text[at] == refined[at])
    assert parted


def test_a_model_that_writes_one_answer_at_a_time(
    tmp_path: Path, data: Path, embedgrad: Command
) -> None:
    recipe = values(
        save_model(tmp_path / "mamba", "mamba"),
        data,
        target={"choices": []},
        training={"steps": 1},
        evaluation={"max_new_tokens": 6},
    )
    eg.run(eg.Recipe.from_dict(recipe), tmp_path / "run", report=lambda _: None)
    player = open_runs([tmp_path / "run"], (), lambda _: None)
    (run,) = player.runs
    assert run.model.forward.one_by_one
    settings = run.model.model.generation_config
    found = ask(player, 0, REVIEW, 1)
    assert run.model.model.generation_config is settings
    told = [
        embedgrad("generate", tmp_path / "run", REVIEW, "--quiet", "--json", *flags).json
        for flags in ((), ("--text-prompt",))
    ]
    assert [found[side]["text"] for side in ("refined", "text")] == [
        readable(one["answer"]) for one in told
    ]
    before = set(threading.enumerate())
    _, events = player.ask({"run": 0, "columns": {"review": "Another."}, "place": 1})
    next(events)
    events.close()
    assert set(threading.enumerate()) <= before


def test_runs_of_one_model_share_it_and_answers_are_kept(opened: Player) -> None:
    assert opened.runs[0].model is opened.runs[1].model
    first, again = (ask(opened, 0, "Seen twice.", 0.3) for _ in range(2))
    assert again.pop("answer") > first.pop("answer")
    assert first == again
    for i in range(KEPT):
        ask(opened, 0, f"Query {i}.", 1.0)
    assert len(opened._shown) == len(opened._answers) == KEPT


def test_what_a_page_says_of_its_runs(opened: Player, finished: Finished, generated: Path) -> None:
    reviews, sums = opened.describe()
    assert (reviews["name"], sums["name"]) == ("finished", "run")
    assert (reviews["choices"], sums["choices"]) == (CHOICES, [])
    assert sums["prompt"] == ["Give the answer only:"]
    assert not reviews["same"]
    assert reviews["samples"][0]["answer"] in CHOICES
    assert reviews["samples"][0]["columns"].keys() == {"review"}
    run = opened.runs[0]
    unchanged = replace(run, prompt=run.prompt.with_rows(run.prompt.start_rows))
    twins = Player({finished[0]: run, generated: unchanged}).describe()
    assert [twin["name"] for twin in twins] == [str(finished[0]), str(generated)]
    assert [twin["same"] for twin in twins] == [False, True]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"run": 2}, "run: 2; expected a number below 2"),
        ({"run": -1}, "run: -1; expected"),
        ({"run": "../first"}, "run: '../first'; expected"),
        ({"run": True}, "run: True; expected"),
        ({"place": 1.3}, "place: 1.3; expected a number from 0 to 1.2"),
        ({"place": -0.1}, "place: -0.1; expected"),
        ({"place": "1"}, "place: '1'; expected"),
        ({"place": float("nan")}, "place: nan; expected"),
        ({"columns": {"text": "x"}}, "the query: no column 'review'; known: text"),
        ({"columns": {"review": " "}}, "the query: column 'review' holds no text"),
        ({"columns": {"review": "\ud800"}}, "the query: column 'review' is not UTF-8 text"),
        ({"columns": None}, "the query: expected a JSON object with review"),
        ({"columns": {"review": "word " * 2000}}, "the query: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_query_that_cannot_be_answered_is_refused(
    changed: dict[str, Any], told: str, client: TestClient
) -> None:
    body = {"run": 0, "columns": {"review": REVIEW}, "place": 1, **changed}
    response = client.post(f"/{TOKEN}/answer", content=json.dumps(body))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.startswith(told)
    assert "\n" not in error


def test_a_query_that_was_cut_is_told(opened: Player, finished: Finished) -> None:
    run = eg.recipe.open_run.open_run(
        finished[0], ["data.truncate=review"], model=opened.runs[0].model
    )
    player = Player({finished[0]: run})
    told = "the end of review was cut, as it did not fit"
    assert ask(player, 0, "word " * 2000, 1)["note"] == told
    assert "note" not in ask(player, 0, "Short.", 1)


def test_what_goes_wrong_in_the_model_is_told(
    opened: Player, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise eg.ModelError("no more")
        yield

    monkeypatch.setattr("embedgrad.inference.play.player.stream", fail)
    body = {"run": 1, "columns": {"question": "Unheard of?"}, "place": 1}
    lines = client.post(f"/{TOKEN}/answer", content=json.dumps(body)).text.splitlines()
    assert json.loads(lines[-1]) == {"error": "no more"}


# -- the same elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 0.35, 1])
@pytest.mark.parametrize("query", ['It\'s "odd"\n& $HOME', "--json", "\u00e9t\u00e9"])
def test_copies_give_the_same_answer(
    query: str, place: float, client: TestClient, embedgrad: Command
) -> None:
    body = {"run": 0, "columns": {"review": query}, "place": place}

    def asked(content: str) -> list[dict[str, Any]]:
        lines = client.post(f"/{TOKEN}/answer", content=content).text.splitlines()
        return [json.loads(line) for line in lines]

    first, *events = asked(json.dumps(body))
    (chances,) = (e["probabilities"] for e in events if e.get("side") == "refined" and "text" in e)
    copies = first["copies"]
    assert copies.keys() == {"command", "Python", "curl"}
    words = shlex.split(copies["command"])
    lines = b""
    if words[0] == "printf":
        assert words[1] == "%s\\n"
        lines, words = words[2].encode(), words[4:]
    assert words[:2] == ["embedgrad", "generate"]
    told = embedgrad(*words[1:], "--quiet", "--json", stdin=lines).json
    assert told["probabilities"] == pytest.approx(dict(chances), abs=1e-6)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(copies["Python"], {})
    assert printed.getvalue().strip() == told["answer"]
    curl = shlex.split(copies["curl"])
    assert curl[:3] == ["curl", "-N", f"{HERE}/{TOKEN}/answer"]
    assert asked(curl[-1])[1:-1] == events[:-1]


# -- judgements ------------------------------------------------------------------------------------


def test_judgements_are_kept_and_become_training_rows(own: Player) -> None:
    (folder,) = own.folders
    numbers = {query: ask(own, 0, query, 0.5)["answer"] for query in ("One.", "Two.", "Three.")}
    with pytest.raises(OptionError, match="no right answer is known yet"):
        own.write_rows(0)
    said = {"answer": numbers["One."], "side": "refined", "verdict": "up", "note": " fine "}
    assert own.judge(said) == {"judged": 1, "rows": 1}
    said = {"answer": numbers["Two."], "side": "text", "verdict": "down"}
    assert own.judge(said) == {"judged": 2, "rows": 1}
    assert own.judge({**said, "right": "negative"}) == {"judged": 2, "rows": 2}
    said = {"answer": numbers["Three."], "side": "text", "verdict": "up"}
    assert own.judge(said) == {"judged": 3, "rows": 3}
    assert own.judge({**said, "verdict": "down"}) == {"judged": 3, "rows": 2}
    with open(folder / "feedback.jsonl", "ab") as file:
        file.write(b'{"columns": 3}\n[\n{"torn": ')
    assert own.judge({**said, "note": "again", "verdict": "down"})["judged"] == 3
    kept = [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()[:5]]
    first = kept[0]
    assert first.pop("time")
    answer = ask(own, 0, "One.", 0.5)["refined"]["text"]
    assert first == {
        "columns": {"review": "One."},
        "place": 0.5,
        "answer": answer,
        "verdict": "up",
        "note": "fine",
        "right": answer,
    }
    assert kept[1]["place"] == 0.0
    told = own.write_rows(0)
    assert told == {"file": str(folder / "feedback_rows.jsonl"), "rows": 2}
    options = {"columns": ("review",), "answer": "label", "choices": CHOICES}
    splits = eg.read_splits(told["file"], dev_share=0, test_share=0, **options)
    assert {e.columns["review"]: e.answer for e in splits.train} == {
        "One.": answer,
        "Two.": "negative",
    }
    assert Player(dict(zip(own.folders, own.runs, strict=True))).describe()[0]["feedback"] == {
        "judged": 3,
        "rows": 2,
    }
    for answer in ("negative", "positive", "negative"):  # the last word counts
        own.feedback[0].keep({"review": "Four."}, 0.0, answer, {"verdict": "up"})
    assert own.feedback[0].rows()[1][-1] == {"review": "Four.", "label": "negative"}


def test_a_prompt_of_the_hub_is_judged_in_the_current_folder(
    opened: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    player = Player({Path("hub:owner/name"): opened.runs[0]})
    assert player.describe()[0]["name"] == "name"
    number = ask(player, 0, REVIEW, 1)["answer"]
    player.judge({"answer": number, "side": "text", "verdict": "up"})
    assert [path.name for path in (tmp_path / "name").iterdir()] == ["feedback.jsonl"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"answer": 10**9}, "answer: is not in memory any more; ask again"),
        ({"answer": "0"}, "answer: is not in memory any more; ask again"),
        ({"side": "left"}, "side: 'left'; expected text or refined"),
        ({"verdict": "fine"}, "verdict: 'fine'; expected up or down"),
        ({"note": 3}, "note: 3; expected a text"),
        ({"note": "\ud800"}, "note: '\\ud800'; expected a text"),
        ({"right": "neutral"}, "right: 'neutral'; expected one of negative, positive"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_judgement_is_refused(changed: dict[str, Any], told: str, own: Player) -> None:
    number = ask(own, 0, REVIEW, 1)["answer"]
    said = {"answer": number, "side": "refined", "verdict": "down", **changed}
    with pytest.raises(EmbedgradError) as error:
        own.judge(said)
    assert str(error.value) == told
    assert not (own.folders[0] / "feedback.jsonl").exists()


# -- who is let in ---------------------------------------------------------------------------------

PATHS = [
    f"{prefix}{path}{suffix}"
    for prefix in ("", "file://", "..", "%2e%2e/", "....//")
    for path in ("/etc/passwd", "/recipe.toml", "/../../prompt.json", "\\..\\x", "/feedback.jsonl")
    for suffix in ("", "%00.js")
]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/play.js", {}),
        ("/another-token/", {}),
        (f"/{TOKEN}x/", {}),
        (f"/{TOKEN[:-1]}/", {}),
        (f"/%20{TOKEN}/", {}),
        (f"/x/{TOKEN}/", {}),
        (f"/{TOKEN}/", {"host": "evil.example:8000"}),
        (f"/{TOKEN}/", {"host": "127.0.0.1.evil.example:8000"}),
        (f"/{TOKEN}/", {"host": "evil.example@127.0.0.1:8000"}),
        (f"/{TOKEN}/", {"host": "0.0.0.0:8000"}),
        (f"/{TOKEN}/", {"host": ""}),
        (f"/{TOKEN}/", {"origin": "http://evil.example"}),
        (f"/{TOKEN}/", {"origin": "null"}),
        (f"/{TOKEN}/", {"origin": "https://127.0.0.1:8000"}),
        (f"/{TOKEN}/", {"origin": "http://127.0.0.1:8001"}),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_stranger_is_refused(
    method: str, path: str, headers: dict[str, str], client: TestClient
) -> None:
    response = client.request(method, path, headers=headers)
    assert response.status_code == 403
    assert response.text == "refused: open the address that embedgrad play printed\n"


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9000"])
def test_this_machine_is_let_in(host: str, client: TestClient) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    page = client.get(f"/{TOKEN}/", headers=headers)
    assert page.status_code == 200
    assert "embedgrad play" in page.text


def test_no_door_takes_a_path(client: TestClient) -> None:
    assert len(PATHS) == 50
    for path in PATHS:
        response = client.get(f"{HERE}/{TOKEN}/{path}")
        assert response.status_code in (403, 404), path
        for body in ({"run": path}, {"run": 0, "columns": path}, {"answer": path}):
            for door in ("answer", "feedback", "rows"):
                response = client.post(f"/{TOKEN}/{door}", content=json.dumps(body))
                assert response.status_code == 400, (door, body)
                assert "root:" not in response.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_object_is_refused(content: bytes, client: TestClient) -> None:
    for door in ("answer", "feedback", "rows"):
        response = client.post(f"/{TOKEN}/{door}", content=content)
        assert response.status_code == 400
        assert response.json()["error"].startswith("the request: ")


def test_every_response_is_guarded_and_none_is_shared(client: TestClient) -> None:
    names = ("", "play.js", "play.css", "icon.svg", "answer", "nothing", "../x")
    responses = [client.get(f"/{TOKEN}/{name}") for name in names]
    responses += [client.post(f"/{TOKEN}/answer", content=b"{}"), client.get("/")]
    for response in responses:
        policy = response.headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'self'"
        assert "unsafe" not in str(policy)
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in response.headers)
    assert "access-control" not in str(
        client.options(
            f"/{TOKEN}/answer", headers={"access-control-request-method": "POST"}
        ).headers
    )


# -- the server ------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(playing: Playing) -> Iterator[Playing]:
    thread = threading.Thread(target=playing.run)
    thread.start()
    try:
        yield playing
    finally:
        playing.stop()
        thread.join(20)
        assert not thread.is_alive()


class Endless:
    """A player whose answer never ends, and that knows when it is left."""

    folders = (Path("run"),)

    def __init__(self) -> None:
        self.left: list[float] = []
        self.asked = 0

    def describe(self) -> list[Any]:
        return []

    def ask(self, _: Any) -> Any:
        from embedgrad.inference.play.player import Query

        self.asked += 1
        return Query(0, {"review": "x"}, 1.0), self._events(self.asked)

    def _events(self, number: int) -> Iterator[dict[str, Any]]:
        try:
            while True:
                time.sleep(0.02)
                yield {"side": "text", "piece": str(number)}
        finally:
            self.left.append(time.monotonic())


def test_an_answer_that_nobody_reads_ends_within_half_a_second(
    opened: Player, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2

    endless: Any = Endless()
    monkeypatch.setattr("embedgrad.inference.play.player.open_runs", lambda *_: endless)
    with running(play([finished[0]])) as page, httpx2.Client(trust_env=False) as web:
        for number in (1, 2):  # the second waits for the first to end
            with web.stream("POST", f"{page.url}answer", content=b"{}") as response:
                lines = response.iter_lines()
                assert "copies" in json.loads(next(lines))
                assert [json.loads(next(lines))["piece"] for _ in range(3)] == [str(number)] * 3
                assert len(endless.left) == number - 1
            gone = time.monotonic()
            while len(endless.left) < number and time.monotonic() < gone + 10:
                time.sleep(0.01)
            assert endless.left[number - 1] - gone < 0.5


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def one_error(done: Any) -> str:
    assert (done.code, done.out) == (2, "")
    (line,) = done.lines
    assert line.startswith("error: ")
    return str(line.removeprefix("error: "))


def test_a_port_in_use_is_told_before_a_model_is_loaded(
    taken: int, embedgrad: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedgrad.inference.play.player.open_run", None)
    told = one_error(embedgrad("play", finished[0], "--port", taken, "--quiet"))
    assert told.startswith(f"127.0.0.1:{taken}: cannot listen there (")
    assert told.endswith("; choose another port with --port (0: any free port)")


def test_a_run_without_its_model_is_told(
    embedgrad: Command, finished: Finished, model_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for name in ("recipe.toml", "prompt/prompt.json"):
        text = (run / name).read_text("utf-8")
        (run / name).write_text(text.replace(model_folder.name, "gone"), "utf-8")
    reseal(run / "prompt")
    told = one_error(embedgrad("play", run, "--quiet"))
    assert "its model is not at" in told
    assert "gone any more" in told


@pytest.mark.parametrize("what", ["empty", "file", "missing"])
def test_a_folder_that_is_no_run_is_told(
    what: str, embedgrad: Command, finished: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("x")
    for runs in ([folder], [finished[0], folder]):
        assert str(folder) in one_error(embedgrad("play", *runs, "--quiet"))


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_told(
    package: str, embedgrad: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = serving.importlib.util.find_spec
    monkeypatch.setattr(
        serving.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    told = one_error(embedgrad("play", finished[0], "--quiet"))
    assert told == f"play: needs the package {package}; install it: pip install 'embedgrad[ui]'"


def test_the_command_prints_the_address_and_serves(
    embedgrad: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, seen = [], []
    monkeypatch.setattr(Playing, "run", lambda page: served.append(page))
    monkeypatch.setattr("webbrowser.open", seen.append)
    done = embedgrad("play", finished[0], "--quiet", "--open")
    (page,) = served
    page._socket.close()
    assert done.code == 0
    assert done.out.splitlines()[0] == page.url
    assert seen == [page.url]
    assert page.url.startswith("http://127.0.0.1:")
    assert len(page.url.split("/")[3]) >= 32


# -- in a browser ----------------------------------------------------------------------------------

PHONE = 375


@pytest.fixture(scope="module")
def page_of(
    browser: Browser, finished: Finished, generated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Page]]:
    """`page_of(width=375)` opens the page of two runs that may be written to."""
    folder = tmp_path_factory.mktemp("played")
    runs = [Path(shutil.copytree(run, folder / run.name)) for run in (finished[0], generated)]
    with running(play(runs, overrides=["evaluation.max_new_tokens=12"])) as playing:
        yield lambda **options: browser.open(playing.url, **options)


def wait(page: Page, condition: str) -> None:
    until = time.monotonic() + 30
    while not page.value(condition):
        assert time.monotonic() < until, (condition, page.texts("#status"), page.complaints)
        time.sleep(0.05)


ANSWERED = "!document.querySelector('.thumb').disabled"


def answered(page: Page, query: str) -> None:
    page.type("#columns textarea", query)
    page.click("button.main")
    wait(page, ANSWERED)


def move(page: Page, place: float) -> None:
    page.value(
        f"(() => {{ const s = document.getElementById('place'); s.value = {place};"
        "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')); })()"
    )
    wait(page, ANSWERED)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1200])
def test_the_page_shows_both_answers_and_asks_nobody_else(
    width: int, dark: bool, page_of: Callable[..., Page], opened: Player
) -> None:
    page = page_of(width=width, dark=dark)
    try:
        assert page.texts("h1") == ["finished"]
        answered(page, REVIEW)
        found = ask(opened, 0, REVIEW, 1)
        for side in ("text", "refined"):
            assert page.texts(f".side.{side} .answer") == [found[side]["text"]]
            shares = [f"{100 * share:.1f} %" for _, share in found[side]["probabilities"]]
            assert page.texts(f".side.{side} .number") == shares
            names = [name for name, _ in found["next"][side]]
            assert page.texts(f"#next .{side} bdi") == names
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []
        assert all(asked.startswith(page.url) for asked in page.requests)
        assert page.value("fetch('http://127.0.0.1:9/').then(() => 1, () => 0)") == 0
    finally:
        page.value("sessionStorage.clear()")
        page.close()


@pytest.mark.slow
def test_the_slider_moves_the_refined_side_and_reloads_keep_everything(
    page_of: Callable[..., Page], opened: Player
) -> None:
    page = page_of()
    try:
        page.click("#tabs button:nth-child(2)")
        assert page.texts("h1") == ["run"]
        query = "What is 5 plus 1?"
        answered(page, query)
        texts = {place: ask(opened, 1, query, place)["refined"]["text"] for place in (0, 0.6, 1.2)}
        assert len(set(texts.values())) > 1
        for place, text in texts.items():
            move(page, place)
            left, right = page.texts(".answer")
            assert left.strip() == texts[0].strip()
            assert right.strip() == text.strip()
            assert page.texts("#at") == [f"{place:.2f}"]
            marked = page.value("document.querySelectorAll('.answer mark').length")
            assert bool(marked) == (text.split() != texts[0].split())
        for _ in range(10):
            page.value("performance.mark('old')")
            page.call("Page.reload")
            wait(page, "!performance.getEntriesByName('old').length")
            wait(page, f"Boolean(document.querySelector('.thumb')) && {ANSWERED}")
            assert page.texts(".answer")[1].strip() == texts[1.2].strip()
            assert page.value("document.querySelector('#columns textarea').value") == query
            assert page.texts("#at") == ["1.20"]
        assert page.complaints == []
    finally:
        page.value("sessionStorage.clear()")
        page.close()


@pytest.mark.slow
def test_thumbs_are_kept_and_rows_are_written(page_of: Callable[..., Page]) -> None:
    page = page_of()
    try:
        answered(page, "A thumb for this.")
        page.click(".refined .thumb.down")
        wait(page, "document.querySelector('.refined .kept').textContent === 'kept'")
        assert page.value("document.getElementById('rows').hidden")
        page.value("document.querySelector('.refined select').value = 'negative'")
        page.type(".refined input[name=note]", "dull")
        page.click(".refined .say button")
        wait(page, "!document.getElementById('rows').hidden")
        page.click("#rows")
        wait(page, "document.getElementById('written').textContent !== ''")
        (told,) = page.texts("#written")
        assert told.startswith("1 row in ")
        rows = Path(told.removeprefix("1 row in ").partition(";")[0]).read_text()
        assert json.loads(rows) == {"review": "A thumb for this.", "label": "negative"}
        said = Path(told.removeprefix("1 row in ").partition("_rows")[0] + ".jsonl")
        assert json.loads(said.read_text().splitlines()[-1])["note"] == "dull"
        page.click("#sample")
        wait(page, ANSWERED)
        assert page.texts("#sampled")[0].removeprefix("right answer: ") in CHOICES
        assert page.complaints == []
    finally:
        page.value("sessionStorage.clear()")
        page.close()


@pytest.mark.slow
def test_a_new_query_ends_the_old_answer_within_half_a_second(
    page_of: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    def endless(*_: object) -> Iterator[str]:
        try:
            while True:
                time.sleep(0.02)
                yield "on "
        finally:
            left.append(time.monotonic())

    page = page_of()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Player, "_answer", endless)
            page.type("#columns textarea", "Forever?")
            page.click("button.main")
            wait(page, "document.querySelector('.refined .answer').textContent.length > 20")
            assert not left
        before = time.monotonic()
        answered(page, "A new query.")
        assert len(left) == 2
        assert max(left) - before < 0.5 + 0.25  # `type` waits a quarter of a second
        assert "on on" not in str(page.texts(".answer"))
    finally:
        page.value("sessionStorage.clear()")
        page.close()


@pytest.mark.slow
def test_hostile_text_is_text_and_errors_are_told(
    page_of: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hostile(player: Player, number: int, asked: Any, place: float) -> Any:
        from embedgrad.inference.play.player import Shown

        yield HOSTILE[:8]
        yield HOSTILE[8:]
        rows, sequence = player.runs[number].prompt.rows, asked
        return Shown(rows, sequence, HOSTILE, probabilities={HOSTILE: 1.0})

    monkeypatch.setattr(Player, "_answer", hostile)
    page = page_of()
    try:
        answered(page, HOSTILE)
        expected = HOSTILE.replace("\u202e", "\\u202e")
        assert page.texts(".answer") == [expected] * 2
        assert page.texts(".chances bdi") == [expected] * 2
        assert page.value("document.title") == "finished - embedgrad play"
        assert page.value("document.querySelectorAll('img').length") == 0
        page.type("#columns textarea", " ")
        page.click("button.main")
        wait(page, "document.getElementById('status').textContent !== ''")
        assert page.texts("#status") == ["the query: column 'review' holds no text; expected some"]
    finally:
        page.value("sessionStorage.clear()")
        page.close()
