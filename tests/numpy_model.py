"""A Transformer in float64 numpy, written from the papers with loops over rows, heads and queries.

It shares no code with lmx: it reads only the names of the parameters and the settings. Slow and plain.
"""

import math
from functools import partial

import numpy as np


def logits(params, config, tokens, positions=None, segment_ids=None, kept=lambda x: x):
    """float64 [B, T, V]; without positions every row is one sequence that starts at 0.

    kept: what becomes of the keys and of the values [T, K, H] of a layer before they are read.
    """
    p = _float64(params)
    tokens = np.asarray(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        segment_ids = np.ones(tokens.shape, int)
    rows = [
        _row(p, config, kept, *row) for row in zip(tokens, np.asarray(positions), np.asarray(segment_ids))
    ]
    return np.stack(rows)


def log_softmax(x):
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def sequence_nats(params, config, ids):
    """-log p of ids[1:], each given all before it: float64 [len(ids) - 1]."""
    ids = np.asarray(ids)
    log_p = log_softmax(logits(params, config, ids[None, :-1])[0])
    return -log_p[np.arange(len(ids) - 1), ids[1:]]


def _row(p, c, kept, tokens, positions, segments):
    x = p["embed"][tokens]
    if c.scale_embed:
        x = x * math.sqrt(c.d_model)
    scheme = type(c.position).__name__
    if scheme == "Learned":
        x = x + p["position_table"][positions]
    if scheme == "Sinusoidal":
        for t, position in enumerate(positions):
            for i in range(c.d_model // 2):
                angle = position / c.position.theta ** (2 * i / c.d_model)
                x[t, 2 * i] += c.position.scale * math.sin(angle)
                x[t, 2 * i + 1] += c.position.scale * math.cos(angle)
    for layer in range(c.n_layers):
        block = _layer(p["blocks"], layer)
        attend = partial(_attention, c, p, block["attn"], positions, segments, kept)
        x = _residual(c, block, "attn_norm", x, attend)
        feed = _moe if hasattr(c.mlp, "n_experts") else _mlp
        x = _residual(c, block, "mlp_norm", x, partial(feed, c.mlp, block["mlp"]))
    x = _norm(c.norm, p["norm"], x)
    out = x @ (p["embed"].T if c.tie_head else p["head"])
    return out if c.logit_softcap is None else c.logit_softcap * np.tanh(out / c.logit_softcap)


def _residual(c, block, name, x, f):
    if c.placement == "pre":
        return x + f(_norm(c.norm, block[name], x))
    if c.placement == "post":
        return _norm(c.norm, block[name], x + f(x))
    return x + _norm(c.norm, block[name + "_out"], f(_norm(c.norm, block[name], x)))


def _norm(norm, w, x):
    if norm.kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * w["scale"]
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * w["scale"]
    return y + w["bias"] if norm.bias else y


def _linear(w, x):
    return x @ w["w"] + w.get("b", 0.0)


def _attention(c, p, w, positions, segments, kept, x):
    a, T = c.attention, len(x)
    K = a.n_kv_heads or a.n_heads
    H = a.head_dim or c.d_model // a.n_heads
    q, k, v = (_linear(w[name], x).reshape(T, -1, H) for name in "qkv")
    if a.qk_norm:
        q, k = _norm(c.norm, w["q_norm"], q), _norm(c.norm, w["k_norm"], k)
    if type(c.position).__name__ == "RoPE":
        q, k = _rope(q, positions, c.position.theta), _rope(k, positions, c.position.theta)
    k, v, P = kept(k), kept(v), 0
    if "prefix" in w:  # learned keys and values at positions -P to -1, of every segment
        P = len(w["prefix"]["k"])
        k, v = (np.concatenate([w["prefix"][name].reshape(P, K, H), x]) for name, x in (("k", k), ("v", v)))
        positions = np.concatenate([np.arange(-P, 0), positions])
        segments = np.concatenate([np.full(P, -1), segments])
    scale = a.scale or 1 / math.sqrt(H)
    out = np.zeros((T, a.n_heads, H))
    for n in range(a.n_heads):
        group = n // (a.n_heads // K)
        for t in range(T):
            seen = [s for s in range(P + T) if _sees(a.mask, positions, segments, P + t, s)]
            if not seen:
                continue
            score = np.array([q[t, n] @ k[s, group] * scale for s in seen])
            if a.softcap is not None:
                score = a.softcap * np.tanh(score / a.softcap)
            if type(c.position).__name__ == "ALiBi":
                score -= 2.0 ** (-8 * (n + 1) / a.n_heads) * np.array(
                    [abs(positions[P + t] - positions[s]) for s in seen]
                )
            if type(c.position).__name__ == "T5":
                score += [
                    p["position_table"][_t5_bucket(positions[P + t] - positions[s], c.position), n]
                    for s in seen
                ]
            share = np.exp(score - score.max())
            out[t, n] = (share / share.sum()) @ v[seen, group]
    return _linear(w["o"], out.reshape(T, -1))


def _sees(mask, positions, segments, t, s):
    if segments[t] == 0 or segments[s] not in (segments[t], -1):
        return False
    i, j = positions[t], positions[s]
    return {
        "Full": lambda: True,
        "Causal": lambda: j <= i,
        "SlidingWindow": lambda: 0 <= i - j < mask.size,
        "PrefixLM": lambda: j <= i or j < mask.length,
    }[type(mask).__name__]()


def _rope(x, positions, theta):
    """Pairs (i, i + H/2) as complex numbers, turned by e^(i angle)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = np.outer(positions, theta ** (-np.arange(half) / half))
    z = z * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def _t5_bucket(distance, position):
    distance, half = max(distance, 0), position.n_buckets // 2
    if distance < half:
        return distance
    share = math.log(distance / half) / math.log(position.max_distance / half)
    return min(half + int(share * (position.n_buckets - half)), position.n_buckets - 1)


def _mlp(m, w, x):
    up = _linear(w["up"], x)
    if m.activation in ("swiglu", "geglu"):
        gate = _linear(w["gate"], x)
        return _linear(w["down"], (_silu(gate) if m.activation == "swiglu" else _gelu(gate)) * up)
    act = {
        "gelu": _gelu,
        "gelu_exact": _gelu_exact,
        "silu": _silu,
        "relu_squared": lambda u: np.maximum(u, 0) ** 2,
    }
    return _linear(w["down"], act[m.activation](up))


def _moe(m, w, x):
    """Each token alone: softmax over all experts, the most probable of them, and their weighted sum."""
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        p = np.exp(log_softmax(row @ w["router"]["w"]))
        chosen = np.argsort(-p)[: m.top_k]
        share = p[chosen] / p[chosen].sum() if m.renormalise else p[chosen]
        for weight, e in zip(share, chosen):
            y[t] += weight * _mlp(m, _layer(w["experts"], e), row)
    return y


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_exact(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _layer(tree, i):
    return {k: _layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def _float64(tree):
    return (
        {k: _float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)
    )
