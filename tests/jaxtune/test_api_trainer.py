"""What SFTTrainer makes of data and arguments, up to the run that the engine is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from runs import save_model

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, TrainingArguments, UserError, train_on_responses_only

TEXTS = [{"text": "What colour is sky?<|im_end|>"}, {"text": "It is blue.<|im_end|>"}]
TURNS = [{"role": "user", "content": "What colour is sky?"}, {"role": "assistant", "content": "It is blue."}]
CHATS = [{"messages": TURNS}]
PAIRS = [{"prompt": "What colour is sky?", "completion": " It is blue."}]
INSTRUCTIONS = [{"instruction": "What colour is sky?", "output": "It is blue."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, _ = FastLanguageModel.from_pretrained(str(save_model(tmp_path_factory.mktemp("model"))), 64)
    return FastLanguageModel.get_peft_model(base, r=4, use_gradient_checkpointing="auto")


def learnt(trainer: SFTTrainer) -> str:
    """The text that the first record teaches."""
    data, _ = trainer._datasets()
    first = data.documents[0]
    tokens = [int(token) for token, weight in zip(first.tokens, first.weights) if weight]
    return str(trainer.tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("records", "given", "expected"),
    [
        (TEXTS, {}, "What colour is sky?<|im_end|>"),
        (CHATS, {}, "<|im_start|>user\nWhat colour is sky?<|im_end|>\n<|im_start|>assistant\nIt is blue.<|im_end|>\n"),
        (CHATS, {"assistant_only_loss": True}, "It is blue.<|im_end|>"),
        (PAIRS, {}, " It is blue.<|im_end|>"),
        (PAIRS, {"completion_only_loss": False}, "What colour is sky? It is blue.<|im_end|>"),
        (INSTRUCTIONS, {"assistant_only_loss": True}, "It is blue.<|im_end|>"),
        ([{"body": "Hm.", "text": "No."}], {"dataset_text_field": "body"}, "Hm.<|im_end|>"),
    ],
)
def test_what_is_learnt(model: Any, records: Any, given: dict[str, Any], expected: str) -> None:
    """Texts end with the end-of-sequence token. Nothing precedes a first token, which is therefore not learnt."""
    text = learnt(SFTTrainer(model, train_dataset=records, args=SFTConfig("out", **given)))
    assert expected.removesuffix("\n").endswith(text.removesuffix("\n"))
    assert len(text) >= len(expected) - len("<|im_start|>") - 1


def test_formatting_functions_take_a_record_or_columns(model: Any) -> None:
    def one(record: dict[str, Any]) -> str:
        return f"{record['instruction']} {record['output']}"

    def many(columns: dict[str, list[Any]]) -> list[str]:
        return [f"{a} {b}" for a, b in zip(columns["instruction"], columns["output"])]

    data = datasets.Dataset.from_list(INSTRUCTIONS)
    texts = [learnt(SFTTrainer(model, train_dataset=data, formatting_func=function)) for function in (one, many)]
    assert texts[0] == texts[1]
    assert texts[0].endswith("sky? It is blue.<|im_end|>")


def test_responses_only(model: Any) -> None:
    trainer = train_on_responses_only(SFTTrainer(model, train_dataset=CHATS))
    assert learnt(trainer) == "It is blue.<|im_end|>"
    parts = "<|im_start|>user\n", "<|im_start|>assistant\n"
    text = "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\nIt is blue.<|im_end|>"
    trainer = train_on_responses_only(SFTTrainer(model, train_dataset=[{"text": text}]), *parts)
    assert learnt(trainer) == "It is blue.<|im_end|>"
    with pytest.raises(UserError, match="belong together"):
        train_on_responses_only(trainer, "a")
    with pytest.raises(UserError, match="nothing says where in a text"):
        train_on_responses_only(SFTTrainer(model, train_dataset=TEXTS))
    with pytest.raises(UserError, match="letter for letter"):
        learnt(train_on_responses_only(SFTTrainer(model, train_dataset=TEXTS), "<user>", "<assistant>"))


def test_the_run_is_one_that_a_file_could_state(model: Any) -> None:
    args = TrainingArguments("out", max_steps=3, overrides={"output.sample_prompts": ["Hi"], "lora.r": 4})
    config = SFTTrainer(model, None, TEXTS, max_seq_length=32, packing=True, args=args).run_config()
    assert (config.data.max_length, config.data.packing, config.data.overlong) == (32, True, "truncate")
    assert (config.lora.r, config.lora.lora_alpha, config.train.remat) == (4, 16, "auto")
    assert (config.output.sample_prompts, config.train.learning_rate) == (("Hi",), 5e-5)
    assert SFTTrainer(model, None, TEXTS).run_config().data.max_length == 64, "the model's max_seq_length"


class DataCollatorForSeq2Seq:
    """Stands for the one in transformers, which needs torch."""


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "train_dataset is missing"),
        ({"train_dataset": TEXTS, "model": "llama"}, "model is 'llama'; it must be one with an adapter"),
        ({"train_dataset": TEXTS, "args": {"max_steps": 3}}, "import SFTConfig or TrainingArguments from jaxtune"),
        ({"train_dataset": TEXTS, "peft_config": object()}, "put the adapter on with"),
        ({"train_dataset": TEXTS, "data_collator": object()}, "use train_on_responses_only"),
        (
            {"train_dataset": TEXTS, "tokenizer": "llama"},
            "tokenizer is 'llama'; it must be the one of",
        ),
        ({"train_dataset": TEXTS, "max_seq_len": 64}, "unknown argument max_seq_len=64"),
    ],
)
def test_mistakes(model: Any, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        SFTTrainer(**{"model": model, **given})


def test_overrides_are_checked_as_keys_of_a_file_are(model: Any) -> None:
    trainer = SFTTrainer(model, None, TEXTS, args=TrainingArguments("out", overrides={"train.max_step": 3}))
    with pytest.raises(UserError, match=r"train\.max_step"):
        trainer.run_config()


def test_collators_that_pad_have_no_effect(model: Any) -> None:
    with pytest.warns(UserWarning, match="data_collator=DataCollatorForSeq2Seq has no effect"):
        SFTTrainer(model, None, TEXTS, data_collator=DataCollatorForSeq2Seq())


def test_outputs_are_not_overwritten(model: Any, tmp_path: Path) -> None:
    """Known before anything is compiled."""
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="another"):
        SFTTrainer(model, None, TEXTS, args=TrainingArguments(str(tmp_path), max_steps=1)).train()
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        SFTTrainer(model, None, TEXTS).train(resume_from_checkpoint=str(tmp_path))
