"""A fake of vLLM that samples, for training: prompt embeddings in, tokens of answers out."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import torch

from embedgrad.model.language_model import LanguageModel
from fake_servers import Body, FakeServer, Refused, read_saved, token_name

NAME = "tiny"
FIELDS = {"model", "prompt_embeds", "cache_salt", "n", "max_tokens", "temperature", "seed", "stop"}
FIELDS |= {"stop_token_ids", "ignore_eos", "logprobs", "return_tokens_as_token_ids"}
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


class FakeSampler(FakeServer):
    """`vllm serve tiny --enable-prompt-embeds`; `change` may spoil what it answers.

    Each answer has a seed of its own, as in vLLM. `asked` are the bodies of all requests so far.
    """

    def __init__(
        self, model: LanguageModel, change: Callable[[dict[str, Any]], Any] = lambda answer: answer
    ):
        super().__init__(model, torch.float32)
        self.change, self.names = change, [NAME]
        self.asked: list[Body] = []
        self.takes_embeds, self.width = True, model.info.width
        self.routes = {"/v1/models": self._models, "/v1/completions": self._sample}

    @property
    def address(self) -> str:
        return f"{self.url}/v1"

    def _models(self, body: Body) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]}

    @torch.no_grad()
    def _sample(self, body: Body) -> Any:
        self.asked.append(body)
        if not self.takes_embeds:
            raise Refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        if set(body) != FIELDS | set(PLAIN):
            raise Refused(f"unlike what is known: {sorted(set(body) ^ (FIELDS | set(PLAIN)))}")
        if any(body[name] != value for name, value in PLAIN.items()) or body["model"] != NAME:
            raise Refused("this fake samples from the model itself")
        if body["logprobs"] != 0 or not (body["ignore_eos"] and body["return_tokens_as_token_ids"]):
            raise Refused("this fake names tokens by id and stops at stop_token_ids")
        try:
            content = base64.b64decode(body["prompt_embeds"], validate=True)
            embeds_TD = read_saved(content, self.width)
        except ValueError as error:
            raise Refused(f"`prompt_embeds` {error}") from error
        with self._one_at_a_time:
            choices = self._choices(body, embeds_TD)
        return self.change({"object": "text_completion", "model": NAME, "choices": choices})

    def _choices(self, body: Body, embeds_TD: torch.Tensor) -> list[dict[str, Any]]:
        network: Any = self.model.model
        dice = [torch.Generator().manual_seed(body["seed"] + i) for i in range(body["n"])]
        ids: list[list[int]] = [[] for _ in dice]
        logprobs: list[list[float]] = [[] for _ in dice]
        running = list(range(len(dice)))
        for _ in range(body["max_tokens"]):
            before = [torch.cat([embeds_TD, self.embed(ids[i])]) for i in running]
            logits_NV = network(inputs_embeds=torch.stack(before).to(network.dtype)).logits[:, -1]
            shares_NV = (logits_NV.float() / body["temperature"]).softmax(1)
            told_NV = logits_NV.float().log_softmax(1)
            for i, shares_V, told_V in zip(running, shares_NV, told_NV, strict=True):
                ids[i].append(int(torch.multinomial(shares_V, 1, generator=dice[i])))
                logprobs[i].append(float(told_V[ids[i][-1]]))
            running = [i for i in running if not self._ends(ids[i], body)]
            if not running:
                break
        return [
            {
                "index": i,
                "text": "",
                "finish_reason": "length" if i in running else "stop",
                "logprobs": {
                    "tokens": list(map(token_name, ids[i])),
                    "token_logprobs": logprobs[i],
                },
            }
            for i in range(len(dice))
        ]

    def _ends(self, ids: list[int], body: Body) -> bool:
        text = self.text(ids) if body["stop"] else ""
        return ids[-1] in body["stop_token_ids"] or any(stop in text for stop in body["stop"])


def perturbed(model: LanguageModel, scale: float) -> LanguageModel:
    """The same model with noise on all of its weights."""
    loaded = copy.copy(model)
    loaded.model = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight += scale * weight.std() * noise.to(weight)
    return loaded
