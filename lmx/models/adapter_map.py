"""Adapters of low rank on matrices as others name and join them, in both directions.

    for entry, name, low in dump(entries, alone): ...       theirs, one for each of their matrices
    alone = load(entries, shapes, found)                    ours, as `lmx.adapt.adapter` gives it

A matrix of theirs may join several of ours, as the queries, keys and values of GPT-2: adapters of ours then stand side
by side in one of their ranks together, and one of theirs gives each of ours its A and the columns of its B that are
ours. An adapter is a leaf without a base, `LowRank` or `Dora`; in theirs its arrays are numpy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmx import tree
from lmx.models.weight_map import Entry, together
from lmx.weights import Dora, LowRank, Transposed, Weight, dense, is_matrix

Low = LowRank | Dora
EMBED = "embed"
"""Its adapter is that of the transpose, [D, V]."""


def matrices(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that an adapter may stand on."""
    return [entry for entry in entries if is_matrix(entry.ours)]


def dump(entries: Iterable[Entry], alone: Any) -> Iterator[tuple[Entry, str, Low]]:
    """(an entry of that name, their name, adapter) for each of their matrices that has one. Experts that lie in one
    tensor have one adapter, with a leading axis.

    Raises: ValueError for an adapter that is neither LoRA nor DoRA, or has no place there.
    """
    ours = {path: _plain(path, w) for path, w in tree.nodes(alone, Weight).items()}
    stands = matrices(entries)
    left = ours.keys() - {entry.ours for entry in stands}
    if left:
        raise ValueError(f"no place for an adapter of {', '.join(sorted(left))} in that format")
    for parts in together(stands).values():
        entry, lows = parts[0], {part: ours[part.ours] for part in parts if part.ours in ours}
        if lows:
            low = lows[entry] if entry.part is None else _side_by_side(parts, lows)
            for name, place in zip(entry.names(low.a.shape), np.ndindex(*low.a.shape[: entry.n_leading])):
                yield entry, name, _each(low, lambda x, place=place: x[place])


def load(entries: Iterable[Entry], shapes: Any, found: Mapping[str, Low], params: Any = None) -> Any:
    """The tree of our adapters, with None for all that has none; layers that lack one get zeros.

    found: by their names. shapes: of our parameters. params: the parameters themselves, if at hand.
    Raises: ValueError for DoRA that some layers lack, without the params from which their lengths are taken.
    """
    by_path = {}
    sizes, bases = tree.nodes(shapes), tree.nodes(params, Weight)
    for entry in matrices(entries):
        shape = sizes[entry.ours].shape
        lows = [found.get(name) for name in entry.names(shape)]
        if any(low is not None for low in lows):
            own = slice(*entry.part) if entry.part else slice(None)
            lows = [low and replace(low, b=low.b[..., own], **_lengths(low, own)) for low in lows]
            lows = _filled(entry.ours, lows, shape, bases.get(entry.ours))
            stack = _stacked(lows, shape[: entry.n_leading])
            by_path[entry.ours] = Transposed(stack) if entry.ours == EMBED else stack
    return tree.map_at(lambda path, _: by_path.get(path), shapes, "*")


def _plain(path: str, w: Weight) -> Low:
    """With arrays of numpy."""
    low = w.base if path == EMBED and isinstance(w, Transposed) else w
    if not isinstance(low, LowRank if path == EMBED else Low):
        raise ValueError(
            f"{path}: {type(low).__name__} has no counterpart there; merge it, and extract a LoRA of what that made"
        )
    return _each(low, np.asarray)


def _side_by_side(parts: list[Entry], lows: dict[Entry, Low]) -> Low:
    """One adapter for the matrix that the parts make: B [.., R, d_out] is block-diagonal, unless all share an A."""
    first, d_out = next(iter(lows.values())), max(part.part[1] for part in parts)
    if any(isinstance(low, Dora) for low in lows.values()):
        if len(lows) < len(parts) or not all(isinstance(low, Dora) for low in lows.values()):
            names = ", ".join(part.ours for part in parts)
            raise ValueError(
                f"DoRA on {', '.join(part.ours for part in lows)} alone; there it takes all of {names}"
            )
        first = replace(first, magnitude=np.concatenate([low.magnitude for low in lows.values()], -1))
    share = all(low.scale == first.scale and np.array_equal(low.a, first.a) for low in lows.values())
    if share and len(lows) == len(parts):
        return replace(first, b=np.concatenate([low.b for low in lows.values()], -1))
    a = np.concatenate([low.a for low in lows.values()], -1)
    b, at = np.zeros((*a.shape[:-2], a.shape[-1], d_out), a.dtype), 0
    for part, low in lows.items():
        end = at + low.a.shape[-1]
        b[..., at:end, slice(*part.part)] = low.b * (low.scale / first.scale)
        at = end
    return replace(_of_rank(first, at), a=a, b=b)


def _of_rank(low: Low, rank: int) -> Low:
    """With the alpha that keeps its scale at another rank."""
    grown = rank / low.a.shape[-1]
    return replace(low, alpha=low.alpha * (grown**0.5 if low.stabilised else grown))


def _lengths(low: Low, own: slice) -> dict[str, np.ndarray]:
    return {"magnitude": low.magnitude[..., own]} if isinstance(low, Dora) else {}


def _filled(path: str, lows: list[Low | None], shape: tuple[int, ...], base: Any) -> list[Low]:
    """With an adapter that changes nothing where there is none."""
    first = next(low for low in lows if low is not None)
    nothing = replace(first, a=np.zeros_like(first.a), b=np.zeros_like(first.b))
    if None not in lows or isinstance(first, LowRank):
        return [nothing if low is None else low for low in lows]
    if base is None:
        raise ValueError(
            f"{path}: only some layers have DoRA; the lengths of the others are the base's: give params"
        )
    w = np.asarray(dense(base)).reshape(-1, *shape[-2:])
    norm = np.linalg.norm(w, axis=-2, keepdims=True)
    return [replace(nothing, magnitude=norm[i]) if low is None else low for i, low in enumerate(lows)]


def _stacked(lows: list[Low], lead: tuple[int, ...]) -> Low:
    """One adapter of the largest rank, whose B makes up for scales that differ."""
    rank = max(low.a.shape[-1] for low in lows)
    first = lows[0]
    if any(
        (low.a.shape[-1], low.alpha, low.stabilised) != (rank, first.alpha, first.stabilised) for low in lows
    ):
        lows = [replace(low, b=low.b * low.scale, alpha=float(rank), stabilised=False) for low in lows]
        first = lows[0]
    more = [rank - low.a.shape[-1] for low in lows]
    arrays = {
        "a": [np.pad(low.a, ((0, 0), (0, n))) for low, n in zip(lows, more)],
        "b": [np.pad(low.b, ((0, n), (0, 0))) for low, n in zip(lows, more)],
        "magnitude": [low.magnitude for low in lows if isinstance(low, Dora)],
    }
    whole = {name: jnp.asarray(np.stack(x).reshape(*lead, *x[0].shape)) for name, x in arrays.items() if x}
    return replace(first, **whole)


def _each(low: Low, f) -> Low:
    """With f of each of its arrays."""
    return replace(low, **{name: f(x) for name, x in vars(low).items() if hasattr(x, "dtype")})
