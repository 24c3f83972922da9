"""Request bodies for vLLM and SGLang: their format, and what a server makes of them.

`fake_servers` enforces the servers' contracts over real HTTP. vLLM's own decoder is asked too where
it is installed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file

import export_kit
import tiny
from embedgrad import EngineError, ExportError, Target, Template
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.destinations import vllm_chat
from embedgrad.deploy.destinations.client_code import run_generated
from embedgrad.deploy.destinations.embedding_client import Bodies
from embedgrad.deploy.destinations.sglang import SglangBodies
from embedgrad.deploy.destinations.vllm import VllmBodies
from embedgrad.deploy.destinations.vocabulary import Vocabulary
from embedgrad.deploy.job import Destination, ExportedPrompt, Job
from embedgrad.deploy.requests import example_requests
from embedgrad.deploy.verify import parity as checks
from embedgrad.deploy.verify.reference import compute_reference, next_logprobs
from embedgrad.recipe.settings import ExportSettings
from export_kit import exported, job_of, opened, save_base
from fake_servers import PLACEHOLDER, FakeServer, FakeSglang, FakeVllm, read_saved, saved
from kit import PLACEMENTS

torch.set_num_threads(1)
WIDTH = 32
WRITERS: dict[str, type[Bodies]] = {"vllm": VllmBodies, "sglang": SglangBodies}
LINES = Template.chat(
    system="Be brief.\n[[Is the review positive or negative?]]\nOne word.", user="{review}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bodies") / "base")


@pytest.fixture(scope="module")
def job(base: Path) -> Job:
    model = opened(base)
    return job_of(model, exported(model, examples=tiny.reviews(4)))


def written(job: Job, folder: Path, name: str = "vllm") -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    writer: Destination = WRITERS[name]()
    return folder, writer.write(job, folder)


def client_of(job: Job, folder: Path, facts: dict[str, Any], name: str = "vllm") -> Any:
    """The exported client, run as its user would."""
    source = WRITERS[name]().source(job.prompts[0], job.base, facts)
    return run_generated(folder / "client.py", source, job)


def first_columns(job: Job) -> dict[str, str]:
    return dict(job.prompts[0].sequences[0].example.columns)


def choice_tokens(job: Job) -> list[int]:
    return [i for ids in job.prompts[0].sequences[0].targets for i in ids]


def whole_prompt(job: Job, prompt: ExportedPrompt) -> torch.Tensor:
    """Embeddings of the first row by the training path."""
    sequence = prompt.sequences[0]
    parts = [job.model.embed(sequence.prefix), prompt.rows_PD, job.model.embed(sequence.suffix)]
    return torch.cat(parts)


# --------------------------------------------------------------------------- what is sent


def test_the_payload_is_the_tensor_and_nothing_else(job: Job, tmp_path: Path) -> None:
    """Dense, of the rows' precision and shape, in a storage that holds no more than it."""
    out, facts = written(job, tmp_path / "out")
    client = client_of(job, out, facts)
    wide = torch.randn(1000, WIDTH)
    content = base64.b64decode(client.payload(wide[3:8]), validate=True)
    assert len(content) < 5 * WIDTH * 4 + 2000
    assert torch.equal(read_saved(content, WIDTH), wide[3:8])
    body = client.completion(first_columns(job))
    found = read_saved(base64.b64decode(body["prompt_embeds"]), WIDTH)
    assert torch.equal(found, whole_prompt(job, job.prompts[0]))


def test_bodies_for_vllm(job: Job, tmp_path: Path) -> None:
    out, facts = written(job, tmp_path / "out")
    client = client_of(job, out, facts)
    columns = first_columns(job)
    whole, chat = client.completion(columns), client.chat(columns)
    salt = facts["rows"]
    assert salt.startswith("sha256:")
    settings = {"model": job.base.model, "cache_salt": salt, "max_tokens": 1}
    settings |= {"temperature": 0, "allowed_token_ids": choice_tokens(job)}
    assert {k: v for k, v in whole.items() if k != "prompt_embeds"} == settings
    assert {k: v for k, v in chat.items() if k != "messages"} == settings
    ((message,),) = (chat["messages"],)
    text, rows = message["content"]
    # vLLM puts a line feed between the parts: one of the template's two is left to it.
    assert text == {"type": "text", "text": f"Review: {columns['review']}\n"}
    assert rows["type"] == "prompt_embeds"
    rows_PD = read_saved(base64.b64decode(rows["data"]), WIDTH)
    assert torch.equal(rows_PD, job.prompts[0].rows_PD)
    assert torch.equal(load_file(out / "prompt.safetensors")["rows"], rows_PD)


