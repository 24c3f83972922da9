"""Verify a GGUF export in llama.cpp over HTTP."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.atomic_files import scratch_folder
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.formats.gguf_file import replace_rows, table_rows
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Engine, Query
from embedgrad.errors import EngineError
from embedgrad.model.decoding import before_end
from embedgrad.model.llamacpp.server import LlamaCppServer
from embedgrad.prompt.boundaries import Ids, alike

# With f32 weights and caches. There is none for quantized weights, nor for GELU, which llama.cpp
# looks up in a table of half-precision numbers (ggml-cpu/vec.h).
TOLERANCE = 1e-3
_GREEDY = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
_ROOM = 256  # tokens for answers, and for messages longer than the rows of the check


@final
class LlamaCppEngine(Engine):
    """llama.cpp on `folder`'s GGUF file: f32 caches, no flash attention, no prompt caching.

    The start rows go into a temporary copy of the file beside the export.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        self._file = folder / written["file"]
        self._job = job
        self._exported = exported
        self._new_ids: Ids = tuple(written["tokens"][exported.name])
        self._added = slice(*written["added"])
        self._known = min(len(job.model.tokenizer), job.model.info.vocabulary)
        self._size = int(written["size"])
        self._server: LlamaCppServer | None = None
        text = job.model.model.config.get_text_config(decoder=True)
        names = ("hidden_activation", "hidden_act", "activation_function")
        gelu = any("gelu" in str(getattr(text, name, None)) for name in names)
        exact = set(written["types"]) == {"F32"} and not gelu
        self.tolerance = TOLERANCE if exact else None
        # llama.cpp reports nothing for a token that is part of a character, so a bias makes it
        # generate another one: log-probabilities are those before any bias.
        decode, ids = job.model.tokenizer.decode, range(len(job.model.tokenizer))
        bias = [[next((i for i in ids if decode([i]).strip().isalnum()), 0), 1e4]]
        self._one_token = {**_GREEDY, "logit_bias": bias}
        self._choices = Choices.of(exported)
        self._seen: dict[tuple[tuple[tuple[str, str], ...], ...], Tensor] = {}

    def __enter__(self) -> LlamaCppEngine:
        self._server = self._start_server(self._file)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server:
            self._server.close()

    def logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        return torch.stack([self._logprobs(query)[: self._known] for query in queries]).float()

    def start_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        with self._with_start_rows() as file, self._start_server(file) as server:
            logprobs = [self._chat_logprobs(server, query)[: self._known] for query in queries]
        return torch.stack(logprobs).float()

    def plain_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        exported = self._exported
        texts = [query.sequence.context(exported.prompt.prompt_ids) for query in queries]
        return torch.stack([self._after(ids)[: self._known] for ids in texts]).float()

    def greedy(self, queries: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        answers = []
        for query in queries:
            # Not a chat, whose answer omits tokens that are parts of a character.
            body = {"prompt": list(self.prompt_ids(query)), "n_predict": max_new_tokens}
            ids = self._running.ask("/completion", {**body, **_GREEDY})["tokens"]
            answers.append(before_end(ids, self._job.model.end_ids))
        return answers

    def choose(self, query: Query) -> int | None:
        choices = self._choices
        assert choices is not None
        body = {"messages": [dict(message) for message in query.messages], "temperature": 0}
        body |= {"grammar": choices.grammar, "cache_prompt": False}
        reply = self._running.ask("/v1/chat/completions", body)["choices"][0]["message"]
        return choices.find(reply["content"] or "")

    def answer_logprob(self, query: Query, answer: Ids) -> float:
        total = self._logprobs(query)[answer[0]].item()
        prompt = self.prompt_ids(query) if len(answer) > 1 else ()
        for i in range(1, len(answer)):
            total += self._after(prompt + answer[:i])[answer[i]].item()
        return total

    def added_mass(self, queries: Sequence[Query]) -> float:
        added = (self._logprobs(query)[self._added] for query in queries)
        return max(logprobs.exp().sum().item() for logprobs in added)

    def prompt_ids(self, query: Query) -> Ids:
        """Tokens that llama.cpp makes of the messages."""
        messages = [dict(message) for message in query.messages]
        text = self._running.ask("/apply-template", {"messages": messages})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return tuple(self._running.ask("/tokenize", body)["tokens"])

    def token_differences(self, queries: Sequence[Query]) -> list[str]:
        differences = []
        for query in queries:
            ids, expected = self.prompt_ids(query), query.sequence.context(self._new_ids)
            if ids != expected:
                at = alike(ids, expected)
                differences.append(
                    f"llama.cpp makes other tokens of {query.sequence.example.source}, from token "
                    f"{at} on {list(ids[at : at + 4])} instead of {list(expected[at : at + 4])}; "
                    "export to vocabulary"
                )
        return differences

    @property
    def _running(self) -> LlamaCppServer:
        assert self._server, "enter the engine first"
        return self._server

    def _start_server(self, file: Path) -> LlamaCppServer:
        lengths = [len(s.prefix) + len(s.suffix) for s in self._exported.sequences]
        answers = [len(ids) for s in self._exported.sequences for ids in s.targets]
        needed = max(lengths, default=0) + len(self._new_ids) + max(answers, default=0)
        threads = max(1, torch.get_num_threads())
        return LlamaCppServer(file, n_ctx=needed + _ROOM, threads=threads, exact=True)

    def _logprobs(self, query: Query) -> Tensor:
        """Log-probabilities after a refined prompt, asked for once."""
        key = tuple(tuple(message.items()) for message in query.messages)
        if key not in self._seen:
            self._seen[key] = self._chat_logprobs(self._running, query)
        return self._seen[key]

    def _chat_logprobs(self, server: LlamaCppServer, query: Query) -> Tensor:
        body = {
            "messages": [dict(message) for message in query.messages],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": self._size,
        }
        answer = server.ask("/v1/chat/completions", {**body, **self._one_token})
        return self._vector(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])

    def _after(self, ids: Ids) -> Tensor:
        """Log-probabilities after plain ids, float64, of old and new tokens alike."""
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": self._size, **self._one_token}
        answer = self._running.ask("/completion", body)
        return self._vector(answer["completion_probabilities"][0]["top_logprobs"])

    def _vector(self, listed: Sequence[Mapping[str, Any]]) -> Tensor:
        if len(listed) != self._size:
            raise EngineError(
                f"{self._file}: llama.cpp returns {len(listed):,} log-probabilities, but the file "
                f"has {self._size:,} tokens"
            )
        vector = torch.empty(self._size, dtype=torch.float64)
        ids = torch.tensor([int(entry["id"]) for entry in listed])
        # JSON has no NaN: llama.cpp writes null.
        values = [float("nan" if e["logprob"] is None else e["logprob"]) for e in listed]
        vector[ids] = torch.tensor(values, dtype=torch.float64)
        return vector - vector.logsumexp(0)  # llama.cpp's own sum, in fp32, is up to 1e-4 off

    @contextlib.contextmanager
    def _with_start_rows(self) -> Iterator[Path]:
        parent = self._file.parent
        size, free = self._file.stat().st_size, shutil.disk_usage(parent).free
        if size > free:
            raise EngineError(
                f"{parent}: the check needs {size:,} bytes for a copy of the model, but "
                f"only {free:,} are free; make room"
            )
        with scratch_folder(parent, ".start-rows") as aside:
            copy = Path(shutil.copy(self._file, aside))
            rows = table_rows(self._exported.prompt.start_rows, self._job.model.info)
            replace_rows(copy, list(self._new_ids), rows)
            yield copy
