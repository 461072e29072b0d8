"""GGUF, the file format of llama.cpp: models and tokenizers read without torch."""

from convert.gguf.reader import GgufFile, GgufTensorInfo, open_gguf

__all__ = ["GgufFile", "GgufTensorInfo", "open_gguf"]
