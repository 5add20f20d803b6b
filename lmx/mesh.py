"""Where arrays live: a mesh of devices with axes data, fsdp and tensor, and path patterns that place parameters on it.

data copies parameters and splits batches; fsdp splits both (Rajbhandari et al. 2020, ZeRO stage 3); tensor splits
matrices within a layer (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import tree
from lmx.weights import Weight, axes_of

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
BATCH = P(ROWS)

Rules = tuple[tuple[str, tuple], ...]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left.

    pmap: run the step under `jax.pmap` over the data axis instead of `jax.jit` on the mesh.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    pmap: bool = False

    def __post_init__(self):
        sizes = self.sizes
        if sum(n == -1 for n in sizes) > 1 or any(n < 1 and n != -1 for n in sizes):
            raise ValueError(f"MeshConfig: {self}: sizes must be 1 or more, and at most one of them -1")
        if self.pmap and (self.fsdp, self.tensor) != (1, 1):
            raise ValueError(f"MeshConfig: {self}: pmap splits data only; use fsdp=1, tensor=1 or pmap=False")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.data, self.fsdp, self.tensor

    def build(self, devices: list | None = None) -> Mesh:
        """The mesh over these devices, or all that jax sees.

        Raises: ValueError if the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        fixed = math.prod(n for n in self.sizes if n != -1)
        sizes = tuple(len(devices) // fixed if n == -1 else n for n in self.sizes)
        if math.prod(sizes) != len(devices):
            product = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, self.sizes))
            raise ValueError(f"mesh: {product} does not fill {len(devices)} devices; set one of them to -1")
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def shardings(shapes: Any, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a parameter tree, by the first rule whose pattern fits its path.

    A rule names the mesh axis of each of the last dimensions; dimensions before them (layers) are not split,
    and neither is one that its axis does not divide: a warning names those, which every device holds whole.
    Raises: ValueError naming the parameters that no rule covers.
    """
    uncovered = [p for p in tree.paths(shapes) if not any(tree.matches(p, pattern) for pattern, _ in rules)]
    if uncovered:
        raise ValueError(f"no sharding rule covers {', '.join(uncovered[:5])}; add a (pattern, axes) rule")

    copied = []

    def place(keys, x):
        path = tree.path_str(keys)
        axes = next(axes for pattern, axes in rules if tree.matches(path, pattern))
        if isinstance(x, Weight):
            ends = dict(zip(("in", "out"), axes[-2:]))
            return axes_of(x, lambda part, names: put(path, part, (*axes[:-2], *map(ends.get, names))))
        return put(path, x, axes)

    def put(path, x, axes):
        axes = (None,) * (len(x.shape) - len(axes)) + tuple(axes)
        placed = fit(x.shape, axes, mesh)
        copied.extend(
            f"{path} ({n} over {axis}={_size(axis, mesh)})"
            for n, axis, kept in zip(x.shape, axes, placed.spec)
            if kept != axis and n > 1
        )
        return placed

    found = jax.tree_util.tree_map_with_path(place, shapes, is_leaf=lambda x: isinstance(x, Weight))
    if copied:
        more = f" and {len(copied) - 4} more" if len(copied) > 4 else ""
        warnings.warn(f"mesh: not divisible, so not split: {', '.join(copied[:4])}{more}", stacklevel=3)
    return found


def fit(shape: tuple[int, ...], axes: tuple, mesh: Mesh) -> NamedSharding:
    """Each dimension over its mesh axis (a name, several, or None), but not one that the axis does not divide."""
    return NamedSharding(mesh, P(*(a if n % _size(a, mesh) == 0 else None for a, n in zip(axes, shape))))


def _size(axis: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))


def follow(shapes: Any, params: Any, placed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that mirrors parameters in places (an optimizer's state): as the parameter, else copied.

    A leaf mirrors a parameter if its path ends with the parameter's and its shape is the same.
    """
    known = {
        tree.path_str(keys): (x.shape, s)
        for (keys, x), s in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed))
    }

    def place(keys, x):
        parts = tree.path_str(keys).split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == x.shape:
                return sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, shapes)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process holds.

    Raises: ValueError if they are not consecutive, which a mesh over devices in their usual order never does.
    """
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({place[0].indices(batch_size)[:2] for place in places})
    if any(a[1] != b[0] for a, b in pairwise(spans)):
        raise ValueError(f"mesh: this process holds rows {spans} of a batch; order the devices by process")
    return slice(spans[0][0], spans[-1][1])


def check_batch(batch_size: int, n_micro: int, mesh: Mesh) -> None:
    """Raises: ValueError if rows do not split evenly over micro-batches and devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (n_micro * shards):
        near = max(1, round(batch_size / (n_micro * shards))) * n_micro * shards
        raise ValueError(
            f"batch_size={batch_size} does not split into n_micro={n_micro} x {shards} devices "
            f"(data x fsdp); use {near}"
        )
