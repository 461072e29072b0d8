"""Configuration: every rule's message names the key and the remedy; files and overrides round-trip."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtune.config import (
    LINEARS,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)
from jaxtune.config_io import (
    check_files,
    diff,
    dump_yaml,
    fingerprint,
    from_dict,
    load_config,
    local_path,
    to_dict,
)
from jaxtune.errors import UserError

MINIMAL = "model: {name_or_path: org/base}\ndata: {train: org/texts}\noutput: {dir: runs/a}\n"
DIGEST = "0123456789abcdef" * 4


def run(**sections: Any) -> RunConfig:
    given = {
        "model": ModelConfig("org/base"),
        "data": DataConfig("org/texts", eval="org/held-out"),
        "output": OutputConfig("runs/a"),
    }
    return RunConfig(**{**given, **sections})


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def load_error(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    return str(caught.value)


def test_minimal_file_has_the_defaults(tmp_path: Path) -> None:
    expected = RunConfig(ModelConfig("org/base"), DataConfig("org/texts"), OutputConfig("runs/a"))
    assert load(tmp_path, MINIMAL) == expected
    assert load(tmp_path, MINIMAL + "lora:\ntrain: {}\n") == expected


def test_round_trip_of_values_that_yaml_could_take_for_others(tmp_path: Path) -> None:
    config = run(
        model=ModelConfig("package:some_package/weights.gguf", sha256=DIGEST.upper(), load_in_4bit=False, dtype="bf16"),
        lora=LoraConfig(r=3, lora_alpha=7, lora_dropout=0.05, target_modules=("v_proj", "q_proj"), use_rslora=True),
        data=DataConfig("1e-4", eval="no", text_field="2024-01-01", form="text", train_on="all", packing=False),
        train=TrainConfig(max_steps=7, learning_rate=1e-5, adam_epsilon=1e-8, max_grad_norm=None, eval_steps=2),
        output=OutputConfig("~", sample_prompts=("What: is 'this'?\nTwo", "größe # 1"), compile_cache=None),
        mesh=MeshConfig(data=1),
    )
    assert config.model.sha256 == DIGEST
    assert load(tmp_path, dump_yaml(config)) == config
    assert from_dict(to_dict(config)) == config
    assert fingerprint(load(tmp_path, dump_yaml(config))) == fingerprint(config)


def test_overrides_are_yaml_values_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "train.max_steps=10",
        "train.max_steps=20",
        "train.learning_rate=1e-4",
        "lora.lora_alpha=32",
        "lora.target_modules=[q_proj, v_proj]",
        "output.compile_cache=null",
        "model.revision=null",
        "data.packing=false",
        "data.train=a=b.jsonl",
    )
    assert config.train.max_steps == 20
    assert config.train.learning_rate == 1e-4
    assert config.lora.lora_alpha == 32.0
    assert isinstance(config.lora.lora_alpha, float)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.output.compile_cache is None
    assert config.model.revision is None
    assert config.data.packing is False
    assert config.data.train == "a=b.jsonl"


def test_overrides_can_make_up_a_whole_configuration(tmp_path: Path) -> None:
    assert load(tmp_path, "", "model.name_or_path=org/base", "data.train=org/texts", "output.dir=runs/a") == load(
        tmp_path, MINIMAL
    )


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".0001", "+1e-04", "1.0e-4", "0.0001"])
def test_every_way_to_write_a_float(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, MINIMAL + f"train: {{learning_rate: {text}}}").train.learning_rate == 1e-4


@pytest.mark.parametrize("override", ["train.max_steps", "max_steps=3", "train.=3", ".max_steps=3", "=3"])
def test_override_of_a_wrong_form(tmp_path: Path, override: str) -> None:
    message = load_error(tmp_path, MINIMAL, override)
    assert repr(override) in message
    assert "write section.key=value" in message


def test_override_without_a_value_is_not_null_in_silence(tmp_path: Path) -> None:
    for override in ("train.max_steps=", "train.max_steps= "):
        message = load_error(tmp_path, MINIMAL, override)
        assert message.endswith(f"the override {override!r} has no value; write train.max_steps=null to unset the key")


DIGITS = "9" * 400
BOMB = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcd", "bcde"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {max_steps: 010}", "line 4: YAML takes 010 for a number to base 8 or 60; write a decimal number"),
        ("train: {max_steps: 1:30}", "YAML takes 1:30 for a number to base 8 or 60"),
        ("train: {learning_rate: 1:30.5}", "YAML takes 1:30.5 for a number to base 8 or 60"),
        (f"train: {{learning_rate: {DIGITS}}}", "set it to a number below 1e308"),
        (f"train: {{max_steps: {DIGITS}}}", "set it to a number below 2**32"),
        (f"train: {{max_steps: {DIGITS * 20}}}", "is no valid YAML"),
        (f"train: {{max_steps: 0x{DIGITS * 20}}}", "a number of 32000 bits; set it to a number below 2**32"),
        ("train: {max_steps: 2024-13-45}", "is no valid YAML: month must be in 1..12"),
        ("more: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        (BOMB + "train: *e", "train is [["),
        ('lora: {target_modules: "a\\0b"}', "lora.target_modules is 'a\\x00b'"),
        ('data: {train: "a\\0b"}', "a NUL character has no place in it"),
        ("lora: !!python/object/apply:os.system [false]", "could not determine a constructor"),
    ],
    ids=lambda value: value[:24],
)
def test_hostile_values(tmp_path: Path, text: str, part: str) -> None:
    """One sentence of bounded length, soon."""
    minimal = MINIMAL.replace("data: {train: org/texts}\n", "") if text.startswith("data") else MINIMAL
    message = load_error(tmp_path, minimal + text)
    assert part in message
    assert len(message) < 6000


def test_paths_too_long_for_any_file_system(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, f"output.dir={'o' * 300}", f"data.eval={'e' * 5000}")
    check_files(config)
    with pytest.raises(UserError, match=r"data.train is d+.jsonl, but there is no such file"):
        check_files(dataclasses.replace(config, data=DataConfig("d" * 300 + ".jsonl")))


def test_override_that_is_no_yaml(tmp_path: Path) -> None:
    message = load_error(tmp_path, MINIMAL, "data.text_field=@x")
    assert "data.text_field" in message
    assert "quote it" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {learning_rte: 1}", ["unknown key train.learning_rte", "did you mean train.learning_rate?"]),
        ("train: {max_length: 9}", ["unknown key train.max_length", "did you mean data.max_length?"]),
        ("learning_rate: 1", ["unknown key learning_rate", "did you mean train.learning_rate?"]),
        ("trian: {seed: 1}", ["unknown key trian", "did you mean train?"]),
        ("mesh: {zzz: 1}", ["unknown key mesh.zzz", "known here: data, fsdp, tensor, sequence"]),
        ("train.seed: 1", ["unknown section train.seed; write train: and, indented below it, seed:"]),
        ("foo.bar: 1", ["unknown key foo.bar; known here: model, data"]),
        ("train: {8: 1}", ["unknown key train.8"]),
        ("train: 3", ["train is 3", "must be a section of keys: batch_size"]),
        ("train: {seed: 1, seed: 2}", ["line 4: the key seed is given twice; keep one"]),
        ("model: {name_or_path: b}", ["line 4: the key model is given twice"]),
        ("train: {seed: 1", ["is no valid YAML", "line"]),
        ("train: !!python/name:os.system {}", ["is no valid YAML", "python/name"]),
    ],
)
def test_file_errors(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = load_error(tmp_path, MINIMAL + text)
    for part in parts:
        assert part in message


def test_all_unknown_and_missing_keys_are_in_one_error(tmp_path: Path) -> None:
    message = load_error(tmp_path, "model: {name: x}\nlora: {rank: 3}\n")
    for part in (
        "key model.name;",
        "lora.rank; known here: r, lora_alpha",
        "model.name_or_path is missing",
        "data.train is missing",
        "output.dir is",
    ):
        assert part in message
    assert "--set data.train=..." in message


def test_file_that_is_not_sections_or_not_there(tmp_path: Path) -> None:
    assert "must consist of sections (model, data, output" in load_error(tmp_path, "- a\n- b\n")
    with pytest.raises(UserError, match=r"cannot read the configuration .*absent.yaml.*--config"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch_size=1.0", ["train.batch_size is 1.0, of type float", "a whole number"]),
        ("train.batch_size=true", ["train.batch_size is True, of type bool", "a whole number"]),
        ("train.max_steps=1e3", ["train.max_steps is '1e3', of type str", "a whole number"]),
        ("train.learning_rate=true", ["train.learning_rate is True, of type bool", "a number"]),
        ("train.learning_rate=fast", ["train.learning_rate is 'fast'", "a number"]),
        ("train.learning_rate=null", ["train.learning_rate is None", "a number"]),
        ("train.learning_rate=.inf", ["train.learning_rate is inf", "a finite number"]),
        ("train.weight_decay=.nan", ["train.weight_decay is nan", "a finite number"]),
        ("data.packing=1", ["data.packing is 1, of type int", "true or false"]),
        ("model.revision=12345678", ["model.revision is 12345678, of type int", "text (quote it"]),
        ("model.revision=2024-01-01", ["model.revision is datetime.date(2024, 1, 1)", "text (quote it"]),
        ("data.text_field=''", ["data.text_field is empty", "write a value"]),
        ("train.remat=ful", ["train.remat is 'ful'", "none, selective, full, offload", "did you mean full?"]),
        ("train.remat=null", ["train.remat is None", "none, selective, full, offload"]),
        ("model.dtype=[bf16]", ["model.dtype is ['bf16']", "auto, bf16, fp16, fp32"]),
        ("lora.target_modules=q_proj", ["lora.target_modules is 'q_proj'", "a list of text", "[first, second]"]),
        ("output.sample_prompts=[a, 3]", ["output.sample_prompts[1] is 3, of type int", "text (quote it"]),
    ],
)
def test_types(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = load_error(tmp_path, MINIMAL, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("key", "bad", "good", "remedy"),
    [
        ("lora.r", 0, 1, "set it to 1 or more"),
        ("lora.lora_alpha", 0, 0.5, "set it to more than 0"),
        ("lora.lora_dropout", 1.0, 0.99, "at least 0 (no dropout) and below 1"),
        ("lora.lora_dropout", -0.1, 0.0, "at least 0 (no dropout) and below 1"),
        ("lora.seed", 2**32, 2**32 - 1, "below 2**32"),
        ("data.max_length", 7, 8, "8 tokens or more"),
        ("train.batch_size", 0, 1, "set it to 1 or more"),
        ("train.gradient_accumulation_steps", -1, 1, "set it to 1 or more"),
        ("train.max_steps", 0, 1, "set it to 1 or more"),
        ("train.loss_chunk", 0, None, "set it to 1 or more"),
        ("train.logging_steps", 0, 1, "set it to 1 or more"),
        ("train.eval_steps", 0, 1, "set it to 1 or more"),
        ("train.num_train_epochs", 0, 0.5, "set it to more than 0"),
        ("train.learning_rate", -1e-4, 1e-9, "set it to more than 0"),
        ("train.adam_epsilon", 0.0, 1e-12, "set it to more than 0"),
        ("train.max_grad_norm", 0, None, "more than 0, or to null for no clipping"),
        ("train.warmup_steps", -1, 0, "set it to 0 or more"),
        ("train.weight_decay", -0.1, 0, "set it to 0 or more"),
        ("train.adam_beta1", 1.0, 0, "at least 0 and below 1"),
        ("train.adam_beta2", 1.5, 0.95, "at least 0 and below 1"),
        ("train.seed", -1, 0, "at least 0 and below 2**32"),
        ("output.save_steps", 0, None, "set it to 1 or more"),
        ("output.save_total_limit", 0, 1, "set it to 1 or more"),
        ("output.sample_tokens", 0, 1, "set it to 1 or more"),
        ("mesh.data", 0, 1, "1 or more devices"),
    ],
)
def test_ranges(key: str, bad: Any, good: Any, remedy: str) -> None:
    section, name = key.split(".")
    whole = getattr(run(), section)
    assert getattr(dataclasses.replace(whole, **{name: good}), name) == good
    with pytest.raises(UserError) as caught:
        dataclasses.replace(whole, **{name: bad})
    assert str(caught.value).startswith(f"{key} is ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"lora.target_modules is empty; name at least one of q_proj"),
        (["q_proj", "qkv"], r"lora.target_modules has 'qkv'; its members must be among q_proj, .*down_proj"),
        (["q_proj", "q_proj"], r"lora.target_modules has q_proj 2 times; name each linear once"),
    ],
)
def test_target_modules(names: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(target_modules=names)
    assert LoraConfig(target_modules=list(LINEARS)) == LoraConfig()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "package:nothing"}, r"model.name_or_path is .*package:some_package/model.gguf"),
        ({"name_or_path": "a.gguf", "sha256": "abc"}, r"model.sha256 is 'abc'; it must be 64 hexadecimal digits"),
        ({"name_or_path": "a.gguf", "sha256": "g" * 64}, r"model.sha256 .* 64 hexadecimal digits"),
        ({"name_or_path": "org/base", "sha256": DIGEST}, r"is no single file; remove model.sha256"),
        ({"name_or_path": "a.gguf", "revision": "main"}, r"'a.gguf' is a file; remove model.revision"),
    ],
)
def test_model_source(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**arguments)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": None}, r"lora is None; it must be a section, given as a LoraConfig"),
        ({"mesh": MeshConfig(tensor=2), "train": TrainConfig(optim="paged_adamw_8bit")}, "not paged; .* adamw_8bit"),
        (
            {"mesh": MeshConfig(sequence=2), "model": ModelConfig("m", embedding_on_host=True)},
            "on_host is set .* 2 dev",
        ),
        (
            {"mesh": MeshConfig(tensor=2), "output": OutputConfig("out", sample_prompts=("Hello",))},
            r"output.sample_prompts is set, .* remove output.sample_prompts",
        ),
        ({"mesh": MeshConfig(data=2), "train": TrainConfig(batch_size=3)}, r"train.batch_size is 3.* multiple of 2"),
        (
            {"train": TrainConfig(max_steps=5, warmup_steps=5)},
            r"warmup_steps is 5.*set train.warmup_steps below train.ma",
        ),
        ({"train": TrainConfig(eval_steps=5), "data": DataConfig("x")}, r"eval_steps is 5.*set data.eval, or remove"),
    ],
)
def test_rules_across_keys(sections: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**sections)


def test_fingerprint_and_diff_follow_what_changes_the_numbers() -> None:
    base = run()
    same = run(
        output=OutputConfig("elsewhere", save_steps=3),
        train=TrainConfig(logging_steps=9, eval_steps=4, remat="none", loss_chunk=64),
        data=DataConfig("org/texts", eval="other"),
    )
    assert fingerprint(same) == fingerprint(base)
    assert set(diff(base, same)) == {
        "output.dir",
        "output.save_steps",
        "train.logging_steps",
        "train.eval_steps",
        "train.remat",
        "train.loss_chunk",
        "data.eval",
    }
    assert diff(base, base) == {}
    changed = run(lora=LoraConfig(r=8), train=TrainConfig(learning_rate=1e-4))
    assert diff(base, changed) == {"lora.r": (16, 8), "train.learning_rate": (2e-4, 1e-4)}
    assert fingerprint(changed) != fingerprint(base)


@pytest.mark.parametrize(("schedule", "equal"), [("constant", True), ("linear", False), ("cosine", False)])
def test_horizon_counts_where_the_schedule_depends_on_it(schedule: Any, equal: bool) -> None:
    short, long = (run(train=TrainConfig(lr_scheduler_type=schedule, max_steps=n)) for n in (10, 20))
    assert (fingerprint(short) == fingerprint(long)) is equal


def test_local_path_tells_paths_from_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("name", "org/name", "org/name-1.5", "squad"):
        assert local_path(name) is None
    for name in ("./x", "../x", "/x", "~/x", "a/b/c", "x.jsonl", "x.PARQUET", "here", "."):
        assert local_path(name) == Path(name).expanduser()
    assert local_path("x.gguf") is None
    assert local_path("x.gguf", [".gguf"]) == Path("x.gguf")


def test_check_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("{}")
    local = run(data=DataConfig("texts.jsonl", eval="org/held-out"))
    check_files(local)

    def message(**sections: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_files(run(**{"data": local.data, **sections}))
        return str(caught.value)

    absent = message(data=DataConfig("absent.jsonl"))
    assert "data.train is absent.jsonl, but there is no such file" in absent
    assert str(tmp_path) in absent
    assert "correct data.train" in absent
    assert "data.eval is data/x.csv" in message(data=DataConfig("texts.jsonl", eval="data/x.csv"))
    assert "model.name_or_path is weights.gguf" in message(model=ModelConfig("weights.gguf"))
    assert "model.name_or_path is models/a/b" in message(model=ModelConfig("./models/a/b"))
    check_files(run(data=local.data, model=ModelConfig("package:yaml/absent.gguf")))
    assert "output.dir is texts.jsonl, which is a file; name a directory" in message(output=OutputConfig("texts.jsonl"))


def test_reading_a_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    code = (
        "import sys\nfrom jaxtune.config_io import check_files, load_config\n"
        f"check_files(load_config({str(tmp_path / 'run.yaml')!r}))\n"
        "print({'jax', 'numpy', 'datasets', 'transformers', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
