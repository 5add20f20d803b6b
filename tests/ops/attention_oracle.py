"""Attention and its gradient in float64 numpy, one query at a time, straight from the equations."""

from __future__ import annotations

import numpy as np

from lmx.ops.mask import And, Causal, Full, PrefixLM, SameSegment, SlidingWindow


def allows(mask, i: int, seg_i: int, j: int, seg_j: int) -> bool:
    """Whether a query at position i of segment seg_i may see a key at position j of segment seg_j."""
    match mask:
        case And(a, b):
            return allows(a, i, seg_i, j, seg_j) and allows(b, i, seg_i, j, seg_j)
        case Full():
            return True
        case Causal():
            return j <= i
        case SlidingWindow(size):
            return j in range(i - size + 1, i + 1)
        case PrefixLM(length):
            return j <= i or j < length
        case SameSegment():
            return seg_i == seg_j and seg_i != 0
    raise TypeError(mask)


def attend(q, k, v, *, q_where, k_where, mask, bias=None, scale=None, softcap=None, g=None):
    """out [B, T, N, H]; with g, the gradient of sum(out * g): (out, dq, dk, dv, dbias [B, N, T, S])."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_where, k_where = (type(where)(*map(np.asarray, where)) for where in (q_where, k_where))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    scale = 1 / np.sqrt(H) if scale is None else scale
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = np.zeros((B, N, T, S))
    for b in range(B):
        for t in range(T):
            place = int(q_where.positions[b, t]), int(q_where.segment_ids[b, t])
            seen = [
                s
                for s in range(S)
                if allows(mask, *place, int(k_where.positions[b, s]), int(k_where.segment_ids[b, s]))
            ]
            if not seen:
                continue
            for n in range(N):
                keys, values = k[b, seen, n // (N // K)], v[b, seen, n // (N // K)]
                raw = scale * keys @ q[b, t, n]
                capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
                score = capped if bias is None else capped + np.asarray(bias, np.float64)[b, n, t, seen]
                p = np.exp(score - score.max())
                p /= p.sum()
                out[b, t, n] = p @ values
                if g is None:
                    continue
                do = np.asarray(g, np.float64)[b, t, n]
                dscore = p * (values @ do - out[b, t, n] @ do)
                dbias[b, n, t, seen] = dscore
                draw = dscore if softcap is None else dscore * (1 - (capped / softcap) ** 2)
                dq[b, t, n] = scale * draw @ keys
                dk[b, seen, n // (N // K)] += scale * np.outer(draw, q[b, t, n])
                dv[b, seen, n // (N // K)] += np.outer(p, do)
    return out if g is None else (out, dq, dk, dv, dbias)
