"""Checkpoints: bit-exact, complete or absent, and only ever continued by the run they are of."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.checkpoint import Checkpoints, CorruptCheckpointError, check_compatible, main, run_meta
from jaxtune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig
from jaxtune.errors import UserError


def make_state(seed: int = 0) -> dict[str, Any]:
    """Every dtype a run's state has, awkward shapes, special values, optax's tuples and empty states."""
    numbers = np.random.default_rng(seed)
    lora = {
        "layers": {
            "self_attn": {"q_proj": {"lora_A": jnp.asarray(numbers.standard_normal((2, 3, 65)), jnp.float32)}},
            "mlp": {"up_proj": {"lora_B": jnp.asarray(numbers.standard_normal((2, 7, 3)), jnp.bfloat16)}},
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity())
    return {
        "lora": lora,
        "opt_state": optimizer.init(lora),
        "codes": jnp.asarray(numbers.integers(0, 256, (5, 257)), jnp.uint8),
        "step": jnp.int32(2**31 - 1 - seed),
        "rng": jax.random.key_data(jax.random.key(seed)),
        "odd": jnp.asarray([np.nan, -np.inf, -0.0, 1e-45, 3.4e38], jnp.float32),
        "loss_scale": None,
    }


def abstract(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


def assert_bits_equal(got: Any, want: Any) -> None:
    structure: Any = jax.tree.structure
    assert structure(got) == structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:middle])
    else:
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :])


def test_restore_is_bit_exact_and_gives_the_meta_back(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path / "a" / "b"), make_state()
    meta = {"data_position": {"epoch": 1, "row": 17}, "losses": [1.5, None], "text": "größe"}
    assert checkpoints.latest() is None
    checkpoints.save(3, state, meta)
    restored, got = checkpoints.restore(3, abstract(state))
    assert_bits_equal(restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert got == {"step": 3, **meta} == checkpoints.read_meta(3)
    assert_bits_equal(Checkpoints(tmp_path / "a" / "b").restore(3, state)[0], state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_come_back_as_keys(tmp_path: Path, impl: str) -> None:
    state = {"keys": jax.random.split(jax.random.key(5, impl=impl), 3)}
    Checkpoints(tmp_path).save(1, state, {})
    restored, _ = Checkpoints(tmp_path).restore(1, abstract(state))
    assert restored["keys"].dtype == state["keys"].dtype
    np.testing.assert_array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(state["keys"]))


def test_arrays_go_to_the_shardings_asked_for(tmp_path: Path) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec("data"))
    state = {"x": jax.device_put(jnp.arange(8.0), sharding)}
    Checkpoints(tmp_path).save(1, state, {})
    for like in (state, {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}):
        assert Checkpoints(tmp_path).restore(1, like)[0]["x"].sharding == sharding


@pytest.mark.parametrize("keep_last", [1, 2, 4])
def test_retention(tmp_path: Path, keep_last: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (5, 10, 100, 101):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
        assert checkpoints.latest() == step
        assert checkpoints.steps() == [s for s in (5, 10, 100, 101) if s <= step][-keep_last:]
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, checkpoints.steps()))


def test_saving_an_earlier_step_abandons_the_later_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"try": 1})
    checkpoints.save(20, {"x": jnp.full(3, -20)}, {"try": 2})
    assert checkpoints.steps() == [10, 20]
    restored, meta = checkpoints.restore_latest({"x": jnp.zeros(3, jnp.int32)})
    assert meta == {"step": 20, "try": 2}
    np.testing.assert_array_equal(restored["x"], [-20] * 3)


def test_missing_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"there is no readable checkpoint in .*; start a new run, without resume"):
        checkpoints.restore_latest({})
    with pytest.raises(UserError, match=r"there is no checkpoint of step 7 in .*; it has: none"):
        checkpoints.restore(7, {})
    checkpoints.save(3, {"x": jnp.zeros(2)}, {})
    with pytest.raises(UserError, match=r"there is no checkpoint of step 7 in .*; it has: 3"):
        checkpoints.restore(7, {})


def test_every_file_is_guarded_and_the_one_before_is_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    old, new = make_state(1), make_state(2)
    checkpoints.save(1, old, {})
    checkpoints.save(2, new, {})
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    assert len(files) > 4
    for path in files:
        original = path.read_bytes()
        for how in ("missing", "cut", "changed"):
            damage(path, how)
            with pytest.raises(CorruptCheckpointError, match=rf"checkpoint .*2 is damaged: .*{path.name}"):
                checkpoints.restore(2, abstract(new))
            path.write_bytes(original)
    # Deeper than Python reads.
    (tmp_path / "2" / "meta.json").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint .*2 is damaged: meta\.json: maximum recursion"):
        checkpoints.read_meta(2)
    checkpoints.save(2, new, {})
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    damage(files[0], "changed")
    with pytest.warns(UserWarning, match=rf"2 is damaged: .*{files[0].name}.*Falling back to the checkpoint before it"):
        restored, meta = checkpoints.restore_latest(abstract(old))
    assert meta["step"] == 1
    assert_bits_equal(restored, old)
    checkpoints.save(2, new, {})
    assert_bits_equal(checkpoints.restore_latest(abstract(new))[0], new)


def test_other_arrays_are_refused_and_do_not_fall_back(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), make_state()
    checkpoints.save(1, state, {})
    other = {**state, "codes": jnp.zeros((5, 256), jnp.uint8), "step": jnp.float32(0), "more": jnp.zeros(1)}
    del other["odd"]
    with pytest.raises(UserError) as caught:
        checkpoints.restore_latest(abstract(other))
    assert not isinstance(caught.value, CorruptCheckpointError)
    for part in (
        "codes is uint8[5, 257] in it, uint8[5, 256] now",
        "step is int32[] in it, float32[] now",
        "more is not in it",
        "odd is not in the run's state",
        "Resume with the configuration it was written with",
    ):
        assert part in str(caught.value)


def test_other_format_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, {"x": jnp.zeros(1)}, {})
    path = tmp_path / "1" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match=r"meta.json is not of format 1"):
        Checkpoints(tmp_path).restore_latest({"x": jnp.zeros(1)})


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*Make room there, or change output.dir"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {"x": jnp.zeros(1)}, {})


def test_failure_while_saving_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {"x": jnp.ones(3)}, {})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match=r"No space left on device; earlier ones are untouched"):
            checkpoints.save(2, {"x": jnp.zeros(3)}, {})
    assert checkpoints.steps() == [1]
    np.testing.assert_array_equal(checkpoints.restore_latest({"x": jnp.zeros(3)})[0]["x"], np.ones(3))
    checkpoints.save(3, {"x": jnp.zeros(3)}, {})
    assert os.listdir(tmp_path) == ["3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MiB where one may be mounted, else a limit of 150 kB on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", disk], capture_output=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode != 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted.returncode == 0:
        subprocess.run(["umount", disk], check=True)


def test_full_disk(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints", keep_last=1)
    state = {"x": jnp.arange(5000.0)}
    checkpoints.save(1, state, {})
    # Random bits, which no part of the file system packs.
    large = {"x": jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 400_000, np.uint32))}
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*/2: .*; earlier ones are untouched. Make room"):
        checkpoints.save(2, large, {})
    assert checkpoints.steps() == [1]
    assert_bits_equal(checkpoints.restore_latest(abstract(state))[0], state)
    # The space that the attempt took is given back by the next save.
    checkpoints.save(3, state, {})
    assert os.listdir(small_disk / "checkpoints") == ["3"]


def test_directory_that_became_read_only(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    if os.geteuid() == 0:
        read_only = ["mount", "--bind", "-o", "ro", tmp_path / "checkpoints", tmp_path / "checkpoints"]
        if subprocess.run(read_only, capture_output=True).returncode != 0:
            pytest.skip("root may write everywhere, and nothing can be mounted here")
    else:
        (tmp_path / "checkpoints").chmod(0o555)
    try:
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*(Read-only|Permission denied)"):
            checkpoints.save(2, {"x": jnp.zeros(3)}, {})
        assert checkpoints.steps() == [1]
        checkpoints.verify(1)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", tmp_path / "checkpoints"], check=True)
        else:
            (tmp_path / "checkpoints").chmod(0o755)


def test_foreign_files_are_passed_over_and_stay(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep_last=1), {"x": jnp.ones(3)}
    checkpoints.save(4, state, {})
    (tmp_path / "5").write_text("a file")
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "notes.txt").write_text("mine")
    (tmp_path / "4" / "state" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"12 is damaged: meta.json.*Falling back"):
        restored, meta = checkpoints.restore_latest(abstract(state))
    assert meta["step"] == 4
    assert_bits_equal(restored, state)
    checkpoints.save(6, state, {})
    assert sorted(os.listdir(tmp_path)) == ["12", "5", "6"]
    assert (tmp_path / "12" / "notes.txt").read_text() == "mine"


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2)
    kept = []
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.0, None, 4.0), 1):
        checkpoints.save(step, {"x": jnp.ones(1)}, {} if loss is None else {"eval_loss": loss})
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 6]]
    assert checkpoints.best() == [2, 4, 6]
    # One that cannot be read has no loss that could be compared; it is thinned as any other.
    damage(tmp_path / "2" / "meta.json", "cut")
    assert checkpoints.best() == [4, 6]


SAVER = """
import sys
import numpy as np
from jaxtune.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep_last=1)
for step in range(1, 10_000):
    state = {f"x{i}": np.full((512, 1024), step, np.float32) * np.arange(1024, dtype=np.float32) for i in range(8)}
    print("saving", step, flush=True)
    checkpoints.save(step, state, {"step_was": step})
    print("saved", step, flush=True)
