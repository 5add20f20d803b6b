"""Containers that know bytes, not models: each gives tensors by name, and reads only what is asked of them."""

from lmx.formats import gguf, safetensors
from lmx.formats.tensor import Tensor

__all__ = ["Tensor", "gguf", "safetensors"]
