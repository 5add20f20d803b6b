"""Containers that know bytes, not models: each gives tensors by name, and reads only what is asked of them."""

from lmx.formats import codes, gguf, safetensors
from lmx.formats.tensor import Tensor, Wanted

__all__ = ["Tensor", "Wanted", "codes", "gguf", "safetensors"]
