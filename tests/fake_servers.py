"""Fakes of vLLM and SGLang: their documented contracts over real HTTP, on a loopback port.

One request is answered after the other, greedily, by a `transformers` model. Whatever a contract
does not name is refused.

vLLM 0.33: docs/features/prompt_embeds, `vllm/renderers` (embed_utils, chat_utils, hf) and the
protocol classes of its OpenAI API. SGLang: docs/basic_usage/native_api and sampling_params,
`srt/managers/io_struct.py`.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.quiet import silence_libraries

Body = Mapping[str, Any]
LOWEST = -9999.0  # of log-probabilities, as vLLM writes minus infinity
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = {"model", "cache_salt", "max_tokens", "temperature", "return_tokens_as_token_ids"}
SETTINGS |= {"allowed_token_ids", "structured_outputs"}
LONGEST_SALT = 1024
PLACEHOLDER = "<prompt_embeds>"  # vLLM's special token in the place of embeddings
JOIN = "\n"  # between the parts of a message


class Refused(Exception):
    """A request that the contract does not allow; `status` is HTTP's."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


class FakeServer:
    """A server for one model, by `routes`: path -> function of the body.

    `dtype` is what such a server computes in: embeddings are rounded to it, also of plain tokens.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.ids = min(len(model.tokenizer), model.info.vocabulary)
        self.routes: dict[str, Callable[[Body], dict[str, Any]]] = {}
        self.key = ""  # that every request must have
        self._one_at_a_time = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def embed(self, ids: list[int]) -> Tensor:
        """Rows [T, D] of plain tokens."""
        if not all(isinstance(i, int) and 0 <= i < self.model.info.vocabulary for i in ids):
            raise Refused("token ids are out of the vocabulary")
        return self.model.embed(ids).to(self.dtype)

    @torch.no_grad()
    def continued(
        self, embeds_TD: Tensor, most: int, allowed: Callable[[list[int]], list[int]] | None = None
    ) -> tuple[list[int], Tensor]:
        """Greedy tokens behind a prompt, the end token among them, and log-probabilities [N, V].

        `allowed` gives the tokens that may follow those so far; log-probabilities are those before.
        """
        engine: Any = self.model.model
        if len(embeds_TD) == 0:
            raise Refused("the prompt is empty")
        embeds = embeds_TD.to(engine.device, engine.dtype)[None]
        with self._one_at_a_time, silence_libraries():
            made = engine.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], device=engine.device),
                max_new_tokens=most,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=list(self.model.end_ids) or None,
                pad_token_id=0,
                prefix_allowed_tokens_fn=allowed and (lambda _, ids: allowed(ids.tolist())),
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits_NV = torch.cat(made.logits).float()
        return made.sequences[0].tolist(), torch.log_softmax(logits_NV, dim=1)[:, : self.ids].cpu()

    def one_of(self, texts: Sequence[str]) -> Callable[[list[int]], list[int]]:
        """Tokens, cut in any way, that keep an answer to one of the texts."""

        def allowed(ids: list[int]) -> list[int]:
            so_far = self.text(ids)
            ends = list(self.model.end_ids) if so_far in texts else []
            grown = ((i, self.text([*ids, i])) for i in range(self.ids))
            inside = [i for i, t in grown if t != so_far and any(x.startswith(t) for x in texts)]
            return [*ends, *inside] or list(self.model.end_ids)

        return allowed

    def text(self, ids: list[int]) -> str:
        """What tokens read like."""
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True))

    def _answer(self, path: str, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            if path not in self.routes:
                raise Refused(f"no route {path}", 404)
            try:
                body = json.loads(content, parse_constant=_refuse_constant)
            except ValueError as error:
                raise Refused(f"the body is not JSON: {error}") from error
            if not isinstance(body, dict):
                raise Refused("the body is not a JSON object")
            return 200, self.routes[path](body)
        except Refused as refused:
            return refused.status, {"error": {"message": str(refused)}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the library's name
                self.tell(b"{}")

            def do_POST(self) -> None:  # the library's name
                self.tell(self.rfile.read(int(self.headers["Content-Length"])))

            def tell(self, content: bytes) -> None:
                try:
                    status, answer = fake._answer(self.path, content)
                    if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                        status, answer = 401, {"error": "Unauthorized"}
                except ConnectionAbortedError:  # a server that dies
                    self.close_connection = True
                    return
                told = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler


def likeliest(logprobs_V: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens, all of them for -1; JSON knows no infinity."""
    most = len(logprobs_V) if count < 0 else min(count, len(logprobs_V))
    found = logprobs_V.clamp(min=LOWEST).topk(most)
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def saved(tensor: Tensor) -> bytes:
    """The tensor as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def read_saved(content: bytes, width: int) -> Tensor:
    """The tensor [T, width] in `content`. Raises `ValueError` for anything but a dense one."""
    try:
        numbers, described = _parts(content)
    except (zipfile.BadZipFile, KeyError, IndexError) as error:
        raise ValueError(f"is not what torch.save writes ({error})") from error
    for dtype in DTYPES:
        count = len(numbers) // dtype.itemsize
        shape = (count // width, width)
        if not count or len(numbers) != shape[0] * width * dtype.itemsize:
            continue
        if described == _parts(saved(torch.empty(shape, dtype=dtype)))[1]:
            return torch.frombuffer(bytearray(numbers), dtype=dtype).view(shape)
    raise ValueError(
        f"is not a dense tensor of shape (tokens, {width}) in float32, bfloat16 or float16 with a "
        "storage of its own"
    )


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """The numbers, and the pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root = archive.namelist()[0].split("/")[0]
        return archive.read(f"{root}/data/0"), archive.read(f"{root}/data.pkl")


