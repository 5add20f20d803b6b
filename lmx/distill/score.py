"""Scores of many texts by a head of two classes, and of what is left of them in a file after any end.

found = scores(trained("runs/scorer"), texts)                        [n] in [0, 1]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx import artifact
from lmx.data import Records, Report
from lmx.data.encoded import ids_of

from .lines import lines

BLOCK = 1024
"""Rows that are scored together, and lost at most by a kill."""
Seen = Callable[[int, int], None]


def scores(
    model: Any, texts: Sequence[str], *, batch_tokens: int = 4096, seen: Seen = lambda done, of: None
) -> np.ndarray:
    """The probability of the second class of each text, float32 [n], as the model reads it whole.

    Texts of like length are read together, in few sizes of rows, and one batch is read while the last one is counted.
    Args:
      model: as `lmx.run.trained` gives it, with a head of `lmx.adapt.Classes(2)`.
      batch_tokens: in a batch, padding included. seen: called with the texts that are done, and with all.
    Raises: ValueError for a model without such a head, or a text longer than its positions, or empty to a tokenizer
      without bos.
    """
    head = model.params.get("classes")
    if head is None or head.shape[-1] != 2:
        has = "no head of classes" if head is None else f"a head of {head.shape[-1]} classes"
        raise ValueError(f"scores: the model has {has}; train one with start=(..., Classes(2))")
    ids = [ids_of(model.tokenizer, text) for text in texts]
    limit = model.model.config.position.max_len()
    for i, row in enumerate(ids):
        if not row or (limit is not None and len(row) > limit):
            raise ValueError(f"scores: text {i} has {len(row)} tokens; use 1 to {limit or 'any number'}")
    found = np.empty(len(ids), np.float32)
    program, running, done = _program(model.model), None, 0
    for rows, batch in _batches(ids, batch_tokens):
        following = rows, program(model.params, batch)
        if running is not None:
            found[running[0]] = np.asarray(running[1])[: len(running[0])]
            seen(done := done + len(running[0]), len(ids))
        running = following
    if running is not None:
        found[running[0]] = np.asarray(running[1])[: len(running[0])]
        seen(len(ids), len(ids))
    return found


def score_records(
    model: Any,
    records: Records,
    fields: Sequence[str],
    text: Callable[[Mapping[str, Any]], str],
    out: str | Path,
    *,
    how: str,
    origin: Sequence[str | Path | artifact.Artifact],
    field: str = "score",
    batch_tokens: int = 4096,
    seen: Seen = lambda done, of: None,
) -> Report:
    """Writes every row of `records` with its score into a JSONL file; what an earlier call has written is kept.

    Args:
      fields: of a row that are written. text: of a row what is scored; how: what tells this from other texts of it, as
        a template does. origin: what the model was read from. field: that holds the score.
    Returns: what was passed over. Raises: as `scores`, `Records.rows` and `lines`; ValueError if a row has the field.
    """
    if field in fields:
        raise ValueError(f"score: rows have a field {field!r} already; name another for the score")
    parents = [artifact.find(x) for x in origin]
    of = {"teacher": [x.hash for x in parents], "records": records.fingerprint(), "text": how, "field": field}
    report = Report()
    with lines(out, "scores", of, [*parents, *records.files()]) as growing:
        if growing is None:
            return report
        rows = [row for _, row in records.rows(fields, report)]
        while growing.n < len(rows):
            block, done = rows[growing.n : growing.n + BLOCK], growing.n
            found = scores(
                model,
                [text(row) for row in block],
                batch_tokens=batch_tokens,
                seen=lambda n, _, done=done: seen(done + n, len(rows)),
            )
            growing.add({**row, field: float(p)} for row, p in zip(block, found))
    return report


def _batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[tuple[np.ndarray, dict]]:
    """(numbers of the texts, their batch), those of like length together."""
    lengths = np.array([len(row) for row in ids], np.int64)
    sizes = np.array([_size(n) for n in lengths], np.int64)
    for size in np.unique(sizes):
        here = np.flatnonzero(sizes == size)
        n_rows = max(1, batch_tokens // int(size))
        for start in range(0, len(here), n_rows):
            rows = here[start : start + n_rows]
            tokens = np.zeros((n_rows if len(here) > n_rows else len(here), size), np.int32)
            for b, i in enumerate(rows):
                tokens[b, : lengths[i]] = ids[i]
            last = np.zeros(len(tokens), np.int32)
            last[: len(rows)] = lengths[rows] - 1
            yield rows, {"tokens": tokens, "last": last}


def _size(n: int) -> int:
    """Length of the rows for n tokens: 8, 12, 16, 24, 32, 48, ..."""
    power = 1 << max(3, (int(n) - 1).bit_length())
    return power * 3 // 4 if n <= power * 3 // 4 else power


@functools.lru_cache(maxsize=8)
def _program(model):
    @jax.jit
    def answers(params, batch):
        tokens, last = batch["tokens"], batch["last"]
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        whole = {"tokens": tokens, "positions": at, "segment_ids": (at <= last[:, None]).astype(jnp.int32)}
        out = model.apply(params, whole)
        hidden = out.hidden[jnp.arange(len(tokens)), last][:, None]
        logits = replace(out, hidden=hidden).logits[:, 0]
        return jax.nn.sigmoid(logits[:, 1] - logits[:, 0])

    return answers
