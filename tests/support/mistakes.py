"""What users get wrong, and the one sentence that each mistake is answered with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runs import CHATML, save_model

Sections = Mapping[str, Mapping[str, Any]]
# What is written into the test's directory first; gives the sections of a configuration that uses it.
Prepare = Callable[[Path], Sections]


def sections(**given: Mapping[str, Any]) -> Prepare:
    return lambda directory: given


def data(text: str, name: str = "bad.jsonl", **settings: Any) -> Prepare:
    def prepare(directory: Path) -> Sections:
        (directory / name).write_text(text)
        return {"data": {"train": str(directory / name), **settings}}

    return prepare


def model(**changes: Any) -> Prepare:
    return lambda directory: {"model": {"name_or_path": str(save_model(directory / "model", **changes))}}


def model_file(name: str, text: str | None) -> Prepare:
    """A model one of whose files is replaced, or deleted."""

    def prepare(directory: Path) -> Sections:
        path = save_model(directory / "model") / name
        path.unlink() if text is None else path.write_text(text)
        return {"model": {"name_or_path": str(directory / "model")}}

    return prepare


def below_a_file(directory: Path) -> Sections:
    (directory / "file").write_text("")
    return {"output": {"dir": str(directory / "file" / "out")}}


def adapter(directory: Path) -> Sections:
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    return {"model": {"name_or_path": str(directory / "adapter")}}


def gguf(content: bytes) -> Prepare:
    def prepare(directory: Path) -> Sections:
        (directory / "bad.gguf").write_bytes(content)
        return {"model": {"name_or_path": str(directory / "bad.gguf")}}

    return prepare


def pickled(directory: Path) -> Sections:
    path = save_model(directory / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    return {"model": {"name_or_path": str(path)}}


def output_file(directory: Path) -> Sections:
    (directory / "file").write_text("")
    return {"output": {"dir": str(directory / "file")}}


def read_only(directory: Path) -> Sections:
    """Not even root may write below /proc."""
    return {"output": {"dir": "/proc/jaxtune"}}


MESSAGE = {"role": "user", "content": "What colour is snow?"}
NO_USER = CHATML + "{% if messages | length == 1 %}{{ raise_exception('no answer in sight') }}{% endif %}"
MISTAKES: dict[str, tuple[Prepare, str]] = {
    "unknown key": (
        sections(train={"batchsize": 2}),
        "<run>: unknown key train.batchsize; did you mean train.batch_size?",
    ),
    "unknown section": (
        sections(trainer={"batch_size": 2}),
        "<run>: unknown key trainer; did you mean train?",
    ),
    "wrong type": (
        sections(train={"max_steps": "many"}),
        "<run>: train.max_steps is 'many', of type str; it must be a whole number",
    ),
    "impossible combination": (
        sections(train={"eval_steps": 2}, data={"eval": None}),
        "<run>: train.eval_steps is 2, but data.eval names no held-out data; set data.eval, or remove train.eval_steps",
    ),
    "warmup beyond the epochs": (
        sections(train={"max_steps": None, "warmup_steps": 50}),
        "train.warmup_steps is 50, but the run has 3 updates: the learning rate would never reach its peak; "
        "lower train.warmup_steps, or raise train.num_train_epochs",
    ),
    "no data file": (
        sections(data={"train": "nowhere.jsonl"}),
        "data.train is nowhere.jsonl, but there is no such file in <dir>, from where relative paths are "
        "taken; correct data.train",
    ),
    "other columns": (
        data('{"question": "?", "answer": "!"}\n'),
        "<dir>/bad.jsonl has the columns question, answer, which fit no form (instruction needs instruction "
        "and output; messages needs messages; sharegpt needs conversations; completion needs completion and "
        "prompt; text needs text; tokens needs input_ids); rename the columns, or set data.text_field, or "
        "data.response_format",
    ),
    "empty data": (
        data(""),
        "data file <dir>/bad.jsonl is empty; at least one record is needed",
    ),
    "no record": (
        data("[]", name="bad.json"),
        "<dir>/bad.json has no records in split 'train'; at least one is needed",
    ),
    "broken JSON": (
        data('{"instruction": "?", "outp\n'),
        "<dir>/bad.jsonl, record 1: line 1 is no valid JSON (…); correct or remove it; no other record can be "
        "read either",
    ),
    "field without text": (
        data('{"instruction": "?", "output": "!"}\n{"instruction": "?", "output": null}\n'),
        "<dir>/bad.jsonl, record 2: output must be a text that is not blank, not None; correct or remove the "
        "record (data.on_bad_record: skip passes over such records)",
    ),
    "nothing to learn": (
        data(json.dumps({"messages": [MESSAGE]})),
        "<dir>/bad.jsonl: none of 1 records has anything to learn (0 dropped as longer than data.max_length "
        "64, 0 bad); check for assistant turns, or raise data.max_length",
    ),
    "too long": (
        sections(data={"max_length": 8}),
        "<run dir>/train.jsonl: 18 of 18 records are longer than data.max_length 8 (first: record 1; longest: "
        "28 tokens); raise it, or set data.overlong to drop, truncate or split",
    ),
    "split": (
        sections(data={"train_split": "test"}),
        "<run dir>/train.jsonl has no split 'test'; choose from train",
    ),
    "unknown family": (
        model_file("config.json", '{"model_type": "mamba"}'),
        "<dir>/model/config.json: model_type 'mamba' is not supported; the nearest families that are: llama, "
        "gemma, gemma2",
    ),
    "broken config": (
        model_file("config.json", "{"),
        "<dir>/model/config.json: it is no valid JSON (…); take the model's own config.json",
    ),
    "no config": (
        model_file("config.json", None),
        "<dir>/model: config.json is missing; name a directory that holds a model",
    ),
    "no weights": (
        model_file("model.safetensors", None),
        "<dir>/model: neither model.safetensors nor model.safetensors.index.json is here; name a model's directory",
    ),
    "weights cut short": (
        model_file("model.safetensors", "short"),
        "<dir>/model/model.safetensors: 5 bytes with header length 500136110195 are no safetensors file; "
        "download it again",
    ),
    "no tokenizer": (
        model_file("tokenizer.json", None),
        "<dir>/model: no tokenizer.json, and no other tokenizer loads from it: …; save it as a "
        "fast tokenizer beside the model (no code of a model's own is run)",
    ),
    "damaged tokenizer": (
        model_file("tokenizer.json", "{"),
        "<dir>/model: its tokenizer files are damaged (…); take the model's own tokenizer.json and "
        "tokenizer_config.json",
    ),
    "damaged tokenizer settings": (
        model_file("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": []}'),
        "<dir>/model: its tokenizer files are damaged (…); take the model's own tokenizer.json and "
        "tokenizer_config.json",
    ),
    "activation": (
        model(hidden_act="relu"),
        "config.json: hidden_act 'relu' is not implemented; known are ['gelu', 'gelu_new', "
        "'gelu_pytorch_tanh', 'silu', 'swish']",
    ),
    "adapter for a model": (
        adapter,
        "<dir>/adapter: config.json is missing; it holds an adapter: name its base model",
    ),
    "no model directory": (
        sections(model={"name_or_path": "./nowhere"}),
        "model.name_or_path is nowhere, but there is no such file in <dir>, from where relative paths are "
        "taken; correct model.name_or_path",
    ),
    "package": (
        sections(model={"name_or_path": "package:no_such_package/a.gguf"}),
        "model.name_or_path 'package:no_such_package/a.gguf': package no_such_package is not installed; run: "
        "pip install no-such-package",
    ),
    "no chat template": (
        model(chat_template=None),
        "the tokenizer has no chat template, which conversations need; use the instruct version of the model, "
        "name one in data.chat_template (chatml, llama-3, llama-3.1, gemma, gemma-3, mistral, qwen-2.5, "
        "qwen-3, phi-3, phi-4, alpaca, vicuna, zephyr, or a .jinja file), or put whole texts in one column "
        "(data.form: text)",
    ),
    "broken chat template": (
        model(chat_template="{% for %}"),
        "the chat template is no valid Jinja, line 1: Expected an expression, got 'end of statement block'; correct it",
    ),
    "foreign tokenizer": (
        model(vocab_size=270),
        "the tokenizer gives token 313, but the model's vocabulary has 270 entries; use the tokenizer that "
        "belongs to the model",
    ),
    "prompt refused": (
        lambda directory: {
            **model(chat_template=NO_USER)(directory),
            "data": {"form": "text", "text_field": "output"},
            "output": {"sample_prompts": ["Hello?"]},
        },
        "output.sample_prompts: the chat template refuses the turns (user) with 'Hello?': no answer in sight; "
        "leave output.sample_prompts out, or correct the template",
    ),
    "mesh": (
        sections(mesh={"data": 2}),
        "mesh asks for 2 devices, this machine has 1; lower mesh.data",
    ),
    "batch over the mesh": (
        sections(mesh={"data": 2}, train={"batch_size": 3}),
        "<run>: train.batch_size is 3, which mesh.data * mesh.fsdp = 2 does not divide; set train.batch_size "
        "to a multiple of 2, or change the mesh",
    ),
    "output below a file": (
        below_a_file,
        "output.dir '<dir>/file/out' cannot be written: Not a directory; name another with --set output.dir=...",
    ),
    "section twice": (
        sections(arguments={"more": ["--set", "train.max_steps"]}),
        "<run>: cannot read the override 'train.max_steps'; write section.key=value, as in train.max_steps=10",
    ),
    "override without a value": (
        sections(arguments={"more": ["--set", "train.max_steps="]}),
        "<run>: the override 'train.max_steps=' has no value; write train.max_steps=null to unset the key",
    ),
    "number to base 8": (
        sections(arguments={"more": ["--set", "train.max_steps=010"]}),
        "<run>: cannot read the value of train.max_steps: line 1: YAML takes 010 for a number to base 8 or 60; "
        "write a decimal number without a leading zero, or quote it where text is meant",
    ),
    "optimizer of another library": (
        sections(train={"optim": "adamw_torch"}),
        "<run>: train.optim is 'adamw_torch'; it must be one of adamw, adamw_8bit, paged_adamw_8bit; did you "
        "mean adamw_8bit?",
    ),
    "rank of zero": (
        sections(lora={"r": 0}),
        "<run>: lora.r is 0; set it to 1 or more",
    ),
    "dropout of one": (
        sections(lora={"lora_dropout": 1.0}),
        "<run>: lora.lora_dropout is 1.0; set it to at least 0 (no dropout) and below 1",
    ),
    "linear of another family": (
        sections(lora={"target_modules": ["c_attn"]}),
        "<run>: lora.target_modules has 'c_attn'; its members must be among q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj",
    ),
    "modules as text": (
        sections(lora={"target_modules": "all-linear"}),
        "<run>: lora.target_modules is 'all-linear'; it must be a list of text, such as [first, second]",
    ),
    "held out twice": (
        sections(data={"eval_fraction": 0.1}),
        "<run>: data.eval and data.eval_fraction both say what is held out; keep one of them",
    ),
    "pattern": (
        sections(data={"never_learn": ["(unclosed"]}),
        "<run>: data.never_learn has '(unclosed', no regular expression: …",
    ),
    "best without measuring": (
        sections(output={"keep_best": 1}),
        "<run>: output.keep_best is 1, but output.save_steps is None and train.eval_steps is None; set both, "
        "output.save_steps to a multiple of train.eval_steps, so that each is measured",
    ),
    "memory without a unit": (
        sections(train={"memory_limit": "12"}),
        "<run>: train.memory_limit is '12'; write a number and MiB, GiB, MB or GB, as in 12GiB",
    ),
    "digest cut short": (
        sections(model={"name_or_path": "a.gguf", "sha256": "abc"}),
        "<run>: model.sha256 is 'abc'; it must be 64 hexadecimal digits, as sha256sum prints them",
    ),
    "revision of a file": (
        sections(model={"name_or_path": "a.gguf", "revision": "main"}),
        "<run>: model.revision is 'main', but model.name_or_path 'a.gguf' is a file; remove model.revision "
        "(model.sha256 pins a file)",
    ),
    "resume without a checkpoint": (
        sections(arguments={"more": ["--resume"]}),
        "--resume: no complete checkpoint in <dir>/out/checkpoints; run the same command without --resume (or "
        "with --resume auto) to start",
    ),
    "model file missing": (
        sections(model={"name_or_path": "nowhere.gguf"}),
        "model.name_or_path is nowhere.gguf, but there is no such file in <dir>, from where relative paths "
        "are taken; correct model.name_or_path",
    ),
    "GGUF cut short": (
        gguf(b"GGUF\x03\0\0\0"),
        "<dir>/bad.gguf: the GGUF header ends beyond the file's 8 bytes; download it again",
    ),
    "pickled weights": (
        pickled,
        "<dir>/model: the weights are pickled (pytorch_model.bin), and opening a pickle can run any code; use "
        "the model's safetensors revision, or convert it once where you trust the file: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(directory)",
    ),
    "damaged parquet": (
        data("no parquet", name="bad.parquet"),
        "data file <dir>/bad.parquet could not be read: …; correct the name, split or file",
    ),
    "template by name": (
        sections(data={"chat_template": "chatmll"}),
        "data.chat_template 'chatmll' is neither a file that can be read ([Errno 2] No such file or directory: "
        "'chatmll') nor one of chatml, llama-3, llama-3.1, gemma, gemma-3, mistral, qwen-2.5, qwen-3, phi-3, "
        "phi-4, alpaca, vicuna, zephyr; correct it",
    ),
    "tracker that is not installed": (
        sections(output={"report_to": ["wandb"]}),
        "output.report_to names wandb, but wandb cannot be imported (No module named 'wandb'); run: pip "
        'install "jaxtune[wandb]"',
    ),
    "mesh with paging": (
        sections(mesh={"data": 2}, train={"batch_size": 2, "optim": "paged_adamw_8bit"}),
        "<run>: train.optim is paged_adamw_8bit on a mesh of 2 devices, where its state is not paged; set "
        "train.optim to adamw_8bit, whose state mesh.fsdp spreads",
    ),
    "output is a file": (
        output_file,
        "output.dir is <dir>/file, which is a file; name a directory",
    ),
    "output may not be written": (
        read_only,
        "output.dir '/proc/jaxtune' cannot be written: No such file or directory; name another with --set "
        "output.dir=...",
    ),
}
