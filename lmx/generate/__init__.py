"""Decoding: from prompts to completions, as a list or as a stream."""

from lmx.generate.decode import Completion, generate
from lmx.generate.sampling import Sampling
from lmx.generate.stream import stream

__all__ = ["Completion", "Sampling", "generate", "stream"]
