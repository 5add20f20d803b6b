"""A change of parameters before training: `(params, key) -> params`, and so composable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Surgery:
    """The surgery that changes nothing, and the base of those that do."""

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return params


def chain(*surgeries: Surgery):
    """Surgeries in order, each with a key of its own."""

    def operate(params: Any, key: jax.Array) -> Any:
        for i, surgery in enumerate(surgeries):
            params = surgery(params, jax.random.fold_in(key, i))
        return params

    return operate
