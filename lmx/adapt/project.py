"""A learned matrix between a student's hidden states and a teacher's, beside the student's own parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmx import tree, values
from lmx.weights import shape_of
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Project(Surgery):
    """`project` [D, width], float32, normal with standard deviation D**-0.5, for `lmx.losses.MatchHidden`.

    width: the teacher's d_model. It is trained and resumed with the student, and left out where the student is used.
    """

    width: int

    def __post_init__(self):
        values.check(self, width="[1, inf)")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        if "project" in params:
            raise ValueError("Project: there is a projection already; start from parameters without it")
        D = shape_of(params["embed"])[1]
        drawn = jax.random.normal(tree.key_at(key, "project"), (D, self.width), jnp.float32)
        return {**params, "project": drawn / D**0.5}
