"""Sets that people have: recognised with no hint, read whole, learnt where they should be, packed tight."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from real_files import data_folder
from transformers import PreTrainedTokenizerBase

from jaxtune.config import DataConfig
from jaxtune.data.dataset import build
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError

FORMS = {
    "alpaca_en_demo.json": ("instruction", 999),
    "alpaca_zh_demo.json": ("instruction", 1000),
    "identity.json": ("instruction", 91),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "glaive_toolcall_zh_demo.json": ("sharegpt", 300),
    "v1_sft_demo.jsonl": ("messages", 500),
    "reason_tool_use_demo_50.jsonl": ("messages", 50),
    "c4_demo.jsonl": ("text", 300),
    "wiki_demo.txt": ("text", 30),
}
REFUSED = {
    "dpo_en_demo.json": "chosen are pairs of a better and a worse answer",
    "v1_dpo_demo.jsonl": "chosen_messages are pairs of a better and a worse answer",
    "kto_en_demo.json": "label may mark answers to avoid",
    "mllm_demo.json": "images are pictures",
    "mllm_audio_demo.json": "audios are sounds",
    "mllm_video_demo.json": "videos are films",
}


def config(name: str, **settings: object) -> DataConfig:
    # SmolLM2's own template does not write tools; this one is for the same tokens.
    values = {"max_length": 2048, "overlong": "split", "chat_template": "qwen-2.5"} | settings
    return DataConfig(train=str(data_folder() / name), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "form", "records"), [(name, *value) for name, value in FORMS.items()], ids=FORMS)
def test_form_is_recognised(name: str, form: str, records: int, smollm2: PreTrainedTokenizerBase) -> None:
    data = build(config(name), smollm2)
    assert data.sources[0].form == form
    assert (data.statistics.records, data.statistics.bad) == (records, 0)
    assert set(data.documents.records.tolist()) == set(range(1, records + 1))


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_data_for_other_purposes_are_refused(name: str, reason: str, smollm2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=reason):
        build(config(name), smollm2)


def test_calls_and_answers_are_learnt_and_what_tools_say_is_not(smollm2: PreTrainedTokenizerBase) -> None:
    name = "glaive_toolcall_en_demo.json"
    data = build(config(name, overlong="truncate", max_length=8192), smollm2)
    records = json.loads((data_folder() / name).read_text(encoding="utf-8"))
    for index, record in enumerate(records):
        document = data.documents[index]
        if len(document.tokens) == data.max_length:  # cut
            continue
        pieces = itertools.groupby(range(len(document.tokens)), document.weights.__getitem__)
        runs = [list(places) for weight, places in pieces if weight]
        learnt = [str(smollm2.decode(document.tokens[run])) for run in runs]
        turns = [turn for turn in record["conversations"] if turn["from"] in ("gpt", "function_call")]
        assert len(learnt) == len(turns), index
        for text, turn in zip(learnt, turns):
            assert text.endswith("<|im_end|>")
            if turn["from"] == "gpt":
                assert text.removesuffix("<|im_end|>").strip() == turn["value"].strip()
            else:
                call = json.loads(text.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0])
                assert call == json.loads(turn["value"]), index


def test_rows_of_every_epoch_are_97_percent_full(smollm2: PreTrainedTokenizerBase) -> None:
    data = build(config("alpaca_en_demo.json"), smollm2)
    for seed in range(5):
        loader = Loader(data, batch_size=1, accumulation=1, seed=seed)
        rows = itertools.takewhile(lambda item: item[1].epoch < 3, loader.rows())
        filled = [int(data.documents.lengths[row].sum()) for row, _ in rows]
        assert np.mean(filled) / data.max_length >= 0.97
