"""The Transformer: embed, L blocks, norm, head; as `init`, `apply` over whole sequences, `step` with a cache.

h_0 = embed[tokens];  h_l = block(h_{l-1});  logits = norm(h_L) W_head        (Vaswani et al. 2017, decoder only)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from lmx import tree, values
from lmx.mesh import ROWS, Rules, fit
from lmx.nn import KEPT, PRODUCT, Block, BlockConfig, Context, Norm, weight
from lmx.ops import experts, flash
from lmx.ops.attention import attention
from lmx.ops.mask import Where
from lmx.ops.position import Position, RoPE
from lmx.weights import Quantized, Transposed, Weight, leaf, linear, lookup, static

RULES: Rules = (
    ("*/experts/up/w*|*/experts/gate/w*", ("fsdp", None, "tensor")),
    ("*/experts/down/w*", ("fsdp", "tensor", None)),
    ("*/router/w*", ("fsdp", None)),
    ("*/q/w*|*/k/w*|*/v/w*|*/up/w*|*/gate/w*|head*", ("fsdp", "tensor")),
    ("*/o/w*|*/down/w*", ("tensor", "fsdp")),
    ("embed*", ("tensor", "fsdp")),
    ("*/prefix/*", ("tensor",)),
    ("prompt|classes|project", ()),
    ("*/q/b|*/k/b|*/v/b|*/up/b|*/gate/b", ("tensor",)),
    ("*/b|*scale|*bias|position_*", ()),
)
"""Mesh axes of the last dimensions of each parameter, as `lmx.mesh.shardings` reads them."""

AIDS = ("project",)
"""Parameters beside a model's own that only its training uses: whoever reads the trained model does not get them."""

REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


@dataclass(frozen=True)
class TransformerConfig(BlockConfig):
    """vocab_size: None means the tokenizer's. tie_head: the head is the embedding, transposed (Press & Wolf 2017).

    scale_embed: embeddings times sqrt(d_model) (Vaswani et al. 2017, section 3.4). logit_softcap: c tanh(logit / c).
    embed_noise: a in NEFTune (Jain et al. 2023, arXiv:2310.05914): while training, uniform noise within
    a / sqrt(length * d_model) on every embedding, the length being that of the packed segment; 5 to 15 are usual for
    fine-tuning on instructions, 0 is off.
    init_std: of embedding and input matrices; the two matrices that write to the residual stream get
    init_std / sqrt(2 n_layers) (Radford et al. 2019, section 2.3). dtype: of activations; parameters are float32.
    remat: "none", "dots" (keep matmul results) or "full" (keep layer inputs). unroll: layers per scan step;
    None means all of them on a CPU with up to 16 layers and no remat, else 1, as in `step`.
    """

    vocab_size: int | None = None
    d_model: int = 256
    n_layers: int = 4
    position: Position = RoPE()
    tie_head: bool = True
    scale_embed: bool = False
    logit_softcap: float | None = None
    embed_noise: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    unroll: int | None = None

    def __post_init__(self):
        super().__post_init__()
        values.check(self, vocab_size="[1, inf) or None", d_model="[1, inf)", n_layers="[1, inf)")
        values.check(
            self,
            logit_softcap="(0, inf) or None",
            init_std="[0, inf)",
            embed_noise="[0, inf)",
            unroll="[1, inf) or None",
        )
        self.attention.width(self.d_model)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'TransformerConfig: dtype={self.dtype!r}; use "float32" or "bfloat16"')
        if self.remat not in ("none", *REMAT):
            raise ValueError(f'TransformerConfig: remat={self.remat!r}; use "none", "dots" or "full"')


@leaf
class Routing:
    """What the routers of a model with experts answer: logits float32; each token goes to its top_k experts."""

    logits: Float[Array, "L B T E"]
    top_k: int = static()


