"""The Python API: a script in the style of Unsloth's README, the same run from a file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from runs import COLOURS, Command, question, save_records

from jaxtune import FastLanguageModel
from jaxtune.metrics import read_metrics
from jaxtune.models.decoder import hidden_states, logits

# As notebooks have it, but for the imports, the names of model and files, and inputs that stay on the host.
SCRIPT = '''
import sys
from jaxtune import FastLanguageModel, SFTTrainer, TrainingArguments, is_bfloat16_supported
from datasets import load_dataset

base_model, records, outputs = sys.argv[1:]
max_seq_length = 128 # Choose any!
dtype = None # None for auto detection. Float16 for Tesla T4, V100, Bfloat16 for Ampere+
load_in_4bit = True # Use 4bit quantization to reduce memory usage. Can be False.

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = base_model,
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
)

model = FastLanguageModel.get_peft_model(
    model,
    r = 16, # Choose any number > 0 ! Suggested 8, 16, 32, 64, 128
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                      "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0, # Supports any, but = 0 is optimized
    bias = "none",    # Supports any, but = "none" is optimized
    use_gradient_checkpointing = "unsloth", # True or "unsloth" for very long context
    random_state = 3407,
    use_rslora = False,  # We support rank stabilized LoRA
    loftq_config = None, # And LoftQ
)

alpaca_prompt = """Below is an instruction. Write a response.

### Instruction:
{}

### Response:
{}"""

EOS_TOKEN = tokenizer.eos_token # Must add EOS_TOKEN
def formatting_prompts_func(examples):
    texts = []
    for instruction, output in zip(examples["instruction"], examples["output"]):
        # Must add EOS_TOKEN, otherwise your generation will go on forever!
        texts.append(alpaca_prompt.format(instruction, output) + EOS_TOKEN)
    return { "text" : texts, }

dataset = load_dataset("json", data_files = records, split = "train")
dataset = dataset.map(formatting_prompts_func, batched = True,)

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    dataset_num_proc = 2,
    packing = True,
    args = TrainingArguments(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 2,
        warmup_steps = 2,
        max_steps = 20,
        learning_rate = 1e-2,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = outputs,
        report_to = "none", # Use this for WandB etc
    ),
)
trainer_stats = trainer.train()
print(trainer_stats.metrics["train_runtime"], "seconds used for training.")

FastLanguageModel.for_inference(model) # Enable native 2x faster inference
inputs = tokenizer([alpaca_prompt.format("What colour is sky?", "")], return_tensors = "pt").to("cuda")
out = model.generate(**inputs, max_new_tokens = 12, use_cache = True)
print("ANSWER", tokenizer.batch_decode(out)[0].split("### Response:\\n")[1])

model.save_pretrained(outputs + "/lora_model")
tokenizer.save_pretrained(outputs + "/lora_model")
'''
CONFIG = """
model: {{name_or_path: {model}}}
lora: {{r: 16, lora_alpha: 16}}
data: {{train: {records}, form: text, train_on: all, max_length: 128, overlong: truncate, packing: true}}
train: {{batch_size: 2, gradient_accumulation_steps: 2, warmup_steps: 2, max_steps: 20, learning_rate: 0.01,
  weight_decay: 0.01, optim: adamw_8bit, remat: full}}
output: {{dir: {output}, compile_cache: {cache}}}
"""


def alpaca(record: dict[str, str]) -> dict[str, str]:
    text = "Below is an instruction. Write a response.\n\n### Instruction:\n{}\n\n### Response:\n{}<|im_end|>"
    return {"text": text.format(record["instruction"], record["output"])}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.slow
def test_script_and_file_compute_the_same(base_model: Path, command: Command, shared: Path, tmp_path: Path) -> None:
    """Only imports changed; losses equal those of the run from a file bit for bit; it answers as its weights say."""
    records = [question(thing) for thing in COLOURS] * 4
    script = command(
        base_model,
        save_records(tmp_path / "records.jsonl", records),
        tmp_path / "api",
        code=SCRIPT,
    )
    assert script.returncode == 0, script.stderr
    assert "dataset_num_proc=2 has no effect" in script.stderr
    assert "fp16=True has no effect: the model was loaded to compute in float32" in script.stderr
    texts = save_records(tmp_path / "texts.jsonl", [alpaca(record) for record in records])
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.format(model=base_model, records=texts, output=tmp_path / "file", cache=shared / "compiled"))
    run = command("--config", file)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "api") == losses(tmp_path / "file")
    assert len(losses(tmp_path / "api")) == 20
    ours, theirs = (
        path / "adapter_model.safetensors" for path in (tmp_path / "api/lora_model", tmp_path / "file/adapter")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    assert losses(tmp_path / "api")[-1] < 0.6 * losses(tmp_path / "api")[0]
    assert script.stdout.split("ANSWER ")[1].rstrip("\n") == without_cache(tmp_path / "api/lora_model").rstrip("\n")


def without_cache(adapter: Path) -> str:
    """The answer by the definition: the saved adapter on its base, the whole text through the model for each token."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(adapter))
    prompt = alpaca({"instruction": "What colour is sky?", "output": ""})["text"].removesuffix("<|im_end|>")
    (ids,) = tokenizer([prompt])["input_ids"]
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
