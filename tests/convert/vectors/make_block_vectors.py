"""Make block_types.json beside this file: what llama.cpp's quantiser makes of fixed weights and models.

Not run by the suite. It needs llama.cpp as llama-cpp-python packs it (a C++ compiler, about five minutes):

    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF" pip install llama-cpp-python==0.3.36
    PYTHONPATH=.:tests/support python tests/convert/vectors/make_block_vectors.py

`encodings`: SHA-256 of each type's bytes for `block_cases.weights()`. `mixtures`: the type of every kind of tensor,
layer by layer, for the models of `block_cases.MODELS`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from block_cases import KINDS, MODELS, QUANTISED, by_kind, model, weights, write

from convert.gguf.header import parse_header
from convert.gguf.mixture import FILE_TYPES

OUT = Path(__file__).with_name("block_types.json")


def quantise(source: Path, target: Path, file_type: str, pure: bool = False) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.pure = int(FILE_TYPES[file_type][1]), 1, pure
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    assert status == 0, (source, file_type)


def main() -> None:
    vectors: dict[str, dict[str, object]] = {"encodings": {}, "mixtures": {}}
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "f32.gguf", Path(name) / "quantised.gguf"
        for case, sizes in MODELS.items():
            write(source, *model(**sizes), file_type="F32")
            found = {}
            for file_type in QUANTISED:
                quantise(source, target, file_type)
                types = {
                    name: tensor.type.name for name, tensor in parse_header(target.read_bytes(), target)[1].items()
                }
                found[file_type] = by_kind(types)
            vectors["mixtures"][case] = found
        # A model whose up projection is the matrix in question, all of it in one type.
        matrix = weights()
        config, tensors = model(hidden_size=matrix.shape[1], intermediate_size=len(matrix), num_hidden_layers=1)
        tensors["model.layers.0.mlp.up_proj.weight"] = matrix
        write(source, config, tensors, file_type="F32")
        for kind, file_type in KINDS.items():
            quantise(source, target, file_type, pure=True)
            data = target.read_bytes()
            tensor = parse_header(memoryview(data), target)[1]["blk.0.ffn_up.weight"]
            assert tensor.type.name == kind
            encoded = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset)
            vectors["encodings"][kind] = hashlib.sha256(encoded).hexdigest()
    OUT.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
