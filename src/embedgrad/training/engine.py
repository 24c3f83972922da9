"""An engine that samples answers: vLLM, asked with prompt embeddings.

    rows + questions -> embeddings -> engine -> token ids and their log-probabilities -> answers

The rows change with every step, so the whole prompt goes along as embeddings; tokens come back as
ids and are never tokenized again. The engine computes in its own precision with its own kernels,
so its log-probabilities are not ours: `mismatch` says by how much.

Formats: vLLM 0.33, docs/features/prompt_embeds and `entrypoints/openai/completion/protocol.py`.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Annotated, Any, final
from urllib.parse import urlsplit

import torch
from annotated_types import Ge, Gt

from embedgrad.errors import EngineError, OptionError
from embedgrad.formatting import one_line
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.generation import begin
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

KEY = "VLLM_API_KEY"  # the environment variable of vLLM's own --api-key
MISMATCH = ("mismatch", "mismatch_ratio", "mismatch_cut")  # of a step; see `mismatch`
LARGE = 0.1  # nats a token: far beyond what 16-bit precision explains
_CONNECT = 10.0  # seconds
_FAR = 50.0  # nats, beyond which a ratio says no more
_LONGEST = 300  # characters of a server's own words
_SENT = (torch.float32, torch.bfloat16, torch.float16)  # precisions that vLLM takes
# What a server would otherwise take from the model's generation_config.json.
_PLAIN = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@final
@dataclass(frozen=True)
class SamplingEngine:
    """What samples the answers, if the objective trains on the model's own."""

    engine: str | None = None
    """Address of a vLLM server that samples the answers, as in "http://127.0.0.1:8000/v1"; unset:
    embedgrad itself."""
    model: str | None = None
    """The model's name there; unset: the only one that is served."""
    timeout: Annotated[float, Gt(0)] = 600.0
    """Longest wait for the answers to a question, in seconds."""
    most_weight: Annotated[float, Ge(1)] = 2.0
    """A token's loss is weighted by our probability of it over the engine's, up to this; 1: no
    token counts more for it."""

    def __post_init__(self) -> None:
        if self.engine is None:
            if self.model is not None:
                raise OptionError(
                    f"sampling.model: {self.model!r} is a name with an engine; set "
                    "sampling.engine, or take it out"
                )
            return
        try:
            url = urlsplit(self.engine)
            usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # a port that is none
            usable = False
        if not usable or url.username or url.password or url.query or url.fragment:
            raise OptionError(
                f"sampling.engine: {self.engine!r}; expected the address of a vLLM server, as in "
                f'"http://127.0.0.1:8000/v1" (a key goes into {KEY})'
            )