@leaf
class Out:
    """What a forward pass returns: hidden [B, T, D] after the last norm, and the head that makes logits of it, of words
    or of the classes of `lmx.adapt.Classes`.

    routing: for losses on the routers; None without experts.
    kept: what each layer was asked for, [L, B, T, ...] by its name among `lmx.nn.KEPT`, and with it the matrix
      `project` of `lmx.adapt.Project`, where there is one; None if nothing was asked for.
    """

    hidden: Float[Array, "B T D"]
    head: Array | Weight
    softcap: float | None = static(default=None)
    routing: Routing | None = None
    kept: dict[str, Any] | None = None

    @cached_property
    def logits(self) -> Float[Array, "B T V"]:
        """Float32 sums of products in the dtype of `hidden`, computed when first read."""
        logits = linear(self.hidden, self.head, "float32")
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


@leaf
class Cache:
    """Keys and values of the tokens seen so far; slot s of row b is empty while segment_ids[b, s] is 0.

    scales: of k and of v where they are int8 codes, float32 [L, B, K, 1, S] each; () where they are floats.
    For `unstacked` parameters k, v and each of scales are tuples of L arrays.
    """

    k: Shaped[Array, "L B K H S"] | tuple[Shaped[Array, "B K H S"], ...]
    v: Shaped[Array, "L B K S H"] | tuple[Shaped[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, B]
    scales: tuple = ()

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is kept: that of a model's activations, or int8."""
        return jax.tree.leaves(self.k)[0].dtype

    def rewind(self, length: Int[Array, " B"]) -> Cache:
        """Without the tokens of row b from number length[b] on; a row that holds fewer stays as it is."""
        kept = self.positions < length[:, None]
        segment_ids = jnp.where(kept, self.segment_ids, 0)
        return replace(self, segment_ids=segment_ids, length=jnp.minimum(self.length, length))

    def resize(self, length: int) -> Cache:
        """With `length` slots per row: empty ones are added, or the last ones and what they hold cut off."""

        def fit(axis, x):
            axis %= x.ndim
            x = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
            return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])

        return replace(
            self,
            k=jax.tree.map(partial(fit, -1), self.k),
            v=jax.tree.map(partial(fit, -2), self.v),
            positions=fit(-1, self.positions),
            segment_ids=fit(-1, self.segment_ids),
            scales=jax.tree.map(partial(fit, -1), self.scales),
        )

    def take(self, at: Int[Array, " R"]) -> Cache:
        """Rows at[0], at[1], ... alone."""
        return jax.tree.map(lambda x: x[_rows(x, at)], self)

    def place(self, new: Cache, at: Int[Array, " R"]) -> Cache:
        """With row i of `new` in row at[i], cut to as many slots.

        Raises: ValueError if `new` keeps its numbers in another dtype.
        """
        _check_kept(new, self.dtype)
        new = new.resize(self.positions.shape[1])
        return jax.tree.map(lambda x, y: x.at[_rows(x, at)].set(y), self, new)


def _check_kept(cache: Cache, dtype: str | jnp.dtype) -> None:
    if cache.dtype != dtype:
        raise ValueError(
            f"this cache keeps keys and values as {cache.dtype}, and {jnp.dtype(dtype)} is wanted here; make it with "
            "`new_cache` of the model that reads it"
        )


def _rows(x, at):
    """The index of some rows of an array of a Cache, which in a stack of layers are its second axis."""
    return (slice(None), at) if x.ndim == 5 else at


class Model(NamedTuple):
    """Pure functions of one configuration.

    init(key) -> params
    apply(params, batch, key=None, keep=()) -> Out; batch has tokens [B, T], and positions and segment_ids if packed;
      a key turns dropout and noise on; `Out.kept` has what `keep` names of `lmx.nn.KEPT`.
    step(params, cache, tokens [B, t], valid [B, t] or None) -> (Out, cache): the next t tokens of each row;
      valid is False on right padding, which leaves no trace in the cache. The cache is one of this model's own kind.
    new_cache(batch_size, length, params=None) -> Cache with room for `length` tokens per row; more are dropped.
      params: those it is for, if they are `unstacked`.
    """

    init: Callable
    apply: Callable
    step: Callable
    new_cache: Callable
    config: TransformerConfig


