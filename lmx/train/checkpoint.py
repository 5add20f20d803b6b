"""Checkpoints of a run: written in the background, committed by one rename, checked when read.

Arrays, description and hashes (`stored.py`) are written and synced in `<folder>/<step>.partial`, which then
becomes `<folder>/<step>` in one rename. A process killed at any moment, also during a save, leaves whole
checkpoints and at most one `.partial`, removed at the next start. All processes see the same folder and
call these methods together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lmx import artifact
from lmx.models.transformer import AIDS
from lmx.train import stored
from lmx.tree import matches

FOLDER = "checkpoints"
_saves = itertools.count()


class _Quiet(logging.Filter):
    """Orbax logs one failed write many times, with stack traces; it is reported here, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        where = record.getMessage() if record.name == "asyncio" else record.pathname
        return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in where)


_quiet = _Quiet()


class Checkpoints:
    """The checkpoints of one run: the last `keep` and the one with the lowest `best` metric.

    Args:
      folder: made if missing; must be writable.
      best: the name of a metric given to `save`, lower is better; None keeps none for its metric.
      made_from: data, tokenizer, run file, and the checkpoint resumed from: their hashes go into each
        artifact.
      skip: pattern of paths that are not saved; `restore` leaves them as they are in `like`.
      strict: a failed save raises OSError at the next `save`, `wait` or `close` instead of a warning.
      wait_seconds: how long a process waits for the others at the end of a save.
      at: the path to write into the artifacts, where the folder gets its final name only later.
    Attributes: `failed`, the number of saves that failed; `problem`, why the last one did, or None.
    Raises: OSError (PermissionError, NotADirectoryError, ...) at once if the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        best: str | None = "valid/loss",
        made_from: Iterable[str | Path | artifact.Artifact] = (),
        skip: str = "constants/*",
        strict: bool = False,
        wait_seconds: int = 600,
        at: str | Path | None = None,
    ):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep={keep} would delete every checkpoint; use 1 or more")
        self.folder, self.keep, self.best = Path(folder).absolute(), keep, best
        self.made_from = tuple(artifact.find(p) for p in made_from)
        self.skip, self.strict, self.wait_seconds = skip, strict, wait_seconds
        self.at = Path(at or folder).absolute()
        self.failed, self.problem = 0, None
        self._saving, self._error = None, None
        self._start, self._own = -1, set()
        _check_writable(self.folder)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_quiet)
        if jax.process_index() == 0:
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        _meet("checkpoints ready")

    def save(
        self,
        step: int,
        state: Any,
        meta: dict,
        metrics: Mapping[str, float] | None = None,
        passing: bool = False,
    ) -> None:
        """Copies the arrays to the host and writes in the background; waits only for an earlier save.

        A full disk or a lost permission does not stop training: it is a warning, `failed` and `problem`,
        and the checkpoints before it stay. The step it resumed from, or saved already, is not written
        again; checkpoints that this run neither wrote nor resumed from, and are newer than its start, are
        set aside, not deleted.
        Args:
          meta: small values for JSON: data position, data fingerprint, mesh, versions.
          metrics: only finite values are kept.
          passing: it is no regular save, and stays only as long as it is the best.
        Raises: TypeError if a leaf of `state` is not an array or number, or `meta` is not JSON.
        """
        self.wait()
        if step in self._own:
            return
        leaves = {path: x for path, x in stored.leaves(state).items() if not matches(path, self.skip)}
        shapes = {path: [str(x.dtype), list(x.shape)] for path, x in leaves.items()}
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        about = {"step": step, "meta": meta, "metrics": finite, "tree": shapes, "passing": passing}
        text = json.dumps(about, ensure_ascii=False)
        self._error = _make_folder(self._partial(step)) if jax.process_index() == 0 else None
        if not _all_processes(self._error is None):
            return self._report_failure(step)
        writer = ocp.AsyncCheckpointer(
            stored.handler(),
            async_options=ocp.AsyncOptions(timeout_secs=self.wait_seconds),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=f"lmx-save-{next(_saves)}"
            ),
        )
        try:
            arrays = stored.nest({path: x for path, x in leaves.items() if x.size})
            writer.save(self._partial(step) / "state", args=ocp.args.PyTreeSave(arrays))
        except OSError as error:
            self._error = error
        thread = threading.Thread(target=self._commit, args=(step, writer, text), name=f"checkpoint {step}")
        self._saving = step, thread
        thread.start()

    def wait(self) -> None:
        """Until the save under way, if any, is committed or has failed in every process.

        Raises: OSError if it failed and `strict` is set.
        """
        if self._saving is None:
            return
        (step, thread), self._saving = self._saving, None
        thread.join()
        if _all_processes(self._error is None):
            self._own.add(step)
            self.problem = None
        else:
            self._report_failure(step)

    def close(self) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """The committed steps, rising."""
        return steps(self.folder)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The kept step with the lowest `best` metric, or None if no kept step has it."""
        return best_step(self.folder, self.best)

    def lowest(self) -> float:
        """The lowest `best` metric of the kept steps; infinity if none has it."""
        return min(_values(self.folder, self.best).values(), default=math.inf)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, meta) of a step, or of the newest whole one: values bit for bit, placed as `like` says.

        A damaged checkpoint is set aside as `<step>.damaged.*`, with a warning, and the one before it is
        taken. Damage is a size other than the recorded one or, up to stored.HASHED_BYTES, another content
        hash.
        Args:
          like: the state to fill, of arrays or jax.ShapeDtypeStruct. A leaf with a sharding, of any mesh
            and any number of processes, is restored with it; one without becomes a numpy array.
        Raises: FileNotFoundError if there is no checkpoint; ValueError if `like` has other paths, shapes or
          dtypes, or if no checkpoint is whole, or the one asked for is not.
        """
        self.wait()
        wanted = {path: x for path, x in stored.leaves(like).items() if not matches(path, self.skip)}
        for tried in [step] if step is not None else reversed(self.steps()):
            source = _step_folder(self.folder, tried)
            problem = stored.damage(source, hashed=jax.process_index() == 0)
            if _all_processes(problem is None):
                about = stored.about(source)
                stored.check_same(about["tree"], wanted, source)
                state = stored.fill(like, stored.read(source, wanted))
                self._start, self._own = tried, {tried}
                self.made_from = (*self.made_from, stored.parent(source))
                return state, about["meta"]
            problem = problem or "another process finds it damaged"
            if step is not None:
                raise ValueError(f"{source}: {problem}; restore another of the steps {self.steps()}")
            warnings.warn(
                f"{source}: {problem}; it is set aside and the one before it restored", stacklevel=2
            )
            self._set_aside(tried, "damaged")
            _meet(f"{tried} set aside")
        raise _none_left(self.folder)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{step}.partial"

    def _commit(self, step: int, writer: ocp.AsyncCheckpointer, text: str) -> None:
        partial, final = self._partial(step), self.folder / str(step)
        try:
            writer.wait_until_finished()
            if self._error is None and jax.process_index() == 0:
                stored.seal(partial, text, self.at / str(step), self.made_from)
                for newer in self.steps():
                    if newer > self._start and newer not in self._own:
                        self._set_aside(newer, "aside")
                os.replace(partial, final)
                stored.sync(self.folder)
                self._prune()
        except Exception as error:  # of a thread: the trainer reports it at its next save
            self._error = self._error or error
        finally:
            writer.close()

    def _set_aside(self, step: int, why: str) -> None:
        if jax.process_index() == 0:
            os.replace(self.folder / str(step), self.folder / f"{step}.{why}.{uuid.uuid4().hex[:6]}")

    def _prune(self) -> None:
        regular = [step for step in self.steps() if not _passing(self.folder / str(step))]
        kept = {*regular[-self.keep :], self.best_step()}
        try:
            for old in set(self.steps()) - kept:
                os.replace(self.folder / str(old), self._partial(old))
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left)
        except OSError as error:
            warnings.warn(
                f"{self.folder}: old checkpoints are not removed ({error}); remove them", stacklevel=2
            )

    def _report_failure(self, step: int) -> None:
        self.failed += 1
        self.problem = (
            f"the checkpoint of step {step} in {self.folder} was not saved: "
            f"{self._error or 'another process failed'}; the last one saved is {self.latest()}. "
            "Free space or repair the folder: the next save tries again"
        )
        if jax.process_index() == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        if self.strict:
            raise OSError(self.problem) from self._error
        warnings.warn(self.problem, stacklevel=4)


def steps(folder: str | Path) -> list[int]:
    """The committed steps in a folder of checkpoints, rising."""
    names = (p.name for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else ()
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def best_step(folder: str | Path, metric: str | None = "valid/loss") -> int | None:
    """The step with the lowest value of a metric, or None if no step has it."""
    found = _values(folder, metric)
    return min(found, key=found.get, default=None)


def _passing(source: Path) -> bool:
    """Whether a checkpoint was saved only because it was the best."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return stored.about(source)["passing"]
    return False


