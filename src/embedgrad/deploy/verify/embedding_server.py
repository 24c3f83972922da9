"""An export for vLLM or SGLang: its own client's bodies, sent to a stand-in server.

The servers themselves need a GPU and are seldom installed where prompts are refined; what a body
must hold and what the server makes of it is checked here, the server's own arithmetic is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from torch import Tensor

from embedgrad.deploy.destinations.client_code import TEMPLATE_FILE, base_from, run_written
from embedgrad.deploy.destinations.embedding_client import CLIENT_FILE
from embedgrad.deploy.destinations.sglang import SglangBodies
from embedgrad.deploy.destinations.vllm import VllmBodies
from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.verify.engine import Asked, Engine
from embedgrad.deploy.verify.sglang_stand_in import SglangStandIn
from embedgrad.deploy.verify.stand_in import StandIn
from embedgrad.deploy.verify.vllm_stand_in import VllmStandIn
from embedgrad.errors import EngineError
from embedgrad.model.decoding import before_end
from embedgrad.prompt.boundaries import Ids

EXACT = 1e-4  # natural log-probability, in float32
_NAME = "token_id:"


class BodyEngine(Engine):
    """Every answer over HTTP. Raises `EngineError` for a body that the server refuses."""

    def __init__(self, folder: Path, job: Job, exported: Exported, written: Mapping[str, Any]):
        self.tolerance = EXACT if written["dtype"] == "float32" else None
        self.vllm = written["destination"] == "vllm"
        writer = VllmBodies() if self.vllm else SglangBodies()
        source = writer.source(exported, base_from(written, job), written)
        self.client = run_written(folder / CLIENT_FILE, source)
        self.refined_PD = self.client.rows
        self.start_PD = exported.prompt.start_rows.to(self.refined_PD)
        self.span_ids = exported.prompt.span.ids
        self.end_ids = job.model.ends_of(exported.sequencer)
        self.chat = self.vllm and bool(written["chat"])
        # As the client's own loading gives it, without a second model in memory.
        self.client.embedding = lambda: lambda ids: job.model.embed(ids.tolist())
        self.server = self._server(folder, job, str(written["model"]))
        self.ids = self.server.ids
        self._next: dict[tuple[Ids, Ids], Tensor] = {}  # after a refined row

    def _server(self, folder: Path, job: Job, name: str) -> StandIn:
        dtype = self.refined_PD.dtype
        if not self.vllm:
            return SglangStandIn(job.model, dtype)
        template = job.model.tokenizer.chat_template or ""
        if (folder / TEMPLATE_FILE).is_file():
            template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        return VllmStandIn(job.model, dtype, name, template)

    def __enter__(self) -> BodyEngine:
        self.server.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.__exit__(*exception)

    def logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        """By the whole prompt's embeddings, and by the chat's parts where there are such."""
        whole_BV = self._whole(rows)
        for row, logprobs_V in zip(rows, whole_BV, strict=True):
            self._next[_key(row)] = logprobs_V
        if not self.chat:
            return whole_BV
        parts_BV = self._chats(rows)
        apart = (whole_BV - parts_BV).abs().max().item()
        if not apart <= EXACT:
            raise EngineError(
                f"{CLIENT_FILE}: the two kinds of bodies give other answers to one query (their "
                f"log-probabilities differ by {apart:.1e}); export again"
            )
        return parts_BV

    def _whole(self, rows: Sequence[Asked]) -> Tensor:
        return self._after([self._body(_columns(row)) for row in rows])

    def _chats(self, rows: Sequence[Asked]) -> Tensor:
        asking = {"logprobs": True, "top_logprobs": -1, "return_tokens_as_token_ids": True}
        return self._after([{**self.client.chat(_columns(row)), **asking} for row in rows])

    def start_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        with self._start_rows():
            return self._chats(rows) if self.chat else self._whole(rows)

    def plain_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        bodies = []
        for row in rows:
            ids = [*row.sequence.prefix, *self.span_ids, *row.sequence.suffix]
            body = self._body(_columns(row))
            body.pop("prompt_embeds" if self.vllm else "input_embeds")
            bodies.append({**body, "prompt" if self.vllm else "input_ids": ids})
        return self._after(bodies)

    def greedy(self, rows: Sequence[Asked], max_new_tokens: int) -> list[Ids]:
        answers = []
        for row in rows:
            tokens, _ = self._asked(self._body(_columns(row), max_new_tokens, few=True))
            answers.append(before_end(tokens, self.end_ids))
        return answers

    def answer_logprobs(self, rows: Sequence[Asked]) -> list[tuple[float, ...]]:
        """Token by token, each behind the embeddings of those before it."""
        return [
            tuple(self._answered(row, answer) for answer in row.sequence.targets) for row in rows
        ]

    def added_mass(self, rows: Sequence[Asked]) -> float:
        return 0.0

    def _answered(self, row: Asked, answer: Ids) -> float:
        if _key(row) not in self._next:
            self._next[_key(row)] = self._whole([row])[0]
        total = float(self._next[_key(row)][answer[0]])
        made = self.client.embeddings
        for n in range(1, len(answer)):
            ids = torch.tensor(answer[:n], dtype=torch.long)
            try:
                self.client.embeddings = lambda columns, ids=ids: torch.cat(
                    [made(columns), self.client.embedding()(ids).to(self.refined_PD)]
                )
                total += float(self._whole([row])[0, answer[n]])
            finally:
                self.client.embeddings = made
        return total

    def _body(self, columns: dict[str, str], most: int = 1, *, few: bool = False) -> dict[str, Any]:
        """The client's body for a whole prompt, with log-probabilities of all tokens or of one."""
        count = 1 if few else -1
        if self.vllm:
            asking = {"logprobs": count, "return_tokens_as_token_ids": True, "max_tokens": most}
            body: dict[str, Any] = self.client.completion(columns, **asking)
            return body
        body = self.client.generation(columns, return_logprob=True)
        body["top_logprobs_num"] = self.ids if count < 0 else count
        body["sampling_params"]["max_new_tokens"] = most
        return body

    def _after(self, bodies: Sequence[dict[str, Any]]) -> Tensor:
        """Log-probabilities [B, V] of the next token."""
        found_BV = torch.full((len(bodies), self.ids), -torch.inf)
        for b, body in enumerate(bodies):
            _, first = self._asked({**body, "max_tokens": 1} if self.vllm else body)
            for token, logprob in first:
                found_BV[b, token] = logprob
        return found_BV

    def _asked(self, body: dict[str, Any]) -> tuple[list[int], list[tuple[int, float]]]:
        """The answer's tokens, and the log-probabilities of the first one by token."""
        try:
            answer = self.client.send(body, self.server.url)
        except HTTPError as error:
            told = error.read().decode(errors="replace")
            raise EngineError(f"{CLIENT_FILE}: the server refuses a body: {told}") from error
        if not self.vllm:
            facts = answer["meta_info"]
            tokens = [i for _, i, _ in facts["output_token_logprobs"]]
            return tokens, [(i, p) for p, i, _ in facts["output_top_logprobs"][0]]
        found = answer["choices"][0]["logprobs"]
        if "content" in found:
            tokens = [_token(made["token"]) for made in found["content"]]
            first = found["content"][0]["top_logprobs"]
            return tokens, [(_token(t["token"]), t["logprob"]) for t in first]
        tokens = [_token(name) for name in found["tokens"]]
        return tokens, [(_token(name), p) for name, p in found["top_logprobs"][0].items()]

    @contextmanager
    def _start_rows(self) -> Iterator[None]:
        self.client.rows = self.start_PD
        try:
            yield
        finally:
            self.client.rows = self.refined_PD


def _key(row: Asked) -> tuple[Ids, Ids]:
    return row.sequence.prefix, row.sequence.suffix


def _columns(row: Asked) -> dict[str, str]:
    return dict(row.sequence.example.columns)


def _token(name: str) -> int:
    return int(name.removeprefix(_NAME))
