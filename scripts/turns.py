"""Training steps of several programs in turns, each in a process of its own that waits while the others run.

What `bench_train.py`, `bench_finetune.py` and `bench_distill.py` share. It imports nothing of lmx, so that a peer's
Python can run it.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any


def started(
    name: str, words: list[str], threads: int, python: str = sys.executable, env: Mapping[str, str] = {}
) -> subprocess.Popen:
    """A process that answers as `serve` does, once it has compiled. words: its script and options."""
    worker = subprocess.Popen(
        [python, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | env,
    )
    if not worker.stdout.readline():
        sys.exit(f"{words[0]}: {name} did not start")
    return worker


def serve(step: Callable[[], float], **facts: str) -> None:
    """Reads numbers of steps from standard input, and answers with the seconds of each, and with the first two losses.

    step: makes one, and returns its loss.
    """
    first = [step(), step()]
    print("{}", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "first": first, "bytes": most, **facts}), flush=True)


def in_turns(workers: Mapping[Hashable, subprocess.Popen], rounds: int, steps: int) -> dict[Any, dict]:
    """What each tells at its end, with the seconds of all its steps."""
    seconds: dict[Any, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name] += _ask(worker, steps)["seconds"]
    told = {name: _ask(worker, 0) | {"seconds": seconds[name]} for name, worker in workers.items()}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return told


def show(told: Mapping[str, dict], tokens: int, peer: str) -> None:
    """Medians, and their ratio to the fastest of those whose name begins with `peer`. tokens: of a step."""
    medians = {name: statistics.median(of["seconds"]) for name, of in told.items()}
    peers = [median for name, median in medians.items() if name.startswith(peer)]
    print(f"\n{'contender':18} {'ms':>8} {'tokens/s':>9} {'ratio':>6} {'GiB':>6}  first losses")
    for name, median in medians.items():
        ratio = f"{min(peers) / median:6.2f}" if peers else ""
        losses = " ".join(f"{x:.6f}" for x in told[name]["first"])
        held = told[name]["bytes"] / 2**30
        print(f"{name:18} {1e3 * median:8.0f} {tokens / median:9.0f} {ratio:>6} {held:6.2f}  {losses}")


def _ask(worker: subprocess.Popen, steps: int) -> dict:
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())
