"""Every type of blocks that the gguf package decodes, K-quants, IQ and ternary types among them, through our reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from convert.gguf import open_gguf

# All that the package has code for; it encodes few of them.
TYPES = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits and kind.name != "BF16"]


def test_any_bytes_decode_as_the_package_has_it(tmp_path: Path) -> None:
    """In one file with a layer for each type."""
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_1", "IQ4_XS", "IQ2_XXS"} <= {k.name for k in TYPES}
    rng, path = np.random.default_rng(5), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    written = []
    for layer, kind in enumerate(TYPES):
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        written.append(rng.integers(0, 256, (3, 512 // block_size * block_bytes), np.uint8))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", written[layer], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(path)
    with np.errstate(all="ignore"):
        for layer, kind in enumerate(TYPES):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            assert model.tensors[name].type == kind
            assert model.tensors[name].shape == (3, 512)
            np.testing.assert_array_equal(model.read(name), gguf.dequantize(written[layer], kind), err_msg=kind.name)
