"""Prunes a model to a smaller shape: the layers, heads, units and features that do most on a text are kept.

  lmx shrink SmolLM2.gguf runs/half --layers 15 --ff 1024 --calibration wiki.txt --report
  lmx shrink runs/model runs/narrow --d-model 288 --calibration "data/*.jsonl"     narrower embeddings and layers
  lmx shrink runs/model runs/every-other --layers 15 --evenly --calibration wiki.txt

The result is a run of no steps, which `lmx eval`, `lmx generate`, `lmx convert` and a run's Load read; its run.txt has
its configuration. Pruned alone it is a poor model and a good start: train it on, with the model it came from as its
teacher if you can (experiments/distill_lm.py).

Query heads go together with the keys and values they share, so --heads is a multiple of their number. --report judges
the result beside the original, and beside parts chosen at random: perplexity, KL divergence, share of equal likeliest
tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from lmx import cli

TABLE = (
    "kept",
    "parameters",
    "perplexity",
    "times that of the original",
    "KL, nats per token",
    "same likeliest token",
)


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    calibration: str
    """Text to see what each part does: a file, a pattern or a source."""
    layers: int | None = None
    """Layers to keep; all if not given, and so below."""
    heads: int | None = None
    """Heads of queries to keep in each layer."""
    ff: int | None = None
    """Units of the feed-forward layer to keep in each layer."""
    d_model: int | None = None
    """Features of the residual stream to keep, and so the width of the embedding."""
    evenly: bool = False
    """Layers evenly over the depth, the first and the last among them, whatever they do."""
    samples: int = 64
    """Windows of the calibration text."""
    length: int = 512
    """Tokens of a window."""
    report: bool = False
    """Judges the result and writes report.html beside it."""
    text: str | None = None
    """Text to judge by, other than the calibration text."""
    windows: int = 16
    """Windows to judge by."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "shrink")
    if all(size is None for size in (asked.layers, asked.heads, asked.ff, asked.d_model)):
        raise ValueError("nothing is to shrink; give one or more of --layers, --heads, --ff, --d-model")
    if asked.evenly and asked.layers is None:
        raise ValueError("--evenly says which layers to keep; say how many: --layers N")
    from lmx.adapt import smaller
    from lmx.run import trained

    step = cli.step_of(asked.model, asked.step) if (asked.model / "run.txt").exists() else 0
    model = trained(asked.model, step, asked.ema)
    smaller(model.run.model, **_shape(asked, model.run.model))  # what cannot be is said before the work
    write(asked, model, *measured(asked, model))


def measured(asked: Options, model) -> tuple[Any, dict]:
    """What each part of a model is worth on the calibration text, and what is to be said of that."""
    from lmx.adapt import worth
    from lmx.cli.progress import Steps
    from lmx.cli.quantize import hashed, windows
    from lmx.models import layers

    seen = windows(asked.calibration, model, asked.samples, asked.length)
    with Steps("layers") as progress:
        found = worth(model.run.model, layers(model.run.model), model.params, seen, seen=progress)
    return found, {
        "calibration": asked.calibration,
        "calibration tokens": int(seen.size),
        "calibration hash": hashed(seen),
        "influence of each layer": [round(float(x), 6) for x in found.layers],
    }


def write(asked: Options, model, found, facts: dict) -> None:
    """The smaller model, in its folder, and if asked for its report."""
    from lmx.adapt import shrink
    from lmx.cli.folder import new_folder
    from lmx.tree import count

    shape = _shape(asked, model.run.model)
    facts = facts | {"shape": {name: str(size) for name, size in shape.items() if size is not None}}
    with new_folder(asked.out) as folder:
        config, params = shrink(model.run.model, model.params, found, **shape)
        _save(asked, model, config, params, facts, folder)
        if asked.report:
            rows = judged(asked, model, {"worth most": (config, params), **_at_random(asked, model, found)})
            (folder / "report.html").write_text(_page(asked, facts, rows).html(), encoding="utf-8")
            print(rows.text())
    before, after = count(model.params), count(params)
    print(
        f"wrote {asked.out}: {after:,} parameters, {after / before:.0%} of {before:,}; train it on, and it heals"
    )


def judged(asked: Options, model, students: dict[str, tuple[Any, Any]]):
    """A table of each (configuration, parameters) beside the model they come from."""
    from lmx.cli.quantize import windows
    from lmx.evals import agreement
    from lmx.models import build
    from lmx.report.table import Table
    from lmx.tree import count

    text = asked.text or asked.calibration
    read = windows(text, model, asked.windows, asked.length)
    rows = []
    for name, (config, params) in {"all of it": (model.run.model, model.params), **students}.items():
        near = agreement(model.model, model.params, params, read, other_model=build(config))
        rows.append((name, count(params), near.perplexity, near.ratio, near.kl, near.top1))
    return Table(
        TABLE, tuple(rows), f"{len(read)} windows of {asked.length} tokens of {text}; intervals of 95 %"
    )


def _shape(asked: Options, config) -> dict[str, Any]:
    from lmx.adapt import spread

    every = config.n_layers
    layers = spread(asked.layers, every) if asked.evenly and 0 < asked.layers <= every else asked.layers
    return {"n_layers": layers, "n_heads": asked.heads, "d_ff": asked.ff, "d_model": asked.d_model}


def _at_random(asked: Options, model, found) -> dict[str, tuple[Any, Any]]:
    from lmx.adapt import shrink

    shape = _shape(replace(asked, evenly=False), model.run.model)
    return {
        f"at random, {seed}": shrink(model.run.model, model.params, found.shuffled(seed), **shape)
        for seed in (1, 2)
    }


def _save(asked: Options, model, config, params, facts: dict, folder: Path) -> None:
    from lmx.cli.convert import write_run
    from lmx.cli.quantize import origin

    beside, made_from = origin(asked.model, asked.step, asked.calibration)
    write_run(
        folder,
        asked.out,
        replace(model.run, model=config, start=(), trainable="*"),
        params,
        model.tokenizer,
        beside,
        made_from,
        {"source": str(asked.model), "pruned": facts},
    )


def _page(asked: Options, facts: dict, rows):
    from lmx.report import plots
    from lmx.report.page import Figure, KeyValues, Page, Section

    points = {"influence": list(enumerate(facts["influence of each layer"]))}
    svg = plots.lines_with_points(points, x_label="layer", y_label="1 - cosine of what it reads and gives")
    sections = (
        Section("Beside the original", (rows,)),
        Section("What each layer does", (Figure(svg, "on the calibration text"),)),
        Section("How", (KeyValues({name: json.dumps(x, ensure_ascii=False) for name, x in facts.items()}),)),
    )
    return Page(f"{asked.model.name}, pruned", sections)