"""


def test_kill_while_saving_never_shows_an_incomplete_checkpoint(tmp_path: Path) -> None:
    delays = random.Random(7)
    interrupted = 0
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(directory)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        times = {}
        for line in child.stdout:
            times[line.strip()] = time.monotonic()
            if line == "saving 3\n":
                time.sleep(delays.uniform(0.1, 0.9) * (times["saved 2"] - times["saving 2"]))
                child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
        saved = max(int(line.split()[1]) for line in times if line.startswith("saved"))
        interrupted += any(path.name.startswith(".tmp-") for path in directory.iterdir())
        like = {f"x{i}": jax.ShapeDtypeStruct((512, 1024), jnp.float32) for i in range(8)}
        restored, meta = Checkpoints(directory).restore_latest(like)
        # A save that was complete, but not yet reported as such, also counts.
        assert meta["step"] == meta["step_was"] == Checkpoints(directory).latest()
        assert meta["step"] in (saved, saved + 1)
        for leaf in restored.values():
            np.testing.assert_array_equal(leaf[511], meta["step"] * np.arange(1024, dtype=np.float32))
        Checkpoints(directory, keep_last=1).save(meta["step"] + 1, {"x": jnp.zeros(1)}, {})
        assert os.listdir(directory) == [str(meta["step"] + 1)]
    assert interrupted >= 1, "the kills came when nothing was being written"


def a_run(**sections: Any) -> RunConfig:
    given = {"model": ModelConfig("org/base"), "data": DataConfig("t.jsonl"), "output": OutputConfig("runs/a")}
    return RunConfig(**{**given, **sections})


def through_json(meta: Any) -> Any:
    return json.loads(json.dumps({"step": 5, **meta}))


def test_same_run_may_go_on_even_where_files_have_moved() -> None:
    meta = through_json(run_meta(a_run(), "data-1", "model-1", "float32", data_position=3))
    assert meta["data_position"] == 3
    assert len(meta["config_fingerprint"]) == 64
    check_compatible(meta, a_run(), "data-1", "model-1", "float32")
    moved = a_run(
        model=ModelConfig("/elsewhere/base"),
        data=DataConfig("/elsewhere/t.jsonl"),
        lora=LoraConfig(start_from="/elsewhere/adapter"),
        output=OutputConfig("runs/b", save_steps=1),
        train=TrainConfig(logging_steps=7, remat="none"),
    )
    check_compatible(meta, moved, "data-1", "model-1", "float32")


def test_another_run_is_refused_with_every_difference() -> None:
    meta = through_json(run_meta(a_run(), "data-1", "model-1", "float32"))
    other = a_run(lora=LoraConfig(r=8, target_modules=("q_proj",)), train=TrainConfig(learning_rate=1e-4, max_steps=9))
    with pytest.raises(UserError) as caught:
        check_compatible(meta, other, "data-2", "model-2", "bfloat16")
    for part in (
        "cannot resume: the checkpoint of step 5",
        "lora.r: 16 then, 8 now",
        "lora.target_modules: [",
        "train.learning_rate: 0.0002 then, 0.0001 now",
        "train.max_steps: None then, 9 now",
        "the data's content: data-1 then, data-2 now",
        "the base model's content: model-1 then, model-2 now",
        "Undo these changes, or start a new run in another output.dir",
    ):
        assert part in str(caught.value)
    assert "output" not in str(caught.value).replace("output.dir", "")


def test_constant_rate_may_be_prolonged() -> None:
    short = a_run(train=TrainConfig(lr_scheduler_type="constant", max_steps=5))
    long = dataclasses.replace(short, train=dataclasses.replace(short.train, max_steps=50))
    check_compatible(through_json(run_meta(short, "d", "m", "float32")), long, "d", "m", "float32")


def test_meta_of_another_release() -> None:
    meta = through_json(run_meta(a_run(), "d", "m", "float32"))
    del meta["config"]["lora"]["seed"]
    check_compatible(meta, a_run(), "d", "m", "float32")
    meta["config"]["lora"]["future"] = 1
    with pytest.raises(UserError, match=r"cannot resume: this release does not read .*unknown key lora.future"):
        check_compatible(meta, a_run(), "d", "m", "float32")
    with pytest.raises(UserError, match=r"cannot resume: this release does not read .*config"):
        check_compatible({"step": 5}, a_run(), "d", "m", "float32")


def test_warning_and_check_order_of_restore_latest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(1)}, {"mark": "ours"})
    seen: list[dict[str, Any]] = []

    def refuse(meta: dict[str, Any]) -> None:
        seen.append(meta)
        raise UserError("another run")

    with pytest.raises(UserError, match="another run"):
        checkpoints.restore_latest({"of another shape": jnp.zeros(2)}, check=refuse)
    assert seen == [{"step": 1, "mark": "ours"}]


def test_verify_reads_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 5):
        checkpoints.save(step, make_state(step), {"config_fingerprint": "0123456789abcdef"})
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        assert main(["verify", str(path)]) == 0
        assert "checkpoints/3: whole, " in capsys.readouterr().out
    victims = [path for path in (tmp_path / "checkpoints" / "5" / "state").rglob("*") if path.stat().st_size > 8]
    largest = max((path for path in victims if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    smallest = min((path for path in victims if path.is_file()), key=lambda path: path.stat().st_size)
    smallest.unlink()
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "checkpoints/3: whole" in out
    for path, what in ((largest, "has changed since it was written"), (smallest, "is missing")):
        assert f"{path.relative_to(tmp_path / 'checkpoints' / '5')} {what}" in out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
