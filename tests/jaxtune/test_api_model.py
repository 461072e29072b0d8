"""Models of the API: loading, generating as transformers' scripts do, templates, saving."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pytest
from runs import save_model
from transformers import TextStreamer

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, UserError, get_chat_template, standardize_sharegpt
from jaxtune.api.model import Model
from jaxtune.config import LoraConfig
from jaxtune.lora import init_lora


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[Model, Any]:
    return FastLanguageModel.from_pretrained(str(directory), 64)


def test_batches_are_padded_in_front_or_behind(loaded: tuple[Model, Any]) -> None:
    model, _ = loaded
    left = model.generate([[0, 0, 5], [7, 8, 9]], [[0, 0, 1], [1, 1, 1]], max_new_tokens=6)
    right = model.generate([[5, 0, 0], [7, 8, 9]], [[1, 0, 0], [1, 1, 1]], max_new_tokens=6)
    alone = model.generate([5], max_length=7)
    assert left.dtype == np.int64
    np.testing.assert_array_equal(left[:, 3:], right[:, 3:])
    np.testing.assert_array_equal(left[0, 3:], alone[0, 1:])
    np.testing.assert_array_equal(left[1, :3], [7, 8, 9])


def test_rows_end_with_their_stop_token(loaded: tuple[Model, Any]) -> None:
    model, tokenizer = loaded
    free = model.generate([[5], [7]], max_new_tokens=8, eos_token_id=[])
    stop = int(free[0, 3])
    ended = model.generate([[5], [7]], max_new_tokens=8, eos_token_id=stop)
    end = next(at for at in range(1, 9) if free[0, at] == stop)
    np.testing.assert_array_equal(ended[0, : end + 1], free[0, : end + 1])
    assert (ended[0, end + 1 :] == tokenizer.eos_token_id).all()


def test_rows_end_with_a_stop_string(loaded: tuple[Model, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Each row with the token that completes it, wherever the texts of tokens begin and end."""
    model, tokenizer = loaded
    free = model.generate([[5], [7]], max_new_tokens=40, eos_token_id=[])[:, 1:]
    texts = [[tokenizer.decode(row[:n]) for n in range(41)] for row in free]
    stop = texts[0][20][-3:]
    ended = model.generate([[5], [7]], max_new_tokens=40, eos_token_id=[], stop_strings=["nowhere at all", stop])[:, 1:]
    lengths = [next((n for n in range(41) if stop in row[n]), 40) for row in texts]
    assert lengths[0] <= 20
    assert ended.shape[1] == max(lengths)
    for row, expected, length in zip(ended, free, lengths):
        assert row[:length].tolist() == expected[:length].tolist()
        assert (row[length:] == tokenizer.eos_token_id).all()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate([5], max_new_tokens=40, eos_token_id=[], stop_strings=stop, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == texts[0][lengths[0]].rstrip("\n")
    with pytest.raises(UserError, match=r"stop_strings is \[''\]; give texts"):
        model.generate([[5]], stop_strings=[""])


def test_streams(loaded: tuple[Model, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("What colour", return_tensors="np")
    out = model.generate(**inputs, max_new_tokens=5, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).rstrip("\n")
    with pytest.raises(UserError, match="a streamer shows one prompt"):
        model.generate([[1], [2]], streamer=TextStreamer(tokenizer))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"input_ids": None}, "input_ids is missing"),
        ({"input_ids": [[1.5]]}, "whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "pad prompts to one length"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, "make them alike"),
        ({"input_ids": [[1]], "num_beams": 4}, "num_beams=4 is not supported"),
        ({"input_ids": [[1]], "max_tokens": 4}, "did you mean max_new_tokens"),
        ({"input_ids": [[1]], "do_sample": False, "top_p": 0.9}, "top_p given with do_sample=False"),
        ({"input_ids": [[1, 2]], "max_length": 2}, "room for 0 new tokens"),
        ({"input_ids": [[1]], "max_length": 2, "max_new_tokens": 2}, "keep one of them"),
    ],
)
def test_what_cannot_be_generated(loaded: tuple[Model, Any], given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        loaded[0].generate(**given)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "name the model once"),
        ({"model_name": "a", "model_name_or_path": "a"}, "name the model once"),
        ({"model_name": "a", "max_seq_length": "64"}, "max_seq_length='64'; it must be a whole number"),
        ({"model_name": "a", "memory_limit": "lots"}, "memory_limit is 'lots'"),
        ({"model_name": "a", "dtype": "float64"}, "dtype is 'float64'"),
        ({"model_name": "a", "load_in_8bit": True}, "load_in_8bit=True is not supported"),
    ],
)
def test_what_cannot_be_loaded(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        FastLanguageModel.from_pretrained(**given)


def test_tensors_of_scripts_for_pytorch(loaded: tuple[Model, Any], tmp_path: Path) -> None:
    """Prompts go the way that such scripts send them; the tokenizer can be copied, pickled and saved as before."""
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "What colour is snow?"}]
    with pytest.warns(UserWarning, match="NumPy"):
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to("cuda")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert inputs["input_ids"].tolist() == [expected]
    out = model.generate(input_ids=inputs, max_new_tokens=2)
    np.testing.assert_array_equal(out, model.generate(**inputs, max_new_tokens=2))
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again("snow")["input_ids"] == tokenizer("snow")["input_ids"]
        assert type(again) is type(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"


def test_adapters(loaded: tuple[Model, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded
    adapted = FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", lora_alpha=8)
    adapted.print_trainable_parameters()
    # 2 layers of q, o [64, 64], k, v [32, 64], gate, up [96, 64], down [64, 96]
    lora = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 160)
    base = 2 * 330 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64) + 64
    share = f"{100 * lora / (lora + base):.4f}"
    expected = f"trainable params: {lora:,} || all params: {lora + base:,} || trainable%: {share}\n"
    assert capsys.readouterr().out == expected
    adapted.save_pretrained(tmp_path / "adapter", tokenizer)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"))
    assert again.lora_config is not None
    assert again.lora_config.lora_alpha == 8
    np.testing.assert_array_equal(again.generate([[5]], max_new_tokens=4), model.generate([[5]], max_new_tokens=4))
    with pytest.raises(UserError, match="has an adapter already"):
        FastLanguageModel.get_peft_model(adapted)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        adapted.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="no adapter"):
        model.save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="use_dora=True is not supported"):
        FastLanguageModel.get_peft_model(model, use_dora=True)