def _values(folder: str | Path, metric: str | None) -> dict[int, float]:
    """A metric of each step that has it."""
    found = {}
    for step in steps(folder):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found[step] = float(stored.about(Path(folder) / str(step))["metrics"][metric])
    return found


def load_params(folder: str | Path, like: Any = None, step: int | str = "latest", ema: bool = False) -> Any:
    """The parameters of a checkpoint, trainable and frozen together, without the optimizer.

    Args:
      folder: a run, its folder of checkpoints, or one checkpoint.
      like: parameters of arrays or jax.ShapeDtypeStruct, filled and placed as in `Checkpoints.restore`.
        None gives numpy arrays, in the leaves that meta["weights"] describes (`lmx.weights.describe`).
      step: a step, "latest" or "best".
      ema: the moving average of the trainable ones (`lmx.optim.ema`) in their place.
    Raises: FileNotFoundError, ValueError as `Checkpoints.restore`; a damaged checkpoint is an error here, and
      so is `ema` where the optimizer kept no average.
    """
    source = find_step(Path(folder).absolute(), step)
    if problem := stored.damage(source):
        raise ValueError(f"{source}: {problem}; give another step")
    about = stored.about(source)
    whole = stored.parameters(about)
    mark = "/ema_params/"
    averages = {
        path.partition(mark)[2]: (path, entry)
        for path, entry in about["tree"].items()
        if path.startswith("opt_state/") and mark in path and path.partition(mark)[2] not in AIDS
    }
    if ema and not averages:
        raise ValueError(
            f"{source}: its optimizer kept no average of the parameters; train with optim.ema=0.999"
        )
    if ema:
        whole |= averages
    if like is None:
        wanted = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (_, (dtype, shape)) in whole.items()}
    else:
        wanted = stored.leaves(like)
    stored.check_same({path: entry for path, (_, entry) in whole.items()}, wanted, source)
    found = stored.read(source, {whole[path][0]: x for path, x in wanted.items()})
    params = {path: found[whole[path][0]] for path in wanted}
    return stored.arranged(about, params, source) if like is None else stored.fill(like, params)


