"""The standard body of the loop: metrics, evaluation, checkpoints, preemption, and a stop where training diverges."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmx import artifact, models, values
from lmx.data.store import explained
from lmx.optim import Muon, lr_at
from lmx.train import stored
from lmx.train.checkpoint import FOLDER, Checkpoints, steps, value_of
from lmx.train.load import check_unchanged
from lmx.train.loop import Session, metric_names, to_host
from lmx.train.metrics import JsonLines, Meter, Sink
from lmx.train.program import loaded_first
from lmx.train.record import FILES, record
from lmx.train.state import State
from lmx.weights.describe import describe

RESUMABLE = (
    "mesh",
    "eval_every",
    "eval_batches",
    "eval_lengths",
    "patience",
    "save_every",
    "keep",
    "max_skips",
)
STOPPING = (signal.SIGTERM, signal.SIGINT)


class Diverged(RuntimeError):
    """Too many updates in a row were not finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Result:
    """step reached, the last metrics, the signal that stopped the run before its end or 0, and the final state.

    early: why the run ended before its last step, if its patience did.
    """

    out: Path
    step: int
    metrics: dict[str, float]
    interrupted: int
    state: State
    early: str = ""


def run(
    session: Session,
    out: str | Path,
    *,
    sinks: Iterable[Sink] = (),
    source: Path | None = None,
    base: Any = None,
    judge: Callable[[State], Mapping[str, float]] | None = None,
) -> Result:
    """Trains to the end, or until its patience is spent, from the newest checkpoint in `out` if there is one.

    Writes into `out`: what `record` says, metrics.jsonl with one line per step, and checkpoints/. SIGTERM, or a
    first Ctrl-C, saves the step at hand and returns; a second Ctrl-C raises KeyboardInterrupt at once.
    Args:
      sinks: further places for metrics, such as the live display; `out` has metrics.jsonl without being asked.
      source: the experiment file, copied beside the results.
      base: the run that this one varies; what differs is written beside the results.
      judge: more of an evaluation, such as a task's score: name -> value, told as valid/NAME. `Run.best` may name it.
    A checkpoint that cannot be written, but for the last, is a warning: training goes on and the next one is tried.
    Nothing is saved within a streak of updates that are not finite, so that the good ones before it stay; every best
    by `Run.best` is saved, whatever `save_every` says.
    Raises: ValueError if `out` holds another run, another process trains there, or `Run.best` is of no evaluation;
      OSError if it cannot be written; Diverged after `max_skips` updates in a row that are not finite.
    """
    out = Path(out)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    with artifact.alone(out / ".lock") if jax.process_index() == 0 else nullcontext():
        return _run(session, out, sinks, source, base, judge)


