"""SGLang's contract for a prompt's embeddings, enforced by a stand-in.

Sources: SGLang, docs/basic_usage/native_api and sampling_params, `srt/managers/io_struct.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedgrad.deploy.verify.stand_in import Body, Refused, StandIn, likeliest
from embedgrad.model.language_model import LanguageModel


class SglangStandIn(StandIn):
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
        if set(sampling) != {"max_new_tokens", "temperature"} or sampling["temperature"] != 0:
            raise Refused("this stand-in decodes greedily: max_new_tokens, and temperature = 0")
        tokens, logprobs_NV = self.continued(embeds_TD, sampling["max_new_tokens"])
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