def find_step(folder: Path, step: int | str) -> Path:
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    if (folder / stored.META).is_file():
        return folder
    if step == "latest":
        chosen = max(steps(folder), default=None)
    elif step == "best":
        chosen = best_step(folder)
    elif isinstance(step, int):
        chosen = step
    else:
        raise ValueError(f"load_params: step={step!r}; give a number, 'latest' or 'best'")
    if chosen is None:
        raise _none_left(folder, "with a valid/loss " if step == "best" else "")
    return _step_folder(folder, chosen)


def _step_folder(folder: Path, step: int) -> Path:
    if not (folder / str(step)).is_dir():
        raise FileNotFoundError(f"{folder}: no checkpoint of step {step}; there are {steps(folder)}")
    return folder / str(step)


def _none_left(folder: Path, which: str = "") -> Exception:
    damaged = sorted(p.name for p in folder.glob("*.damaged.*")) if folder.is_dir() else []
    if damaged:
        return ValueError(
            f"{folder}: no whole checkpoint is left; damaged: {', '.join(damaged)}; start a new run"
        )
    return FileNotFoundError(
        f"{folder}: no checkpoint {which}here; give the folder of a run that has saved one"
    )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{uuid.uuid4().hex}.partial"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise type(error)(
            f"{folder}: checkpoints cannot be written here ({error.strerror}); "
            "give a folder this user may write to"
        ) from error


def _make_folder(path: Path) -> OSError | None:
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    except OSError as error:
        return error
    return None


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lmx {name}")


def _all_processes(ok: bool) -> bool:
    """Whether it holds in every process; they meet here."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