class FakeVllm(FakeServer):
    """`vllm serve MODEL --runner generate --enable-prompt-embeds`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, name: str, chat_template: str):
        super().__init__(model, dtype)
        self.name = name
        self.chat_template = chat_template
        self.tokenizer = with_placeholder(model.tokenizer)
        self.routes = {
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._tokenize,
        }

    def _tokenize(self, body: Body) -> dict[str, Any]:
        if set(body) != {"model", "messages"}:
            raise Refused("this fake tokenizes messages only")
        ids = prompt_ids(body["messages"], self.tokenizer, self.chat_template, {})
        return {"tokens": ids, "count": len(ids)}

    def _read(self, body: Body) -> dict[str, Any]:
        """The log-probabilities of several prompts' own tokens; the first token has none."""
        if set(body) != {"model", "prompt", "max_tokens", "prompt_logprobs"}:
            raise Refused("this fake reads lists of tokens, and nothing else")
        choices = []
        for index, ids in enumerate(body["prompt"]):
            engine: Any = self.model.model
            with torch.no_grad():
                logprobs_TV = engine(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
            read = zip(ids[1:], logprobs_TV, strict=False)
            places = [None, *({str(i): {"logprob": float(p[i])}} for i, p in read)]
            choices.append({"index": index, "text": "", "prompt_logprobs": places})
        return {"object": "text_completion", "model": self.name, "choices": choices}

    def _completion(self, body: Body) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            return self._read(body)
        self._check(body, {"prompt", "prompt_embeds", "logprobs"})
        if ("prompt" in body) == ("prompt_embeds" in body):
            raise Refused("Either prompt or prompt_embeds must be provided and non-empty.")
        if "prompt" in body:
            embeds_TD = self.embed(body["prompt"])
        else:
            embeds_TD = self._decoded(body["prompt_embeds"])
        tokens, logprobs_NV = self.continued(embeds_TD, body["max_tokens"], self._limit(body))
        choice: dict[str, Any] = {"index": 0, "text": self.text(tokens)}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "tokens": [token_name(i) for i in tokens],
                "token_logprobs": [float(p[i]) for p, i in zip(logprobs_NV, tokens, strict=True)],
                "top_logprobs": [
                    {token_name(i): p for i, p in likeliest(logprobs_V, body["logprobs"])}
                    for logprobs_V in logprobs_NV
                ],
            }
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _chat(self, body: Body) -> dict[str, Any]:
        self._check(body, {"messages", "logprobs", "top_logprobs", "chat_template_kwargs"})
        tensors: list[Tensor] = []
        messages = [
            {"role": message["role"], "content": self._content(message["content"], tensors)}
            for message in body["messages"]
        ]
        ids = prompt_ids(
            messages, self.tokenizer, self.chat_template, body.get("chat_template_kwargs", {})
        )
        place = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        if ids.count(place) != len(tensors):
            raise Refused(
                f"Expected {len(tensors)} prompt_embeds placeholder spans in the tokenized prompt, "
                f"found {ids.count(place)}."
            )
        parts = [tensors.pop(0) if i == place else self.embed([i]) for i in ids]
        embeds_TD = torch.cat(parts)
        tokens, logprobs_NV = self.continued(embeds_TD, body["max_tokens"], self._limit(body))
        message = {"role": "assistant", "content": self.text(tokens)}
        choice: dict[str, Any] = {"index": 0, "message": message}
        if body.get("logprobs"):
            choice["logprobs"] = {
                "content": [
                    {
                        "token": token_name(i),
                        "logprob": float(logprobs_V[i]),
                        "top_logprobs": [
                            {"token": token_name(t), "logprob": p}
                            for t, p in likeliest(logprobs_V, body["top_logprobs"])
                        ],
                    }
                    for i, logprobs_V in zip(tokens, logprobs_NV, strict=True)
                ]
            }
        return {"object": "chat.completion", "model": self.name, "choices": [choice]}

    def _limit(self, body: Body) -> Callable[[list[int]], list[int]] | None:
        if "allowed_token_ids" in body:
            return lambda _: body["allowed_token_ids"]
        limits = body.get("structured_outputs")
        if limits is None:
            return None
        if set(limits) != {"choice"}:
            raise Refused("structured_outputs: this fake knows choice only")
        return self.one_of(limits["choice"])

    def _content(self, content: Any, tensors: list[Tensor]) -> str:
        """A message's text, with a placeholder for every tensor."""
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "prompt_embeds" and set(part) == {"type", "data"}:
                tensors.append(self._decoded(part["data"]))
                texts.append(PLACEHOLDER)
            elif part.get("type") == "text" and set(part) == {"type", "text"}:
                if PLACEHOLDER in part["text"]:
                    raise Refused(f"text contains the reserved {PLACEHOLDER}")
                texts.append(part["text"])
            else:
                raise Refused(f"Unsupported chat content part type: {part.get('type')!r}")
        return JOIN.join(text for text in texts if text)

    def _check(self, body: Body, more: set[str]) -> None:
        unknown = set(body) - SETTINGS - more
        if unknown:
            raise Refused(f"unknown fields: {', '.join(sorted(unknown))}")
        if body.get("model") != self.name:
            raise Refused(f"The model `{body.get('model')}` does not exist.", 404)
        salt = body.get("cache_salt", "none")
        if not isinstance(salt, str) or not 1 <= len(salt) <= LONGEST_SALT:
            raise Refused(f"cache_salt must be a string of 1 to {LONGEST_SALT} characters")
        if body.get("logprobs") is not None and not body.get("return_tokens_as_token_ids"):
            raise Refused("this fake names tokens by id: set return_tokens_as_token_ids")
        if body.get("temperature") != 0:
            raise Refused("this fake decodes greedily: temperature must be 0")

    def _decoded(self, data: Any) -> Tensor:
        """Embeddings [T, D] in the server's precision."""
        if not isinstance(data, str) or not data:
            raise Refused("prompt_embeds content part requires a non-empty `data` field")
        try:
            content = base64.b64decode(data, validate=True)
            return read_saved(content, self.model.info.width).to(self.model.device, self.dtype)
        except ValueError as error:
            raise Refused(f"`prompt_embeds` {error}") from error


