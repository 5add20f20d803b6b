"""Structured pruning: a smaller model of the same kind, made of the parts of a larger one that are worth most.

    found = worth(config, layers(config), params, tokens)                  # tokens [N, T] of a calibration text
    config, params = shrink(config, params, found, n_layers=15, d_ff=768)  # to be healed by training

    layer l        1 - mean cos(x_l, x_{l+1})                 how far it turns what passes through (Block Influence)
    heads g        mean |W_o[g]^T y_g|^2                      what a group of heads that share keys adds to the stream
    unit i         mean h_i^2 |W_down[i]|^2                   what a unit of the feed-forward layer adds to it
    feature i      mean over matrices that read the stream of the share of mean x_i^2 |W[i]|^2, x after the norm

Layers, and one set of features, are chosen for the whole model; heads and units in each layer for itself. Query heads
go with the keys and values they share. A norm that reads fewer features has its scale multiplied by what their size is,
measured, beside that of all, so that the matrices after it read numbers as large as before.

Source: Men et al. 2024 (ShortGPT), arXiv:2403.03853, section 3.1, for layers; Muralidharan et al. 2024 (Minitron),
arXiv:2407.14679, section 2.2, for the rest. Minitron takes activations alone, in means of absolute values or norms;
here mean squares are weighed by the matrix that reads them, as in Sun et al. 2023 (Wanda), arXiv:2306.11695, since a
part that nothing reads is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx import tree
from lmx.nn import MoeConfig
from lmx.ops.position import Sinusoidal
from lmx.weights import Weight

AXES = {
    "blocks/attn/q/w": ("features", "queries"),
    "blocks/attn/[kv]/w": ("features", "keys"),
    "blocks/attn/o/w": ("queries", "features"),
    "blocks/attn/q/b": ("queries",),
    "blocks/attn/[kv]/b": ("keys",),
    "blocks/mlp/up/w|blocks/mlp/gate/w": ("features", "units"),
    "blocks/mlp/up/b|blocks/mlp/gate/b": ("units",),
    "blocks/mlp/down/w": ("units", "features"),
    "blocks/attn/o/b|blocks/mlp/down/b|blocks/*_norm*/*|norm/*": ("features",),
    "embed|position_table": (None, "features"),
    "head|classes": ("features", None),
}
"""Pattern of paths -> what the axes of a parameter run over, after that of the layers."""
JOINT = {"blocks/attn/q_norm/*": ("queries",), "blocks/attn/k_norm/*": ("keys",)}
EACH_HEAD = {"blocks/attn/[qk]_norm/*": (None,)}


class Worth(NamedTuple):
    """How much each part does on some text; more is more. Heads are in groups that share keys, K of them.

    sizes: path of a norm that reads the residual stream -> mean squares of what it has normed, before its scale.
    """

    layers: Float[np.ndarray, " L"]
    heads: Float[np.ndarray, "L K"]
    units: Float[np.ndarray, "L F"]
    features: Float[np.ndarray, " D"]
    sizes: dict[str, Float[np.ndarray, "*L D"]]

    def shuffled(self, seed: int) -> Worth:
        """The same numbers in another order: parts chosen by it are chosen at random."""
        draw = np.random.default_rng(seed)
        mixed = {name: draw.permuted(getattr(self, name), axis=-1) for name in self._fields[:-1]}
        return self._replace(**mixed)


def worth(
    config: Any,
    layers: Any,
    params: Any,
    tokens: Int[Array, "N T"],
    *,
    batch_size: int = 8,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> Worth:
    """What each part of a model does while it reads tokens; every one counts.

    Args:
      layers: the model's parts, `lmx.models.layers(config)`.
      seen: called with the layers done and their number.
    Raises: ValueError if the model has experts, adapters or codes, or numbers that are not finite.
    """
    _check(config, params)
    K, offset = config.attention.kv_heads, config.norm.offset

    @jax.jit
    def one(rest, of_layer, i, x):
        y, stats = layers.layer(rest, of_layer, i, x)
        attn, mlp = of_layer["attn"], of_layer["mlp"]
        a, b = x.astype(jnp.float32), y.astype(jnp.float32)
        apart = 1 - (a * b).sum(-1) / jnp.maximum(
            jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-30
        )
        o, read = attn["o"]["w"], stats["attn"]["o"]["w"].gram
        o, read = o.reshape(K, -1, o.shape[-1]), read.reshape(K, len(read) // K, K, -1)
        heads = jnp.einsum("kid,kikj,kjd->k", o, read, o)
        units = jnp.diag(stats["mlp"]["down"]["w"].gram) * _norms(mlp["down"]["w"])
        of_attn, of_mlp = (jnp.diag(s.gram) for s in (stats["attn"]["q"]["w"], stats["mlp"]["up"]["w"]))
        attn_reads = of_attn * sum(_norms(attn[name]["w"]) for name in "qkv")
        mlp_reads = of_mlp * sum(_norms(mlp[name]["w"]) for name in ("up", "gate") if name in mlp)
        features = jnp.stack([attn_reads, mlp_reads])
        sizes = {
            name: size / jnp.square(of_layer[name]["scale"] + offset)
            for name, size in (("attn_norm", of_attn), ("mlp_norm", of_mlp))
        }
        n = stats["attn"]["q"]["w"].n
        return y, (apart.mean(), heads / n, units / n, features / n, jax.tree.map(lambda x: x / n, sizes))

    @jax.jit
    def last(params, x):
        out = layers.leave(params, x)
        head = out.head.dense() if isinstance(out.head, Weight) else out.head
        size = jnp.square(out.hidden.astype(jnp.float32)).mean((0, 1))
        return size * _norms(head), size / jnp.square(params["norm"]["scale"] + offset)

    rest = {name: x for name, x in params.items() if name != "blocks"}
    n_layers = tree.depth(params["blocks"])
    parts = range(0, len(tokens), batch_size)
    xs = [layers.enter(params, jnp.asarray(tokens[i : i + batch_size])) for i in parts]
    rows = np.array([len(x) for x in xs], np.float64) / len(tokens)

    def mean(found):
        found = jax.tree.map(lambda *x: np.tensordot(rows, np.asarray(x, np.float64), 1), *found)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(found[:-1])):
            raise ValueError("worth: what the model makes of this text is not finite; look at its weights")
        return found

    made = []
    for i in range(n_layers):
        of_layer = tree.layer(params["blocks"], i)
        xs, found = zip(*(one(rest, of_layer, i, x) for x in xs))
        made.append(mean(found))
        seen(i + 1, n_layers)
    of_head, size = mean([last(params, x) for x in xs])
    influence, heads, units, features, sizes = jax.tree.map(lambda *x: np.stack(x), *made)
    reads = np.concatenate([*features, of_head[None]])
    features = (reads / np.maximum(reads.sum(-1, keepdims=True), 1e-30)).mean(0)
    read = config.placement in ("pre", "sandwich")
    sizes = {f"blocks/{name}": x for name, x in sizes.items() if read} | ({"norm": size} if read else {})
    return Worth(influence, heads, units, features, sizes)


def spread(n: int, of: int) -> tuple[int, ...]:
    """n of the numbers 0 to of - 1, evenly, the first and the last among them; (0,) for one.

    >>> spread(4, 10)
    (0, 3, 6, 9)
    """
    return tuple(int(i) for i in np.linspace(0, of - 1, n).round())


def smaller(
    config: Any,
    *,
    n_layers: int | Sequence[int] | None = None,
    n_heads: int | None = None,
    d_ff: int | None = None,
    d_model: int | None = None,
) -> Any:
    """The configuration that `shrink` gives; None leaves a size as it is. n_layers: how many, or which.

    Heads keep their width, and local layers stay local; which those are follows from n_layers alone where every layer
    is like the others.
    Raises: ValueError for sizes that are not smaller or that the model's kind rules out.
    """
    a, D, L = config.attention, config.d_model, config.n_layers
    N, K, H, F = a.n_heads, a.kv_heads, a.width(D), config.mlp.width(D)
    if isinstance(n_layers, int | None):
        _between("n_layers", n_layers, L)
        layers = None if n_layers in (None, L) else range(n_layers)
    else:
        layers = tuple(n_layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= L:
            raise ValueError(
                f"shrink: n_layers={layers} are not numbers of layers in order; use some of 0 to {L - 1}"
            )
    for name, size, most in (("n_heads", n_heads, N), ("d_ff", d_ff, F), ("d_model", d_model, D)):
        _between(name, size, most)
    G = N // K
    if n_heads is not None and n_heads % G:
        fits = ", ".join(str(G * k) for k in range(1, K + 1))
        raise ValueError(f"shrink: n_heads={n_heads} parts heads that share keys, {G} each; use {fits}")
    if n_heads not in (None, N) and config.position.biased:
        raise ValueError(
            f"shrink: n_heads={n_heads}: {config.position} tells heads apart by their number; prune other parts"
        )
    if d_model not in (None, D) and isinstance(config.position, Sinusoidal):
        raise ValueError(
            f"shrink: d_model={d_model}: {config.position} adds to each feature by its number; prune other parts"
        )
    changed = {}
    if layers is not None:
        changed["n_layers"] = len(layers)
        if a.local:
            kinds = "".join(a.local.pattern[i % len(a.local.pattern)] for i in layers)
            a = replace(a, local=replace(a.local, pattern=kinds))
    if d_model not in (None, D) or n_heads not in (None, N):
        kept = (n_heads or N) // G
        a = replace(a, n_heads=kept * G, n_kv_heads=None if a.n_kv_heads is None else kept, head_dim=H)
        changed["d_model"] = d_model or D
        changed["mlp"] = replace(config.mlp, d_ff=F)
    if d_ff not in (None, F):
        changed["mlp"] = replace(config.mlp, d_ff=d_ff)
    return replace(config, attention=a, **changed)


def shrink(
    config: Any,
    params: Any,
    worth: Worth,
    *,
    n_layers: int | Sequence[int] | None = None,
    n_heads: int | None = None,
    d_ff: int | None = None,
    d_model: int | None = None,
) -> tuple[Any, Any]:
    """(configuration, parameters) of the parts that are worth most, in their old order; of equals the first.

    Args:
      n_layers: how many, or which, such as `spread(15, 30)`.
      n_heads: of queries, in whole groups that share keys. None leaves a size as it is, and so does its own number:
        no parameter then changes.
    Raises: ValueError as `smaller`, and if the model has experts, adapters, codes or a prompt, or `worth` is of
      another model.
    """
    _check(config, params)
    a, D = config.attention, config.d_model
    K, H, L, F = a.kv_heads, a.width(D), config.n_layers, config.mlp.width(D)
    shapes = [x.shape for x in worth[:-1]]
    if shapes != [(L,), (L, K), (L, F), (D,)]:
        raise ValueError(f"shrink: worth has shapes {shapes}, and this is another model; measure it anew")
    if isinstance(n_layers, int) and n_layers != L:
        _between("n_layers", n_layers, L)
        n_layers = tuple(int(i) for i in _best(worth.layers, n_layers))
    small = smaller(config, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, d_model=d_model)
    every = isinstance(n_layers, int | None)
    layers = np.arange(L) if every else np.array(n_layers)
    kept: dict[str, Any] = {"layers": None if every else layers, "features": None, "units": None}
    heads = None
    if small.attention.kv_heads != K:
        heads = _best(worth.heads[layers], small.attention.kv_heads)
    for name, width in (("queries", a.n_heads // K * H), ("keys", H)):
        columns = None if heads is None else heads[..., None] * width + np.arange(width)
        kept[name] = None if heads is None else columns.reshape(len(layers), -1)
    if small.mlp.width(small.d_model) != F:
        kept["units"] = _best(worth.units[layers], small.mlp.d_ff)
    if small.d_model != D:
        kept["features"] = _best(worth.features, small.d_model)
    axes = AXES | (JOINT if a.qk_norm == "joint" else EACH_HEAD)
    if config.position.biased:
        axes |= {"position_*": (None, None)}
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        blocks = tree.stack(blocks)
    params = tree.map_at(lambda path, x: _cut(path, x, axes, kept), {**params, "blocks": blocks}, "*")
    if kept["features"] is not None:
        params = _rescaled(config, params, worth.sizes, kept["layers"], kept["features"])
    return small, params


def _check(config, params) -> None:
    if isinstance(config.mlp, MoeConfig):
        raise ValueError(
            f"shrink: {config.mlp.n_experts} experts: models with experts are not pruned; use one without"
        )
    for path, w in tree.nodes(params, Weight).items():
        if isinstance(w, Weight):
            raise ValueError(
                f"shrink: {path} is {type(w).__name__}; make it plain first: Merge() for adapters, Dense() for codes"
            )
        if path == "prompt" or "/prefix/" in path:
            raise ValueError(f"shrink: {path} was learned for the whole model; take it away first")


def _between(name: str, size: int | None, most: int) -> None:
    if size is not None and not 1 <= size <= most:
        raise ValueError(f"shrink: {name}={size}; the model has {most}, use 1 to {most}")


def _best(scores: np.ndarray, n: int) -> np.ndarray:
    """The places of the n largest of the last axis, in order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :n], axis=-1)


