"""lmx.cli.heap, by the page faults that the kernel counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from lmx.cli.heap import keep_heap

if sys.argv[1] == "keep" and not keep_heap():
    sys.exit("no glibc")
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(2**23)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_arrays_made_again_fault_no_page_again():
    """8 arrays of 64 MiB, made and dropped in turn: all their pages, or next to none with the heap kept."""
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("keep", "default")
    }
    assert faults["keep"] < 100
    assert faults["default"] > 8 * faults["keep"] + 100
