"""Where metrics go: a file that survives kills, TensorBoard, Weights & Biases; and how fast training is.

A sink takes (step, metrics) and nothing else. In a run of several processes only the first one has sinks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmx.train.peak import peak_flops

NAMES = (
    *("step", "loss", "grad_norm", "skipped", "streak", "tokens", "lr"),
    *("first_step_seconds", "step_seconds", "tokens_per_sec", "mfu"),
)
"""What a line of a training step holds, beside each term of an objective that has several."""


class Sink:
    """A place for metrics; this one drops them."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; several writes for one step are several records."""

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`: called on resume, before the first write."""

    def flush(self) -> None:
        """Puts what was written on the disk; called before each checkpoint."""

    def close(self) -> None:
        """Flushes, and lets go of files and threads."""


class JsonLines(Sink):
    """One JSON object a line, {"step": 7, "loss": 3.1, ...}, each handed to the system whole and at once.

    A kill loses nothing that was written; a half-written line, which a power cut may leave, is dropped when
    the file is opened. What JSON cannot write becomes "NaN", "Infinity" and "-Infinity".
    Raises: OSError naming the file where it cannot be written (full disk, lost permission). The file then
    ends with the last whole line, and checkpoints are not touched.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._open()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        record = {"step": int(step)} | {name: _plain(x) for name, x in metrics.items()}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise self._trouble(error, f"the metrics of step {step} were not written") from None

    def rewind(self, step: int) -> None:
        """Drops every record of a step after `step`, by writing the rest to a new file and one rename.

        Raises: ValueError naming the first line that is not a record; OSError as above, the old file kept.
        """
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self.close()
        try:
            with self.path.open("rb") as old, partial.open("wb") as new:
                for number, line in enumerate(old, 1):
                    if _step_of(line, self.path, number) <= step:
                        new.write(line)
                new.flush()
                os.fsync(new.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            raise self._trouble(error, f"the records after step {step} were not dropped") from None
        finally:
            partial.unlink(missing_ok=True)
            self._fd = self._open()

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._trouble(error, "the latest metrics may not be on disk") from None

    def close(self) -> None:
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(fd, _whole_lines(self.path))
        return fd

    def _trouble(self, error: OSError, what: str) -> OSError:
        hint = f"{error.strerror}; {what}. Checkpoints are not affected: free the disk and resume"
        return OSError(error.errno, hint, str(self.path))


class TensorBoard(Sink):
    """Scalars for TensorBoard. After `rewind`, it hides the steps that are run again.

    A background thread writes, so a kill may cost the last seconds; metrics.jsonl is the record, this a view.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._purge: int | None = None
        self._writer: Any = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Its file names count whole seconds and it overwrites: of two writers in one second, one is lost.
            unique = f".{time.time_ns()}"
            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge, filename_suffix=unique)
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def rewind(self, step: int) -> None:
        self.close()
        self._purge = step + 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb(Sink):
    """Weights & Biases, in its own process; `pip install 'lmx[wandb]'`.

    Args:
      config: what was run, as names and values; `values.leaves(run)` is such a dict.
      run_id: of a run to go on with. W&B keeps the steps it already has, so a resumed run is not doubled.
      mode: "online", "offline" (for `wandb sync` later), or None for what W&B's own settings say.
      folder: where it keeps its files.
    Raises: ModuleNotFoundError if wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        mode: str | None = None,
        folder: str | Path | None = None,
    ):
        try:
            import wandb
        except ImportError:
            raise ModuleNotFoundError("Wandb: wandb is not installed; pip install 'lmx[wandb]'") from None
        self.run = wandb.init(
            project=project,
            name=name,
            config={k: v if isinstance(v, int | float | None) else str(v) for k, v in (config or {}).items()},
            id=run_id,
            resume="allow" if run_id else None,
            mode=mode,
            dir=None if folder is None else str(folder),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({name: float(x) for name, x in metrics.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class Meter:
    """Tokens per second and MFU over the last `window` steps, on the host's clock.

    Tick when the metrics of a step have arrived: a step is only over when its numbers are there. The first
    step, which compiles, is reported by itself and in no average; from `pause` to `resume` no time passes.
    Args:
      tokens: positions in one step's batch, over all processes.
      flops_per_token: forward and backward; None leaves MFU out.
      mesh: the jax mesh that computes; the peaks of its devices add up. None, or a device without a known
        peak, leaves MFU out.
      dtype: in which matrices are multiplied.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        tokens: int,
        flops_per_token: float | None = None,
        mesh: Any = None,
        *,
        window: int = 20,
        dtype: str = "bfloat16",
        clock: Callable[[], float] = time.perf_counter,
    ):
        devices = [] if mesh is None else list(mesh.devices.flat)
        peaks = [peak_flops(d.device_kind, dtype, num_cores=getattr(d, "num_cores", None)) for d in devices]
        self.peak = sum(peaks) if peaks and None not in peaks else None
        self.tokens, self.flops_per_token = tokens, flops_per_token
        self._clock, self._away, self._left = clock, 0.0, None
        self._ends: deque[tuple[int, float]] = deque(maxlen=window + 1)
        self._start = clock()

    def tick(self, step: int) -> dict[str, float]:
        """Called once per step: tokens_per_sec, step_seconds and mfu; at first only first_step_seconds."""
        now = self._clock() - self._away
        self._ends.append((step, now))
        if len(self._ends) == 1:
            return {"first_step_seconds": now - self._start}
        first, since = self._ends[0]
        if now <= since:
            return {}
        seconds = (now - since) / (step - first)
        found = {"tokens_per_sec": self.tokens / seconds, "step_seconds": seconds}
        if self.peak and self.flops_per_token:
            found["mfu"] = found["tokens_per_sec"] * self.flops_per_token / self.peak
        return found

    def pause(self) -> None:
        """Something else than training begins: an evaluation, a checkpoint."""
        self._left = self._clock()

    def resume(self) -> None:
        """It is over. Raises: RuntimeError without a `pause`."""
        if self._left is None:
            raise RuntimeError("Meter.resume: it was not paused")
        self._away, self._left = self._away + self._clock() - self._left, None


def _plain(value: Any) -> int | float | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _step_of(line: bytes, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number}: not a record with a step: {line[:60]!r}; mend or remove that line"
        ) from None


def _whole_lines(path: Path, block: int = 1 << 16) -> int:
    """The file's length without a last line that was not finished."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                return start + last + 1
            end = start
    return 0
