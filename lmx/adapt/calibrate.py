"""Quantization that looks at inputs: layer after layer, each on what the quantized ones before it give.

    found = calibrate(layers(config), params, tokens, Gptq(bits=4, group_size=128))
    found.params, found.lost["blocks/0/attn/q/w"]

A method takes the matrices that share an input and what is known of it, and gives a leaf for each:
`Gptq`, `Rounded(Int4())`, and around another `Awq(then=Gptq())` and `Smooth(then=Rounded(W8A8()))`. Within a layer the
output of attention and of the feed-forward layer see what the matrices before them have become ("true sequential").
Each expert is handed to the method by itself, with the tokens that were sent to it. The Gram matrices of one input are
held at a time, or of one layer if not sequential.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx import tree
from lmx.adapt.gptq import gptq, lost
from lmx.adapt.matrices import LAYERS, check, found
from lmx.adapt.quantize import BITS, Int4, Quantize
from lmx.nn import Inputs
from lmx.weights import Quantized, Rotated, Scaled, Weight, dense, quantize
from lmx.weights.quantized import of_codes
from lmx.weights.rotated import hadamard

STAGES = ("*attn/[qkv]/w", "*attn/o/w", "*mlp/*gate/w|*mlp/*up/w", "*mlp/*down/w")
"""The matrices of a layer that read the same, in the order in which a token meets them."""

Method = Callable[[dict[str, Array], Inputs], dict[str, Weight]]
"""(path -> [d_in, d_out], their input) -> path -> leaf."""


@dataclass(frozen=True)
class Gptq:
    """See `lmx.adapt.gptq`. A matrix of which it loses more than plain rounding does is rounded plainly.

    act_order: rows by falling size of their input; costs a gather at each use. damp: share of the mean of H's diagonal
    that is added to it. clip: whether the largest of a group may lie outside its grid where the sum of squares then is
    smaller.
    """

    bits: int = 4
    group_size: int | None = 128
    act_order: bool = True
    damp: float = 0.05
    symmetric: bool = True
    scale_dtype: str = "float16"
    clip: bool = True

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"Gptq: bits={self.bits}; use {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"Gptq: group_size={self.group_size}; use 2 or more, or None for one scale an output"
            )
        if not 0 < self.damp < 1:
            raise ValueError(f"Gptq: damp={self.damp} must lie in (0, 1)")

    def __call__(self, matrices: dict[str, Array], inputs: Inputs) -> dict[str, Weight]:
        return {path: self.of(w, inputs.gram) for path, w in matrices.items()}

    def of(self, w: Float[Array, "d_in d_out"], gram: Float[Array, "d_in d_in"]) -> Quantized:
        solved = gptq(
            w,
            gram,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            act_order=self.act_order,
            damp=self.damp,
            scale_dtype=self.scale_dtype,
            clip=self.clip,
        )
        size = min(self.group_size or w.shape[0], w.shape[0])
        scale = solved.scale.astype(self.scale_dtype)
        found = of_codes(solved.q, scale, solved.zero, self.bits, size, order=solved.order)
        plain = quantize(w, self.bits, size, self.symmetric, scale_dtype=self.scale_dtype)
        if solved.order is not None:
            plain = replace(plain, order=jnp.arange(len(w), dtype=solved.order.dtype))
        worse = lost(w, dense(found), gram) > lost(w, dense(plain), gram)
        return jax.tree.map(lambda x, y: jnp.where(worse, y, x), found, plain)


@dataclass(frozen=True)
class Rounded:
    """Each matrix as a surgery without data makes it; with whole-number activations (W8A8), of calibrated size.

    calibrated: one scale for all inputs of a matrix, from the largest that was seen, instead of one for each row.
    """

    to: Any = Int4()
    calibrated: bool = False

    def __call__(self, matrices: dict[str, Array], inputs: Inputs) -> dict[str, Weight]:
        rounded = {path: self.to.of(w) for path, w in matrices.items()}
        if not self.calibrated:
            return rounded
        scale = (jnp.maximum(inputs.largest.max(), 1e-30) / 127)[None]
        return {path: replace(w, input_scale=scale) for path, w in rounded.items()}


@dataclass(frozen=True)
class Smooth:
    """Inputs divided by s_j = max|x_j|^strength / max|w_j|^(1 - strength), and the matrix multiplied by it, so that
    none stands out among those that are rounded with it.

    Source: Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, section 4.
    """

    strength: float = 0.5
    then: Method = Rounded()

    def __call__(self, matrices: dict[str, Array], inputs: Inputs) -> dict[str, Weight]:
        widest = jnp.stack([jnp.abs(w).max(1) for w in matrices.values()]).max(0)
        largest = jnp.maximum(inputs.largest, 1e-5)
        s = largest**self.strength / jnp.maximum(widest, 1e-5) ** (1 - self.strength)
        return _scaled(matrices, inputs, jnp.maximum(s, 1e-5), self.then)


@dataclass(frozen=True)
class Awq:
    """Inputs divided by s_j = rms(x_j)^strength, with the strength in [0, 1] that loses least of the outputs.

    What is lost is measured with `trial`'s rounding on the inputs' Gram matrix; the paper takes mean|x_j|.
    Source: Lin et al. 2024, arXiv:2306.00978, section 3.2.
    """

    trial: Quantize = Int4()
    then: Method = Rounded()
    steps: int = 20

    def __call__(self, matrices: dict[str, Array], inputs: Inputs) -> dict[str, Weight]:
        rms = jnp.sqrt(jnp.maximum(jnp.diag(inputs.gram) / inputs.n, 1e-12))
        ws = tuple(matrices.values())
        tried = [_normal(rms ** (i / self.steps)) for i in range(self.steps)]
        losses = [float(_awq_loss(ws, inputs.gram, s, self.trial)) for s in tried]
        return _scaled(matrices, inputs, tried[losses.index(min(losses))], self.then)


class Calibrated(NamedTuple):
    """params; lost: path -> share of the output's energy on the calibration inputs that rounding changes; of experts,
    of what all of them give."""

    params: Any
    lost: dict[str, float]


def calibrate(
    layers: Any,
    params: Any,
    tokens: Int[Array, "N T"],
    method: Method | Sequence[Method],
    *,
    where: str = LAYERS,
    batch_size: int = 8,
    sequential: bool = True,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> Calibrated:
    """The parameters with each matrix of the layers whose path fits `where` in the form that `method` gives it.

    Where layers are one by one (`Unstack`), `where` may choose among them: "blocks/2?/*mlp*".
    Args:
      layers: the model's parts, `lmx.models.layers(config)`.
      tokens: what is read to see inputs; every one counts.
      method: for all layers, or one for each.
      sequential: whether matrices see what those before them in their layer have become.
      seen: called with the layers done and their number.
    Raises: ValueError if no matrix fits, if one is none of a layer's products (a router), or, by the matrix's name, if
      inputs or numbers are not finite.
    """
    check({"blocks": params["blocks"]}, where)
    stacked = not isinstance(params["blocks"], tuple)
    one = jax.jit(partial(_looked_at, layers.layer), static_argnames="stage")
    rest = {name: x for name, x in params.items() if name != "blocks"}
    n_layers = tree.depth(params["blocks"])
    xs = _entered(layers, params, tokens, batch_size)
    made, shares = [], {}
    for i in range(n_layers):
        of_layer = tree.layer(params["blocks"], i)
        at = "blocks" if stacked else f"blocks/{i}"
        wanted = {p: w for p, w in found(of_layer).items() if tree.matches(f"{at}/{p}", where)}
        stages = STAGES if sequential else ("*",)
        stages = [[p for p in wanted if tree.matches(p, stage)] for stage in stages]
        left = set(wanted) - {p for stage in stages for p in stage}
        if left:
            raise ValueError(
                f"blocks/{min(left)}: its inputs are not known here; leave it out: where={where!r}"
            )
        for stage in filter(None, stages):
            groups = [stage] if sequential else [[p] for p in stage]
            inputs = _gathered(one, rest, of_layer, i, xs, [group[0] for group in groups])
            for group in groups:
                own = method[i] if isinstance(method, Sequence) else method
                new = _one_stage(own, {p: wanted[p] for p in group}, inputs[group[0]], i, shares)
                of_layer = _with(of_layer, new)
        xs = [one(rest, of_layer, i, x) for x in xs]
        made.append(of_layer)
        seen(i + 1, n_layers)
    return Calibrated({**params, "blocks": _together(made, stacked)}, shares)


def importance(
    layers: Any,
    params: Any,
    tokens: Int[Array, "N T"],
    *,
    batch_size: int = 8,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Float[np.ndarray, "L *E d_in"]]:
    """Path of each matrix of the layers -> the mean square of each of its inputs; 1 for experts that no token reached.

    What a GGUF file's types weigh their errors with (an imatrix of llama.cpp). layers, tokens and seen: as `calibrate`.
    """

    @jax.jit
    def one(rest, of_layer, i, x):
        x, stats = layers.layer(rest, of_layer, i, x)
        found = tree.nodes(stats, Inputs)
        return x, {path: (jnp.diagonal(of.gram, 0, -2, -1), of.n[..., None]) for path, of in found.items()}

    rest = {name: x for name, x in params.items() if name != "blocks"}
    n_layers = tree.depth(params["blocks"])
    xs, made = _entered(layers, params, tokens, batch_size), []
    for i in range(n_layers):
        xs, found = zip(*(one(rest, tree.layer(params["blocks"], i), i, x) for x in xs))
        sums = jax.tree.map(lambda *x: np.asarray(sum(x)), *found)
        made.append({path: np.where(n > 0, x / np.maximum(n, 1), 1) for path, (x, n) in sums.items()})
        seen(i + 1, n_layers)
    return {f"blocks/{path}": np.stack([of[path] for of in made]) for path in made[0]}


def _entered(layers, params, tokens, batch_size):
    return [
        layers.enter(params, jnp.asarray(tokens[i : i + batch_size]))
        for i in range(0, len(tokens), batch_size)
    ]


def _one_stage(method, matrices, inputs, i, shares):
    """The leaves of matrices that share an input."""
    if inputs.n.ndim == 0:
        new = _of_one(method, matrices, inputs, i)
    else:
        each = (jax.tree.map(itemgetter(e), (matrices, inputs)) for e in range(len(inputs.n)))
        made = [_of_one(method, of_expert, _filled(reads), i) for of_expert, reads in each]
        new = tree.stack(made)
    for path, w in new.items():
        share = float(lost(dense(matrices[path]).astype(jnp.float32), dense(w), inputs.gram))
        if not share < float("inf"):
            raise ValueError(f"blocks/{i}/{path}: not finite when quantized; its weights or inputs are not")
        shares[f"blocks/{i}/{path}"] = share
    return new


def _of_one(method, matrices, inputs, i):
    """Leaves of matrices [d_in, d_out]; what stands on top of them, such as adapters, stays there."""
    bare, below = {}, inputs
    for path, w in matrices.items():
        bare[path], below = _base(f"blocks/{i}/{path}", w, inputs)
    if not jnp.isfinite(below.gram).all():
        raise ValueError(
            f"blocks/{i}/{min(matrices)}: its inputs are not finite; look at the layers before it"
        )
    new = method({path: w.astype(jnp.float32) for path, w in bare.items()}, below)
    return {path: _on(matrices[path], w) for path, w in new.items()}


@jax.jit
def _filled(inputs: Inputs) -> Inputs:
    """An expert's inputs, with those that were always 0 as large as the others and apart from them: that few tokens or
    none were sent to it does not say that its weights may be anything."""
    size = jnp.diag(inputs.gram)
    seen = size > 0
    mean = jnp.where(seen.any(), size.mean() / jnp.maximum(seen.astype(jnp.float32).mean(), 1e-30), 1.0)
    n = jnp.maximum(inputs.n, 1.0)
    gram = inputs.gram + jnp.diag(jnp.where(seen, 0.0, mean))
    return Inputs(gram, jnp.where(seen, inputs.largest, jnp.sqrt(mean / n)), n)


def _base(path, w, inputs: Inputs) -> tuple[Array, Inputs]:
    """The plain matrix below what stands on it, and what it reads."""
    if not isinstance(w, Weight):
        return w, inputs
    if isinstance(w, Quantized):
        raise ValueError(f"{path} is quantized already, to {w.bits} bits; make it dense first: Dense()")
    if isinstance(w, Scaled):
        inputs = _divided(inputs, 1 / w.scale)
    if isinstance(w, Rotated):
        turned = hadamard(inputs.gram * w.signs[:, None] * w.signs[None])
        gram = hadamard(turned.T)
        inputs = Inputs(gram, jnp.sqrt(jnp.maximum(jnp.diag(gram), 0.0)), inputs.n)  # no input is larger
    return _base(path, w.base, inputs)


def _on(old, new):
    return replace(old, base=_on(old.base, new)) if isinstance(old, Weight) else new


def _divided(inputs: Inputs, s: Float[Array, " d_in"]) -> Inputs:
    return Inputs(inputs.gram / s[:, None] / s[None], inputs.largest / s, inputs.n)


def _scaled(matrices, inputs, s, then) -> dict[str, Weight]:
    made = then({path: w * s[:, None] for path, w in matrices.items()}, _divided(inputs, s))
    return {path: Scaled(w, 1 / s) for path, w in made.items()}


def _normal(s):
    return s / jnp.sqrt(s.max() * s.min())


@jax.jit(static_argnums=3)
def _awq_loss(ws, gram, s, trial):
    total = jnp.zeros(())
    for w in ws:
        apart = w - dense(trial.of(w * s[:, None])) / s[:, None]
        total += (apart * (gram @ apart)).sum()
    return total


def _looked_at(layer, rest, of_layer, i, x, stage: tuple[str, ...] = ()):
    """What the next layer reads, or the inputs of the matrices of a stage alone, without what comes after them."""
    x, stats = layer(rest, of_layer, i, x)
    return [_at(stats, path) for path in stage] if stage else x


def _gathered(one, rest, of_layer, i, xs, stage) -> dict[str, Inputs]:
    """The inputs of some matrices of a layer over all batches."""
    total: dict[str, Inputs] = {}
    for x in xs:
        for path, new in zip(stage, one(rest, of_layer, i, x, stage=tuple(stage))):
            old = total.get(path, Inputs(0.0, 0.0, 0.0))
            total[path] = Inputs(old.gram + new.gram, jnp.maximum(old.largest, new.largest), old.n + new.n)
    return total


def _with(of_layer, new: dict[str, Any]):
    def one(keys, x):
        return new.get(tree.path_str(keys), x)

    return jax.tree_util.tree_map_with_path(one, of_layer, is_leaf=lambda x: isinstance(x, Weight))


def _at(stats, path):
    for name in path.split("/"):
        stats = stats[name]
    return stats


def _together(made: Iterable[Any], stacked: bool) -> Any:
    """A stack of layers, or a tuple of them where they differ in their leaves' settings."""
    made = list(made)
    if stacked and len({jax.tree.structure(x) for x in made}) == 1:
        return tree.stack(made)
    return tuple(made)
