"""What becomes of the records on the way to documents, and that each is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config import DataConfig
from jaxtune.data.dataset import Dataset, build, eval_sets
from jaxtune.data.report import describe
from jaxtune.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Make = Callable[..., PreTrainedTokenizerFast]
Write = Callable[..., str]


def word_records(*lengths: int) -> list[dict[str, str]]:
    """Texts that give so many tokens with <s> and <|im_end|> around them."""
    return [{"text": "!" * (n - 2)} for n in lengths]


def build_text(make_tokenizer: Make, path: str, split: str = "train", **settings: Any) -> Dataset:
    return build(DataConfig(**({"train": path, "max_length": 8} | settings)), make_tokenizer(), split)


def counted(data: Dataset) -> dict[str, float]:
    """The statistics that are not 0."""
    return {name: value for name, value in vars(data.statistics).items() if value}


def test_overlong_records_are_refused_dropped_cut_or_split(make_tokenizer: Make, write_jsonl: Write) -> None:
    path = write_jsonl(word_records(8, 9, 3, 20))
    with pytest.raises(UserError, match=r"2 of 4 records are longer than data\.max_length 8 .*record 2.* 20 tokens"):
        build_text(make_tokenizer, path)
    drop = build_text(make_tokenizer, path, overlong="drop")
    assert counted(drop) == {
        "records": 4, "dropped": 2, "documents": 2, "tokens": 11, "learnt_tokens": 9, "rows": 2, "fill": 11 / 16
    }  # fmt: skip
    cut = build_text(make_tokenizer, path, overlong="truncate")
    assert counted(cut) == {
        "records": 4, "truncated": 2, "documents": 4, "tokens": 27, "learnt_tokens": 23, "rows": 4, "fill": 27 / 32
    }  # fmt: skip
    split = build_text(make_tokenizer, path, overlong="split")
    # 9 = 8 + (1) 1, and 20 = 8 + (1) 7 + (1) 5: what a piece begins with is not learnt again.
    assert split.documents.lengths.tolist() == [8, 8, 2, 3, 8, 8, 6]
    assert counted(split) == {
        "records": 4, "split": 2, "documents": 7, "tokens": 43, "learnt_tokens": 7 + 8 + 2 + 19, "rows": 6,
        "fill": 43 / 48,
    }  # fmt: skip
    assert "longer than a row: records 2, 4\n" in describe("train", split)
    with pytest.raises(UserError, match=r"none of 1 records has anything to learn \(1 dropped"):
        build_text(make_tokenizer, write_jsonl(word_records(9)), overlong="drop")


def test_pieces_of_a_split_document_learn_each_token_once(make_tokenizer: Make, write_jsonl: Write) -> None:
    text = "the cat sat on the mat, and the dog in the hat" * 3
    path = write_jsonl([{"text": text}])
    whole = build_text(make_tokenizer, path, max_length=200).documents
    pieces = build_text(make_tokenizer, path, overlong="split", packing=False)
    targets = [batch["targets"][batch["loss_weights"] > 0] for batch in pieces.eval_batches(1)]
    assert np.concatenate(targets).tolist() == whole[0].tokens[1:].tolist()


def test_records_with_nothing_to_learn_are_counted_and_left_out(make_tokenizer: Make, write_jsonl: Write) -> None:
    ask, answer = {"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}
    tokenizer = make_tokenizer(CHATML)
    path = write_jsonl([{"messages": [ask]}, {"messages": [ask, answer]}])
    statistics = build(DataConfig(train=path), tokenizer).statistics
    assert (statistics.records, statistics.unlearnt, statistics.documents) == (2, 1, 1)
    assert "nothing to learn: record 1\n" in describe("train", build(DataConfig(train=path), tokenizer))
    # Cut before the response begins.
    path = write_jsonl([{"messages": [ask, answer]}])
    with pytest.raises(UserError, match="none of 1 records has anything to learn"):
        build(DataConfig(train=path, max_length=8, overlong="truncate"), tokenizer)
    with pytest.raises(UserError, match=r"check that data.response_part '### Answer:' stands in the texts"):
        build(DataConfig(train=path, instruction_part="### Question:", response_part="### Answer:"), tokenizer)


def test_bad_records_stop_the_run_or_are_counted(
    make_tokenizer: Make, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": null}\n{"text": "\xe9"}\n{"text": "\\ud800"}\n{"text": "b"}\n{"tex')
    with pytest.raises(UserError, match=r"data\.jsonl, record 2: text must be .*data\.on_bad_record: skip"):
        build_text(make_tokenizer, str(path))
    data = build_text(make_tokenizer, str(path), on_bad_record="skip")
    assert (data.statistics.records, data.statistics.bad, data.statistics.documents) == (6, 4, 2)
    first, second, third = data.sources[0].tally.examples
    assert "record 2: text must be" in first
    assert "record 3: line 3 is not UTF-8" in second
    assert "record 4: it holds half of a surrogate pair" in third


def test_fingerprint_follows_content_and_layout(make_tokenizer: Make, write_jsonl: Write) -> None:
    path = write_jsonl(word_records(8, 3, 4))
    prints = [
        build_text(make_tokenizer, path).fingerprint,
        build_text(make_tokenizer, path, packing=False).fingerprint,
        build_text(make_tokenizer, path, shuffle=False).fingerprint,
        build_text(make_tokenizer, path, max_length=9).fingerprint,
        build_text(make_tokenizer, path, train={path: 2.0}).fingerprint,
        build_text(make_tokenizer, write_jsonl(word_records(8, 4, 3), "other.jsonl")).fingerprint,
    ]
    assert len(set(prints)) == 6
    moved = write_jsonl(word_records(8, 3, 4), "moved.jsonl")
    assert build_text(make_tokenizer, path, "eval", eval=moved).fingerprint == prints[0]


def test_several_sources_of_several_forms(make_tokenizer: Make, write_jsonl: Write) -> None:
    texts = write_jsonl(word_records(8, 3), "texts.jsonl")
    prompts = write_jsonl([{"prompt": "a", "completion": "b"}], "prompts.jsonl")
    data = build_text(make_tokenizer, "", train={texts: 1, prompts: 3})
    assert [(source.form, source.start, source.stop, source.weight) for source in data.sources] == [
        ("text", 0, 2, 1.0),
        ("completion", 2, 3, 3.0),
    ]
    assert build_text(make_tokenizer, "", train=[texts, prompts]).statistics.documents == 3


def test_a_held_out_fraction_is_no_part_of_training(make_tokenizer: Make, write_jsonl: Write) -> None:
    records = [{"text": f"{i % 40}"} for i in range(50)]
    path = write_jsonl(records)
    tokenizer = make_tokenizer()
    config = DataConfig(train=path, eval_fraction=0.2)
    train, held = build(config, tokenizer), eval_sets(config, tokenizer)["eval"]

    def texts(data: Dataset) -> list[str]:
        return [tokenizer.decode(data.documents[i].tokens) for i in range(len(data.documents))]

    assert len(texts(train)) + len(texts(held)) == 50
    assert not set(texts(train)) & set(texts(held))
    assert 10 <= len(texts(held)) <= 11
    # Where a record stands does not matter.
    turned = DataConfig(train=write_jsonl(records[::-1], "turned.jsonl"), eval_fraction=0.2)
    assert sorted(texts(eval_sets(turned, tokenizer)["eval"])) == sorted(texts(held))


def test_named_evaluation_sets(make_tokenizer: Make, write_jsonl: Write) -> None:
    one, two = write_jsonl(word_records(8), "one.jsonl"), write_jsonl(word_records(3, 3), "two.jsonl")
    sets = eval_sets(DataConfig(train=one, eval={"short": two, "long": one}), make_tokenizer())
    assert {name: data.statistics.documents for name, data in sets.items()} == {"short": 2, "long": 1}
    assert sets["short"].statistics.duplicates == 1
    assert list(eval_sets(DataConfig(train=one, eval=two), make_tokenizer())) == ["eval"]
    with pytest.raises(UserError, match=r"data\.eval names no file"):
        build(DataConfig(train="x"), make_tokenizer(), "eval")
    with pytest.raises(UserError, match=r"data\.eval has a set named train, .* rename it"):
        DataConfig(train="a", eval={"train": "b"})


def test_records_in_memory_and_a_function_of_the_users(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(CHATML)
    rows = datasets.Dataset.from_list([{"q": "a", "a": "b"}, {"q": "c", "a": "d"}])
    config = DataConfig(train="in memory")

    def decoded(formatting_func: Callable[[dict[str, Any]], Any]) -> list[str]:
        documents = build(config, tokenizer, records=rows, formatting_func=formatting_func).documents
        return [tokenizer.decode(documents[i].tokens) for i in range(2)]

    assert decoded(lambda row: f"{row['q']}={row['a']}") == ["<s>a=b<|im_end|>", "<s>c=d<|im_end|>"]
    assert "assistant\nb<|im_end|>" in decoded(lambda row: {"instruction": row["q"], "output": row["a"]})[0]
    with pytest.raises(UserError, match=r"must return a text or a record .*, not a list"):
        decoded(lambda row: [row["q"]])
    with pytest.raises(KeyError) as raised:
        decoded(lambda row: row["x"])
    assert raised.value.__notes__ == ["in formatting_func, given the records given, record 1"]


def test_what_would_leave_a_source_or_a_split_without_documents_is_refused(
    make_tokenizer: Make, write_jsonl: Write
) -> None:
    many, same = write_jsonl(word_records(*range(3, 8)), "many.jsonl"), write_jsonl(word_records(4, 4, 4), "same.jsonl")
    with pytest.raises(UserError, match=r"many\.jsonl has 5 documents and the weight 0\.05, .* to 0\.2 or more"):
        build(DataConfig(train={many: 0.05, same: 1.0}, max_length=8), make_tokenizer())
    with pytest.raises(UserError, match=r"of 3 records with 1 different texts leaves none to learn"):
        build_text(make_tokenizer, same, eval_fraction=0.4)
    with pytest.raises(UserError, match=r"same\.jsonl more than once; name it once, with a weight"):
        DataConfig(train=(same, many, same))
