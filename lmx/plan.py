"""Know before paying: what a compiled step needs on a TPU that is not here.

The TPU compiler runs on any Linux machine that has `libtpu` (`pip install 'lmx[aot]'`): it compiles the very step that
would train, for the chips of a named topology, and says how much memory each chip needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

HBM_GIB = {"v2": 8, "v3": 16, "v4": 16, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
"""Memory per jax device, in GiB; v2, v3, v4 and tpu7x have two devices a chip in libtpu's topologies.

Source: the Cloud TPU system architecture pages.
"""


@dataclass(frozen=True)
class Plan:
    """Bytes are per device. fits: the compiler's verdict; if it is False, problem is its reason and bytes are 0."""

    topology: str
    n_devices: int
    fits: bool
    problem: str
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    kernels: int
    hbm_bytes: int
    flops_per_step: float


def topology_devices(topology: str) -> list:
    """The abstract devices of a topology such as "v5e:4x4", "v5p:2x2x1" or "v6e:8x8".

    Raises: ImportError without libtpu; ValueError for a topology that libtpu does not know.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ImportError("compiling for a TPU needs libtpu: pip install 'lmx[aot]' (Linux)") from None
    from jax.experimental import topologies

    if not re.fullmatch(r"(v\d+[ep]?|tpu7x):\d+(x\d+)*", topology):
        raise ValueError(
            f"topology {topology!r}: write a generation and a shape, such as v5e:4x4 or v5p:2x2x1"
        )
    single = {"chips_per_host_bounds": [1, 1, 1]} if re.fullmatch(r".*:1(x1)*", topology) else {}
    try:
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu", **single).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # what libtpu and jax refuse it with
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology!r} is not known to libtpu: {reason}; try v5e:2x2 or v5p:2x2x1"
        ) from None


def plan(
    step: Callable, arguments: tuple[Any, ...], topology: str, n_devices: int, flops_per_step: float
) -> Plan:
    """Compiles a jitted step for the devices its abstract arguments are placed on.

    Raises: jax.errors.JaxRuntimeError if the compiler fails for another reason than memory.
    """
    hbm = HBM_GIB.get(topology.split(":")[0], 0) * 2**30
    try:
        with _uncached():
            compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return Plan(topology, n_devices, False, reason, 0, 0, 0, 0, hbm, flops_per_step)
    memory = compiled.memory_analysis()
    return Plan(
        topology,
        n_devices,
        True,
        "",
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        hbm,
        flops_per_step,
    )


@contextmanager
def _uncached() -> Iterator[None]:
    """Without jax's compilation cache, which stores programs for absent devices and cannot read them back."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles several times faster at XLA's lowest effort; the memory it finds differs by some percent."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)