def _cut(path: str, x: Array, axes: dict, kept: dict) -> Array:
    of_layers = path.startswith("blocks/")
    names = next(names for pattern, names in reversed(axes.items()) if tree.matches(path, pattern))
    if of_layers and kept["layers"] is not None:
        x = x[kept["layers"]]
    for axis, name in enumerate(names):
        at = kept[name] if name else None
        if at is None:
            continue
        if at.ndim == 2:
            x = jax.vmap(lambda x, at, axis=axis: jnp.take(x, at, axis))(x, at)
        else:
            x = jnp.take(x, at, axis + of_layers)
    return x


def _rescaled(config, params, sizes, layers, features) -> Any:
    """Norms as large as they were on the features left, and embeddings that are multiplied by less."""
    offset, growth = config.norm.offset, (config.d_model / len(features)) ** 0.5

    def times(norm, factor):
        return {**norm, "scale": (norm["scale"] + offset) * factor - offset}

    if config.norm.kind == "rms":
        for path, size in sizes.items():
            size = size if layers is None or path == "norm" else size[layers]
            factor = jnp.asarray(np.sqrt(size[..., features].mean(-1, keepdims=True)), jnp.float32)
            if path == "norm":
                params = {**params, "norm": times(params["norm"], factor)}
            else:
                name = path.removeprefix("blocks/")
                params = {
                    **params,
                    "blocks": {**params["blocks"], name: times(params["blocks"][name], factor)},
                }
    if config.scale_embed:
        params = {**params, "embed": params["embed"] * growth}
        if config.tie_head:
            norm = times(params["norm"], 1 / growth)
            params = {**params, "norm": norm | ({"bias": norm["bias"] / growth} if "bias" in norm else {})}
    return params


def _norms(w: Float[Array, "d_in d_out"]) -> Float[Array, " d_in"]:
    return jnp.square(w.astype(jnp.float32)).sum(-1)