def test_the_body_for_sglang(job: Job, tmp_path: Path) -> None:
    out, facts = written(job, tmp_path / "out", "sglang")
    body = client_of(job, out, facts, "sglang").generation(first_columns(job))
    assert set(body) == {"input_embeds", "sampling_params"}
    grammar = 'root ::= "negative" | "positive"'
    assert body["sampling_params"] == {"max_new_tokens": 256, "temperature": 0, "ebnf": grammar}
    numbers = json.loads(json.dumps(body["input_embeds"]))
    assert all(isinstance(x, float) for row in numbers for x in row)
    assert torch.equal(torch.tensor(numbers), whole_prompt(job, job.prompts[0]))


def test_example_bodies_hold_no_data_of_the_user(job: Job, tmp_path: Path) -> None:
    for name, files in (("vllm", {"completions.json", "chat.json"}), ("sglang", {"generate.json"})):
        out, _ = written(job, tmp_path / name, name)
        kept = {"client.py", "prompt.safetensors"}
        assert {p.name for p in out.iterdir()} == files | kept
    (message,) = json.loads((tmp_path / "vllm" / "chat.json").read_text())["messages"]
    assert message["content"][0]["text"] == "Review: This is an example.\n"
    reviews = [s.example.columns["review"] for s in job.prompts[0].sequences]
    told = "".join(p.read_text() for p in tmp_path.glob("*/*.*") if p.suffix != ".safetensors")
    assert not any(review in told for review in reviews)


