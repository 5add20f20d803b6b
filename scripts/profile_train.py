"""Where the time of a training step goes: milliseconds for each part of the model, forward and backward.

    python scripts/profile_train.py --shape cpu --precision float32

The step is that of `bench_train.py`. The profiler names each operation XLA runs, the compiled program says which line
of the model an operation comes from, and the table adds them up. Times are busy time of all threads or streams, so
on a processor with several cores their sum exceeds the wall clock; "products" is the share spent in matrix products.
The gradients of the weight matrices, dW = x^T dy, lose their place in the model on the way through XLA and have a
row of their own.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import jax
from bench_train import SHAPES, describe, lmx_step
from jax.profiler import ProfileData

PARTS = (  # the first that an operation's name holds
    ("norms", r"/(attn_|mlp_|)norm/"),
    ("attention", r"/attn/"),
    ("mlp", r"/mlp/"),
    ("weights' gradients", r"transpose\(jvp\(Transformer\)\)/closed_call$|^product$"),
    ("embedding, residuals", r"Transformer"),
    ("head and loss", r"jvp\("),
    ("clip and update", r""),
)


class Operation(NamedTuple):
    name: str
    is_product: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    step, text = lmx_step(asked.precision, asked.shape)
    for _ in range(3):
        step()
    walls = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(asked.steps):
                begin = time.perf_counter()
                step()
                walls.append(time.perf_counter() - begin)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        seconds = busy(ProfileData.from_file(str(trace)), operations(text()))
    for name, value in describe(asked.shape).items():
        print(f"{name:12} {value}")
    report({operation: total / asked.steps for operation, total in seconds.items()}, statistics.median(walls))


def operations(text: str) -> dict[str, Operation]:
    """The operations of a compiled program by the names under which the profiler shows them."""
    found: dict[str, Operation] = {}
    roots: dict[str, Operation] = {}
    computation, products = "", False
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if header:
            computation, products = header[1], False
        instruction = re.match(r"\s+(ROOT )?%([\w.\-]+) = \S+ ([\w\-]+)\(", line)
        if not instruction:
            continue
        root, name, opcode = instruction.groups()
        where = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%([\w.\-]+)", line)
        inner = roots.get(called[1]) if called else None
        products |= opcode in ("dot", "convolution") or "gemm" in line
        is_product = inner.is_product if inner else opcode == "dot" or "gemm" in line
        place = where[1] if where else inner.name if inner else ""
        found[name] = Operation(place or ("product" if is_product else ""), is_product)
        if root:
            roots[computation] = Operation(found[name].name, products)
    return found


def busy(trace: ProfileData, by_name: dict[str, Operation]) -> Counter[Operation]:
    """Seconds of each operation, over all threads and streams."""
    seconds: Counter[Operation] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op", event.name)
                if name in by_name:
                    seconds[by_name[name]] += event.duration_ns / 1e9
    return seconds


def report(seconds: dict[Operation, float], wall: float) -> None:
    """Prints parts by direction, and the share of products."""
    table: Counter[tuple[str, str]] = Counter()
    for operation, spent in seconds.items():
        part = next(name for name, pattern in PARTS if re.search(pattern, operation.name))
        direction = "backward" if re.search(r"transpose\(|^product$", operation.name) else "forward"
        table[part, direction] += spent
        if operation.is_product:
            table[part, "products"] += spent
    total = sum(seconds.values())
    print(f"\n{'part':22} {'forward':>9} {'backward':>9} {'of all':>7} {'products':>9}")
    for part, _ in PARTS:
        forward, backward = table[part, "forward"], table[part, "backward"]
        if forward + backward:
            share = table[part, "products"] / (forward + backward)
            print(
                f"{part:22} {1e3 * forward:6.1f} ms {1e3 * backward:6.1f} ms {(forward + backward) / total:7.1%} "
                f"{share:9.1%}"
            )
    products = sum(table[part, "products"] for part, _ in PARTS)
    print(f"{'all':22} {1e3 * total:6.1f} ms busy, {products / total:.1%} products")
    print(f"{'wall clock':22} {1e3 * wall:6.1f} ms a step while traced")


if __name__ == "__main__":
    main()