def test_merged_models_answer_as_the_adapter_does(loaded: tuple[Model, Any], tmp_path: Path) -> None:
    """Weights are rounded to bfloat16 as they are written: first tokens, which are no ties."""
    model, tokenizer = loaded
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    lora: Any = init_lora(LoraConfig(r=4), model.base.decoder)
    adapted.lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    expected = adapted.generate([[5, 9], [7, 3]], max_new_tokens=3)
    assert (expected != model.generate([[5, 9], [7, 3]], max_new_tokens=3)).any()
    adapted.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    adapted.save_pretrained_gguf(tmp_path / "gguf", tokenizer, quantization_method=["q8_0", "bf16"])
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"gguf-Q8_0.gguf", "gguf-BF16.gguf", "Modelfile"}
    for path in (tmp_path / "merged", tmp_path / "gguf/gguf-BF16.gguf"):
        again, _ = FastLanguageModel.from_pretrained(str(path), load_in_4bit=False)
        np.testing.assert_array_equal(again.generate([[5, 9], [7, 3]], max_new_tokens=3), expected)
    with pytest.raises(UserError, match="exists"):
        adapted.save_pretrained_merged(tmp_path / "merged", tokenizer)
    with pytest.raises(UserError, match="must be lora or one of merged_16bit"):
        adapted.save_pretrained_merged(tmp_path / "other", tokenizer, save_method="merged_8bit")
    with pytest.raises(UserError, match="choose one of"):
        adapted.save_pretrained_gguf(tmp_path / "other", tokenizer, quantization_method="q2_k")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_evaluate_is_the_loss_of_training(loaded: tuple[Model, Any], tmp_path: Path) -> None:
    """On the same rows, before any update."""
    model, tokenizer = loaded
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    texts = [{"text": f"What colour is {thing}?"} for thing in ("sky", "snow")]
    args = SFTConfig(str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, max_length=64)
    trainer = SFTTrainer(adapted, tokenizer, texts, texts, args=args)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    np.testing.assert_allclose(trainer.log_history[-1]["loss"], loss, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] < loss
    trainer.save_model()
    trainer.save_model(tmp_path / "copy")
    assert (tmp_path / "copy/adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="give SFTTrainer an eval_dataset"):
        SFTTrainer(adapted, tokenizer, texts, args=args).evaluate()


@pytest.mark.slow
def test_an_embedding_in_host_memory_changes_nothing(
    loaded: tuple[Model, Any], directory: Path, tmp_path: Path
) -> None:
    """Answers, held-out loss, what is learnt, and what is written."""
    made = []
    for on_host in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(str(directory), 64, embedding_on_host=on_host)
        adapted = FastLanguageModel.get_peft_model(model, r=4, random_state=1)
        args = SFTConfig(str(tmp_path / f"run-{on_host}"), max_steps=1, max_length=64)
        trainer = SFTTrainer(adapted, tokenizer, [{"text": "What colour is sky?"}], [{"text": "Hm?"}], args=args)
        trainer.train()
        adapted.save_pretrained_merged(tmp_path / f"merged-{on_host}")
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(adapted.frozen["embed_tokens"])}
        assert kinds == {"pinned_host" if on_host else "device"}
        answer = adapted.generate(**tokenizer(["What colour"], return_tensors="np"), max_new_tokens=4)
        merged = (tmp_path / f"merged-{on_host}/model.safetensors").read_bytes()
        made.append((answer.tolist(), trainer.evaluate(), jax.device_get(adapted.lora), merged))
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_templates_by_name(loaded: tuple[Model, Any]) -> None:
    _, tokenizer = loaded
    changed = get_chat_template(tokenizer, "alpaca")
    messages = [{"role": "user", "content": "Hi"}]
    assert "### " in changed.apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>" in tokenizer.apply_chat_template(messages, tokenize=False), "the tokenizer itself was changed"
    with pytest.raises(UserError, match="does not have as one token"):
        get_chat_template(tokenizer, "llama-3.1")
    with pytest.raises(UserError, match="one of chatml, llama-3"):
        get_chat_template(tokenizer, "lama")


def test_standard_conversations() -> None:
    theirs = datasets.Dataset.from_list(
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}]
    )
    ours = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]]
    assert standardize_sharegpt(theirs)["conversations"][:] == ours
    assert standardize_sharegpt(standardize_sharegpt(theirs))["conversations"][:] == ours
    with pytest.raises(UserError, match="no conversations"):
        standardize_sharegpt(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(UserError, match="a role among"):
        standardize_sharegpt(datasets.Dataset.from_list([{"conversations": [{"from": "cat", "value": "mew"}]}]))