def _run(
    session: Session, out: Path, sinks: Iterable[Sink], source: Path | None, base: Any, judge: Callable | None
) -> Result:
    plan, prepared = session.run, session.prepared
    if judge is None:
        _check_best(plan, metric_names(plan))
    origin = artifact.Artifact(
        "run", artifact.hash_text(values.show(plan) + "\n"), str((out / "run.txt").absolute())
    )
    load = loaded_first(plan.start)
    checkpoints = Checkpoints(
        out / FOLDER,
        keep=plan.keep,
        best=plan.best,
        made_from=(*prepared.made_from, origin, *(load.files() if load else ()), *plan.enrich.files()),
        skip="constants/*|frozen/*" if load else "constants/*",
    )
    state, start, waited = _begin(session, checkpoints, out)
    first = jax.process_index() == 0
    log: list[Sink] = []
    if first:
        record(out, plan, prepared, list(session.program.mesh.devices.flat), source, base)
        log = [JsonLines(out / "metrics.jsonl"), *sinks]
        for sink in log:
            sink.rewind(start)
    tokens = plan.data.batch_size * plan.data.seq_len
    flops = models.flops_per_token(plan.model, plan.data.seq_len)
    meter = Meter(tokens, flops, session.program.mesh, dtype=plan.model.dtype)
    rate = rate_of(plan)
    latest: dict[str, float] = {}
    valid: dict[str, float] = {}
    pending: list = []

    def flush() -> None:
        """Writes the metrics of the steps before; the newest is left on the device until the next one runs."""
        for step, metrics in pending:
            latest.update(to_host(metrics))
            latest["lr"] = rate(step - 1 - latest["skipped"] + bool(latest["streak"]))
            line = latest | meter.tick(step)
            for sink in log:
                sink.write(step, line)
            if latest["streak"] >= plan.max_skips:
                raise Diverged(_diverged(step, latest["streak"], checkpoints))
        pending.clear()

    def evaluate(step: int) -> None:
        meter.pause()
        valid.update(session.evaluate(state))
        if judge is not None:
            valid.update({f"valid/{name}": x for name, x in judge(state).items()})
            _check_best(plan, valid)
        meter.resume()
        for sink in log:
            sink.write(step, valid)

    def save(step: int, passing: bool = False) -> None:
        for sink in log:
            sink.flush()
        meta = {
            "data": {"next_batch": step, "fingerprint": prepared.train.fingerprint},
            "run": values.show(plan),
            "waited": waited,
            "weights": describe(state.params),
        }
        meter.pause()
        checkpoints.save(step, state, meta, latest | valid, passing)
        meter.resume()

    step, stopping, lowest = start, 0, checkpoints.lowest()
    with _stop_signal() as asked:
        try:
            for state, metrics in () if _spent(plan, waited) else session.steps(state):
                step += 1
                valid.clear()
                flush()
                pending.append((step, metrics))
                stopping = asked(step)
                last = step == plan.steps
                if last or stopping or step % plan.eval_every == 0 or step % plan.save_every == 0:
                    flush()
                best = False
                if prepared.valid_stores and (last or step % plan.eval_every == 0):
                    try:
                        evaluate(step)
                    except Exception:  # whatever it is, what was trained is worth keeping
                        save(step)
                        raise
                    value = value_of(plan.best, valid)
                    best = value < lowest
                    lowest = value if best else lowest
                    waited = 0 if best else waited + 1
                ends = last or stopping or _spent(plan, waited)
                regular = ends or (step % plan.save_every == 0 and not latest["streak"])
                if regular or best:
                    save(step, passing=not regular)
                if ends:
                    break
        finally:
            checkpoints.close()
            for sink in log:
                sink.close()
    if checkpoints.problem:
        raise OSError(f"stopped at step {step}, but {checkpoints.problem}")
    early = ""
    if _spent(plan, waited) and step < plan.steps:
        best = checkpoints.best_step()
        more = plan.best.startswith("-")
        than = f"{'higher' if more else 'lower'} than {-lowest if more else lowest:.4f} of step {best}"
        than = "that is finite" if best is None else than
        early = f"{waited} evaluations without a {plan.best.removeprefix('-')} {than}"
    if first:
        facts = {"step": step} | ({"early": early} if early else {})
        artifact.record(out / "run.txt", "run", made_from=prepared.made_from, facts=facts)
    return Result(out, step, latest | valid, 0 if early or step == plan.steps else stopping, state, early)


def _spent(plan: Any, waited: int) -> bool:
    """Whether a run stops early after this many evaluations without a new best."""
    return plan.patience is not None and waited >= plan.patience


def _check_best(plan: Any, known: Iterable[str]) -> None:
    """Raises: ValueError if the best checkpoint is chosen by what no evaluation yields."""
    held_out = [name for name in known if name.startswith("valid/")]
    if held_out and plan.best.removeprefix("-") not in held_out:
        raise ValueError(f"Run: best={plan.best!r} is none of {', '.join(held_out)}; name one of them")


def _begin(session: Session, checkpoints: Checkpoints, out: Path) -> tuple[State, int, int]:
    """The newest checkpoint's state, if it is of this run, or a fresh one; its step; and the evaluations it had waited
    for a new best."""
    if checkpoints.latest() is None:
        _check_free(session, out)
        return session.init(), 0, 0
    load = loaded_first(session.run.start)
    latest = out / FOLDER / str(checkpoints.latest())
    check_unchanged([*(load.files() if load else ()), *session.run.enrich.files()], latest)
    constants = jax.tree.leaves(session.program.shapes.constants)
    like = session.init() if load or constants else session.program.shapes  # neither is in a checkpoint
    state, meta = checkpoints.restore(like)
    _check_same(session, int(state.step), meta, out)
    return state, int(state.step), meta.get("waited", 0)