class Layers(NamedTuple):
    """A model taken apart, to look at its layers one at a time; all are pure functions.

    enter(params, tokens [B, T]) -> x [B, T, D]: what the first layer reads.
    layer(params, those of the layer, its number, x) -> (x, stats): what the next one reads, and the `nn.Inputs` of
    each of its matrices at its path.
    leave(params, x) -> Out.
    """

    enter: Callable
    layer: Callable
    leave: Callable


class Transformer(nn.Module):
    """only: "enter" gives the embedded tokens; "leave" takes what the layers made of them in place of tokens; "prompt"
    takes embeddings [B, T, D] that are learned, and with them what else stands at their positions."""

    config: TransformerConfig
    attend: Callable
    constrain: Callable
    unroll: int
    deterministic: bool = True
    mix: Callable = experts.mix

    @nn.compact
    def __call__(self, tokens: Array, where: Where, cache=None, slots=None, kv_where=None, only=None):
        c = self.config
        embed = weight(self, "embed", nn.initializers.normal(c.init_std), (c.vocab_size, c.d_model))
        position_weights = {
            name: self.param(f"position_{name}", nn.initializers.normal(std), shape, jnp.float32)
            for name, (shape, std) in c.position.weights(c.d_model, c.attention.n_heads).items()
        }
        if only != "leave":
            rows = embed if isinstance(embed, Weight) else self.constrain(embed, "tensor", None)
            x = tokens if only == "prompt" else lookup(rows, tokens)
            if c.scale_embed:
                x = x * c.d_model**0.5
            if c.embed_noise and not self.deterministic:
                x = x + _noise(self.make_rng("dropout"), x, where.segment_ids, c.embed_noise)
            if only != "prompt":
                x = c.position.embed(x, where.positions, position_weights)
            x = nn.Dropout(c.dropout, deterministic=self.deterministic)(x)
            x = self.constrain(x.astype(c.dtype), ROWS, None, None)
            if only == "enter":
                return x
            x, cache, routing = self._layers(x, where, cache, slots, kv_where, position_weights)
        else:
            x, routing = tokens, None
        x = self.constrain(Norm(c.norm, name="norm")(x), ROWS, None, None)
        if self.has_variable("params", "classes"):  # put there by lmx.adapt.Classes
            head = self.get_variable("params", "classes")
        elif c.tie_head:
            head = Transposed(embed)
        else:
            head = weight(self, "head", nn.initializers.normal(c.init_std), (c.d_model, c.vocab_size))
        if routing is not None:
            routing = Routing(routing, c.mlp.top_k)
        softcap = None if self.has_variable("params", "classes") else c.logit_softcap
        return Out(x, head, softcap, routing), cache

    def _layers(self, x, where, cache, slots, kv_where, position_weights):
        c = self.config
        block = Block
        if c.remat != "none":
            # In one scan step of several layers XLA would merge what is computed again with what was there.
            block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=self.unroll > 1)
        out_std = c.init_std / (2 * c.n_layers) ** 0.5
        make = (c, c.position, self.attend, c.init_std, out_std, self.deterministic, self.mix)
        context = Context(where, position_weights, slots, kv_where)
        each = None if self.is_initializing() else self.get_variable("params", "blocks")
        if isinstance(each, tuple):
            asked = [name for name in KEPT if self.is_mutable_collection(name)]
            x, cache, routing, kept = _one_by_one(block(*make, parent=None), each, x, cache, context, asked)
            for name, values_of in kept.items():
                self.put_variable(name, name, values_of)
        else:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "stats": 0, **dict.fromkeys(KEPT, 0)},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=c.n_layers,
                unroll=self.unroll,
            )(*make, name="blocks")
            (x, cache), routing = layers((x, cache), jnp.arange(c.n_layers), context)
        return x, cache, routing


