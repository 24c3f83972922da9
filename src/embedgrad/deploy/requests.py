"""Requests to a served export, ready to paste."""

from __future__ import annotations

import shlex
from typing import Any

from embedgrad.deploy.choices import Choices
from embedgrad.deploy.programs import fill, to_source


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
    examples = [
        f'curl {url}/chat/completions -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(to_source(body))}",
        fill("ask.py", url=url, model=model, extra=extra),
    ]
    if choices and more:
        examples.append(_ranking(engine, url, model, choices))
    return [example.rstrip("\n") for example in examples]


def _ranking(engine: str, url: str, model: str, choices: Choices) -> str:
    names = list(map(to_source, choices.names))
    if engine == "llamacpp" and choices.whole:
        program = "rank_grammar.py"
        entries = [
            f'{name}: ("{choices.grammar_of(i)}", {len(choices.tokens[i])})'
            for i, name in enumerate(names)
        ]
    else:
        program = "rank_tokens.py" if engine == "llamacpp" else "rank_vllm.py"
        pairs = zip(names, choices.tokens, strict=True)
        entries = [f"{name}: {list(ids)}" for name, ids in pairs]
    # Of several tokens that end a turn, the one that training scored.
    scored = zip(choices.tokens, choices.written, strict=True)
    return fill(
        program,
        url=url,
        root=url.removesuffix("/v1"),
        model=model,
        choices=f"{{{', '.join(entries)}}}",
        ends={str(i): 100 for ids, written in scored for i in ids[written:]},
        normalize=choices.normalize,
    )