def test_another_prompt_has_another_salt(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    salts = [
        written(job_of(model, exported(model, seed=seed)), tmp_path / str(i))[1]["rows"]
        for i, seed in enumerate((0, 1, 0))
    ]
    assert salts[0] == salts[2] != salts[1]


def test_commands_serve_in_the_precision_of_the_rows(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    settings = ExportSettings(dtype="bfloat16")
    job = job_of(model, exported(model, settings=settings, examples=tiny.reviews(2)))
    out, facts = written(job, tmp_path / "out")
    assert load_file(out / "prompt.safetensors")["rows"].dtype == torch.bfloat16
    client = client_of(job, out, facts)
    rows = read_saved(base64.b64decode(client.payload(client.rows)), WIDTH)
    assert torch.equal(rows, job.prompts[0].rows_PD.bfloat16())
    serve, ask, curl = VllmBodies().commands(Path("my export"), facts)
    assert serve == (
        'vllm serve "$BASE_MODEL" --runner generate --served-model-name '
        f"{base.name} --generation-config vllm --enable-prompt-embeds --dtype bfloat16 "
        "--chat-template-content-format string"
    )
    assert ask == "python 'my export/client.py' REVIEW"
    assert curl.endswith("-d @'my export/completions.json'")
    launch = SglangBodies().commands(Path("out"), facts)[0]
    assert launch.endswith('--model-path "$BASE_MODEL" --disable-radix-cache --dtype bfloat16')


def test_rows_that_a_precision_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    prompt = exported(model, settings=ExportSettings(dtype="float16"), examples=tiny.reviews(2))
    large = replace(prompt, prompt=prompt.prompt.with_rows(prompt.rows_PD * 1e6))
    with pytest.raises(ExportError, match=r"the rows are not finite in float16; set export\.dtype"):
        written(job_of(model, large), tmp_path / "out")


def test_a_dated_chat_template_goes_with_the_server(tmp_path: Path) -> None:
    model = opened(save_base(tmp_path / "base", template=tiny.DATED))
    job = job_of(model, exported(model, examples=tiny.reviews(2)))
    out, facts = written(job, tmp_path / "out")
    assert '"12 Mar 2024"' in (out / "chat_template.jinja").read_text()
    serve = VllmBodies().commands(out, facts)[0]
    assert serve.endswith(f"--chat-template {out}/chat_template.jinja")


# ----------------------------------------------------------- what a server makes of the bodies


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize("template", [LINES, PLACEMENTS["opening"], PLACEMENTS["plain-start"]])
def test_the_check_and_a_server_compute_what_training_computes(
    name: str, kind: str, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(save_base(tmp_path / "base", tokenizer_kind=kind))
    job = job_of(model, exported(model, template=template, examples=tiny.reviews(3)))
    out, facts = written(job, tmp_path / "out", name)
    found = checks.check(name, out, job, facts)
    assert found["problems"] == []
    assert found["step_zero_difference"] <= 1e-5
    assert found["max_logprob_difference"] < 1e-4
    assert found["choice_agreement"] == 1
    (prompt,) = job.prompts
    expected_BV = next_logprobs(model, prompt.rows_PD, prompt.sequences)
    client = client_of(job, out, facts, name)
    with fake_server(job, out, name) as server:
        for way in ("completion", "chat") if name == "vllm" else ("generation",):
            if hasattr(client, way):
                logprobs_BV = asked(server, client, way, prompt)
                assert torch.allclose(logprobs_BV, expected_BV, atol=1e-4)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("choices", [export_kit.CHOICES, ("not good", "not bad", "fine")])
def test_a_client_is_answered_with_a_choice(
    name: str, choices: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    """And the check's figure is the share of rows where it is the one of `evaluate`."""
    model = opened(base)
    prompt = exported(model, target=Target(choices), examples=tiny.reviews(6))
    job = job_of(model, prompt)
    out, facts = written(job, tmp_path / "out", name)
    client = client_of(job, out, facts, name)
    best = compute_reference(model, prompt, prompt.sequences, 1).choices
    assert best is not None
    same = 0
    with fake_server(job, out, name) as server:
        for row, choice in zip(prompt.sequences, best, strict=True):
            columns = dict(row.example.columns)
            if name == "vllm":
                reply = client.send(client.completion(columns), server.url)["choices"][0]["text"]
            else:
                reply = client.send(client.generation(columns), server.url)["text"]
            assert reply in choices
            same += reply == choices[choice]
    found = checks.check(name, out, job, facts)
    assert found["choice_agreement"] == 1
    assert found["limited_agreement"] == same / 6
    assert same == 6 or name == "sglang" or len(choices) == 3


def test_ranking_through_vllm_is_that_of_evaluate(base: Path, tmp_path: Path) -> None:
    """The printed program, on a vocabulary export: the server renders the export's template."""
    model = opened(base)
    target = Target(("not good", "not bad", "fine"), normalize=True)
    prompt = exported(model, target=target, examples=tiny.reviews(4))
    (tmp_path / "out").mkdir()
    Vocabulary().write(job_of(model, prompt), tmp_path / "out")
    served = opened(tmp_path / "out")
    outcome = model.outcome(prompt.rows_PD, prompt.sequences, normalize=True)
    template = served.tokenizer.chat_template
    with FakeVllm(served, torch.float32, "refined", template) as server:
        url = f"{server.url}/v1"
        *_, program = example_requests("vllm", url, "refined", Choices.of(prompt))
        names: dict[str, Any] = {}
        exec(program.replace('\nprint(rank("YOUR TEXT"))', ""), names)
        for row, scores_C in zip(prompt.sequences, outcome.scores_BC, strict=True):
            order, scores = names["rank"](row.example.columns["review"])
            assert order[0] == target.choices[int(scores_C.argmax())]
            found = torch.tensor([scores[name] for name in target.choices])
            assert torch.allclose(found, scores_C, atol=1e-4)


def fake_server(job: Job, out: Path, name: str) -> FakeServer:
    if name == "sglang":
        return FakeSglang(job.model, torch.float32)
    template = out / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.is_file() else job.model.tokenizer.chat_template
    return FakeVllm(job.model, torch.float32, job.base.model, chat)


def asked(server: FakeServer, client: Any, way: str, prompt: ExportedPrompt) -> torch.Tensor:
    """Log-probabilities [B, V] of the next token, over HTTP."""
    found_BV = torch.full((len(prompt.sequences), server.ids), -torch.inf)
    for b, sequence in enumerate(prompt.sequences):
        columns = dict(sequence.example.columns)
        if way == "generation":
            body = client.generation(columns, return_logprob=True, top_logprobs_num=server.ids)
            body["sampling_params"]["max_new_tokens"] = 1
            tops = client.send(body, server.url)["meta_info"]["output_top_logprobs"][0]
            pairs = [(i, p) for p, i, _ in tops]
        else:
            asking = {"max_tokens": 1, "return_tokens_as_token_ids": True}
            asking |= {"logprobs": True, "top_logprobs": -1} if way == "chat" else {"logprobs": -1}
            answer = client.send(getattr(client, way)(columns, **asking), server.url)
            logprobs = answer["choices"][0]["logprobs"]
            if way == "chat":
                entries = logprobs["content"][0]["top_logprobs"]
                named = [(entry["token"], entry["logprob"]) for entry in entries]
            else:
                named = list(logprobs["top_logprobs"][0].items())
            pairs = [(int(token.removeprefix("token_id:")), p) for token, p in named]
        for token, logprob in pairs:
            found_BV[b, token] = logprob
    return found_BV


@pytest.mark.parametrize("architecture", ["gemma3", "granite", "gpt2"])
def test_scaled_embeddings_are_sent_in_the_space_of_the_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(save_base(tmp_path / "base", architecture))
    job = job_of(model, exported(model, examples=tiny.reviews(3)))
    out, facts = written(job, tmp_path / "out")
    assert checks.check("vllm", out, job, facts)["problems"] == []
    client = client_of(job, out, facts)  # with the table that it loads by itself
    body = client.completion(first_columns(job))
    found = read_saved(base64.b64decode(body["prompt_embeds"]), WIDTH)
    assert torch.allclose(found, whole_prompt(job, job.prompts[0]), atol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("row", [0, -1])
def test_a_writer_broken_in_one_row_is_caught(
    name: str, row: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = job.prompts
    broken_PD = prompt.rows_PD.clone()
    broken_PD[row] = prompt.prompt.start_rows[row]
    broken = replace(prompt, prompt=prompt.prompt.with_rows(broken_PD))
    out, facts = written(replace(job, prompts=(broken,)), tmp_path / "out", name)
    found = checks.check(name, out, job, facts)
    assert not found["passed"]
    assert "are not those of training" in found["problems"][0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PLACEMENTS["plain"], "plain text goes through no chat template"),
        (PLACEMENTS["opening"], "the opening of the answer cannot be part of a chat request"),
        (PLACEMENTS["user-before"], "text next to the span is part of its rows"),
        (PLACEMENTS["system"], "the server puts line feeds around the rows"),
        (Template.chat(user="{review}[[ Is it positive?]]"), "the server puts line feeds around"),
        (Template.chat(user="\n[[Is it positive]] now\n{review}"), "the server puts line feeds"),
    ],
)
def test_where_a_chat_would_be_cut_otherwise_there_is_none(
    template: Template, why: str, base: Path, tmp_path: Path
) -> None:
    model = opened(base)
    job = job_of(model, exported(model, template=template, examples=tiny.reviews(3)))
    out, facts = written(job, tmp_path / "out")
    assert not facts["chat"]
    assert facts["notes"][-1].startswith(f"for /v1/completions only: {why}")
    assert not (out / "chat.json").exists()
    assert not hasattr(client_of(job, out, facts), "chat")


def test_a_chat_that_makes_other_tokens_of_a_row_is_left_out(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = job.prompts[0].sequences[2].example
    real = vllm_chat.server_prompt

    def other(body: Any, sequencer: Any) -> Any:
        ids, payloads = real(body, sequencer)
        return ids[:-1] if third.columns["review"] in str(body) else ids, payloads

    monkeypatch.setattr(vllm_chat, "server_prompt", other)
    _, facts = written(job, tmp_path / "out")
    assert not facts["chat"]
    assert facts["notes"][-1].endswith(f"the server would make other tokens of {third.source}")


def test_a_client_that_makes_other_tokens_of_a_row_is_refused(job: Job, tmp_path: Path) -> None:
    (prompt,) = job.prompts
    wrong = replace(prompt.sequences[1], suffix=prompt.sequences[1].suffix[:-1])
    changed = replace(prompt, sequences=[prompt.sequences[0], wrong])
    with pytest.raises(ExportError) as told:
        written(replace(job, prompts=(changed,)), tmp_path / "out")
    where = len(wrong.prefix) + 1 + len(wrong.suffix)
    assert f"tokens of reviews.csv:3 than training, from token {where} on" in str(told.value)


# -------------------------------------------------------------------- what a server refuses


@pytest.fixture
def vllm(job: Job) -> Iterator[FakeServer]:
    template = job.model.tokenizer.chat_template
    with FakeVllm(job.model, torch.float32, job.base.model, template) as server:
        yield server


@pytest.fixture
def sglang(job: Job) -> Iterator[FakeServer]:
    with FakeSglang(job.model, torch.float32) as server:
        yield server


def refusal(server: FakeServer, path: str, body: Any) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(HTTPError) as told:
        urlopen(Request(server.url + path, data))
    with told.value as error:
        return error.code, json.loads(error.read())["error"]["message"]


def payload(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _saved(made: object) -> bytes:
    file = io.BytesIO()
    torch.save(made, file)
    return file.getvalue()


BAD_PAYLOADS: dict[str, Callable[[], str]] = {
    "no base64": lambda: "???",
    "no zip": lambda: payload(b"not a tensor"),
    "other width": lambda: payload(saved(torch.zeros(3, WIDTH + 1))),
    "other precision": lambda: payload(saved(torch.zeros(3, WIDTH, dtype=torch.float64))),
    "whole numbers": lambda: payload(saved(torch.zeros(3, WIDTH, dtype=torch.int32))),
    "one dimension": lambda: payload(saved(torch.zeros(3 * WIDTH))),
    "a view": lambda: payload(saved(torch.zeros(4, WIDTH)[1:])),
    "sparse": lambda: payload(saved(torch.zeros(3, WIDTH).to_sparse())),
    "gradients": lambda: payload(saved(torch.zeros(3, WIDTH).requires_grad_())),
    "something else": lambda: payload(_saved({"rows": torch.zeros(3, WIDTH)})),
}


@pytest.mark.parametrize("bad", BAD_PAYLOADS)
def test_only_a_dense_tensor_of_the_right_shape_is_read(
    bad: str, vllm: FakeServer, job: Job, tmp_path: Path
) -> None:
    out, facts = written(job, tmp_path / "out")
    body = client_of(job, out, facts).completion(first_columns(job))
    body["prompt_embeds"] = BAD_PAYLOADS[bad]()
    status, told = refusal(vllm, "/v1/completions", body)
    assert status == 400
    assert told.startswith("`prompt_embeds` ")


def test_what_vllms_contract_does_not_name_is_refused(
    vllm: FakeServer, job: Job, tmp_path: Path
) -> None:
    out, facts = written(job, tmp_path / "out")
    client = client_of(job, out, facts)
    body = client.completion(first_columns(job))
    for change, told in (
        ({"prompt": [1, 2]}, "Either prompt or prompt_embeds"),
        ({"model": "another"}, "The model `another` does not exist."),
        ({"cache_salt": ""}, "cache_salt must be a string of 1 to 1024 characters"),
        ({"prompt_embed": "x"}, "unknown fields: prompt_embed"),
        ({"temperature": 1}, "temperature must be 0"),
    ):
        assert told in refusal(vllm, "/v1/completions", {**body, **change})[1]
    chat = client.chat({"review": f"Good. {PLACEHOLDER}"})
    assert "reserved" in refusal(vllm, "/v1/chat/completions", chat)[1]
    assert refusal(vllm, "/v2", body)[0] == 404
    assert "not JSON" in refusal(vllm, "/v1/completions", b'{"model": NaN}')[1]


def test_what_sglangs_contract_does_not_name_is_refused(
    sglang: FakeServer, job: Job, tmp_path: Path
) -> None:
    out, facts = written(job, tmp_path / "out", "sglang")
    body = client_of(job, out, facts, "sglang").generation(first_columns(job))
    whole = [[int(x) for x in row] for row in body["input_embeds"]]
    floats = f"input_embeds must be a list of lists of {WIDTH} floats, one per token"
    for change, told in (
        ({"input_embeds": whole}, floats),  # a list of whole numbers was once read as a batch
        ({"input_embeds": [row[:-1] for row in body["input_embeds"]]}, floats),
        ({"input_embeds": "x"}, floats),
        ({"input_ids": [1]}, "Either text, input_ids or input_embeds should be provided."),
        ({"cache_salt": "x"}, "unknown fields: cache_salt"),
    ):
        assert told in refusal(sglang, "/generate", {**body, **change})[1]


def test_bodies_that_hold_different_prompts_are_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vllm_chat.server_prompt
    out, facts = written(job, tmp_path / "out")
    monkeypatch.setattr(
        "embedgrad.deploy.destinations.vllm.server_prompt",
        lambda body, sequencer: (real(body, sequencer)[0][1:], real(body, sequencer)[1]),
    )
    with pytest.raises(EngineError, match=r"client\.py: its two kinds of bodies hold different"):
        checks.check("vllm", out, job, facts)


def test_the_client_asks_a_server_in_a_process_of_its_own(
    vllm: FakeServer, job: Job, tmp_path: Path
) -> None:
    out, _ = written(job, tmp_path / "out")
    columns = first_columns(job)
    asking = (
        "import sys, client\n"
        "columns, url = {'review': sys.argv[1]}, sys.argv[2]\n"
        "whole = client.send(client.completion(columns, max_tokens=5), url)\n"
        "chat = client.send(client.chat(columns, max_tokens=5), url)\n"
        "print(whole['choices'][0]['text'] == chat['choices'][0]['message']['content'] != '')\n"
    )
    command = [sys.executable, "-c", asking, columns["review"], vllm.url]
    place = {**os.environ, "BASE_MODEL": job.model.info.path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out, env=place)
    assert done.stdout == "True\n", done.stderr


def test_a_client_from_elsewhere_is_not_run(job: Job, tmp_path: Path) -> None:
    out, facts = written(job, tmp_path / "out")
    trace = tmp_path / "trace"
    hostile = {**facts, "rows": f'"; open({str(trace)!r}, "w"); "'}
    source = VllmBodies().source(job.prompts[0], job.base, hostile)
    (out / "client.py").write_text(source)
    run_generated(out / "client.py", source, job)  # a text, whatever it says
    with (out / "client.py").open("a") as file:
        file.write(f"open({str(trace)!r}, 'w')\n")
    with pytest.raises(EngineError, match="is not what embedgrad writes for this prompt"):
        checks.check("vllm", out, job, facts)
    assert not trace.exists()


def test_vllms_own_decoder_reads_the_payloads(job: Job, tmp_path: Path) -> None:
    embed_utils = pytest.importorskip("vllm.renderers.embed_utils", exc_type=ImportError)

    class Config:
        enable_prompt_embeds = True
        dtype = torch.float32
        hf_text_config = object()

        def get_hidden_size(self) -> int:
            return WIDTH

    out, facts = written(job, tmp_path / "out")
    client = client_of(job, out, facts)
    body = client.completion(first_columns(job))
    found = embed_utils.safe_load_prompt_embeds(Config(), body["prompt_embeds"].encode())
    assert torch.equal(found, whole_prompt(job, job.prompts[0]))