def build(
    config: TransformerConfig, *, mesh: Mesh | None = None, platform: str | None = None, cache: str = "float"
) -> Model:
    """The model's functions, with attention and scan chosen for a platform ("cpu", "gpu", "tpu").

    platform: None means that of the mesh, or jax's default backend.
    cache: how decoding keeps keys and values: "float", in the dtype of activations, or "int8", about a quarter of
      float32 (`lmx.nn.attention.rounded`).
    Raises: ValueError if vocab_size is not set, or for another cache.
    """
    if cache not in ("float", "int8"):
        raise ValueError(f'build: cache={cache!r}; use "float" or "int8"')
    kept = config.dtype if cache == "float" else cache
    if config.vocab_size is None:
        raise ValueError("TransformerConfig: vocab_size=None; set it, or let the run take the tokenizer's")
    if platform is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    together = platform == "cpu" and config.n_layers <= 16 and config.remat == "none"
    unroll = config.unroll or (config.n_layers if together else 1)

    def constrain(x, *axes):
        return x if mesh is None else jax.lax.with_sharding_constraint(x, fit(x.shape, axes, mesh))

    attend = flash.pick(config.attention.impl, platform=platform, mesh=mesh)
    # Over a cache only paths that read the mask: kernels assume that slots are in order.
    over_cache = flash.pick(platform="cpu", mesh=mesh)
    mix = experts.pick(mesh)
    make = partial(Transformer, config, attend=attend, constrain=constrain, unroll=unroll, mix=mix)
    # A scan that is unrolled copies every layer out of its stack, which only many tokens are worth.
    unroll_step = config.unroll or 1

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        return make(attend=attention).init({"params": key}, tokens, _places(tokens))["params"]

    def apply(params, batch, key=None, keep=()):
        where = (
            Where(batch["positions"], batch["segment_ids"])
            if "positions" in batch
            else _places(batch["tokens"])
        )
        _check_length(config, batch["tokens"].shape[1])
        params = prefixed(config, params)
        module = make(deterministic=key is None or config.dropout == config.embed_noise == 0)
        rngs = None if key is None else {"dropout": key}
        if not keep:
            return module.apply({"params": params}, batch["tokens"], where, rngs=rngs)[0]
        (out, _), said = module.apply(
            {"params": params}, batch["tokens"], where, rngs=rngs, mutable=list(keep)
        )
        kept = {name: jax.tree.leaves(said[name])[0] for name in keep}
        kept |= {name: params[name] for name in AIDS if name in params}
        return replace(out, kept=kept)

    def step(params, cache, tokens, valid=None):
        _check_kept(cache, kept)
        params = prefixed(config, params)
        B, t = tokens.shape
        valid = jnp.ones((B, t), bool) if valid is None else valid
        positions = cache.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        slots = jnp.where(valid, positions, cache.positions.shape[1])
        rows = jnp.arange(B)[:, None]
        kv_where = Where(
            cache.positions.at[rows, slots].set(positions, mode="drop"),
            cache.segment_ids.at[rows, slots].set(1, mode="drop"),
        )
        out, (k, v, *scales) = make(attend=over_cache, unroll=unroll_step).apply(
            {"params": params},
            tokens,
            Where(positions, valid.astype(jnp.int32)),
            (cache.k, cache.v, *cache.scales),
            slots,
            kv_where,
        )
        length = cache.length + valid.sum(1, dtype=jnp.int32)
        return out, Cache(k, v, *kv_where, length, tuple(scales))

    def new_cache(batch_size: int, length: int, params=None) -> Cache:
        _check_length(config, length)
        a = config.attention
        K, H = a.kv_heads, a.width(config.d_model)
        parts = [((H, length), kept), ((length, H), kept)]
        parts += [((1, length), "float32")] * (2 if cache == "int8" else 0)
        parts = [jnp.zeros((config.n_layers, batch_size, K, *last), dtype) for last, dtype in parts]
        k, v, *scales = (
            map(tuple, parts) if params is not None and isinstance(params["blocks"], tuple) else parts
        )
        empty = jnp.zeros((batch_size, length), jnp.int32)
        return Cache(k, v, empty, empty, jnp.zeros(batch_size, jnp.int32), tuple(scales))

    return Model(init, apply, step, new_cache, config)