def token_name(token: int) -> str:
    """How vLLM names a token with `return_tokens_as_token_ids`."""
    return f"token_id:{token}"


def prompt_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    chat_template: str,
    options: Mapping[str, Any],
) -> list[int]:
    """Token ids of a chat as vLLM makes them, one placeholder for all rows of a part."""
    text = tokenizer.apply_chat_template(
        list(messages),
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_placeholder(tokenizer: Any) -> Any:
    """A copy of a tokenizer with vLLM's special token."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([PLACEHOLDER], special_tokens=True)
    return changed


class FakeSglang(FakeServer):
    """`python -m sglang.launch_server --model-path MODEL --disable-radix-cache`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        super().__init__(model, dtype)
        self.routes = {"/generate": self._generate}

    def _generate(self, body: Body) -> dict[str, Any]:
        known = {"input_ids", "input_embeds", "sampling_params", "return_logprob"}
        unknown = set(body) - known - {"top_logprobs_num"}
        if unknown:
            raise Refused(f"unknown fields: {', '.join(sorted(unknown))}")
        if ("input_ids" in body) == ("input_embeds" in body):
            raise Refused("Either text, input_ids or input_embeds should be provided.")
        if "input_ids" in body:
            embeds_TD = self.embed(body["input_ids"])
        else:
            embeds_TD = self._floats(body["input_embeds"])
        sampling = body.get("sampling_params", {})
        fields = set(sampling) - {"ebnf"}
        if fields != {"max_new_tokens", "temperature"} or sampling["temperature"] != 0:
            raise Refused("this fake decodes greedily: max_new_tokens, and temperature = 0")
        limit = None
        if "ebnf" in sampling:
            texts = sampling["ebnf"].removeprefix("root ::= ").split(" | ")
            limit = self.one_of(list(map(json.loads, texts)))
        tokens, logprobs_NV = self.continued(embeds_TD, sampling["max_new_tokens"], limit)
        facts: dict[str, Any] = {"completion_tokens": len(tokens)}
        if body.get("return_logprob"):
            pairs = list(zip(tokens, logprobs_NV, strict=True))
            facts["output_token_logprobs"] = [[float(p[i]), i, None] for i, p in pairs]
            facts["output_top_logprobs"] = [
                [[p, i, None] for i, p in likeliest(logprobs_V, body.get("top_logprobs_num", 0))]
                for _, logprobs_V in pairs
            ]
        return {"text": self.text(tokens), "output_ids": tokens, "meta_info": facts}

    def _floats(self, rows: Any) -> Tensor:
        width = self.model.info.width
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and len(row) == width and all(isinstance(x, float) for x in row)
            for row in rows
        ):
            raise Refused(f"input_embeds must be a list of lists of {width} floats, one per token")
        return torch.tensor(rows).to(self.model.device, self.dtype)
