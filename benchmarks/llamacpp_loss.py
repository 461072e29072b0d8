"""A model's GGUF files in llama.cpp: its loss beside ours, and its own quantisation beside ours, byte for byte.

Run by hand; nothing is compiled (`tests/support/llamacpp.py`):

    python tests/support/real_files.py
    PYTHONPATH=.:tests/support python benchmarks/llamacpp_loss.py MODEL --text TEXT --tokens 2048

F32 and F16 are written from MODEL, and the other types from that F16 file, which llama.cpp quantises too. Keys and
values are float32 in both programs; llama.cpp quantises activations where weights are quantised, ours does not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from llamacpp import LlamaCpp, quantise

from convert.__main__ import main as convert
from convert.gguf.header import parse_header
from convert.gguf.mixture import FILE_TYPES
from jaxtune.config import ModelConfig
from jaxtune.linear import Adaptation
from jaxtune.loading import load_model, load_tokenizer, resolve_source
from jaxtune.models.config import DecoderConfig
from jaxtune.verify import text_logits

_DENSE = ("F32", "F16", "BF16")
# An empty system message, which keeps templates from putting one of their own.
_QUESTION = [{"role": "system", "content": ""}, {"role": "user", "content": "What is the capital of France?"}]


def our_logits(path: Path, tokens: list[int]) -> Float[np.ndarray, "T V"]:
    """Of the file's weights as they are decoded, in float32."""
    dtype = jnp.dtype(jnp.float32)
    model = load_model(ModelConfig(str(path), load_in_4bit=False, dtype="fp32"), dtype)
    ids = np.array([tokens], np.int32)
    batch = {"tokens": ids, "positions": np.arange(ids.size, dtype=np.int32)[None], "segment_ids": np.ones_like(ids)}
    return text_logits(model.frozen, {}, batch, DecoderConfig.from_hf(model.hf_config), Adaptation(), dtype)[0]


def their_logits(path: Path, tokens: list[int]) -> Float[np.ndarray, "T V"]:
    """llama.cpp's, of the same tokens."""
    with LlamaCpp(path, context=len(tokens)) as model:
        return model.logits(tokens)


def different_tensors(one: Path, other: Path) -> tuple[list[str], int]:
    """The tensors whose type or bytes are not the same in two GGUF files, and how many there are."""
    files = [(data := np.memmap(path, mode="r"), parse_header(memoryview(data), path)[1]) for path in (one, other)]
    (ours, our_tensors), (theirs, their_tensors) = files
    assert our_tensors.keys() == their_tensors.keys()

    def same(name: str) -> bool:
        a, b = our_tensors[name], their_tensors[name]
        return a.type == b.type and np.array_equal(
            ours[a.offset : a.offset + a.nbytes], theirs[b.offset : b.offset + b.nbytes]
        )

    return [name for name in our_tensors if not same(name)], len(our_tensors)


def loss(logits: Float[np.ndarray, "T V"], tokens: list[int]) -> float:
    """Mean negative log likelihood of every token but the first, summed in float64."""
    total = 0.0
    for row, target in zip(logits, tokens[1:]):
        row = row.astype(np.float64) - row.max()
        total += float(np.log(np.exp(row).sum()) - row[target])
    return total / (len(tokens) - 1)


def main() -> None:
    """Print a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory, or a .gguf file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--types", nargs="+", choices=tuple(FILE_TYPES), default=tuple(FILE_TYPES))
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_source(ModelConfig(options.model)))
    text = options.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    print(f"{len(tokens)} tokens\ntype: ours, llama.cpp, difference | same tensors | loss of llama.cpp's own file")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        f16, own = directory / "F16.gguf", directory / "own.gguf"
        for file_type in dict.fromkeys(("F16", *options.types)):
            path = directory / f"{file_type}.gguf"
            source = options.model if file_type in _DENSE else str(f16)
            assert convert(["to-gguf", source, "--out", str(path), "--type", file_type, "--base", "original"]) == 0
            if file_type not in options.types:
                continue
            ours, theirs = loss(our_logits(path, tokens), tokens), loss(their_logits(path, tokens), tokens)
            line = f"{file_type}: {ours:.5f}, {theirs:.5f}, {theirs - ours:+.5f}"
            if file_type not in _DENSE:
                quantise(f16, own, file_type)
                different, count = different_tensors(path, own)
                line += f" | {count - len(different)} of {count}"
                line += f" | {theirs if not different else loss(their_logits(own, tokens), tokens):.5f}"
            print(line, flush=True)
            if file_type in ("Q8_0", "Q4_K_M"):
                ids = tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, return_dict=False)
                with LlamaCpp(path, context=256) as model:
                    answer = tokenizer.decode(model.continued(ids, 20))
                print(f"  {_QUESTION[-1]['content']} {answer!r}", flush=True)
            if path != f16:
                path.unlink()


if __name__ == "__main__":
    main()
