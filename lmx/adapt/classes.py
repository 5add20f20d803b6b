"""A head of classes on the last hidden states, in the place of that of words.

    run = Run(start=(Load("model"), Lora(), Classes(2)), trainable="*/w/[ab]|classes", data=..., ...)

Everything else is as before: `out.logits` are [B, T, n], a label is the number of a class, and the loss of classes is
that of words. `lmx.tasks.Answers(task, head=True)` makes such labels, and `lmx.evals.score` reads such heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmx import tree
from lmx.weights import shape_of
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Classes(Surgery):
    """`classes` [D, n], float32, normal with standard deviation `init_std`: 0 begins with every class alike.

    Source: Radford et al. 2018 (GPT), section 3.2: a linear layer on the last token's last hidden state.
    """

    n: int = 2
    init_std: float = 0.0

    def __post_init__(self):
        if self.n < 2 or not 0 <= self.init_std < float("inf"):
            raise ValueError(f"Classes: n={self.n}, init_std={self.init_std}; use 2 or more, and 0 or more")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        if "classes" in params:
            raise ValueError("Classes: there are classes already; start from parameters without them")
        shape = shape_of(params["embed"])[1], self.n
        drawn = self.init_std * jax.random.normal(tree.key_at(key, "classes"), shape, jnp.float32)
        return {**params, "classes": drawn}
