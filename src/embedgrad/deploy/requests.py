"""Requests to a served export, ready to paste."""

from __future__ import annotations

import json
import shlex
from typing import Any

from embedgrad.deploy.base_model import to_source
from embedgrad.deploy.choices import Choices

_PYTHON = """\
from openai import OpenAI
client = OpenAI(base_url={url}, api_key="none")
messages = [{{"role": "user", "content": "YOUR TEXT"}}]
reply = client.chat.completions.create(
    model={model}, messages=messages, temperature=0{extra}
)
print(reply.choices[0].message.content)"""

# llama.cpp: one request per choice, whose tokens are the only ones allowed. The log-probabilities
# in its answer are those before the grammar.
_RANK = """\
# rank the choices by log-probability, as `embedgrad evaluate` does: a request per choice
from openai import OpenAI
client = OpenAI(base_url={url}, api_key="none")
CHOICES = {{{choices}}}

def rank(text, **more):
    scores = {{}}
    for choice, (grammar, tokens) in CHOICES.items():
        reply = client.chat.completions.create(
            model={model}, messages=[{{"role": "user", "content": text}}], temperature=0,
            logprobs=True, {bias}extra_body={{"grammar": "root ::= " + grammar, **more}}
        )
        logprobs = [token.logprob for token in reply.choices[0].logprobs.content[:tokens]]
        scores[choice] = sum(logprobs){per_token}
    return sorted(scores, key=scores.get, reverse=True), scores

print(rank("YOUR TEXT"))"""

_POST = """\
import json, urllib.request
CHOICES = {{{choices}}}

def post(path, **body):
    data = json.dumps({{"model": {model}, **body}}).encode()
    request = urllib.request.Request({root} + path, data, {{"Content-Type": "application/json"}})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
"""

# llama.cpp reports nothing for a token that completes no character: the grammar makes it write a
# letter instead, and all log-probabilities before the grammar are in the answer.
_RANK_PARTS = (
    """\
# rank the choices by log-probability, as `embedgrad evaluate` does: a request per token
"""
    + _POST
    + """
def rank(text, **more):
    messages = [{{"role": "user", "content": text}}]
    chat = post("/apply-template", messages=messages, **more)["prompt"]
    ids = post("/tokenize", content=chat, add_special=True, parse_special=True)["tokens"]
    letter = f'root ::= <[{{post("/tokenize", content="a")["tokens"][-1]}}]>'
    scores = dict.fromkeys(CHOICES, 0.0)
    for choice, tokens in CHOICES.items():
        for i, token in enumerate(tokens):
            answer = post(
                "/completion", prompt=ids + tokens[:i], n_predict=1, n_probs=10**6, grammar=letter
            )
            found = answer["completion_probabilities"][0]["top_logprobs"]
            logprob = next(entry["logprob"] for entry in found if entry["id"] == token)
            scores[choice] += logprob{per_token}
    return sorted(scores, key=scores.get, reverse=True), scores

print(rank("YOUR TEXT"))"""
)

# vLLM: /tokenize renders the chat template; the prompts of all choices are one request.
_RANK_VLLM = (
    """\
# rank the choices by log-probability, as `embedgrad evaluate` does: two requests
"""
    + _POST
    + """
def rank(text, **more):
    messages = [{{"role": "user", "content": text}}]
    ids = post("/tokenize", messages=messages, **more)["tokens"]
    prompts = [ids + tokens for tokens in CHOICES.values()]
    answers = post("/v1/completions", prompt=prompts, max_tokens=1, prompt_logprobs=0)["choices"]
    scores = {{}}
    for (choice, tokens), answer in zip(CHOICES.items(), answers):
        places = zip(tokens, answer["prompt_logprobs"][-len(tokens):])
        scores[choice] = sum(place[str(token)]["logprob"] for token, place in places){per_token}
    return sorted(scores, key=scores.get, reverse=True), scores

print(rank("YOUR TEXT"))"""
)


def constraint(engine: str, choices: Choices | None) -> dict[str, Any]:
    """What a request adds so that the reply is one of the choices; empty where nothing can."""
    if choices is None or engine == "transformers":
        return {}
    if engine == "llamacpp":
        return {"grammar": choices.grammar}
    return vllm_limit(choices)


def vllm_limit(choices: Choices) -> dict[str, Any]:
    """What limits vLLM to the choices: by their tokens where each is one, else by their texts."""
    if choices.single:
        return {"max_tokens": 1, "allowed_token_ids": [ids[0] for ids in choices.tokens]}
    return {"structured_outputs": {"choice": list(choices.texts)}}


def example_requests(engine: str, url: str, model: str, choices: Choices | None) -> list[str]:
    """A shell command and Python for one request; for choices, Python that ranks them, too.

    `url` is the base of the server's API, and ends with /v1.
    """
    more = constraint(engine, choices)
    messages = [{"role": "user", "content": "YOUR TEXT"}]
    body = {"model": model, "messages": messages, "temperature": 0, **more}
    extra = f",\n    extra_body={to_source(more)}" if more else ""
    quoted = {"url": json.dumps(url), "model": to_source(model)}
    examples = [
        f'curl {url}/chat/completions -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(to_source(body))}",
        _PYTHON.format(**quoted, extra=extra),
    ]
    if choices and more:
        examples.append(_ranking(engine, quoted, url, choices))
    return examples


def _ranking(engine: str, quoted: dict[str, str], url: str, choices: Choices) -> str:
    names = [to_source(name) for name in choices.names]
    if engine == "llamacpp" and choices.whole:
        entries = [
            f'{name}: ("{choices.forced(i)}", {len(choices.tokens[i])})'
            for i, name in enumerate(names)
        ]
        program, each = _RANK, " / tokens"
    else:
        pairs = zip(names, choices.tokens, strict=True)
        entries = [f"{name}: {list(ids)}" for name, ids in pairs]
        program = _RANK_PARTS if engine == "llamacpp" else _RANK_VLLM
        each = " / len(tokens)"
    # Of several tokens that end a turn, the one that training scored.
    scored = zip(choices.tokens, choices.written, strict=True)
    ends = {str(i): 100 for ids, written in scored for i in ids[written:]}
    return program.format(
        **quoted,
        root=json.dumps(url.removesuffix("/v1")),
        choices=", ".join(entries),
        bias=f"logit_bias={json.dumps(ends)}, " if ends else "",
        per_token=each if choices.normalize else "",
    )