def prefixed(config: TransformerConfig, params: Any) -> Any:
    """The parameters with what each layer makes of a learned `prompt` [P, D], keys and values, as its prefix.

    Without a prompt they are as they were. No text that follows changes them, so one row serves all rows and segments.
    `apply` and `step` do this themselves; whoever decodes many tokens does it before. The prompt stands at positions -P
    to -1: no scheme that adds to embeddings adds to it, since what it would add can be learned.
    Raises: ValueError if there is a prefix already.
    """
    if "prompt" not in params:
        return params
    prompt, rest = params["prompt"], {name: x for name, x in params.items() if name != "prompt"}
    if any("/prefix/" in path for path in tree.paths(rest)):
        raise ValueError("these parameters hold a prompt and a prefix; keep one of them")
    slots = jnp.arange(prompt.shape[0], dtype=jnp.int32)[None]
    cache = build(config, platform="cpu").new_cache(1, prompt.shape[0], rest)
    where = Where(slots - prompt.shape[0], jnp.ones_like(slots))
    module = Transformer(config, attention, lambda x, *axes: x, config.unroll or 1)
    _, (k, v) = module.apply(
        {"params": rest}, prompt[None], where, (cache.k, cache.v), slots, where, only="prompt"
    )

    def of_layers(blocks, k, v):
        each = {"k": jnp.moveaxis(k[..., 0, :, :, :], -1, -3), "v": jnp.moveaxis(v[..., 0, :, :, :], -2, -3)}
        prefix = {name: x.reshape(*x.shape[:-2], -1) for name, x in each.items()}
        return {**blocks, "attn": {**blocks["attn"], "prefix": prefix}}

    blocks = rest["blocks"]
    together = not isinstance(blocks, tuple)
    return {**rest, "blocks": of_layers(blocks, k, v) if together else tuple(map(of_layers, blocks, k, v))}


def layers(config: TransformerConfig) -> Layers:
    """The parts of the model that `build` gives, for whole sequences of unpacked text."""
    attend = flash.pick(config.attention.impl, platform=jax.default_backend(), mesh=None)
    module = Transformer(config, attend, lambda x, *axes: x, 1)
    block = Block(config, config.position, attend, 0.0, 0.0, parent=None)

    def enter(params, tokens):
        if "prompt" in params:
            raise ValueError("these parameters hold a prompt; make it a prefix first: lmx.models.prefixed")
        return module.apply({"params": params}, tokens, _places(tokens), only="enter")

    def layer(params, of_layer, i, x):
        position = "position_"
        weights = {name.removeprefix(position): w for name, w in params.items() if name.startswith(position)}
        context = Context(_places(x[..., 0]), weights)
        ((x, _), _), stats = block.apply({"params": of_layer}, (x, None), i, context, mutable=["stats"])
        return x, stats["stats"]

    def leave(params, x):
        return module.apply({"params": params}, x, _places(x[..., 0]), only="leave")[0]

    return Layers(enter, layer, leave)


def _noise(key: jax.Array, x: Array, segment_ids: Array, scale: float) -> Array:
    """Uniform in +-scale / sqrt(length of the segment * D), [B, T, D]."""
    T = segment_ids.shape[1]
    counted = jax.vmap(lambda ids: jnp.zeros(T + 1, x.dtype).at[ids].add(1)[ids])(segment_ids)
    bound = scale * jax.lax.rsqrt(counted * x.shape[-1])[..., None]
    return bound * jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)


