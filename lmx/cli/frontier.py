"""`lmx quantize --frontier`: every method on one page, bits against what they keep, and kept as far as measured."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmx import artifact, cli
from lmx.adapt import Gguf, importance
from lmx.cli.quantize import Options, hashed, judged, made, origin, windows
from lmx.generate.rows import Decoder, Known
from lmx.generate.sampling import Sampling
from lmx.models import layers
from lmx.report import plots
from lmx.report.page import Figure, Page, Section, Text
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.tree import count, nbytes

RESULTS = "frontier.json"
ROW = {"perplexity", "ratio", "kl", "top1", "bytes", "bits", "seconds", "speed"}
FRONTIER = {
    "float32": ("float32", None, True),
    "bf16": ("bf16", None, True),
    "fp8": ("fp8", None, True),
    "int8": ("int8", None, True),
    "w8a8": ("w8a8", None, True),
    "w8a8, smoothed": ("smooth", None, True),
    "w4a8": ("w4a8", 4, True),
    "nf4": ("nf4", None, True),
    **{f"{bits}-bit rounded": ("int4", bits, True) for bits in (4, 3)},
    **{f"{bits}-bit GPTQ": ("gptq", bits, False) for bits in (4, 3)},
    **{f"{bits}-bit GPTQ, act-order": ("gptq", bits, True) for bits in (4, 3, 2)},
    "4-bit AWQ": ("awq", 4, True),
    "4-bit AWQ, GPTQ": ("awq-gptq", 4, True),
    "3-bit rotated GPTQ": ("rotate-gptq", 3, True),
    "mixed, 3.5 bits": ("mixed", 3.5, True),
    **{
        f"GGUF {kind}": (kind, None, True)
        for kind in "Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 Q3_K Q2_K".split()
    },
}
"""Name -> method, bits, act_order."""


def compare(asked: Options, model) -> None:
    """Judges one method after the other, and writes the page anew after each.

    Raises: ValueError if another process does so there; as `_earlier`.
    """
    asked.out.mkdir(parents=True, exist_ok=True)
    with artifact.alone(asked.out / ".lock"):
        try:
            _compare(asked, model)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{asked.out} keeps every row that is done; repeat the command to go on"
            ) from None


def _compare(asked: Options, model) -> None:
    file = asked.out / RESULTS
    seen = windows(asked.calibration, model, asked.samples, asked.length)
    read = windows(asked.text or asked.calibration, model, asked.windows, asked.length)
    _, files = origin(asked.model, asked.step, None)
    hashes = {"calibration hash": hashed(seen), "text hash": hashed(read)}
    hashes |= {"model hash": " ".join(artifact.find(x).hash for x in files)}
    done = _earlier(file, asked, hashes)
    judge = replace(asked, embed=True)
    n = count(model.params)
    weights = {}
    if any(
        method[0] == "Q"
        for name, (method, *_) in FRONTIER.items()
        if "bits" not in done["rows"].get(name, {})
    ):
        weights = importance(layers(model.run.model), model.params, seen)
    for name, (method, bits, order) in FRONTIER.items():
        if "perplexity" in done["rows"].get(name, {}):  # a problem may have gone
            continue
        began = time.monotonic()
        try:
            params, stored = _variant(
                replace(judge, method=method, bits=bits, act_order=order), model, seen, weights
            )
            row = {"bytes": stored, "bits": 8 * stored / n, "seconds": time.monotonic() - began}
            row |= {k: asdict(v) for k, v in judged(asked, model, params).items()}
            row["speed"] = None if method[0] == "Q" else speed(model, params)
        except ValueError as error:  # a method that this model's shapes rule out
            done["rows"][name] = {"problem": str(error)}
            print(f"{name:24} left out: {error}")
        else:
            done["rows"][name] = row
            near = (Interval(**row[k]) for k in ("perplexity", "kl"))
            print(f"{name:24} {row['bits']:5.2f} bits  " + "perplexity {}  KL {}".format(*near))
        artifact.write(file, json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        artifact.write(asked.out / "report.html", _page(asked, done).html())
    artifact.write(asked.out / "report.html", _page(asked, done).html())  # of a run killed just before it
    print(f"wrote {asked.out / 'report.html'}")


def _earlier(file: Path, asked: Options, texts: dict[str, str]) -> dict:
    """What a frontier's file holds, or of a new one: {"asked": settings, "rows": {name: figures or a problem}}.

    texts: hashes of what is read, since a text or a model may change under its name.
    Raises: ValueError if it is damaged, or of other settings or texts.
    """
    left = ("out", "method", "report", "frontier", "bits")
    said = {k: str(v) for k, v in asdict(asked).items() if k not in left} | texts
    if (asked.model / "run.txt").exists():  # "latest" may be another one by now
        said["step"] = str(cli.step_of(asked.model, asked.step))
    if not file.exists():
        return {"asked": said, "rows": {}}
    try:
        done = json.loads(file.read_text("utf-8"))
        same = done["asked"] == said
        if not all("problem" in row or set(row) >= ROW for row in done["rows"].values()):
            raise KeyError
        _page(asked, done).html()  # figures of other kinds than the page's are damage too
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{file} is damaged; delete it, or name another folder") from None
    if not same:
        raise ValueError(f"{file.parent} holds the frontier of other settings or texts; name another folder")
    return done


def _variant(asked: Options, model, seen, weights) -> tuple[Any, int]:
    """(parameters, the bytes in which they are stored). weights: the importance of inputs, for GGUF's types."""
    if asked.method == "float32":
        return model.params, nbytes(model.params)
    if asked.method[0] == "Q":
        file = Gguf(asked.method, importance=weights)
        return file(model.params, jax.random.key(0)), file.nbytes(model.params)
    params, _ = made(asked, model, seen)
    return params, nbytes(params)


