"""llama.cpp itself, with nothing compiled: node-llama-cpp's build of it behind llama-cpp-python's declarations.

Both are of llama.cpp 0.5.0. `python tests/support/real_files.py` fetches them; without them, tests are skipped.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import real_files
from jaxtyping import Float

from convert.gguf.mixture import FILE_TYPES

_F32 = 0


class _Library(ctypes.CDLL):
    """A library that is asked for functions it does not have: the declarations are a few days younger."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *_: NotImplemented


@functools.cache
def library() -> Any:
    """llama.cpp's C functions, as the module `llama_cpp.llama_cpp` declares them."""
    folder = real_files.llama_cpp_library()
    # The package itself would import more than its declarations, and look for a library of its own.
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(real_files.llama_cpp_declarations())]
    sys.modules["llama_cpp"] = package
    extensions = importlib.import_module("llama_cpp._ctypes_extensions")
    extensions.load_shared_library = lambda *_: _Library(str(next(folder.glob("libllama.v*.so"))))
    declared = importlib.import_module("llama_cpp.llama_cpp")
    silent = declared.llama_log_callback(lambda *_: None)
    declared.llama_log_set(silent, ctypes.c_void_p(0))
    declared.kept_alive = silent
    # The build has one library for each kind of processor, and picks from them.
    ctypes.CDLL(str(next(folder.glob("libggml.v*.so")))).ggml_backend_load_all_from_path(os.fsencode(folder))
    return declared


class LlamaCpp:
    """A GGUF file in llama.cpp on all cores, with float32 keys and values; with an adapter's GGUF file on it."""

    def __init__(self, path: Path, adapter: Path | None = None, context: int = 2048) -> None:
        self._lib = library()
        parameters = self._lib.llama_model_default_params()
        # Repacked weights crash that release where the processor has AMX.
        parameters.use_extra_bufts = False
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_ubatch = min(context, 512)
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = self._lib.llama_init_from_model(self._model, settings)
        assert self._context, f"llama.cpp makes no context for {path}"
        if adapter is not None:
            lora = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            assert lora, f"llama.cpp does not load {adapter}"
            adapters, scales = (self._lib.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
            assert self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales) == 0
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def logits(self, tokens: list[int], first: int = 0) -> Float[np.ndarray, "T V"]:
        """After each of some tokens that stand at `first` and behind; those before were given before."""
        if first == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, first + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        assert self._lib.llama_decode(self._context, batch) == 0
        self._lib.llama_batch_free(batch)
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (len(tokens), self._vocabulary)).copy()

    def continued(self, tokens: list[int], count: int) -> list[int]:
        """The most likely tokens that follow."""
        logits, made = self.logits(tokens), []
        for _ in range(count):
            made.append(int(logits[-1].argmax()))
            logits = self.logits(made[-1:], len(tokens) + len(made) - 1)
        return made


def quantise(source: Path, target: Path, file_type: str) -> None:
    """Let llama.cpp quantise the file `source`."""
    parameters = library().llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(FILE_TYPES[file_type][1]), len(os.sched_getaffinity(0))
    status = library().llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    assert status == 0, (source, file_type)
