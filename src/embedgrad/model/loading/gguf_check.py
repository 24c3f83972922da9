"""Compare a converted GGUF model with llama.cpp, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from embedgrad.errors import EngineError, ModelError
from embedgrad.model.llamacpp.server import LlamaCppServer

# What rules for splitting text tell apart: digits, blanks, line breaks, scripts, marks, case.
TEXTS = (
    "The waiter slept at table 12, so we asked again: is 3,141,592.65 the price? (It wasn't.) "
    "Nobody knew why the soup of 2024 was cold, but everyone ate it and paid in silence.",
    "Hello world! They'll say it's fine, WE'LL SEE; I'd rather not.",
    "1234567 + 89 = 1234656, $12.50 or 100%",
    "a  b   c\td\n\ne\r\n  f \n",
    "def f(x):\n    return x**2  # square\n\n\tprint(f'{x!r}')",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u0438 "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u03b1\u03b2\u03b3",
    "\u6f22\u5b57\u3068\u304b\u306a\u30ab\u30ca\u3002\ud55c\uad6d\uc5b4, \u4e2d\u6587\uff01",
    "(\u2026) \u2018quotes\u2019 \u201cmore\u201d \u2013 "
    "dash\u2014long ... !!! ?! -- ~ ^ | ` <tag>",
    "snake_case camelCase HTTPServer x2y3 v1.2.3",
    "\u0915\u094d\u0937\u093f \u0e44\u0e17\u0e22 \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 ok \U0001f44d\U0001f3fd",
)
_TOP = 50  # tokens that are compared
# Mean difference in nats over the most likely tokens. llama.cpp rounds activations as well where
# weights are quantized: 0.04 for 4-bit weights of SmolLM2-135M; a wrong setting gives 1 to 6.
_MOST = 0.5


def compare_with_llamacpp(file: Path, model: Any, tokenizer: Any) -> list[str]:
    """What llama.cpp does otherwise without much harm, as notes; none where it is not installed.

    Raises `ModelError` where the model would compute something else.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return []
    size = min(len(tokenizer), model.config.get_text_config().vocab_size)
    word = next((i for i in range(size) if tokenizer.decode([i]).strip().isalnum()), 0)
    # A token that is part of a character would not be reported: the bias makes it a whole word.
    once = {"n_predict": 1, "n_probs": _TOP, "temperature": 0, "logit_bias": [[word, 1e4]]}
    try:
        with LlamaCppServer(file, n_ctx=256, exact=True) as server:
            asked = ({"content": text, "add_special": True} for text in TEXTS)
            tokens = [server.ask("/tokenize", body)["tokens"] for body in asked]
            answer = server.ask("/completion", {"prompt": tokens[0], **once})
        top = [
            (t["id"], t["logprob"]) for t in answer["completion_probabilities"][0]["top_logprobs"]
        ]
    except (EngineError, OSError, LookupError, TypeError):  # another version may answer otherwise
        return [f"{file.name} was not compared with llama.cpp, which cannot open it"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[0]]), use_cache=False).logits[0, -1]
    ids, theirs = [token for token, _ in top], torch.tensor([logprob for _, logprob in top])
    ours = logits.float().log_softmax(-1)[ids]
    difference = (ours - theirs).abs().mean().item()
    if not difference < _MOST:
        raise ModelError(
            f"{file}: read by transformers, its log-probabilities are {difference:.2g} nats off "
            "those of llama.cpp, so something in the file has not been understood; use the model's"
            " safetensors"
        )
    others = [
        text for text, ids in zip(TEXTS, tokens, strict=True) if tokenizer(text)["input_ids"] != ids
    ]
    if not others:
        return []
    return [
        f"{file.name}: transformers and llama.cpp split {len(others)} of {len(TEXTS)} texts into "
        f"different tokens (such as {others[0]!r}); what is exported to llama.cpp may differ there"
    ]