def speed(model, params, tokens: int = 32) -> float:
    """Tokens per second that one row writes, when all is compiled."""
    fast = model._replace(params=params).for_decoding()
    endless = model.tokenizer.without("eos_token").ending_with(())
    decoder = Decoder(fast.model, fast.params, endless, Sampling(temperature=0, max_tokens=tokens + 1))
    prompt = [[0] * 16]
    times = []
    for _ in range(4):  # the first compiles
        rows = jax.block_until_ready(decoder.begin(prompt, [0], Known(), decoder.slots(prompt)))
        began = time.perf_counter()
        jax.block_until_ready(decoder.advance(rows, np.zeros(1, bool), tokens))
        times.append(time.perf_counter() - began)
    return tokens / sorted(times[1:])[1]


def _page(asked: Options, done: dict):
    rows = {name: row for name, row in done["rows"].items() if "problem" not in row}
    of = {
        name: {k: Interval(**v) for k, v in row.items() if isinstance(v, dict)} for name, row in rows.items()
    }
    table = Table(
        ("method", "bits a weight", "MiB", "perplexity", "KL", "same top", "tokens/s", "seconds to make"),
        tuple(
            (name, row["bits"], row["bytes"] / 2**20, of[name]["perplexity"], of[name]["kl"], of[name]["top1"],
             row["speed"], row["seconds"])
            for name, row in rows.items()
        ),
        "Embedding and head are int8, but in float32, bf16 and GGUF. Intervals of 95 % over windows of text. GGUF rows "
        "have the numbers of such a file made with the calibration text, computed in float32, so that their speed is "
        "not told.",
    )  # fmt: skip
    figures = []
    for label, x, better in (
        ("bits a weight, of the whole model", "bits", "fewer"),
        ("tokens/s of one row", "speed", "more"),
    ):
        for measure, unit in (("kl", "KL, nats per token"), ("perplexity", "perplexity")):
            points: dict[str, dict] = {}
            for name, row in rows.items():
                if row["bits"] < 12 and row[x] is not None:
                    family = next((f for f in ("GGUF", "AWQ", "GPTQ", "mixed") if f in name), "other")
                    points.setdefault(family, {})[name] = row[x], of[name][measure].value
            if points:
                svg = plots.frontier(points, x_label=label, y_label=unit, more_x=better == "more", log_y=True)
                figures.append(
                    Figure(svg, f"{unit}, against {label}; the line joins what has less of one for {better}")
                )
    problems = [f"{name}: {row['problem']}" for name, row in done["rows"].items() if "problem" in row]
    told = (Text("Left out. " + " ".join(problems), "quiet"),) if problems else ()
    return Page(
        f"{asked.model.name}: bits and what they keep",
        (Section("Frontier", tuple(figures)), Section("Every method", (table, *told))),
        f"calibrated on {asked.samples} windows of {asked.length} tokens of {asked.calibration}, judged on "
        f"{asked.windows} of {asked.text or asked.calibration}",
    )