def _one_by_one(block: Block, params: tuple, x, cache, context: Context, asked: list[str]):
    """The layers of `unstacked` parameters. Returns what the scan over a stack does, and what was asked of each."""
    routings, caches, said = [], [], []

    @jax.jit
    def one(p, carry, layer, context):
        return block.apply({"params": p}, carry, layer, context, mutable=asked)

    for layer, of_layer in enumerate(params):
        kv = None if cache is None else tuple(part[layer] for part in cache)
        ((x, kv), routing), kept = one(of_layer, (x, kv), jnp.int32(layer), context)
        routings.append(routing)
        caches.append(kv)
        said.append({name: jax.tree.leaves(kept[name])[0] for name in asked})
    cache = None if cache is None else tuple(zip(*caches))
    return x, cache, None if routings[0] is None else jnp.stack(routings), tree.stack(said) if asked else {}


def unstacked(params: Any) -> Any:
    """The parameters with a tuple of layers in place of stacks [L, ...], and matrices stored [d_out, d_in]: `apply` and
    `step` take both.

    Reading a layer out of a stack copies it on a CPU, which few tokens are not worth, and few tokens are multiplied
    faster so (`lmx.ops.dot.rows_by`). Codes are multiplied as whole numbers, by inputs of 16 bits (`lmx.ops.int8`). It
    compiles longer, so it is for decoding; the arrays are copies.
    """

    def turned(path, w):
        if isinstance(w, Quantized) and w.activations == "float" and w.whole:
            return replace(w, activations="int16")
        if isinstance(w, Weight):  # an adapter or another transform: what it stands on
            return replace(w, base=turned(path, w.base)) if hasattr(w, "base") else w
        is_matrix = isinstance(w, jax.Array) and w.ndim == 2 and "/prefix/" not in path
        return Transposed(jnp.swapaxes(w, -1, -2)) if is_matrix else w

    def layer(i):
        of_layer = tree.layer(params["blocks"], i)
        return tree.map_at(turned, of_layer, "*", is_leaf=lambda x: isinstance(x, Weight))

    head = {name: turned(name, w) for name, w in params.items() if name == "head"}
    if isinstance(params["embed"], Weight):
        head["embed"] = turned("embed", params["embed"])
    return {**params, **head, "blocks": tuple(map(layer, range(tree.depth(params["blocks"]))))}


def flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """FLOPs of one training token, forward and backward: 6 per matrix parameter, and 12 L N H T for attention.

    The embedding lookup is free, the head counts; the causal half of attention is not subtracted. Of experts
    those count that a token goes to.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    a, D = config.attention, config.d_model
    H = a.width(D)
    layer = 2 * D * H * (a.n_heads + a.kv_heads) + config.mlp.n_active(D)
    matrices = config.n_layers * layer + D * config.vocab_size
    return 6.0 * matrices + 12.0 * config.n_layers * a.n_heads * H * seq_len


def n_params(config: TransformerConfig) -> tuple[int, int]:
    """(all, active): parameters of the model, and those that one token meets; they differ by its idle experts."""
    everything = tree.count(jax.eval_shape(build(config).init, jax.random.key(0)))
    idle = config.mlp.n_weights(config.d_model) - config.mlp.n_active(config.d_model)
    return everything, everything - config.n_layers * idle


def _places(tokens: Shaped[Array, "B T"]) -> Where:
    """One unpacked sequence per row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return Where(positions, jnp.ones_like(positions))


def _check_length(config: TransformerConfig, length: int) -> None:
    limit = config.position.max_len()
    if limit is not None and length > limit:
        raise ValueError(f"{config.position} has no position past {limit}, asked for {length}; raise it")
