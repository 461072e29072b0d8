from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from convert import bnb4bit
from pallas_kernels.nf4 import DYNAMIC_MAP, dequantize, quantize

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"
DTYPES = ("bfloat16", "float16", "float32")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bytes; bfloat16 is ml_dtypes'."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view("bfloat16")
    return tensor.numpy()


def saved_by_bitsandbytes(shape=(6, 64), dtype="bfloat16", seed=0, **options):
    """A weight and the tensors of its Linear4bit, as a checkpoint holds them."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
    options = {"quant_type": "nf4", "compress_statistics": True} | options
    module = Linear4bit(shape[1], shape[0], bias=False)
    module.weight = Params4bit(weight, **options)
    tensors = module.to("cpu").state_dict(prefix=NAME.removesuffix("weight"))
    return weight, {name: as_numpy(tensor) for name, tensor in tensors.items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 64), (130, 192), (7, 96), (3, 11)])
def test_round_trip_is_byte_for_byte(shape, dtype, double_quant):
    # Different offsets have decimals of different lengths.
    for seed in range(5):
        _, tensors = saved_by_bitsandbytes(shape, dtype, seed, compress_statistics=double_quant)
        packed = bnb4bit.pack(NAME, tensors)
        assert (packed.shape, packed.dtype, packed.is_nested) == (shape, dtype, double_quant)
        assert_same_tensors(bnb4bit.unpack(NAME, packed), tensors)


def test_what_we_quantise_is_what_they_save_but_for_nested_statistics():
    weight, tensors = saved_by_bitsandbytes((64, 192), compress_statistics=False)
    assert_same_tensors(bnb4bit.unpack(NAME, quantize(as_numpy(weight), double_quant=False)), tensors)
    weight, tensors = saved_by_bitsandbytes((64, 192))
    ours = bnb4bit.unpack(NAME, quantize(as_numpy(weight)))
    assert ours.keys() == tensors.keys()
    for name in (NAME, NAME + ".quant_map", NAME + ".nested_quant_map"):
        np.testing.assert_array_equal(ours[name], tensors[name])
    our_state, their_state = (json.loads(t[STATE].tobytes()) for t in (ours, tensors))
    assert our_state.pop("nested_offset") == pytest.approx(their_state.pop("nested_offset"), rel=1e-6)
    assert list(our_state.items()) == list(their_state.items())


def test_another_storage_dtype_is_the_same_bytes():
    _, tensors = saved_by_bitsandbytes((6, 64), quant_storage=torch.bfloat16)
    assert tensors[NAME].dtype == "bfloat16"
    packed = bnb4bit.pack(NAME, tensors)
    np.testing.assert_array_equal(packed.codes, tensors[NAME].view(np.uint8).reshape(-1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama that transformers quantised, with one kind of linear left alone: folder and its tensors."""
    folder = tmp_path_factory.mktemp("bnb")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head", "o_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder / "nf4")
    tensors = {name: as_numpy(t) for name, t in load_file(folder / "nf4" / "model.safetensors").items()}
    plain = {name: as_numpy(t) for name, t in load_file(folder / "plain" / "model.safetensors").items()}
    return folder, tensors, plain


def test_transformers_checkpoint(checkpoint):
    _, tensors, plain = checkpoint
    packed = [name for name in plain if bnb4bit.is_packed(name, tensors)]
    expected = [name for name in plain if "_proj" in name and "o_proj" not in name]
    assert sorted(packed) == sorted(expected)
    assert len(packed) == 12
    for name in packed:
        theirs = {key: array for key, array in tensors.items() if key == name or key.startswith(name + ".")}
        weight = bnb4bit.pack(name, tensors)
        assert_same_tensors(bnb4bit.unpack(name, weight), theirs)
        ours = quantize(plain[name])
        np.testing.assert_array_equal(weight.codes, ours.codes)
        # Codes are equal, so values differ by the nested scales alone: up to four steps of their map, and a rounding.
        step = np.diff(DYNAMIC_MAP).max() * ours.nested_absmax.max()
        difference = np.abs(dequantize(weight, "float32") - dequantize(ours, "float32"))
        assert difference.max() <= 4 * step + 2.0**-8 * np.abs(plain[name].astype(np.float32)).max()


def test_decoding_a_checkpoint_is_what_the_model_computes_with(checkpoint):
    folder, tensors, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder / "nf4", dtype=torch.bfloat16, device_map="cpu")
    compared = 0
    for name, module in model.named_modules():
        # down_proj's rows are no whole blocks, which bitsandbytes' AVX-512 loop decodes wrongly.
        if isinstance(module, Linear4bit) and not name.endswith("down_proj"):
            theirs = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            ours = dequantize(bnb4bit.pack(name + ".weight", tensors))
            assert ours.tobytes() == as_numpy(theirs).tobytes()
            compared += 1
    assert compared == 10


