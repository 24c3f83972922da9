"""vLLM's contract for prompt embeddings, enforced by a stand-in.

Sources: vLLM 0.33, docs/features/prompt_embeds, `vllm/renderers` (embed_utils, chat_utils, hf) and
the protocol classes of its OpenAI API.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from embedgrad.deploy.destinations.vllm_chat import JOIN, PLACEHOLDER, prompt_ids, with_placeholder
from embedgrad.deploy.verify.stand_in import Body, Refused, StandIn, likeliest, read_saved
from embedgrad.model.language_model import LanguageModel

SETTINGS = {"model", "cache_salt", "max_tokens", "temperature", "return_tokens_as_token_ids"}
LONGEST_SALT = 1024


class VllmStandIn(StandIn):
    """`vllm serve MODEL --runner generate --enable-prompt-embeds`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, name: str, chat_template: str):
        super().__init__(model, dtype)
        self.name = name
        self.chat_template = chat_template
        self.tokenizer = with_placeholder(model.tokenizer)
        self.routes = {"/v1/completions": self._completion, "/v1/chat/completions": self._chat}

    def _completion(self, body: Body) -> dict[str, Any]:
        self._check(body, {"prompt", "prompt_embeds", "logprobs"})
        if ("prompt" in body) == ("prompt_embeds" in body):
            raise Refused("Either prompt or prompt_embeds must be provided and non-empty.")
        if "prompt" in body:
            embeds_TD = self.embed(body["prompt"])
        else:
            embeds_TD = self._decoded(body["prompt_embeds"])
        tokens, logprobs_NV = self.continued(embeds_TD, body["max_tokens"])
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
        tokens, logprobs_NV = self.continued(torch.cat(parts), body["max_tokens"])
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
            raise Refused("this stand-in names tokens by id: set return_tokens_as_token_ids")
        if body.get("temperature") != 0:
            raise Refused("this stand-in decodes greedily: temperature must be 0")

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
