"""A few rows times a matrix on a CPU, in the three forms that decoding can take: milliseconds of a model's layers.

    python scripts/bench_rows.py --d-model 576 --d-ff 1536 --layers 30

x w with w [d_in, d_out]; x w^T with w [d_out, d_in]; and `lmx.ops.dot.rows_by`, which puts the matrix first. The
fastest of several runs is given, since a machine can only be slowed down.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
from bench_train import describe_machine

from lmx.ops.dot import rows_by


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-ff", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 48, 64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    print(describe_machine("jax"))
    D, F = asked.d_model, asked.d_ff
    key = jax.random.key(0)
    pairs = [
        (jax.random.normal(key, (F, D)) / D**0.5, jax.random.normal(key, (D, F)) / F**0.5)
        for _ in range(asked.layers)
    ]
    turned = [(up.T.copy(), down.T.copy()) for up, down in pairs]
    print(f"{'rows':>5}" + "".join(f"{name:>10}" for name in ("x w", "x w^T", "rows_by", "ratio")))
    for rows in asked.rows:
        x = jax.random.normal(key, (rows, D))
        ms = [
            fastest(lambda x, w: x @ w, x, turned, asked.repeats),
            fastest(lambda x, w: x @ w.T, x, pairs, asked.repeats),
            fastest(rows_by, x, pairs, asked.repeats),
        ]
        print(f"{rows:5}" + "".join(f"{t:10.1f}" for t in ms) + f"{min(ms[:2]) / ms[2]:9.2f}x", flush=True)


def fastest(product, x, pairs, repeats: int) -> float:
    """Milliseconds of all layers, each an up and a down product."""

    @jax.jit
    def layers(x, pairs):
        for up, down in pairs:
            x = x + jnp.tanh(product(jnp.tanh(product(x, up)), down))
        return x

    layers(x, pairs).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        layers(x, pairs).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