def test_config(checkpoint):
    folder, _, _ = checkpoint
    config = json.loads((folder / "nf4" / "config.json").read_text())
    assert bnb4bit.is_quantized(config)
    written = bnb4bit.quantization_config() | {"llm_int8_skip_modules": ["lm_head", "o_proj"]}
    assert written == config["quantization_config"]
    assert BitsAndBytesConfig.from_dict(written).to_dict() == config["quantization_config"]

    plain = json.loads((folder / "plain" / "config.json").read_text())
    assert not bnb4bit.is_quantized(plain)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
    ],
)
def test_other_quantisations_are_refused(change, found):
    config = {"quantization_config": bnb4bit.quantization_config() | change}
    with pytest.raises(NotImplementedError, match=f"quantization_config is {found}; only bitsandbytes nf4"):
        bnb4bit.is_quantized(config)


def test_fp4_is_refused():
    _, tensors = saved_by_bitsandbytes(quant_type="fp4")
    assert bnb4bit.is_packed(NAME, tensors)
    with pytest.raises(NotImplementedError, match=f"{NAME} is packed as fp4; only nf4"):
        bnb4bit.pack(NAME, tensors)


def with_state(**change):
    """Damages the JSON: a value of None deletes the key."""

    def damage(tensors):
        state = {**json.loads(tensors[STATE].tobytes()), **change}
        state = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return damage


def replace(suffix, function):
    def damage(tensors):
        tensors[NAME + suffix] = function(tensors[NAME + suffix])

    return damage


def remove(suffix):
    return lambda tensors: tensors.pop(NAME + suffix)


def scaled(array):
    return array * np.float32(1.001)


@pytest.mark.parametrize(
    ("damage", "key", "rule"),
    [
        (remove(""), NAME, "is missing"),
        (remove(".absmax"), NAME + ".absmax", "is missing"),
        (remove(".quant_map"), NAME + ".quant_map", "is missing"),
        (remove(".nested_quant_map"), NAME + ".nested_quant_map", "is missing"),
        (remove(".nested_absmax"), STATE, "must hold exactly"),
        (remove(".quant_state.bitsandbytes__nf4"), STATE, "is missing"),
        (replace("", lambda a: a[:-1]), NAME, "191 bytes of codes do not make a weight of shape"),
        (replace(".absmax", lambda a: a[:-1]), NAME + ".absmax", r"its shape is \(5,\), .* asks for \(6,\)"),
        (replace(".absmax", lambda a: a.astype(np.float32)), NAME + ".absmax", "float32, and must be uint8"),
        (replace(".nested_absmax", lambda a: np.tile(a, 2)), NAME + ".nested_absmax", r"its shape is \(2,\)"),
        (replace(".quant_map", scaled), NAME + ".quant_map", "not the format's table"),
        (replace(".nested_quant_map", scaled), NAME + ".nested_quant_map", "not the format's table"),
        (replace(".quant_state.bitsandbytes__nf4", lambda a: a[:-1]), STATE, "holds no JSON"),
        (replace(".quant_state.bitsandbytes__nf4", lambda a: a + 100), STATE, "holds no JSON"),
        (with_state(shape=[6, -64]), STATE, "list of positive numbers"),
        (with_state(shape=[6, 65]), NAME, "192 bytes of codes do not make"),
        (with_state(blocksize=63), STATE, "blocksize 63 must be one of"),
        (with_state(blocksize="64"), STATE, "blocksize '64' must be one of"),
        (with_state(dtype="float8"), STATE, "dtype 'float8' must be one of"),
        (with_state(nested_dtype="int8"), STATE, "nested_dtype 'int8' must be one of"),
        (with_state(nested_offset=float("nan")), STATE, "nested_offset nan must be a finite number"),
        (with_state(nested_offset=None), STATE, "must hold exactly"),
        (with_state(new_key=1), STATE, "must hold exactly"),
    ],
)
def test_damage_is_named(damage, key, rule):
    _, tensors = saved_by_bitsandbytes()
    damage(tensors)
    with pytest.raises(ValueError, match=rf"^{key}: .*{rule}.*Fetch or make the 4-bit checkpoint again"):
        bnb4bit.pack(NAME, tensors)


def test_what_is_legal_but_unsupported():
    _, tensors = saved_by_bitsandbytes()
    for change, found in (({"shape": [2, 3, 64]}, "only matrices"), ({"quant_type": "fp4"}, "only nf4")):
        changed = dict(tensors)
        with_state(**change)(changed)
        with pytest.raises(NotImplementedError, match=found):
            bnb4bit.pack(NAME, changed)
    with pytest.raises(ValueError, match="take one layer"):
        bnb4bit.unpack(NAME, quantize(np.ones((2, 4, 64), np.float32)))


def test_a_map_from_another_processor_is_accepted():
    _, tensors = saved_by_bitsandbytes()
    exact = bnb4bit.pack(NAME, tensors)
    tensors[NAME + ".nested_quant_map"] = np.nextafter(tensors[NAME + ".nested_quant_map"], np.float32(2))
    # Zero stays zero on every processor.
    tensors[NAME + ".nested_quant_map"][127] = 0
    np.testing.assert_array_equal(dequantize(bnb4bit.pack(NAME, tensors)), dequantize(exact))