@final
class Engine:
    """A vLLM server that continues prompts given as embeddings."""

    def __init__(self, settings: SamplingEngine):
        assert settings.engine is not None
        self.settings = settings
        self.url = settings.engine.rstrip("/")

    @cached_property
    def model(self) -> str:
        """The name of the model to ask for; see `find_model`."""
        return self.find_model()

    def find_model(self) -> str:
        """The name of the model to ask for. Raises `EngineError` where no such server answers."""
        with closing(self._send("GET", "/models")) as connection:
            served = self._read(connection).get("data")
        listed = served if isinstance(served, list) else []
        names = [str(m.get("id")) for m in listed if isinstance(m, dict)]
        name = self.settings.model
        if name in names or (name is None and len(names) == 1):
            return name or names[0]
        wanted = "no model" if name is None else f"not {name!r}"
        raise EngineError(
            f"sampling.engine: {self.url} serves {', '.join(names[:5]) or 'nothing'}, and "
            f"{wanted} was named; set sampling.model to one that it serves"
        )

    def sample(
        self,
        model: LanguageModel,
        prompt: Prompt,
        questions: Sequence[TokenSequence],
        decoding: Decoding,
        *,
        end_ids: Ids,
        numbers: Sequence[int],
    ) -> list[list[Generation]]:
        """`decoding.samples` answers per question, each with the engine's `logprobs`.

        All questions are asked at once. What is drawn depends on the seed, the question's number
        and the engine. Raises `EngineError` where it is not there, or not such an engine.
        """
        prompt_PD = join_spans(prompt)
        asked = []
        with ExitStack() as stack:
            for question, number in zip(questions, numbers, strict=True):
                answers = [
                    begin(model, prompt_PD, decoding, end_ids, question, (number, i))
                    for i in range(decoding.samples)
                ]
                payload = _payload(model, model.forward.embed_in_full(prompt_PD, question))
                body = {
                    **_PLAIN,
                    "model": self.model,
                    "prompt_embeds": payload,
                    # Else vLLM's prefix cache takes prompts for the same that differ in their rows.
                    "cache_salt": hashlib.sha256(payload.encode()).hexdigest(),
                    "n": decoding.samples,
                    "max_tokens": max(answers[0].most, 1),
                    "temperature": decoding.temperature,
                    "seed": random.Random(f"{decoding.seed}:{number}").getrandbits(48),
                    "stop": list(decoding.stop),
                    "stop_token_ids": list(answers[0].end_ids),
                    "ignore_eos": True,  # only the tokens above end an answer
                    "logprobs": 0,  # of the token drawn alone
                    "return_tokens_as_token_ids": True,
                }
                connection = self._send("POST", "/completions", body)
                asked.append((stack.enter_context(closing(connection)), answers))
            for connection, answers in asked:
                self._fill(answers, self._read(connection), model.info.vocabulary)
        return [answers for _, answers in asked]

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> http.client.HTTPConnection:
        """A connection on which a request was sent, and its answer was not read."""
        url = urlsplit(self.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(url.hostname), url.port, timeout=_CONNECT)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            connection.sock.settimeout(self.settings.timeout)
            content = None if body is None else json.dumps(body)
            connection.request(method, url.path + path, content, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise EngineError(
                f"sampling.engine: no server answers at {self.url} ({_words(error)}); start one "
                "there with `vllm serve MODEL --enable-prompt-embeds`, or name another"
            ) from error
        return connection

    def _read(self, connection: http.client.HTTPConnection) -> Mapping[str, Any]:
        """The answer on a connection."""
        try:
            answer = connection.getresponse()
            text = answer.read()
        except TimeoutError as error:
            raise EngineError(
                f"sampling.engine: {self.url} did not answer within {self.settings.timeout:g} "
                "seconds; see what it does, or raise sampling.timeout"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"sampling.engine: {self.url} went away while it was asked ({_words(error)}); "
                "start it again and resume the run"
            ) from error
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = text.decode(errors="replace")
        if answer.status in (401, 403):
            raise EngineError(
                f"sampling.engine: {self.url} wants a key ({_reason(content)}); set {KEY} in the "
                "environment"
            )
        if answer.status != http.client.OK:
            raise EngineError(
                f"sampling.engine: {self.url} refused a request ({answer.status}: "
                f"{_reason(content)}); it must be vLLM with the same model and context length, "
                "started with --enable-prompt-embeds"
            )
        if not isinstance(content, dict):
            raise self._strange(f"it says {_reason(content)!r}")
        return content

    def _fill(
        self, answers: Sequence[Generation], content: Mapping[str, Any], vocabulary: int
    ) -> None:
        """Put what the engine wrote into the answers."""
        choices = content.get("choices")
        count = len(choices) if isinstance(choices, list) else 0
        if count != len(answers):
            raise self._strange(f"it gave {count} answers of {len(answers)} asked for")
        for answer, choice in zip(answers, choices or (), strict=True):
            try:
                drawn = list(_tokens(choice))
                ended = choice["finish_reason"]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._strange(
                    f"an answer lacks the ids or log-probabilities of its tokens ({_words(error)})"
                ) from error
            for token, logprob in drawn:
                if not 0 <= token < vocabulary:
                    raise self._strange(
                        f"it wrote token {token}, and the recipe's model has {vocabulary}"
                    )
                if not answer.over:
                    answer.add(token)
                    answer.logprobs.append(logprob)
            if not answer.over and ended != "length":
                raise self._strange(
                    f"an answer of {len(drawn)} tokens ended ({ended}) with none that ends one"
                )

    def _strange(self, what: str) -> EngineError:
        return EngineError(
            f"sampling.engine: {self.url} cannot be used: {what}; it must be vLLM with the same "
            "model and tokenizer"
        )


def mismatch(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], most: float
) -> tuple[list[list[float]], dict[str, float]]:
    """Weights of tokens that an engine drew, and how far its log-probabilities are from ours.

    A weight is the token's probability with us over that with the engine, at most `most`:
    truncated importance sampling (Ionides 2008, https://doi.org/10.1198/106186008X320456), per
    token as in Yao et al. 2025, https://fengyao.notion.site/off-policy-rl. `mismatch` is the mean
    absolute difference in nats, `mismatch_ratio` the mean ratio before it is cut (1 where both are
    the same), `mismatch_cut` the share of tokens that it was cut for.
    """
    pairs = zip(ours, theirs, strict=True)
    gaps = [[a - b for a, b in zip(*lines, strict=True)] for lines in pairs]
    ratios = [[math.exp(min(gap, _FAR)) for gap in line] for line in gaps]
    count = max(sum(map(len, gaps)), 1)
    return [[min(ratio, most) for ratio in line] for line in ratios], {
        "mismatch": sum(abs(gap) for line in gaps for gap in line) / count,
        "mismatch_ratio": sum(map(sum, ratios)) / count,
        "mismatch_cut": sum(ratio > most for line in ratios for ratio in line) / count,
    }


def summarize(events: Iterable[Mapping[str, Any] | None]) -> dict[str, float]:
    """The mismatch over all steps of a run: means, and the largest; nothing where none has one."""
    steps = [e for e in events if e and isinstance(e.get("mismatch"), float)]
    if not steps:
        return {}
    means = {name: fmean(e[name] for e in steps) for name in MISMATCH}
    return {"steps": len(steps), **means, "mismatch_max": max(e["mismatch"] for e in steps)}


def _payload(model: LanguageModel, embeds_1TD: torch.Tensor) -> str:
    """Base64 of `torch.save`, which the server decodes; a view would carry its whole storage."""
    dtype = model.forward.dtype if model.forward.dtype in _SENT else torch.float32
    file = io.BytesIO()
    torch.save(embeds_1TD[0].detach().to("cpu", dtype).contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def _tokens(choice: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """Ids of an answer's tokens, as in "token_id:17", and their log-probabilities."""
    told = choice["logprobs"]
    for name, logprob in zip(told["tokens"], told["token_logprobs"], strict=True):
        if not math.isfinite(logprob):
            raise ValueError(f"log-probability {logprob}")
        yield int(name.removeprefix("token_id:")), float(logprob)


def _reason(content: Any) -> str:
    """What a server says is wrong, in any of the usual forms."""
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    return _words(content)


def _words(text: object) -> str:
    return one_line(text)[:_LONGEST] or type(text).__name__
