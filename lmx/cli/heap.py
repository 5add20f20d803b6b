"""The memory that XLA:CPU works in, kept from one step to the next, as far as a process needs it.

XLA:CPU asks malloc for the intermediate arrays of a program at each call and frees them after it. glibc hands
large blocks straight back to the kernel, so every step faults each page in again and has it zeroed. Processor
time of a step, one core of an AMD EPYC: 93 ms against 64 ms at nanoGPT's CPU shape (4 layers, d_model 128, 768
tokens), 2.6 s against 2.1 s at its baby shape (6 layers, d_model 384, 2048 tokens).

What is kept must be watched. For an aligned block glibc looks for a hole that is some bytes larger, and gives the rest
of it to small blocks; so the next block of that size may find its own hole too small, and takes new pages beside it.
A model of 386 MiB in training held 3.4 GiB after 8 steps; fine-tuning SmolLM2-135M in full, 9 to 15 GiB of which it
used 4.6. So a thread looks at what is held and not used, and gives it back when it is too much, 40 ms for each GiB.
"""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
_STATM = Path("/proc/self/statm")
SECONDS = 0.25
"""Between two looks."""
SPARE = 2**28
"""Bytes held without use that are worth no work."""
SHARE = 0.25
"""What may be held without use, of the most that was in use lately."""
FADING = 0.98
"""Of the most in use, from look to look: half of it after nine seconds."""


def keep_heap() -> bool:
    """Has malloc keep what is freed, in one heap for all threads, for the rest of this process.

    Call it before jax first touches a device: threads that jax has started by then keep heaps of their own, from
    which arrays over 64 MiB go back to the kernel as before. The process then holds about a quarter more than the most
    it used in the last seconds.
    Returns: whether it took effect; False without glibc 2.33 or newer, as on macOS or Alpine, where nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallinfo2"):
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28, _ARENA_MAX: 1}
    taken = [libc.mallopt(name, value) for name, value in options.items()]
    if not all(taken):
        return False
    threading.Thread(target=_watch, args=(libc,), name="heap", daemon=True).start()
    return True


class _Mallinfo2(ctypes.Structure):
    """Bytes, but for three counts. Source: mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _watch(libc: ctypes.CDLL) -> None:
    libc.mallinfo2.restype = _Mallinfo2
    most = others = 0  # others: held, but not malloc's
    while True:
        used = _used(libc)
        most = max(used, int(most * FADING))
        if _held() - others > most * (1 + SHARE) + SPARE:
            libc.malloc_trim(ctypes.c_size_t(0))
            others = max(0, _held() - _used(libc))
        time.sleep(SECONDS)


def _used(libc: ctypes.CDLL) -> int:
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def _held() -> int:
    """Bytes in memory that are no file's."""
    resident, shared = map(int, _STATM.read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()
