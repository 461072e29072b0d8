"""Random models of every family as GGUF files in llama.cpp: their logits beside ours.

Run by hand, after `python tests/support/real_files.py`:

    PYTHONPATH=.:tests/support python benchmarks/llamacpp_families.py

Of each form that llama.cpp has: F32 logits, relative to the largest; and in Q4_K_M, with rows of 256, the
tensors that llama.cpp's own quantisation of the same file has byte for byte.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import family_cases
import numpy as np
import runs
from llamacpp import quantise
from llamacpp_loss import different_tensors, our_logits, their_logits

from convert.__main__ import main as convert

# Whole super-blocks in every row.
_SIZES = {
    "vocab_size": 330,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def compared(directory: Path, name: str) -> str:
    """Write the form's models and compare them; a row of the table."""
    case = family_cases.CASES[name]
    # As wide as its heads, which llama.cpp takes for granted of some families.
    family_cases.save(directory / "base", case, vocab_size=330, hidden_size=56)
    runs.save_tokenizer(directory / "base")
    path = directory / "F32.gguf"
    assert convert(["to-gguf", str(directory / "base"), "--out", str(path), "--type", "F32"]) == 0
    tokens = np.random.default_rng(1).integers(3, 330, case.tokens).tolist()
    ours, theirs = our_logits(path, tokens), their_logits(path, tokens)
    error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    row = f"| {name} | {error:.1e} | {same} of {len(tokens)} |"
    if name not in family_cases.PLAIN:
        return row + " |"
    scalar = {"query_pre_attn_scalar": 64} if case.model_type in ("gemma2", "gemma3_text") else {}
    family_cases.save(directory / "large", case, std=0.05, **(_SIZES | scalar))
    runs.save_tokenizer(directory / "large")
    f32, ours_k, theirs_k = (directory / f"{kind}.gguf" for kind in ("large", "ours", "theirs"))
    for kind, out in (("F32", f32), ("Q4_K_M", ours_k)):
        assert convert(["to-gguf", str(directory / "large"), "--out", str(out), "--type", kind]) == 0
    quantise(f32, theirs_k, "Q4_K_M")
    different, count = different_tensors(ours_k, theirs_k)
    return row + f" {count - len(different)} of {count} |"


def main() -> None:
    """Print the table."""
    print("| form | F32 logits differ | same best token | Q4_K_M: same tensors |\n|---|---|---|---|")
    for name in family_cases.GGUF_CASES:
        with tempfile.TemporaryDirectory() as directory:
            print(compared(Path(directory), name), flush=True)


if __name__ == "__main__":
    main()
