"""A tensor that is still in its file: what its header says, and a way to read a part of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

Bytes = Callable[[int, int], np.ndarray]
"""(offset, n) -> n bytes of a file, as uint8."""


class Wanted(NamedTuple):
    """What a tensor has to be. stored: the names of the types that are right; none means any."""

    shape: tuple[int, ...]
    stored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """name, shape: as in the file, the axes in numpy's order, so that the last one lies together.
    dtype: of what `read` gives. stored: the type's name in the file, such as "BF16" or "Q4_1".
    rows: (start, stop) -> those entries of the first axis as a fresh array; a scalar counts as one row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: str
    rows: Callable[[int, int], np.ndarray]

    def read(self, index: slice | tuple[slice, ...] = ()) -> np.ndarray:
        """`whole[index]`, where only the rows between the first and the last one asked for are read.

        index: a slice, or one for each of the first axes, as `jax.make_array_from_callback` hands out.
        Raises: ValueError for another index, and if the file has changed since its header was read; OSError.
        """
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape) or not all(isinstance(axis, slice) for axis in index):
            raise ValueError(f"{self.name!r:.99}: index {index} is not at most {len(self.shape)} slices")
        if not self.shape:
            return self.rows(0, 1).reshape(())
        first, *others = index or (slice(None),)
        wanted = range(self.shape[0])[first]
        ends = sorted((wanted[0], wanted[-1])) if wanted else (0, -1)
        return self.rows(ends[0], ends[1] + 1)[:: wanted.step, *others]


def reader(path: Path) -> Bytes:
    """Reads bytes of a file, which must stay as it is now. It is opened for each read alone."""
    state = _state(path)

    def read(offset: int, n: int) -> np.ndarray:
        if _state(path) != state:
            raise ValueError(f"{path} has changed since its header was read; read the header again")
        return np.fromfile(path, np.uint8, n, offset=offset)

    return read


def block_rows(
    read: Bytes, offset: int, shape: tuple[int, ...], block: tuple[int, int], decode: Callable
) -> Callable[[int, int], np.ndarray]:
    """`Tensor.rows` of a tensor that lies at `offset`.

    block: (values, bytes) of the smallest piece that can be decoded alone.
    decode: the bytes of whole blocks -> their values.
    """
    n_values, n_bytes = block
    row = math.prod(shape[1:])

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start * row // n_values, -(-stop * row // n_values)
        values = decode(read(offset + first * n_bytes, (last - first) * n_bytes))
        skipped = start * row - first * n_values
        return values[skipped : skipped + (stop - start) * row].reshape(stop - start, *shape[1:])

    return rows


def _state(path: Path) -> tuple[int, int, int]:
    now = os.stat(path)
    return now.st_ino, now.st_size, now.st_mtime_ns
