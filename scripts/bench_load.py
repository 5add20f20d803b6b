"""What reading a released model costs: seconds, and host memory beyond the parameters themselves.

    python scripts/bench_load.py SmolLM2-135M-Instruct.gguf
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/bench_load.py FOLDER --mesh 1 2 4

Memory is the peak of the process's resident set, read from the kernel and reset before loading, less what the process
held before and less the parameters, which on a CPU lie in the same memory. It is compared with the largest piece that
must be on the host at once: what one device holds of the largest parameter, and the largest tensor of the file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

from lmx import tree
from lmx.mesh import MeshConfig
from lmx.models import pretrained


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--mesh", type=int, nargs=3, metavar=("DATA", "FSDP", "TENSOR"))
    asked = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("bench_load: reads /proc/self/status, which Linux alone has")
    mesh = MeshConfig(*asked.mesh).build() if asked.mesh else None
    begin = time.perf_counter()
    found = pretrained.find(asked.model)
    described = time.perf_counter() - begin
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend's own memory
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    begin = time.perf_counter()
    params = jax.block_until_ready(pretrained.load(found, mesh))
    loaded = time.perf_counter() - begin
    beyond = resident("VmHWM") - before - tree.nbytes(params)
    piece = max(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    tensor = max(4 * int(np.prod(x.shape)) for x in found.tensors.values())
    size = sum(file.stat().st_size for file in found.files())
    print(
        f"described in {described:.1f} s, loaded in {loaded:.1f} s ({size / 2**20 / loaded:.0f} MiB of file a second)"
    )
    print(f"file {size / 2**20:.0f} MiB, parameters {tree.nbytes(params) / 2**20:.0f} MiB in float32")
    print(
        f"beyond the parameters {beyond / 2**20:.0f} MiB; largest piece {piece / 2**20:.0f} MiB, largest tensor "
        f"{tensor / 2**20:.0f} MiB: {beyond / (piece + tensor):.2f} of the two together"
    )


def resident(field: str) -> int:
    """Bytes of VmRSS, now, or VmHWM, the highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
