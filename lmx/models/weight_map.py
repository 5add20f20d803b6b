"""The parameters of a model under the names and layouts that others give them, in both directions.

    entries = [Entry("blocks/attn/q/w", "model.layers.{layer}.self_attn.q_proj.weight", turned=True), ...]
    check(wanted, tensors, "folder")          what is missing, left over, or of another shape or type
    params = load(entries, shapes, tensors)   ours, read piece by piece, each device's part alone
    dict(dump(entries, params, dtype))        theirs

Ours stacks layers, and experts within a layer, in leading axes; theirs has a tensor for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmx import tree
from lmx.formats import Tensor, Wanted
from lmx.formats.codes import DENSE
from lmx.weights import Weight

LEADING = ("{layer}", "{expert}")


@dataclass(frozen=True)
class Entry:
    """One of our parameters and where it lies in theirs.

    ours: its path. theirs: a name with {layer} and {expert} where ours has a leading axis for them.
    turned: theirs is [d_out, d_in]. part: the (start, stop) of their outputs that are ours, where they join several.
    paired: heads whose rotated features lie in neighbouring rows, as Meta's files and GGUF's have them; 0 for halves.
    """

    ours: str
    theirs: str
    turned: bool = False
    part: tuple[int, int] | None = None
    paired: int = 0

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Their names, in the order of our leading axes; `shape` is ours."""
        axes = [mark.strip("{}") for mark in LEADING if mark in self.theirs]
        places = itertools.product(*map(range, shape[: len(axes)]))
        return [self.theirs.format(**dict(zip(axes, place))) for place in places]

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in theirs of what is ours of one of their tensors."""
        return tuple(self._turn(shape[self.n_leading :]))

    @property
    def n_leading(self) -> int:
        return sum(mark in self.theirs for mark in LEADING)

    @property
    def out_axis(self) -> int:
        """The axis of theirs that runs over outputs."""
        return -2 if self.turned else -1

    def take(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        """What `index` asks for of one of our matrices, out of theirs."""
        if self.paired:
            whole = _halves(tensor.read(), self.paired)
            return (np.swapaxes(whole, -1, -2) if self.turned else whole)[index]
        index = self._turn(index)
        if self.part:
            ours = range(*self.part)[index[self.out_axis]]
            index[self.out_axis] = slice(ours.start, ours.stop)
        found = tensor.read(tuple(index))
        return np.swapaxes(found, -1, -2) if self.turned else found

    def _turn(self, axes: Sequence) -> list:
        axes = list(axes)
        return [*axes[:-2], axes[-1], axes[-2]] if self.turned else axes


def check(wanted: Mapping[str, Wanted], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises: ValueError that lists tensors which are missing, unknown, or of another shape or type."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} has no place in this model" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} where the config makes it {list(want.shape)}"
        for name, want in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != want.shape
    ]
    problems += [
        f"{name} is stored as {tensors[name].stored} where the config makes it {' or '.join(want.stored)}"
        for name, want in wanted.items()
        if name in tensors and want.stored and tensors[name].stored not in want.stored
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: weights and config disagree: {'; '.join(problems[:5])}{more}")


def theirs(entries: Iterable[Entry], shapes: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of theirs and its shape. Raises: ValueError if a parameter of ours has no entry."""
    ours = tree.nodes(shapes, Weight)
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        if entry.ours not in ours:
            raise ValueError(f"{entry.ours}: the model has no such parameter; it has {', '.join(ours)}")
        shape = list(entry.inner(ours[entry.ours].shape))
        for name in entry.names(ours[entry.ours].shape):
            before = found.get(name)
            if before is not None:
                shape[entry.out_axis] = (
                    entry.inner(ours[entry.ours].shape)[entry.out_axis] + before[entry.out_axis]
                )
            found[name] = tuple(shape)
    left = set(ours) - {entry.ours for entry in entries}
    if "classes" in left:
        raise ValueError("a head of classes has no place in a released model's format; use the run as it is")
    if left:
        raise ValueError(f"no place for {', '.join(sorted(left))} in that format")
    return found


def load(entries: Iterable[Entry], shapes: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Our parameters. shapes: a tree of ShapeDtypeStruct; each says where its array lies, if not on one device.

    One piece is on the host at a time: what one device holds of one parameter, and one of their tensors.
    """
    by_path = {entry.ours: entry for entry in entries}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(keys, spec):
        entry = by_path[tree.path_str(keys)]
        names = np.array(entry.names(spec.shape), dtype=object)
        n_lead = entry.n_leading

        def piece(index):
            sizes = [len(range(n)[s]) for n, s in zip(spec.shape, index)]
            found = np.empty(sizes, spec.dtype)
            here = np.ravel(names.reshape(spec.shape[:n_lead])[index[:n_lead]])
            for place, name in zip(np.ndindex(*sizes[:n_lead]), here):
                found[place] = entry.take(tensors[name], index[n_lead:]).astype(spec.dtype)
            return found

        return jax.make_array_from_callback(spec.shape, spec.sharding or one, piece)

    return jax.tree_util.tree_map_with_path(read, shapes)


def stacked(params: Any) -> Any:
    """Parameters whose layers are a tuple, as mixed precision leaves them, with these as the stack that entries name.

    Raises: ValueError if the layers are not represented alike.
    """
    blocks = params["blocks"]
    if not isinstance(blocks, tuple):
        return params
    if len({*map(jax.tree.structure, blocks)}) > 1:
        raise ValueError(f"blocks: its layers are quantized in several ways; make them all dense ({DENSE})")
    return {**params, "blocks": tree.stack(blocks)}


def dump(entries: Iterable[Entry], params: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, one at a time, in the order of the entries.

    Raises: ValueError if a number is too large for the dtype.
    """
    ours = tree.nodes(params, Weight)
    for parts in together(entries).values():
        shape = ours[parts[0].ours].shape
        for name, place in zip(parts[0].names(shape), np.ndindex(*shape[: parts[0].n_leading])):
            pieces = [np.asarray(ours[entry.ours][place]) for entry in parts]
            pieces = [np.swapaxes(x, -1, -2) if entry.turned else x for entry, x in zip(parts, pieces)]
            whole = np.concatenate(pieces, parts[0].out_axis)
            if parts[0].paired:
                whole = pairs(whole, parts[0].paired)
            with np.errstate(over="ignore"):
                rounded = np.ascontiguousarray(whole.astype(dtype))
            if np.isinf(rounded).any() and not np.isinf(whole).any():
                raise ValueError(
                    f"{name} holds {np.abs(whole).max():.3g}, too large for {dtype}; use bfloat16"
                )
            yield name, rounded


def together(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Their names -> the entries that one tensor joins."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.theirs, []).append(entry)
    return found


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with feature pairs (2i, 2i + 1) brought to (i, i + d/2)."""
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(rows.shape)


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with feature pairs (i, i + d/2) brought to (2i, 2i + 1), as `Entry.paired` files have them."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(rows.shape)