def _check_free(session: Session, out: Path) -> None:
    """That a folder without a checkpoint loses nothing to this run.

    Raises: ValueError if it holds steps of another run, or files of the names a run writes.
    """
    saved = out / "run.txt"
    if not saved.exists():
        others = [name for name in FILES if (out / name).exists()]
        if others:
            raise ValueError(f"{out} holds {others[0]} but no run; choose another folder")
    elif (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
        _check_settings(session, saved.read_text(encoding="utf-8"), 0, out)


def finished(session: Session, out: str | Path) -> bool:
    """Whether the newest checkpoint in `out` is the end of this run, or where its patience was spent.

    Raises: ValueError if it is the end of another run.
    """
    newest = max(steps(Path(out) / FOLDER), default=None)
    if newest is None or stored.damage(Path(out) / FOLDER / str(newest)):
        return False
    meta = stored.about(Path(out) / FOLDER / str(newest))["meta"]
    if newest != session.run.steps and not _spent(session.run, meta.get("waited", 0)):
        return False
    _check_same(session, newest, meta, Path(out))
    return True


def _check_same(session: Session, step: int, meta: dict, out: Path) -> None:
    other_data = meta["data"]["fingerprint"] != session.prepared.train.fingerprint
    _check_settings(session, meta["run"], step, out, other_data)
    if other_data:
        raise ValueError(f"{out}: its data has changed since it was started; choose another folder")


def _check_settings(session: Session, text: str, step: int, out: Path, other_data: bool = False) -> None:
    """A run may get other `steps` as long as the learning rates of the `step` updates it has made stay the same.

    other_data: of `steps` nothing is said, which may be counted from the data.
    Raises: ValueError that names what differs from the run saved as `text`.
    """
    kind = type(session.run)
    saved, asked = (values.parse(run, kind, str(out)) for run in (text, values.show(session.run)))
    changed = {k: v for k, v in values.diff(saved, asked).items() if k.split(".")[0] not in RESUMABLE}
    if set(changed) == {"steps"} and other_data:
        changed = {}
    elif set(changed) == {"steps"} and step < session.run.steps:
        before, after = (_rates(run, step) for run in (saved, session.run))
        if np.array_equal(before, after):
            changed = {}
    if changed:
        listed = "; ".join(f"{path}: {a!r:.99} there, {b!r:.99} asked" for path, (a, b) in changed.items())
        raise ValueError(f"{out} holds another run ({listed}); choose another folder or the same settings")


def rate_of(run: Any, block: int = 4096) -> Callable[[int], float]:
    """The learning rate of an update, by its number from 0. Computed for a block of them at once: a rate asked
    of the device alone would wait for the step that it is at."""

    @lru_cache(maxsize=2)
    def rates(n: int) -> np.ndarray:
        return np.asarray(lr_at(run.optim, run.steps, np.arange(n * block, (n + 1) * block)))

    return lambda update: float(rates(update // block)[update % block])


def _rates(run: Any, step: int) -> np.ndarray:
    """The learning rates of the first `step` updates, of Muon's partner too."""
    updates = [run.optim, run.optim.partner] if isinstance(run.optim, Muon) else [run.optim]
    return np.stack([lr_at(update, run.steps, np.arange(step)) for update in updates])


def _diverged(step: int, streak: int, checkpoints: Checkpoints) -> str:
    """A checkpoint is good if the step after it was finite: the last update before the streak may have caused it."""
    checkpoints.wait()
    good = max((saved for saved in checkpoints.steps() if saved < step - streak), default=None)
    return (
        f"step {step}: loss or gradient not finite {streak} times in a row; stopped. "
        f"Last good checkpoint: {good}. Lower optim.lr, or look at the data around this step"
    )


@contextmanager
def _stop_signal() -> Iterator:
    """Gives a function step -> the signal for which to stop there, SIGTERM or SIGINT, or 0.

    With several processes jax's preemption service takes SIGTERM and picks a step that none has passed yet.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return
    seen: list[int] = []

    def stop(number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            os.write(2, b"\nsaving this step; Ctrl-C again stops without it\n")
        seen.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in STOPPING if main}
    try:
        yield lambda step: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
