"""`python -m jaxtune.generate` and `python -m jaxtune.chat` as they are typed, on a tiny model and its adapter."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from runs import CONFIG, Main, WriteRun

from jaxtune import FastLanguageModel, chat, compile_cache, generate
from jaxtune.config import ModelConfig
from jaxtune.devices import sheet, this_device
from jaxtune.generate import table_is_better_on_host
from jaxtune.lora import init_lora
from jaxtune.metrics import read_metrics
from jaxtune.samples import TextGenerator
from jaxtune.structure import frozen_structure, tree_bytes
from pallas_kernels.nf4 import NF4Tensor

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, shared: Path) -> Iterator[None]:
    """Compiled programs go where the other tests' go."""
    monkeypatch.setenv("HOME", str(shared))
    before = {name: jax.config.values[name] for name in CONFIGURED}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


CONFIGURED = (*compile_cache.CONFIGURED, "jax_pjrt_client_create_options")


@pytest.fixture(scope="module")
def adapter(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the answers."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(base_model))
    model = FastLanguageModel.get_peft_model(model, r=8)
    assert model.lora_config is not None
    model.lora = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(model.lora_config, model.base.decoder))
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory, tokenizer)
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = generate.main(["--max-new-tokens", "8", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_one_prompt_or_several(base_model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, alone, err = run("--model", base_model, "--prompt", "What colour is sky?")
    assert (status, "prompt tokens, answered in" in err) == (0, True)
    status, both, _ = run("--model", base_model, "--prompt", "What colour is sky?", "--prompt", "Hm?", "--json")
    answers = [json.loads(line) for line in both.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["What colour is sky?", "Hm?"]
    assert answers[0]["answer"] == alone.removesuffix("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is sky?\n"))
    assert run("--model", base_model, "--prompt", "-")[1] == alone
    assert run("--model", base_model, "--prompt", "What colour is sky?", "--raw")[1] != alone


def test_adapters_bring_their_base(base_model: Path, adapter: Path, run: Run) -> None:
    status, answer, err = run("--adapter", adapter, "--prompt", "What colour is sky?")
    assert (status, f"loaded {base_model}" in err) == (0, True)
    assert answer != run("--model", base_model, "--prompt", "What colour is sky?")[1]


def test_a_head_in_fewer_bits(write_run: WriteRun, run_main: Main, tmp_path: Path, run: Run) -> None:
    """In training, beside an embedding in host memory, and in answers."""
    model = {"head": "nf4", "embedding_on_host": True}
    train = {"max_steps": 1, "gradient_accumulation_steps": 1}
    path = write_run(model=model, data={"eval": None}, lora={"r": 4}, train=train)
    assert run_main("--config", path)[0] == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    (held,) = (row["frozen_bytes"] for row in rows if "frozen_bytes" in row)
    planned = frozen_structure(CONFIG, ModelConfig("-", **model), "float32")
    assert held == tree_bytes(planned)
    assert isinstance(planned["lm_head"]["kernel"], NF4Tensor)
    asked = ("--adapter", tmp_path / "out" / "adapter", "--prompt", "What colour is sky?")
    status, answer, _ = run(*asked, "--head", "nf4")
    assert (status, run(*asked, "--head", "nf4", "--embedding-on-host")[:2]) == (0, (0, answer))


def test_the_table_is_kept_on_the_host_where_that_saves_memory(base_model: Path, tmp_path: Path) -> None:
    """Of a GPU that has its own, unless the table is the head, too."""
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    for tied in (False, True):
        directory = tmp_path / str(tied)
        shutil.copytree(base_model, directory)
        (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}), encoding="utf-8")
        model = ModelConfig(str(directory))
        decided = [
            table_is_better_on_host(model, device) for device in (sheet("h200"), sheet("jetson-orin"), this_device())
        ]
        assert decided == [not tied, False, False]


def test_draws_and_stops(base_model: Path, run: Run) -> None:
    ask = ("--model", base_model, "--prompt", "What colour is sky?", "--temperature", "1.5")
    first = run(*ask, "--seed", "1", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01")[1]
    assert run(*ask, "--seed", "1", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01")[1] == first
    free = run(*ask, "--seed", "1")[1].removesuffix("\n")
    assert free != run(*ask, "--seed", "2")[1].removesuffix("\n")
    assert run(*ask, "--seed", "1", "--stop", free[3])[1].removesuffix("\n") == free[: free.index(free[3])]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "MODEL"], "name a prompt with --prompt"),
        (["--prompt", "Hi"], "name a model with --model, or an adapter with --adapter"),
        (["--model", "MODEL", "--prompt", "Hi", "--top-p", "0.9"], "--top-p without --temperature"),
        (["--model", "MODEL", "--prompt", "Hi", "--temperature", "-1"], "temperature is -1"),
        (["--model", "MODEL", "--prompt", "", "--raw"], "gives no token for ''"),
        (["--model", "MODEL", "--prompt", "Hi", "--raw", "--system", "Be kind."], "--system needs a chat template"),
        (["--adapter", "/nowhere", "--prompt", "Hi"], "no adapter_config.json in it; name an adapter's directory"),
        (["--model", "/nowhere/model", "--prompt", "Hi"], "/nowhere/model"),
    ],
)
def test_mistakes(base_model: Path, run: Run, arguments: list[str], problem: str) -> None:
    status, out, err = run(*(str(base_model) if argument == "MODEL" else argument for argument in arguments))
    assert (status, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err


def test_a_run_is_not_its_adapter(adapter: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to(adapter)
    assert f"name the run's adapter, {tmp_path / 'adapter'}" in run("--adapter", tmp_path, "--prompt", "Hi")[2]


def test_conversation(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Turns are remembered, undone and forgotten; too long a conversation and Ctrl-C leave it usable."""
    lines = iter(["Hi", "Hi", "/undo", "Hi", "/what", "/clear", "Hi", "word " * 300, "Hi", "/exit", "never read"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    asked, given = [], []
    stream = TextGenerator.stream

    def watched(self: TextGenerator, prompts: list[list[int]], **settings: object) -> Iterator[list[str]]:
        asked.append(self.tokenizer.decode(prompts[0]))
        given.append(settings)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return stream(self, prompts, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(TextGenerator, "stream", watched)
    assert chat.main(["--adapter", str(adapter), "--max-new-tokens", "4", "--system", "Be kind."]) == 0
    captured = capsys.readouterr()
    first, second, again, cleared, cut = asked
    assert first.startswith("<|im_start|>system\nBe kind.")
    assert second.startswith(first)
    assert (again, cleared) == (second, first)
    assert cut.startswith(first)
    assert {settings["room"] for settings in given} == {1024}
    assert "[cut short]" in captured.out
    assert "/clear it, or lower --max-new-tokens" in captured.err
    assert next(lines) == "never read"
