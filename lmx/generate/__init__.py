"""Decoding: from prompts to completions, as a list or as a stream."""

from lmx.generate.decode import Completion, completions, generate
from lmx.generate.sampling import Sampling
from lmx.generate.schema import json_pattern
from lmx.generate.speculative import Acceptance, Draft, speculate
from lmx.generate.stream import Memory, stream

__all__ = [
    "Acceptance",
    "Completion",
    "Draft",
    "Memory",
    "Sampling",
    "completions",
    "generate",
    "json_pattern",
    "speculate",
    "stream",
]
