"""The loss of GGUF files as llama.cpp computes it, beside ours on the same tokens.

Run by hand, with llama.cpp as node-llama-cpp packs it (Node 20, no compiler):

    mkdir nlc && cd nlc && npm init -y
    npm install node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 --omit=optional --ignore-scripts
    python benchmarks/llamacpp_loss.py --node-modules nlc --text TEXT model-F16.gguf model-Q8_0.gguf

llama.cpp quantises activations where weights are quantised, and keeps keys and values in float16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxtune.config import ModelConfig
from jaxtune.linear import Adaptation
from jaxtune.loading import load_model, load_tokenizer, resolve_source
from jaxtune.models.config import DecoderConfig
from jaxtune.verify import compare, text_logits

PROGRAM = """
import {getLlama} from "node-llama-cpp";
import fs from "node:fs";
const [modelPath, tokensPath] = process.argv.slice(2);
const tokens = JSON.parse(fs.readFileSync(tokensPath, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 2, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: tokens.length + 8, threads: 2, flashAttention: false});
const options = {temperature: 1, topK: 0, topP: 1, minP: 0};
const items = tokens.map((token) => [token, {generateNext: {probabilities: true, options}}]);
const found = await context.getSequence().controlledEvaluate(items);
let total = 0;
for (let i = 0; i + 1 < tokens.length; i++) total -= Math.log(found[i].next.probabilities.get(tokens[i + 1]));
console.log(total / (tokens.length - 1));
process.exit(0);
"""


def llamacpp_loss(path: Path, tokens: list[int], node_modules: Path) -> float:
    """Mean negative log likelihood of every token but the first."""
    with tempfile.TemporaryDirectory(dir=node_modules) as directory:
        program, ids = Path(directory) / "loss.mjs", Path(directory) / "tokens.json"
        program.write_text(PROGRAM)
        ids.write_text(json.dumps(tokens))
        command = ["node", str(program), str(path.absolute()), str(ids)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def our_loss(path: Path, tokens: list[int]) -> float:
    """The same here, in float32."""
    dtype = jnp.dtype(jnp.float32)
    model = load_model(ModelConfig(str(path), load_in_4bit=False, dtype="fp32"), dtype)
    ids = np.array([tokens], np.int32)
    batch = {"tokens": ids, "positions": np.arange(ids.size, dtype=np.int32)[None], "segment_ids": np.ones_like(ids)}
    decoder = DecoderConfig.from_hf(model.hf_config)
    logits = text_logits(model.frozen, {}, batch, decoder, Adaptation(), dtype)
    return compare(logits, logits, batch).loss


def main() -> None:
    """Print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--node-modules", type=Path, required=True, help="directory in which npm installed it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    for path in options.files:
        tokenizer = load_tokenizer(resolve_source(ModelConfig(str(path))))
        text = options.text.read_text(encoding="utf-8")
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
        ours, theirs = our_loss(path, tokens), llamacpp_loss(path, tokens, options.node_modules)
        print(
            f"{path.name}: {len(tokens)} tokens, ours {ours:.5f}, llama.cpp {theirs:.5f}, {theirs - ours:+.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
