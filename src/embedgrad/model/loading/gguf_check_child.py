"""llama.cpp's tokens and log-probabilities of a GGUF file.

    python gguf_check_child.py '{"model": "model.gguf", "texts": ["Hello"], "word": 5}'

It prints the tokens of every text, and after the first one the most likely tokens with their
log-probabilities. A process, because a file that llama.cpp cannot use may abort it; run by its
path, because it needs nothing of embedgrad.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

TOP = 50


def main() -> None:
    import xllamacpp

    asked = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.ui = params.warmup = params.fit_params = params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cors_origins, params.cors_origins_explicit = "http://localhost", True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True
    params.verbosity = 1
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    tokens = [
        ask("/tokenize", {"content": text, "add_special": True})["tokens"]
        for text in asked["texts"]
    ]
    # A token that is part of a character would not be reported: the bias makes it a whole word.
    body = {"prompt": tokens[0], "n_predict": 1, "n_probs": TOP, "temperature": 0}
    answer = ask("/completion", {**body, "logit_bias": [[asked["word"], 1e4]]})
    top = answer["completion_probabilities"][0]["top_logprobs"]
    print(json.dumps({"tokens": tokens, "top": [[t["id"], t["logprob"]] for t in top]}))


if __name__ == "__main__":
    main()
