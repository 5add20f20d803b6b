"""A fence against XLA:CPU's fusions, and nothing elsewhere.

XLA:CPU fuses an elementwise chain into every later consumer and evaluates it again there; in a backward pass
the chains of all later layers pile up, and the step slows by the square of the depth. A barrier makes XLA
write the value once. GPU and TPU compilers choose well by themselves, so there the value passes through
untouched.
"""

from __future__ import annotations

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def once(values: Tree) -> Tree:
    """The same arrays, evaluated once where the program is compiled for a CPU.

    The platform is the one lowered for, not the one that traces: a program lowered for TPU on a CPU host has
    no barrier.
    """
    return jax.lax.platform_dependent(values, cpu=jax.lax.optimization_barrier, default=lambda v: v)
