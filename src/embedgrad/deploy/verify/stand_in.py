"""A stand-in for servers that are not installed: real HTTP on a loopback port.

It serves checks, not users: one request is answered after the other, greedily, by a `transformers`
model. What a server allows is said by its own stand-in, which refuses everything else.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.quiet import silenced

Body = Mapping[str, Any]
LOWEST = -9999.0  # of log-probabilities, as vLLM writes minus infinity


class Refused(Exception):
    """A request that the contract does not allow; `status` is HTTP's."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


class StandIn:
    """A server for one model, by `routes`: path -> function of the body.

    `dtype` is what such a server computes in: embeddings are rounded to it, also of plain tokens.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.ids = min(len(model.tokenizer), model.info.vocabulary)
        self.routes: dict[str, Callable[[Body], dict[str, Any]]] = {}
        self._one_at_a_time = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StandIn:
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
    def continued(self, embeds_TD: Tensor, most: int) -> tuple[list[int], Tensor]:
        """Greedy tokens behind a prompt, the end token among them, and log-probabilities [N, V]."""
        engine: Any = self.model.model
        if len(embeds_TD) == 0:
            raise Refused("the prompt is empty")
        embeds = embeds_TD.to(engine.device, engine.dtype)[None]
        with self._one_at_a_time, silenced():
            made = engine.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], device=engine.device),
                max_new_tokens=most,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=list(self.model.end_ids) or None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits_NV = torch.cat(made.logits).float()
        return made.sequences[0].tolist(), torch.log_softmax(logits_NV, dim=1)[:, : self.ids].cpu()

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
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                content = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = stand_in._answer(self.path, content)
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


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
