"""How long the host needs for a batch, beside how long a training step takes.

    python scripts/bench_data.py [--step-ms 30]

For each shape and packing: milliseconds of one thread per batch, without looking ahead, as wall and as CPU
time; tokens per CPU second; and the share (CPU time) of a training step that takes --step-ms milliseconds for
12 x 64 tokens and in proportion for more. Then the time to pack a million documents and the share of padding.
Documents are random, of log-normal length (median 400 tokens), in a store on disk. Best of five runs.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from lmx.data.batches import Batches
from lmx.data.pack import BestFit
from lmx.data.store import TokenStore, Writer

SHAPES = ((12, 64), (64, 256), (64, 2048))


def lengths(rng, n, median=400):
    return np.maximum(3, rng.lognormal(np.log(median), 1.0, n)).astype(np.int64)


def make(path, rng, n_documents):
    with Writer(path, 50_000) as writer:
        for n in lengths(rng, n_documents):
            writer.add(rng.integers(0, 50_000, n))
    return TokenStore(str(path))


def seconds_per_batch(batches, repeats=5, least=0.1):
    """(wall, CPU) seconds, the best of several runs each."""
    batches.batch(0)
    at, wall, cpu = 1, float("inf"), float("inf")
    for _ in range(repeats):
        n, start, used = 0, time.perf_counter(), time.process_time()
        while time.process_time() - used < least:
            batches.batch(at + n)
            n += 1
        wall, cpu = min(wall, (time.perf_counter() - start) / n), min(cpu, (time.process_time() - used) / n)
        at += n
    return wall, cpu


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--step-ms", type=float, default=30.0, help="a step of 12 x 64 tokens to compare with, in ms"
    )
    step = parser.parse_args().step_ms
    rng = np.random.default_rng(0)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; a step of 12 x 64 is taken to be {step:g} ms"
    )
    with tempfile.TemporaryDirectory() as folder:
        stores = (make(Path(folder) / "a", rng, 50_000), make(Path(folder) / "b", rng, 10_000))
        columns = ("B x T", "wall ms", "CPU ms", "Mtoken/s", "of a step", "padding")
        print(f"{'stores':20} {'packing':9}" + "".join(f"{name:>11}" for name in columns))
        for name, chosen, weights in (("one", stores[:1], ()), ("two, weights", stores, (0.7, 0.3))):
            for packing in ("best_fit", "concat"):
                for B, T in SHAPES:
                    batches = Batches(chosen, T, B, seed=0, weights=weights, packing=packing)
                    wall, cpu = seconds_per_batch(batches)
                    share = cpu * 1e3 / (step * B * T / (12 * 64))
                    cells = (
                        f"{wall * 1e3:.3f}",
                        f"{cpu * 1e3:.3f}",
                        f"{B * T / cpu / 1e6:.1f}",
                        f"{share:.2%}",
                    )
                    row = (f"{B} x {T}", *cells, f"{batches.padding_share:.3%}")
                    print(f"{name:20} {packing:9}" + "".join(f"{cell:>11}" for cell in row))
    for T in (256, 1024, 8192):
        offsets = np.concatenate([[0], np.cumsum(lengths(rng, 1_000_000))])
        start = time.process_time()
        plan = BestFit(offsets, T)
        print(
            f"best fit of 1,000,000 documents into rows of {T}: {time.process_time() - start:.2f} CPU s,"
            f" {plan.n_rows:,} rows, padding {plan.padding_share:.4%}"
        )


if __name__ == "__main__":
    main()
