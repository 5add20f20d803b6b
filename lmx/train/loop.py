"""The loop is a generator: `for state, metrics in steps(run)`. What is done with each step is the caller's body."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmx import data as datasets
from lmx import tree
from lmx.data.batches import ahead, iterate
from lmx.data.store import explained
from lmx.mesh import local_rows
from lmx.optim import ema_params
from lmx.train.program import Program, judged, program
from lmx.train.state import State


@dataclass(frozen=True)
class Session:
    """A run with its data at hand: its values, the prepared text, and where it is computed."""

    run: Any
    prepared: Any
    devices: tuple | None = None

    @cached_property
    def program(self) -> Program:
        return program(self.run, self.run.mesh.build(self.devices and list(self.devices)))

    def init(self) -> State:
        return self.program.init(self.run.seed)

    def steps(self, state: State) -> Iterator[tuple[State, dict]]:
        """From a state to the end of the run, one update at a time; metrics stay on the device until read.

        The arrays of a state are given up when the next step is asked for: keep copies, not states.
        """
        start = int(state.step)
        batches = iterate(
            self.prepared.train,
            start=start,
            rows=local_rows(self.program.mesh, self.run.data.batch_size),
        )
        try:
            for _ in range(start, self.run.steps):
                _, batch = next(batches)
                state, metrics = self.program.step(state, self.program.place(batch))
                yield state, metrics
        finally:
            batches.close()

    def evaluate(self, state: State) -> dict[str, float]:
        """Mean next-token loss in nats per token over the validation rows, or over `eval_batches` batches drawn
        from all of them, the same at each evaluation. Of a run that learns from pairs the loss is its whole objective.

        Returns: valid/loss; of a run that learns from pairs also valid/NAME, the mean of each term; valid/loss@N for
          each N of `eval_lengths`: the same text in rows of N tokens; and valid/ema_loss, that of the averaged
          parameters, if the optimizer keeps an average.
        """
        means = self._means(state, state.params, self.run.data.seq_len)
        found = {f"valid/{name}": mean for name, mean in means.items()}
        for length in self.run.eval_lengths:
            found[f"valid/loss@{length}"] = self._means(state, state.params, length)["loss"]
        averaged = ema_params(state.opt_state)
        if averaged is not None:
            params = tree.combine(averaged, state.frozen)
            found["valid/ema_loss"] = self._means(state, params, self.run.data.seq_len)["loss"]
        return found

    def _means(self, state: State, params: Any, seq_len: int) -> dict[str, float]:
        """The loss, and the terms it is made of."""
        batches = replace(self.prepared.valid, seq_len=seq_len)
        rounds = batches.once()
        drawn = self.run.eval_batches
        if drawn is not None and drawn * batches.batch_size < batches.n_rows:
            mixed = replace(batches, shuffle=True, seed=0)
            rounds = (mixed.batch(n) for n in range(drawn))
        rows = local_rows(self.program.mesh, batches.batch_size)
        terms = judged(self.run)
        sums, counts = Counter(), Counter()
        for batch in ahead(rounds, depth=2):
            placed = self.program.place({name: x[rows] for name, x in batch.items()})
            more = self.program.evaluate(params, state.constants, placed)
            for whole, part in zip((sums, counts), map(to_host, more)):
                whole.update(part)
        means = {name: sums[name] / counts[name] for name in terms}
        return means | {"loss": sum(term.weight * means[name] for name, term in terms.items())}


def metric_names(run: Any) -> tuple[str, ...]:
    """What a run measures that another can be compared by: of each step, and of the held-out text if it has one."""
    terms = tuple(run.objective) if len(run.objective) > 1 else ()
    each_step = ("loss", *terms, "grad_norm", "skipped", "step_seconds", "tokens_per_sec")
    if not (run.data.valid or run.data.valid_share):
        return each_step
    held_out = dict.fromkeys(("loss", *judged(run), *(f"loss@{n}" for n in run.eval_lengths)))
    averaged = ("valid/ema_loss",) if run.optim.ema is not None else ()
    return (*each_step, *(f"valid/{name}" for name in held_out), *averaged)


def session(
    run: Any, *, cache: str | Path | None = None, devices: list | None = None, progress=None
) -> Session:
    """Prepares the run's data (or finds it prepared) and takes the vocabulary size from its tokenizer.

    cache: folder of prepared data and compiled programs; None means `cache_folder()`.
    Raises: ValueError if the model's vocab_size is smaller than the tokenizer's, or `run.enrich` does not fit.
    """
    cache = Path(cache or cache_folder())
    keep_compiled(cache)
    prepared = datasets.prepare(run.data, cache / "data", seed=run.seed, progress=progress)
    prepared.report.warn("the run's text")
    run = with_vocab(run, prepared.tokenizer.vocab_size)
    run.enrich.check(run, prepared.tokenizer)
    return Session(run, prepared, devices and tuple(devices))


def steps(run: Any, **options) -> Iterator[tuple[State, dict]]:
    """Trains from the start: yields (state, metrics) after each update. Options are those of `session`.

    >>> import lmx, itertools
    >>> run = lmx.Run(data=lmx.data.Data((lmx.data.Documents(("abc " * 200,)),), seq_len=16, batch_size=8), steps=3)
    >>> losses = [float(metrics["loss"]) for state, metrics in lmx.train.steps(run)]
    >>> len(losses)
    3
    """
    prepared = session(run, **options)
    return prepared.steps(prepared.init())


def with_vocab(run: Any, vocab_size: int) -> Any:
    """The run with the model's vocab_size set. Raises: ValueError if it is set too small for the tokenizer."""
    asked = run.model.vocab_size
    if asked is not None and asked < vocab_size:
        raise ValueError(
            f"model.vocab_size={asked} is smaller than the tokenizer's {vocab_size}; leave it unset"
        )
    return replace(run, model=replace(run.model, vocab_size=asked or vocab_size))


def cache_folder() -> Path:
    """LMX_CACHE, or lmx in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LMX_CACHE") or Path(home) / "lmx")


def keep_compiled(cache: Path | None = None) -> None:
    """Turns jax's persistent compilation cache on, in a folder of `cache` or `cache_folder()`, unless the user has
    chosen one."""
    folder = (cache or cache_folder()) / "xla"
    if jax.config.jax_compilation_cache_dir is None:
        with explained(f"{folder} (LMX_CACHE)"):
            folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def to_host(metrics: dict) -> dict[str, float]:
    """Waits for the step and gives its metrics as Python numbers."""
    return {name: np.asarray(x).item() for name, x in jax.device_get(metrics).items()}
