"""llama.cpp's server process, for `verify` and `serve`.

    python -m embedgrad.model.llamacpp.child '{"model": "model.gguf", "port": 8080}'

A process, because a file that llama.cpp cannot use may abort it. It ends when standard input does,
so it never outlives its parent.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def parameters(options: dict[str, Any]) -> Any:
    """Options as xllamacpp's `CommonParams`: one model on a loopback port, no web page, no updates.

    `exact` asks for plain arithmetic: f32 caches, no flash attention, no prompt caching.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx = options.get("n_ctx", 0)
    params.n_parallel = 1
    params.hostnames = [options.get("host", "127.0.0.1")]
    params.port = options["port"]
    params.ui = params.warmup = params.fit_params = False
    params.endpoint_slots = False  # it would show one client's prompt to another
    if "alias" in options:
        params.model_alias = {options["alias"]}
    # Else a browser would let any site's pages ask a local port.
    params.cors_origins, params.cors_origins_explicit = "http://localhost", True
    params.verbosity = options.get("verbosity", 1)
    if options.get("threads"):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    if options.get("exact"):
        f32 = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = f32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_gpu_layers = 0
        params.swa_full = True
    params.sampling.temp = options.get("temperature", params.sampling.temp)
    params.sampling.grammar.grammar = options.get("grammar", "")
    if not options.get("cache_prompt"):
        params.cache_prompt = False
        params.cache_ram_mib = 0
    return params


def main() -> None:
    import xllamacpp

    try:
        server = xllamacpp.Server(parameters(json.loads(sys.argv[1])))
    except RuntimeError:  # llama.cpp says why, in a thread that its end would cut short
        time.sleep(1)
        raise SystemExit(1) from None
    sys.stdin.buffer.read()
    del server


if __name__ == "__main__":
    main()
