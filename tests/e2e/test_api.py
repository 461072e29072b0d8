"""The Python API: the script of docs/from-unsloth.md, and the same run from a file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from runs import COLOURS, Command, question, save_records

from jaxtune import FastLanguageModel
from jaxtune.export import load_peft_adapter
from jaxtune.metrics import read_metrics
from jaxtune.models.decoder import hidden_states, logits

PAGE = Path(__file__).parents[2] / "docs" / "from-unsloth.md"
PROMPT = "Answer the question.\n\n### Instruction:\n{}\n\n### Response:\n"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def block(kind: str) -> str:
    """The page's one block of this kind."""
    (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return str(text)


@pytest.mark.slow
def test_script_and_file_compute_the_same(base_model: Path, command: Command, shared: Path, tmp_path: Path) -> None:
    """The page's script and its file: losses and adapter are equal bit for bit; answers are what the weights say."""
    (tmp_path / "my-model").symlink_to(base_model)
    records = [question(thing) for thing in COLOURS] * 4
    save_records(tmp_path / "my_records.jsonl", records)
    script = command(code=f"import os\nos.chdir({str(tmp_path)!r})\n{block('python')}")
    assert script.returncode == 0, script.stderr
    assert "dataset_num_proc=2 has no effect" in script.stderr
    assert "fp16=True has no effect: the model was loaded to compute in float32" in script.stderr
    texts = [PROMPT.format(record["instruction"]) + record["output"] + "<|im_end|>" for record in records]
    save_records(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    file = tmp_path / "run.yaml"
    file.write_text(block("yaml").replace("remat: offload ", "remat: full "))
    changes = (f"model.name_or_path={tmp_path / 'my-model'}", f"data.train={tmp_path / 'texts.jsonl'}")
    changes = (*changes, f"output.dir={tmp_path / 'file'}", f"output.compile_cache={shared / 'compiled'}")
    run = command("--config", file, *(word for change in changes for word in ("--set", change)))
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "outputs") == losses(tmp_path / "file")
    assert len(losses(tmp_path / "file")) == 20
    assert losses(tmp_path / "file")[-1] < losses(tmp_path / "file")[0]
    ours, theirs = (path / "adapter_model.safetensors" for path in (tmp_path / "lora_model", tmp_path / "file/adapter"))
    assert ours.read_bytes() == theirs.read_bytes()
    answer = script.stdout.split(" s\n")[-1]
    assert answer.rstrip("\n") == without_cache(tmp_path / "lora_model", tmp_path / "my-model").rstrip("\n")


def without_cache(adapter: Path, base: Path) -> str:
    """The answer by the definition: the saved adapter on its base, the whole text through the model for each token."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(base))
    lora, config = load_peft_adapter(adapter)
    model = dataclasses.replace(model, lora=lora, lora_config=config)
    (ids,) = tokenizer([PROMPT.format("What colour is sky?")])["input_ids"]
    generator, start = model.generator(), len(ids)

    @jax.jit
    def run(tokens: jax.Array) -> jax.Array:
        trees = generator.frozen, generator.lora
        computed: Any = generator.decoder, generator.adaptation
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = hidden_states(*trees, tokens, positions, None, *computed, dtype=generator.dtype)
        return logits(generator.frozen, hidden, generator.decoder)[0]

    while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
        padded = jnp.asarray([ids + [0] * (128 - len(ids))], jnp.int32)
        ids.append(int(jnp.argmax(run(padded)[len(ids) - 1])))
    return tokenizer.decode(ids[start:])
