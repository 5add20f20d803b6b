"""Fused attention: one signature, one path per kind of machine, and the choice between them.

| name      | runs on      | memory     | cannot express                                             |
|-----------|--------------|------------|------------------------------------------------------------|
| reference | anything     | B N T S    | -                                                          |
| cpu       | anything     | B N T S    | - (made for short rows on a CPU)                           |
| one_query | x86 CPU      | N S        | T > 1, bias, softcap, not float32, S or H not 8 n          |
| blockwise | anything     | T * block  | -                                                          |
| cudnn     | NVIDIA       | B T S mask | bias, softcap, float32, head_dim over 128 or not 8 n       |
| splash    | TPU (Pallas) | T          | bias, PrefixLM, a cache, a mask without SameSegment        |

`pick` gives the model one function, which chooses by the shapes it meets. Axes: B rows, T queries, S keys,
N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lmx.ops.attention import Bias, attention, check_heads
from lmx.ops.blockwise import blockwise
from lmx.ops.kept import kept
from lmx.ops.mask import Causal, Full, Mask, SameSegment, SlidingWindow, Where
from lmx.ops.one_query import obstacle as why_not_one_query
from lmx.ops.one_query import one_query

Shaped = Array | jax.ShapeDtypeStruct
ROWS = ("data", "fsdp")
HEADS = "tensor"


def pick(impl: str = "auto", *, platform: str, mesh: Mesh | None = None) -> Callable:
    """The attention of a model, with the signature of `attention.attention`.

    A named path serves whole rows, T = S. Steps over a cache, T < S, take the reference, or blockwise where
    the scores of one head exceed 2**20, or one_query where it can express them, whatever the name.
    Args:
      impl: a name in IMPLEMENTATIONS, or "auto" for the best path that can express the call.
      platform: "cpu", "gpu" (or "cuda") or "tpu"; the one the program is compiled for.
      mesh: rows are divided over its axes `data` and `fsdp`, heads over `tensor`, where it has them.
    Raises: ValueError for an unknown name; when called, for what a named path cannot express.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention: impl={impl!r} is none of {', '.join(['auto', *IMPLEMENTATIONS])}")

    def attend(q, k, v, *, q_where, k_where, mask, bias=None, scale=None, softcap=None):
        rule = {"mask": mask, "bias": bias, "softcap": softcap}
        if q.shape[1] != k.shape[1] or impl == "auto":
            name = choose(platform, q, k, mesh=mesh, **rule)
        else:
            name = impl
            reason = obstacle(name, q, k, mesh=mesh, **rule)
            if reason:
                raise ValueError(f'attention: impl="{name}" {reason}; use "blockwise" or "auto"')
        f = partial(IMPLEMENTATIONS[name], scale=scale, **rule)
        if mesh is not None and name in LOCAL and bias is None and _split(q, k, mesh) is None:
            return _on_mesh(f, mesh, q, k, v, q_where, k_where)
        return f(q, k, v, q_where=q_where, k_where=k_where)

    return attend


def choose(
    platform: str,
    q: Shaped,
    k: Shaped,
    *,
    mask: Mask,
    bias: Bias | None,
    softcap: float | None,
    mesh: Mesh | None,
) -> str:
    """The name of the best path for these shapes and this rule; it can always express them."""
    T, S = q.shape[1], k.shape[1]
    if T != S:
        if platform == "cpu" and not obstacle(
            "one_query", q, k, mask=mask, bias=bias, softcap=softcap, mesh=mesh
        ):
            return "one_query"
        return "reference" if T * S <= 2**20 else "blockwise"
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform)
    if kernel and T >= 128 and not obstacle(kernel, q, k, mask=mask, bias=bias, softcap=softcap, mesh=mesh):
        return kernel
    if T > 512:
        return "blockwise"
    return "cpu" if platform == "cpu" else "reference"


