"""Which block type each tensor of a quantised file gets: the choices of llama.cpp's quantiser for dense decoders."""

from __future__ import annotations

from collections.abc import Mapping

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

_TYPE = GGMLQuantizationType
# By the name that users know a file by: the type of most weights, and GGUF's number of the mixture.
FILE_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "F32": (_TYPE.F32, LlamaFileType.ALL_F32),
    "F16": (_TYPE.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (_TYPE.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (_TYPE.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (_TYPE.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "Q5_0": (_TYPE.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "Q4_K_M": (_TYPE.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "Q5_K_M": (_TYPE.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "Q6_K": (_TYPE.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}
_DENSE = (_TYPE.F32, _TYPE.F16, _TYPE.BF16)
# Where rows are no whole blocks of 256.
_SMALLER_BLOCKS = {_TYPE.Q4_K: _TYPE.Q5_0, _TYPE.Q5_K: _TYPE.Q5_1, _TYPE.Q6_K: _TYPE.Q8_0}
_FIVE_BITS_FOR_SHARED_VALUES = ("llama", "qwen2")


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, *, architecture: str, layers: int, grouped: bool
) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor.

    Args:
        shapes: by GGUF name, in the order of the layers.
        file_type: a key of `FILE_TYPES`.
        architecture: GGUF's name, such as "llama".
        layers: L.
        grouped: whether several query heads share a key head.

    Raises:
        ValueError: an unknown file type.
    """
    if file_type not in FILE_TYPES:
        raise ValueError(f"GGUF type {file_type!r} cannot be written; choose one of {', '.join(FILE_TYPES)}")
    most = FILE_TYPES[file_type][0]
    is_mixture = file_type in ("Q4_K_M", "Q5_K_M")
    value_names = [name for name in shapes if name.endswith(("attn_v.weight", "attn_qkv.weight"))]
    # llama.cpp knows its 70B models by their number of layers.
    is_70b = layers == 80 and architecture in _FIVE_BITS_FOR_SHARED_VALUES and (grouped or architecture == "qwen2")
    types = {}
    downs = 0
    for name, shape in shapes.items():
        chosen = most
        if len(shape) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
            types[name] = _TYPE.F32
            continue
        if most in _DENSE:
            types[name] = most
            continue
        if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
            whole = shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0
            chosen = _TYPE.Q6_K if whole and chosen != _TYPE.Q8_0 else _TYPE.Q8_0
        elif name in value_names:
            if is_mixture and _more_bits(value_names.index(name), len(value_names)):
                chosen = _TYPE.Q6_K
            if is_70b and chosen == _TYPE.Q4_K:
                chosen = _TYPE.Q5_K
        elif name.endswith("ffn_down.weight"):
            if is_mixture and _more_bits(downs, layers):
                chosen = _TYPE.Q6_K
            downs += 1
        types[name] = _fitting(chosen, shape[-1])
    return types


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third in between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """`kind`, or the type that stands in where rows of `columns` are no whole blocks."""
    if columns % GGML_QUANT_SIZES[kind][0]:
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return _TYPE.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind
