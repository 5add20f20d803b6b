"""How long the first step of a run takes, without and with the persistent compilation cache.

    python scripts/bench_start.py [--preset baby] [--rounds 3]

Each start is a process of its own on text that is already prepared; a round is one start with an empty cache of
programs and one with a full one. Prints the median seconds from the start of training to the end of its first step.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

START = """
import time, sys
begin = time.perf_counter()
import lmx
from dataclasses import replace
from pydoc_data.topics import topics
text = lmx.data.Documents(tuple(topics.values()))
run = lmx.Run(model=lmx.models.preset(sys.argv[1]), data=lmx.data.Data((text,), seq_len=64, batch_size=8), steps=1)
session = lmx.train.session(run)
ready = time.perf_counter()
for state, metrics in session.steps(session.init()):
    float(metrics["loss"])
print(ready - begin, time.perf_counter() - ready)
"""


def start(preset: str, cache: Path) -> tuple[float, float]:
    """(seconds to import and find the data, seconds to the end of the first step)."""
    environment = {**os.environ, "LMX_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", START, preset], env=environment, capture_output=True, text=True, check=True
    )
    ready, first = done.stdout.split()
    return float(ready), float(first)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="baby")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        start(asked.preset, cache)
        for _ in range(asked.rounds):
            shutil.rmtree(cache / "xla")
            cold.append(start(asked.preset, cache)[1])
            warm.append(start(asked.preset, cache)[1])
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, preset {asked.preset}")
    for name, seconds in (("empty cache", cold), ("full cache", warm)):
        print(
            f"first step, {name:12} median {statistics.median(seconds):6.2f} s",
            f"of {sorted(round(s, 2) for s in seconds)}",
        )
    print(f"ratio {statistics.median(warm) / statistics.median(cold):.2f}")


if __name__ == "__main__":
    main()
