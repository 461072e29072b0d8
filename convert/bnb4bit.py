"""bitsandbytes' 4-bit checkpoints: the tensors of one packed weight <-> NF4Tensor, and the config that announces them.

Format: beside `NAME` (uint8 [bytes, 1]) stand `NAME.absmax`, `NAME.quant_map`, with double quantisation
`NAME.nested_absmax` and `NAME.nested_quant_map`, and `NAME.quant_state.bitsandbytes__nf4`, a JSON object as uint8. What
`pack` read, `unpack` writes byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from convert.safetensors_io import TensorInfo
from pallas_kernels.nf4 import DYNAMIC_MAP, NF4_TABLE, NF4Tensor, quantize
from pallas_kernels.nf4.reference import decode_scales

_STATE = ".quant_state.bitsandbytes__nf4"
_FP4_STATE = ".quant_state.bitsandbytes__fp4"
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_STATE_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = ("bfloat16", "float16", "float32")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The dynamic map is computed when a checkpoint is made, and its last bits depend on that processor.
_MAP_TOLERANCE = 5e-7


def is_packed(name: str, names: Collection[str]) -> bool:
    """Whether the weight `name` of a checkpoint with the tensors `names` is stored in 4 bits."""
    return name + _STATE in names or name + _FP4_STATE in names


def pack(name: str, tensors: Mapping[str, np.ndarray]) -> NF4Tensor:
    """Reads one packed weight.

    Args:
        name: the weight's full name, such as "model.layers.0.mlp.up_proj.weight".
        tensors: the checkpoint, or at least the tensors whose names begin with `name`.

    Returns:
        The weight with NumPy leaves, sharing memory with `tensors` where it can.

    Raises:
        ValueError: a part is missing, has a wrong shape or dtype, or contradicts the format.
        NotImplementedError: FP4, or a packed array that is no matrix.
    """
    state = _read_state(name, tensors)
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    blocks = -(-math.prod(shape) // block_size)
    _check_map(name + ".quant_map", tensors, NF4_TABLE)
    # The storage dtype may be another one that the same bytes are viewed as.
    codes = np.ascontiguousarray(_part(name, tensors)).reshape(-1).view(np.uint8)
    if codes.size != -(-math.prod(shape) // 2):
        raise _damaged(name, f"{codes.size} bytes of codes do not make a weight of shape {shape}")
    if "nested_offset" not in state:
        absmax = _part(name + ".absmax", tensors, np.float32, blocks)
        return NF4Tensor(codes, absmax, None, None, shape, state["dtype"], block_size)
    _check_map(name + ".nested_quant_map", tensors, DYNAMIC_MAP)
    nested_blocks = -(-blocks // state["nested_blocksize"])
    return NF4Tensor(
        codes=codes,
        absmax=_part(name + ".absmax", tensors, np.uint8, blocks),
        nested_absmax=_part(name + ".nested_absmax", tensors, np.float32, nested_blocks),
        nested_offset=np.asarray(state["nested_offset"], np.float32),
        shape=shape,
        dtype=state["dtype"],
        block_size=block_size,
        nested_block_size=state["nested_blocksize"],
        nested_dtype=state["nested_dtype"],
    )


def unpack(name: str, weight: NF4Tensor) -> dict[str, np.ndarray]:
    """The tensors of one packed weight, named and laid out as bitsandbytes saves them.

    Args:
        name: the weight's full name.
        weight: one weight; of a stack, take a layer first.

    Raises:
        ValueError: a stack of weights.
    """
    if weight.stack_shape:
        raise ValueError(
            f"{name}: a stack {weight.stack_shape} of weights is no tensor of a checkpoint; take one layer"
        )
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
    }
    tensors = {
        name: np.asarray(weight.codes).reshape(-1, 1),
        name + ".absmax": np.asarray(weight.absmax),
        name + ".quant_map": NF4_TABLE.copy(),
    }
    if weight.is_nested:
        state["nested_blocksize"] = weight.nested_block_size
        state["nested_dtype"] = weight.nested_dtype
        # The shortest decimal of the float32 taken as a double, which is what torch's item() gives to json.
        state["nested_offset"] = float(np.asarray(weight.nested_offset))
        tensors[name + ".nested_absmax"] = np.asarray(weight.nested_absmax)
        tensors[name + ".nested_quant_map"] = DYNAMIC_MAP.copy()
    tensors[name + _STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def packed_model(
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    linears: Collection[str],
    *,
    double_quant: bool = True,
) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    """A dense model's tensors as bitsandbytes saves them, its linears packed one at a time as they are written.

    Sizes are known before a weight is quantised, since its JSON is filled up with blanks, to whole words of 8 bytes for
    all parts of a weight together. Packed weights stand before the dense tensors, so that all tensors are aligned.

    Args:
        infos: of the dense tensors, by Hugging Face name.
        read: gives one of them.
        linears: the names of those that are packed.
        double_quant: 8-bit scales.

    Returns:
        What `safetensors_io.write_model` takes, to be written in this order (`keep_order`). The function raises
        ValueError where a linear has values that are not finite, and must be asked for one weight's parts in turn.
    """
    parts: dict[str, dict[str, TensorInfo]] = {
        name: _part_infos(name, infos[name], double_quant) for name in infos if name in linears
    }
    owner = {part: name for name, of_weight in parts.items() for part in of_weight}
    dense = {name: info for name, info in infos.items() if name not in linears}
    waiting: dict[str, np.ndarray] = {}

    def read_part(part: str) -> np.ndarray:
        if part in dense:
            return read(part)
        if part not in waiting:
            name = owner[part]
            tensors = unpack(name, quantize(read(name), double_quant=double_quant))
            filled = tensors[name + _STATE].tobytes().ljust(parts[name][name + _STATE].shape[0])
            tensors[name + _STATE] = np.frombuffer(filled, np.uint8)
            waiting.clear()
            waiting.update(tensors)
        return waiting.pop(part)

    return {part: info for of_weight in parts.values() for part, info in of_weight.items()} | dense, read_part


def _part_infos(name: str, info: TensorInfo, double_quant: bool) -> dict[str, TensorInfo]:
    """What `unpack` will give of a weight of this dtype and shape, widest dtypes first and the JSON last."""
    size, block_size, nested_block_size = math.prod(info.shape), NF4Tensor.block_size, NF4Tensor.nested_block_size
    blocks = -(-size // block_size)
    f32, u8 = np.dtype(np.float32), np.dtype(np.uint8)
    parts = {name + ".quant_map": TensorInfo(f32, (NF4_TABLE.size,))}
    if double_quant:
        parts[name + ".nested_quant_map"] = TensorInfo(f32, (DYNAMIC_MAP.size,))
        parts[name + ".nested_absmax"] = TensorInfo(f32, (-(-blocks // nested_block_size),))
    parts[name + ".absmax"] = TensorInfo(u8 if double_quant else f32, (blocks,))
    parts[name] = TensorInfo(u8, (-(-size // 2), 1))
    # The longest JSON that a state can have: no float64 is longer than 24 letters.
    longest = 200 + 24 + len(json.dumps(list(info.shape)))
    before = sum(part.nbytes for part in parts.values())
    parts[name + _STATE] = TensorInfo(u8, (longest + -(before + longest) % 8,))
    return parts


def take_rows(weight: NF4Tensor, start: int, stop: int) -> NF4Tensor:
    """Rows start to stop of one packed weight, cut out of its bytes: nothing is decoded, values stay what they are.

    Where the cut is inside of a block of nested scales, the part's scales are float32 and no longer nested.

    Raises:
        NotImplementedError: the cut is inside of a block of codes (a row is no multiple of the block size).
    """
    first, last = start * weight.shape[1], stop * weight.shape[1]
    if first % weight.block_size or (last % weight.block_size and stop < weight.shape[0]):
        raise NotImplementedError(
            f"rows {start} to {stop} of a packed weight {list(weight.shape)} begin or end inside of a block of "
            f"{weight.block_size} codes; start from the unquantised model"
        )
    blocks = slice(first // weight.block_size, -(-last // weight.block_size))
    part = dataclasses.replace(
        weight,
        codes=weight.codes[first // 2 : -(-last // 2)],
        absmax=weight.absmax[blocks],
        shape=(stop - start, weight.shape[1]),
    )
    if not weight.is_nested:
        return part
    if blocks.start % weight.nested_block_size:
        return dataclasses.replace(part, absmax=decode_scales(weight)[blocks], nested_absmax=None, nested_offset=None)
    nested = slice(blocks.start // weight.nested_block_size, -(-blocks.stop // weight.nested_block_size))
    return dataclasses.replace(part, nested_absmax=weight.nested_absmax[nested])


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json announces bitsandbytes' NF4 weights.

    Raises:
        NotImplementedError: it announces another quantisation.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return False
    method = settings.get("quant_method", "bitsandbytes")
    kind = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else "8-bit"
    if method != "bitsandbytes" or kind != "nf4":
        found = f"{method} {kind}" if method == "bitsandbytes" else method
        raise NotImplementedError(
            f"config.json: quantization_config is {found}; only bitsandbytes nf4 can be read. "
            "Start from the unquantised model or from an nf4 one"
        )
    return True


def quantization_config(*, compute_dtype: str = "bfloat16", double_quant: bool = True) -> dict[str, Any]:
    """The `quantization_config` of config.json, as transformers writes it for the weights of `unpack`.

    Args:
        compute_dtype: what transformers will multiply in.
        double_quant: whether the weights' scales are 8-bit.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # The output head alone.
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _read_state(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The JSON beside the weight, checked."""
    if name + _FP4_STATE in tensors:
        raise NotImplementedError(f"{name} is packed as fp4; only nf4 can be read. Start from an nf4 checkpoint")
    key = name + _STATE
    try:
        state = json.loads(_part(key, tensors, np.uint8).tobytes())
    except ValueError as error:
        raise _damaged(key, f"it holds no JSON ({error})") from error
    nested = name + ".nested_absmax" in tensors
    expected = _STATE_KEYS | _NESTED_STATE_KEYS if nested else _STATE_KEYS
    if not isinstance(state, dict) or set(state) != expected:
        raise _damaged(key, f"it must hold exactly {sorted(expected)}, and holds {state}")
    if state["quant_type"] != "nf4":
        raise NotImplementedError(f"{key}: quant_type is {state['quant_type']!r}; only nf4 can be read")
    shape = state["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise _damaged(key, f"shape {shape!r} must be a list of positive numbers")
    if len(shape) != 2:
        raise NotImplementedError(f"{key}: shape is {shape}; only matrices [out, in] can be read")
    rules: dict[str, tuple[Any, ...]] = {"blocksize": _BLOCK_SIZES, "dtype": _DTYPES}
    if nested:
        rules |= {"nested_blocksize": _BLOCK_SIZES, "nested_dtype": _DTYPES}
        if type(state["nested_offset"]) not in (int, float) or not abs(state["nested_offset"]) < 3e38:
            raise _damaged(key, f"nested_offset {state['nested_offset']!r} must be a finite number")
    for field, allowed in rules.items():
        if state[field] not in allowed:
            raise _damaged(key, f"{field} {state[field]!r} must be one of {allowed}")
    return state


def _part(key: str, tensors: Mapping[str, np.ndarray], dtype: Any = None, size: int | None = None) -> np.ndarray:
    if key not in tensors:
        raise _damaged(key, "the tensor is missing")
    array = tensors[key]
    if dtype is not None and array.dtype != dtype:
        raise _damaged(key, f"its dtype is {array.dtype}, and must be {np.dtype(dtype)}")
    if size is not None and array.shape != (size,):
        raise _damaged(key, f"its shape is {array.shape}, and the weight's shape asks for ({size},)")
    return array


def _check_map(key: str, tensors: Mapping[str, np.ndarray], expected: np.ndarray) -> None:
    values = _part(key, tensors, np.float32, expected.size)
    if not np.allclose(values, expected, rtol=_MAP_TOLERANCE, atol=0):
        raise _damaged(key, "its values are not the format's table, which is the only one that can be decoded")


def _damaged(key: str, what: str) -> ValueError:
    return ValueError(f"{key}: {what}. Fetch or make the 4-bit checkpoint again")
