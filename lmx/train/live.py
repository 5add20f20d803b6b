"""Training as it happens: a few lines that stay in place on a terminal, or now and then a line in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from lmx.train.metrics import Sink

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Live(Sink):
    """Progress, loss, speed and memory: in place on a terminal or in a notebook, elsewhere in lines.

    Shows loss (averaged over about 1 / (1 - smoothing) steps), valid/* losses with the step they are from,
    lr, tokens_per_sec, mfu, memory, and how many updates were skipped; each if it has been written.
    Args:
      total_steps: at which the run ends.
      title: what is trained, in a few words.
      every_seconds: between lines where there is no terminal; evaluations have theirs at once.
      console: where to; standard error if not given, so that results can be piped.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        every_seconds: float = 10.0,
        smoothing: float = 0.95,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self.total_steps, self.title, self.every_seconds = total_steps, title, every_seconds
        self.console = console or Console(stderr=True)
        on_terminal = self.console.is_interactive and self.console.file.isatty()
        self.in_place = on_terminal or self.console.is_jupyter
        self._smoothing, self._clock, self._display = smoothing, clock, None
        self._latest: dict[str, float] = {}
        self._valid: dict[str, tuple[int, float]] = {}
        self._loss, self._weight = 0.0, 0.0
        self._began = self._at = clock()
        self._step, self._first = 0, None
        self._printed, self._printed_step = self._began, None
        self._memory, self._memory_at = memory(), self._began

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        self._step, self._at = step, now
        self._first = self._first or (step, now)
        fresh = {
            k: (step, float(x)) for k, x in metrics.items() if k.startswith("valid/") and k.endswith("loss")
        }
        self._valid |= fresh
        self._latest |= {name: float(x) for name, x in metrics.items()}
        loss = float(metrics.get("loss", math.nan))
        if math.isfinite(loss):
            self._loss = self._smoothing * self._loss + (1 - self._smoothing) * loss
            self._weight = self._smoothing * self._weight + 1 - self._smoothing
        if now - self._memory_at >= 1:
            self._memory, self._memory_at = memory(), now
        if self.in_place:
            self._start()
        elif fresh or now - self._printed >= self.every_seconds:
            self._print(now)

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
        elif not self.in_place and self._first and self._printed_step != self._step:
            self._print(self._clock())

    def line(self) -> str:
        """All of it in one line of plain text."""
        share = f"{100 * self._step / self.total_steps:.0f} %"
        return "  ".join([f"step {self._step}/{self.total_steps}", share, *self._facts(), self._times()])

    def _print(self, now: float) -> None:
        self._printed, self._printed_step = now, self._step
        self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def _start(self) -> None:
        if self._display is None:
            from rich.live import Live as Display

            self._display = Display(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._display.start()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 2))
        top.add_row(
            *([Text(self.title, style="bold")] if self.title else []),
            Text(f"step {self._step:,} of {self.total_steps:,}"),
            ProgressBar(total=self.total_steps, completed=self._step, width=24),
            Text(self._times(), style="dim"),
        )
        return Group(top, Text("   ".join(self._facts())))

    def _facts(self) -> list[str]:
        latest, facts = self._latest, []
        if self._weight:
            facts.append(f"loss {self._loss / self._weight:.4g}")
        if not math.isfinite(latest.get("loss", 0.0)):
            facts.append(f"latest loss {latest['loss']}")
        for name, (step, value) in self._valid.items():
            label = name.removesuffix("loss").rstrip("/").replace("/", " ")
            facts.append(f"{label} {value:.4g} at {step}")
        if "lr" in latest:
            facts.append(f"lr {latest['lr']:.3g}")
        if "tokens_per_sec" in latest:
            facts.append(f"{_short(latest['tokens_per_sec'])} tokens/s")
        if "mfu" in latest:
            facts.append(f"MFU {100 * latest['mfu']:.1f} %")
        if latest.get("skipped"):
            facts.append(f"skipped {latest['skipped']:.0f}")
        return facts + [f"{place} {text}" for place, text in self._memory.items()]

    def _times(self) -> str:
        now = self._clock()
        elapsed = f"{timedelta(seconds=int(now - self._began))}"
        first, since = self._first or (0, now)
        if self._step <= first:
            return elapsed
        left = (self.total_steps - self._step) * (self._at - since) / (self._step - first) - (now - self._at)
        return f"{elapsed}, {timedelta(seconds=max(0, round(left)))} left"


def memory() -> dict[str, str]:
    """Memory in use, in words: of this process, and of the fullest local device where its backend tells."""
    import jax

    found = {}
    if resident := host_bytes():
        found["host"] = _gib(resident)
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    if stats:
        fullest = max(stats, key=lambda s: s.get("bytes_in_use", 0))
        limit = fullest.get("bytes_limit")
        found["device"] = _gib(fullest.get("bytes_in_use", 0)) + (f" of {_gib(limit)}" if limit else "")
    return found


def host_bytes() -> int | None:
    """Resident memory of this process; its peak so far where only that is told (macOS); None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"


def _short(x: float) -> str:
    """41234.0 -> '41.2k'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"
