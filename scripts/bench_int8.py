"""Rows times int8 and int4 matrices on a CPU, in several forms: milliseconds of a model's matrices, all of them.

    python scripts/bench_int8.py --d-model 576 --d-ff 1536 --kv 192 --vocab 49152 --layers 30

The matrices are those of SmolLM2-135M: q, k, v, o, gate, up and down of each layer, and the head. The forms take
turns, since other work on the machine slows whatever runs beside it. Given are medians, and the median over turns
of the time of float32 (`lmx.ops.dot.rows_by`) divided by the form's in the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import describe_machine
from jax import lax

from lmx.ops import native
from lmx.ops.dot import rows_by
from lmx.ops.int8 import int4_by, int8_by

BLOCK = 64
"""Columns of y whose part of the matrix is converted at a time: 64 x 1536 float32 numbers stay in a core's cache."""


def int8_dot(x, w):
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def two_rows(x, w):
    return int8_dot(jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0))), w)[: len(x)]


def widened(kind):
    return lambda x, w: int8_dot(x.astype(kind), w.astype(kind))


def matrix_vector(x, w):
    return jnp.stack([lax.dot(w.astype(jnp.int32), row.astype(jnp.int32)) for row in x])


def sums_of_products(x, w):
    return jnp.sum(x[:, None].astype(jnp.int32) * w[None].astype(jnp.int32), axis=-1)


def in_blocks(x, w):
    x = x.astype(jnp.float32)
    return lax.map(
        lambda block: rows_by(x, block.astype(jnp.float32)), w.reshape(-1, BLOCK, w.shape[1])
    ).swapaxes(0, 1)


INT8 = {
    "int8 dot": int8_dot,
    "int8 dot of two": two_rows,
    "int16 dot": widened(jnp.int16),
    "int32 dot": widened(jnp.int32),
    "matrix x vector": matrix_vector,
    "sum of products": sums_of_products,
    "float32 blocks": in_blocks,
    "int8_by": int8_by,
}
INT4 = {"int4_by, 32": 32, "int4_by, 64": 64, "int4_by, 192": 192}
"""Codes that share a scale."""
FASTEST = ["float32", "int8 dot of two", "float32 blocks", "int8_by", *INT4]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("d-model", 576), ("d-ff", 1536), ("kv", 192), ("vocab", 49152), ("layers", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 16, 32])
    parser.add_argument("--forms", nargs="*", default=FASTEST, choices=["float32", *INT8, *INT4])
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    print(describe_machine("jax", "llvmlite") | {"compiles": native.available()})
    D, F = asked.d_model, asked.d_ff
    layer = [(D, D), (asked.kv, D), (asked.kv, D), (D, D), (F, D), (F, D), (D, F)]
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.integers(-127, 128, shape, dtype=np.int8))

    layers, head = [[draw(shape) for shape in layer] for _ in range(asked.layers)], draw((asked.vocab, D))
    print(f"{'rows':>5}  {'form':16}{'ms':>9}{'least':>9}{'float32 /':>11}")
    read = {
        form: ([[stored(form, w) for w in layer] for layer in layers], stored(form, head))
        for form in asked.forms
    }
    for rows in asked.rows:
        x = draw((rows, D))
        steps = {form: step(form, x, *read[form]) for form in asked.forms}
        times = {form: [] for form in asked.forms}
        for _ in range(asked.turns):
            for form, run in steps.items():
                run()
                begin = time.perf_counter()
                run()
                times[form].append(1e3 * (time.perf_counter() - begin))
        for form, ms in times.items():
            ratio = statistics.median(a / b for a, b in zip(times.get("float32", ms), ms))
            print(f"{rows:5}  {form:16}{statistics.median(ms):9.1f}{min(ms):9.1f}{ratio:10.2f}x", flush=True)


def stored(form: str, w):
    """What the form reads of the int8 matrix w; for int4, words of random codes of the same shape."""
    if form in INT4:
        words = lax.bitcast_convert_type(w[:, : w.shape[1] // 2].reshape(len(w), -1, 4), jnp.int32)
        return words, jnp.ones((len(w), w.shape[1] // INT4[form]), jnp.float32)
    return (w.astype(jnp.float32) if form == "float32" else w,)


def step(form: str, x, layers, head):
    """One program of all products, each layer's from the last one's, as when a model decodes."""
    product = rows_by if form == "float32" else int4_by if form in INT4 else INT8[form]
    kind = jnp.float32 if form == "float32" else jnp.int8

    def inputs(y):
        return (127 * jnp.tanh(y.astype(jnp.float32))).reshape(len(x), -1).astype(kind)

    @jax.jit
    def products(x, layers, head):
        kept = []
        for q, k, v, o, gate, up, down in layers:
            kept += [product(x, *k), product(x, *v)]
            x = inputs(product(inputs(product(x, *q)), *o))
            kept.append(product(x, *up))
            x = inputs(product(inputs(product(x, *gate)), *down))
        return product(x, *head), kept

    def run():
        jax.block_until_ready(products(x.astype(kind), layers, head))

    run()
    return run


if __name__ == "__main__":
    main()
