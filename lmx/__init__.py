"""lmx: the whole life of a language model, where a run is a choice of values.

`import lmx` is cheap and starts no accelerator: each part loads when it is first named.
"""

import importlib

__version__ = "0.1.0"

_PARTS = """
adapt artifact cli data distill evals formats generate losses mesh models nn ops optim plan quickstart report run sweep
tasks text train tree tune values weights
""".split()


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"lmx.{name}")
    if name == "Run":
        return importlib.import_module("lmx.run").Run
    raise AttributeError(f"module 'lmx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS, "Run"])
