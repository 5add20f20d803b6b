"""Any per-token loss, computed a slice of T at a time, so that [B, T, V] never exists, or only where it counts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.losses.base import Loss

LOGITS = 1 << 25


@dataclass(frozen=True)
class Chunked(Loss):
    """The same values and gradients as `loss`, holding logits of [B, size, V] instead of [B, T, V].

    Slices of `size` positions go through `jax.lax.scan`; each computes its logits, and computes them again in
    the backward pass (one more head matmul is the price). A last, shorter slice takes what remains when
    `size` does not divide T. Cut are `out.hidden`, every batch entry [B, T, ...], and the `hidden` of a batch
    entry that is itself a model's answer (a teacher's); everything else is passed whole.
    Args:
      size: positions in a slice; memory is B * size * V * 4 bytes, a few times over.
    Raises: ValueError for a size below 1, or a loss that is not local.
    Source: for the problem, Wijmans et al. 2024 (Cut Your Losses), arXiv:2411.09009, whose kernel cuts V
      too; here T is cut, with rematerialisation (Chen et al. 2016, arXiv:1604.06174).
    """

    loss: Loss
    size: int = 256

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Chunked: size={self.size} positions; use 1 or more, such as 256")
        if not self.loss.local:
            raise ValueError(
                f"Chunked: {self.loss} reads more than its own positions, and no logits [B, T, V]; use it bare"
            )

    @classmethod
    def fitting(cls, loss: Loss, n_rows: int, vocab_size: int) -> Chunked:
        """In slices of 16 to 256 positions, as long as B * size * V stays within LOGITS."""
        return cls(loss, min(256, max(16, LOGITS // (n_rows * vocab_size))))

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        n_rows, n_positions = out.hidden.shape[:2]
        if n_positions <= self.size:
            return self.loss(out, batch)
        cut, whole = _split(batch, (n_rows, n_positions))
        slice_loss = _of_slice(self.loss, out, whole)
        full = n_positions // self.size * self.size
        scanned = jax.tree.map(lambda x: _stack(x[:, :full], self.size), (out.hidden, cut))
        body = jax.checkpoint(slice_loss, prevent_cse=False)
        _, loss = jax.lax.scan(lambda _, xs: (None, body(*xs)), None, scanned)
        loss = jnp.moveaxis(loss, 0, 1).reshape(n_rows, full)
        if full == n_positions:
            return loss
        tail = jax.tree.map(lambda x: x[:, full:], (out.hidden, cut))
        return jnp.concatenate([loss, jax.checkpoint(slice_loss)(*tail)], axis=1)


@dataclass(frozen=True)
class Counted(Loss):
    """The same as `loss` on the tokens that count, and 0 on the others: of short answers to long questions, a share of
    the head's work.

    The positions of a row are sorted, those that count first, and of all rows as many are computed as the fullest one
    needs: a sixteenth, a quarter, or all of them, in slices. So each row keeps its place on a mesh.
    Args:
      mask: the batch entry that says what counts, as in `Term`.
      size: positions in a slice, as in `Chunked`.
    Raises: ValueError for a size below 1, or a loss that is not local.
    """

    loss: Loss
    mask: str = "loss_mask"
    size: int = 256

    def __post_init__(self):
        Chunked(self.loss, self.size)

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        counts = batch[self.mask] != 0
        T = counts.shape[1]
        order = jnp.argsort(~counts, axis=1, stable=True)
        cut, whole = _split(batch, counts.shape)
        loss = _of_slice(Chunked(self.loss, self.size), out, whole)
        lengths = sorted({-(-T // 16), -(-T // 4), T})

        def first(n, hidden, cut):
            found = loss(*jax.tree.map(lambda x: _at(x, order[:, :n]), (hidden, cut)))
            return jnp.pad(found, [(0, 0), (0, T - n)])

        enough = (counts.sum(1).max() > jnp.array(lengths[:-1], jnp.int32)).sum()
        branches = [functools.partial(first, n) for n in lengths]
        # Around the branches, which would else keep what the largest of them needs for the backward pass.
        chosen = jax.checkpoint(lambda *xs: jax.lax.switch(enough, branches, *xs))(out.hidden, cut)
        return jnp.where(counts, _at(chosen, jnp.argsort(order, 1)), 0.0)


def _at(x, order):
    """x [B, T, ...] at positions [B, n] of each row."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)


def _of_slice(loss, out, whole):
    return lambda hidden, cut: loss(dataclasses.replace(out, hidden=hidden), _join(whole, cut))


def _split(batch, shape):
    """(entries to cut, entries to pass whole); of another model's answer the hidden states are cut."""
    cut, whole = {}, {}
    for name, value in batch.items():
        if hasattr(value, "hidden"):
            cut[name], whole[name] = value.hidden, value
        elif hasattr(value, "shape") and value.shape[:2] == shape:
            cut[name] = value
        else:
            whole[name] = value
    return cut, whole


def _join(whole, cut):
    return whole | {
        name: dataclasses.replace(whole[name], hidden=value) if name in whole else value
        for name, value in cut.items()
    }


def _stack(x, size):
    """[B, n * size, ...] -> [n, B, size, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