def obstacle(
    name: str,
    q: Shaped,
    k: Shaped,
    *,
    mask: Mask,
    bias: Bias | None,
    softcap: float | None,
    mesh: Mesh | None,
) -> str | None:
    """Why a path cannot express the call, in words that follow its name; None if it can."""
    if name == "one_query":
        return why_not_one_query(q, k, bias, softcap)
    (_, T, _, H), S = q.shape, k.shape[1]
    if name in ("cudnn", "splash") and bias is not None:
        return "takes no bias on the scores (ALiBi, T5)"
    if name == "cudnn":
        if softcap is not None:
            return f"has no soft cap, softcap={softcap}"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16 or float16, not in {q.dtype}"
        if H % 8 or H > 128:
            return f"needs head_dim a multiple of 8 up to 128, not {H}"
        if T % 2 or S % 2:
            return f"needs even lengths, not {T} queries and {S} keys"
    if name == "splash":
        if not all(isinstance(part, (Full, Causal, SlidingWindow, SameSegment)) for part in mask.parts):
            return f"has no mask {mask}"
        if SameSegment() not in mask.parts:
            return f"needs & SameSegment() in its mask, which is {mask}"
        if T != S:
            return f"needs as many queries as keys, not {T} and {S}"
        return None if mesh is None else _split(q, k, mesh)
    return None


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_where: Where,
    k_where: Where,
    mask: Mask,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """As `attention.attention`, by cuDNN's fused kernel; the mask becomes a dense array of B T S.

    Blocks above the diagonal or outside the window are left out where T = S and the mask joins Causal or
    SlidingWindow with SameSegment: positions must then rise by one along each segment of a row, as data/
    packs them.
    """
    reason = obstacle("cudnn", q, k, mask=mask, bias=bias, softcap=softcap, mesh=None)
    if reason and (implementation == "cudnn" or bias is not None or softcap is not None):
        raise ValueError(f'attention: impl="cudnn" {reason}; use "blockwise" or "auto"')
    check_heads(q.shape[2], k.shape[2])
    allowed = mask(q_where, k_where)
    in_order = q.shape[1] == k.shape[1] and SameSegment() in mask.parts
    causal = in_order and any(isinstance(part, (Causal, SlidingWindow)) for part in mask.parts)
    window = (mask.reach - 1, 0) if causal and mask.reach is not None else None
    options = {"is_causal": causal, "local_window_size": window, "implementation": implementation}
    out = jax.nn.dot_product_attention(q, k, v, mask=allowed, scale=scale, **options)
    sees = jnp.any(allowed, -1)[:, 0, :, None, None]  # [B, T, 1, 1]
    return jnp.where(sees, out, jnp.zeros_like(out))


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_where: Where,
    k_where: Where,
    mask: Mask,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """As `attention.attention`, by JAX's splash attention kernel for TPU; rows are filled up to a multiple of
    128.

    Positions must rise by one along each segment of a row, as data/ packs them. `scale` is multiplied into q,
    rounded to its dtype. interpret: run the kernel step by step on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    reason = obstacle("splash", q, k, mask=mask, bias=bias, softcap=softcap, mesh=None)
    if reason:
        raise ValueError(f'attention: impl="splash" {reason}; use "blockwise" or "auto"')
    T, N, H = q.shape[1:]
    check_heads(N, k.shape[2])
    length = T + -T % 128
    size = next(block for block in (512, 256, 128) if length % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    shape = length, length
    shown = masks.FullMask(shape)
    if mask.reach is not None:
        shown = masks.LocalMask(shape, (mask.reach - 1, 0), 0)
    elif Causal() in mask.parts:
        shown = masks.CausalMask(shape)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([shown] * N),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": size for name in names}),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def fill(x):
        return jnp.pad(x, ((0, 0), (0, length - T), *((0, 0) for _ in x.shape[2:])))

    scaled = q * jnp.asarray(H**-0.5 if scale is None else scale, q.dtype)
    heads_first = (jnp.swapaxes(fill(x), 1, 2) for x in (scaled, k, v))
    segments = kernels.SegmentIds(fill(q_where.segment_ids), fill(k_where.segment_ids))
    out = jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)[:, :T]
    sees = (q_where.segment_ids != 0)[:, :, None, None]
    return jnp.where(sees, out, jnp.zeros_like(out)).astype(q.dtype)


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": attention,
    "cpu": kept,
    "one_query": one_query,
    "blockwise": blockwise,
    "cudnn": cudnn,
    "splash": splash,
}
LOCAL = (
    "cpu",
    "one_query",
    "blockwise",
    "splash",
)  # run on each device's own rows and heads; XLA divides the others itself


def _on_mesh(f: Callable, mesh: Mesh, q, k, v, q_where: Where, k_where: Where):
    """Each device attends for its rows and its heads; nothing is exchanged."""
    tensor = mesh.shape.get(HEADS, 1)
    if k.shape[2] % tensor:  # fewer key/value heads than devices: each device needs a copy of one
        k, v = (jnp.repeat(x, tensor // k.shape[2], axis=2) for x in (k, v))
    rows = tuple(axis for axis in ROWS if axis in mesh.shape) or None
    heads = P(rows, None, HEADS if HEADS in mesh.shape else None, None)
    where = Where(P(rows, None), P(rows, None))

    def local(q, k, v, q_where, k_where):
        return f(q, k, v, q_where=q_where, k_where=k_where)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads, heads, heads, where, where), out_specs=heads, check_vma=False
    )(q, k, v, q_where, k_where)


def _split(q: Shaped, k: Shaped, mesh: Mesh) -> str | None:
    """Why rows and heads do not divide over the mesh; None if they do."""
    rows, tensor = 1, mesh.shape.get(HEADS, 1)
    for axis in ROWS:
        rows *= mesh.shape.get(axis, 1)
    B, N, K = q.shape[0], q.shape[2], k.shape[2]
    if B % rows:
        return f"cannot divide {B} rows over {rows} devices (mesh axes {', '.join(ROWS)})"
    if N % tensor or (K % tensor and tensor % K):
        return f"cannot divide {N} query and {K} key/value heads over {tensor} devices (mesh axis {HEADS})"
    return None
