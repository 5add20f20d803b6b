"""Layers one by one, so that a pattern can choose among them.

run = Run(start=(Load("model"), Unstack()), trainable="blocks/2[89]/*", ...)       the last two of 30 layers
run = Run(start=(Load("model"), Unstack(), Lora(where="blocks/2?/*attn*")), ...)   adapters in the last ten
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lmx import tree
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Unstack(Surgery):
    """`blocks/attn/q/w` [L, D, D] becomes `blocks/0/attn/q/w`, `blocks/1/attn/q/w`, ... [D, D]; a model reads both.

    It compiles longer, each layer being compiled on its own.
    """

    def __call__(self, params: Any, key: jax.Array) -> Any:
        blocks = params["blocks"]
        return {**params, "blocks": tuple(tree.layer(blocks, i) for i in range(tree.depth(blocks)))}
