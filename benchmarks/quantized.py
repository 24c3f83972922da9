"""GGUF files in fewer bits, by llama.cpp's own arithmetic.

    python -m benchmarks.quantized FROM.gguf TO.gguf f16|q8_0|q4_k_m

The mixtures are those of `llama-quantize` without an importance matrix; the `xllamacpp` wheel
carries its kernels but not the program. Kept as they are: one-dimensional weights, the embedding
table (refined rows are exact there) and an output layer that is quantized.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize

from embedgrad.deploy.formats.gguf_file import (
    LM_HEAD,
    TABLE,
    Bytes,
    Weight,
    entry,
    read_contents,
    write_gguf,
)

MIXTURES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}  # with llama.cpp's numbers for them
SUPER_BLOCK = 256  # a row of another length takes the fallback
FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("mixture", choices=MIXTURES)
    arguments = parser.parse_args()
    quantize(arguments.source, arguments.target, arguments.mixture)


def quantize(source: Path, target: Path, mixture: str) -> None:
    """Write `source` with a body of that mixture."""
    contents = read_contents(source)
    layers = int(contents.metadata[f"{contents.architecture}.block_count"].value)
    metadata = {**contents.metadata, "general.file_type": entry(MIXTURES[mixture])}
    weights = [_quantize(w, kind_of(w, mixture, layers)) for w in contents.weights]
    write_gguf(target, contents._replace(metadata=metadata, weights=weights))


def kind_of(weight: Weight, mixture: str, layers: int) -> Kind:
    """The kind that a mixture gives a weight."""
    plain = weight.kind in (Kind.F32, Kind.F16, Kind.BF16)
    is_lm_head = weight.name == LM_HEAD
    if len(weight.shape) < 2 or weight.name == TABLE or (is_lm_head and not plain):
        return weight.kind
    if mixture != "q4_k_m":
        return Kind[mixture.upper()]
    if is_lm_head:
        kind = Kind.Q6_K
    else:
        finer = "attn_v" in weight.name or "ffn_down" in weight.name
        layer = int(weight.name.split(".")[1])
        kind = Kind.Q6_K if finer and _more_bits(layer, layers) else Kind.Q4_K
    return kind if weight.shape[-1] % SUPER_BLOCK == 0 else FALLBACK.get(kind, kind)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _quantize(weight: Weight, kind: Kind) -> Weight:
    if kind in (weight.kind, Kind.F16):
        return weight.convert(kind)
    quantized = replace(weight, kind=kind)

    def read(start: int, stop: int) -> Bytes:
        values = dequantize(np.ascontiguousarray(weight.read(start, stop)), weight.kind)
        source = np.ascontiguousarray(values, dtype=np.float32)
        raw = np.empty((stop - start, quantized.row_bytes), dtype=np.uint8)
        written = _kernels().ggml_quantize_chunk(
            ctypes.c_int(kind.value),
            source.ctypes.data_as(ctypes.c_void_p),
            raw.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(stop - start),
            ctypes.c_int64(weight.shape[-1]),
            None,
        )
        assert written == raw.nbytes, f"{weight.name}: {written} bytes of {raw.nbytes}"
        return raw

    return replace(quantized, read=read)


def _kernels() -> ctypes.CDLL:
    """The library inside the `xllamacpp` wheel."""
    package = importlib.util.find_spec("xllamacpp")
    assert package is not None
    assert package.origin is not None
    (path,) = Path(package.origin).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


if __name__ == "__main__":
    main()
