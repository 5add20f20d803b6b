"""Chapter: models in fewer bits, and an adapter: what each keeps, weighs and costs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np

from lmx import adapt, tree
from lmx.adapt import EVERY, Gguf, Gptq, Int8, Lora, Merge
from lmx.data import Jsonl
from lmx.evals import agreement
from lmx.models import layers, pretrained
from lmx.optim import AdamW
from lmx.quickstart.pretrain import recipe
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page, plots
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import Trained, trained
from lmx.train import Load, session
from lmx.train.standard import run as train

EMBED = Int8(where="embed|head")
SEEN, JUDGED = 8, 8
"""Windows of text that GPTQ sees, and others by which all are judged."""
WINDOW = {"yours": 128, "released": 192}
STEPS, RANK = 60, 8
"""Of the adapter's training."""


def run(tour: Tour) -> dict:
    own = trained(tour.facts["pretrain"]["folder"])
    models = {"yours": own}
    released = tour.facts["released"]
    if "skipped" not in released:
        models["released"] = trained(released["path"])
    return {
        "formats": {name: _formats(tour, model, name) for name, model in models.items()},
        "adapter": _adapter(tour),
    }


def _formats(tour: Tour, model: Trained, name: str) -> dict:
    """What each format makes of a model: bytes, and how near it stays."""
    windows = _windows(tour, model, WINDOW[name])
    seen, judged = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    q4k = Gguf("Q4_K")

    def gptq(params):
        found = adapt.calibrate(layers(model.run.model), params, seen, Gptq(4, 64), batch_size=len(seen))
        return EMBED(found.params, jax.random.key(0))

    made = {
        "float32": lambda params: params,
        "int8": lambda params: Int8(where=EVERY)(params, jax.random.key(0)),
        "GPTQ, 4 bits": gptq,
        "GGUF Q4_K": lambda params: q4k(params, jax.random.key(0)),
    }
    facts = {}
    for method, make in made.items():
        params = make(model.params)
        near = agreement(model.model, model.params, params, judged, seed=tour.options.seed)
        size = q4k.nbytes(params) if method == "GGUF Q4_K" else tree.nbytes(params)
        facts[method] = {"bytes": size} | {k: asdict(getattr(near, k)) for k in ("perplexity", "kl", "top1")}
        tour.say(f"   {name}, {method}: {size / 2**20:.1f} MiB, perplexity {near.perplexity}")
    return facts


def _adapter(tour: Tour) -> dict:
    """An adapter that learns more Hindi, alone in its checkpoint, then merged and written for others."""
    folder = tour.facts["pretrain"]["folder"]
    hindi = tour.facts["text"]["languages"]["Hindi"]["parts"]
    data = replace(
        recipe(tour).data,
        train=(Jsonl(hindi["train"]["path"]),),
        valid=(Jsonl(hindi["valid"]["path"]),),
        weights=(),
    )
    plan = replace(
        recipe(tour),
        data=data,
        start=(Load(folder), Lora(RANK)),
        trainable="*/w/[ab]",
        optim=AdamW(lr=3e-3),
        steps=STEPS,
        eval_every=STEPS,
        save_every=STEPS,
    )
    prepared = session(plan)
    out = tour.folder / f"adapter-{tour.made_from[:8]}"
    before = prepared.evaluate(prepared.init())["valid/loss"]
    result = train(prepared, out)
    if result.interrupted:
        raise KeyboardInterrupt
    model = trained(out)
    merged = tour.folder / f"merged-{tour.made_from[:8]}"
    family = pretrained.save(
        merged, model.run.model, Merge()(model.params, jax.random.key(0)), context=model.run.data.seq_len
    )
    model.tokenizer.save(merged)
    learned = tree.count(adapt.adapter(model.params))
    tour.say(
        f"   adapter of {learned:,} numbers: {before:.3f} to {result.metrics['valid/loss']:.3f} nats a token of Hindi"
    )
    return {
        "folder": str(out),
        "path": str(merged),
        "family": family.model_type,
        "numbers": learned,
        "share": learned / tree.count(trained(folder).params),
        "bytes": sum(p.stat().st_size for p in (out / "checkpoints").rglob("*") if p.is_file()),
        "before": before,
        "after": result.metrics["valid/loss"],
    }


def show(tour: Tour, facts: dict) -> tuple:
    rows, points = [], {}
    titles = {"yours": "the model of this tour", "released": "SmolLM2-135M-Instruct"}
    for name, formats in facts["formats"].items():
        first = formats["float32"]["bytes"]
        for method, x in formats.items():
            kl = Interval(**x["kl"])
            rows.append(
                (
                    titles[name],
                    method,
                    x["bytes"] / 2**20,
                    Interval(**x["perplexity"]),
                    kl,
                    Interval(**x["top1"]),
                )
            )
            if method != "float32":
                points.setdefault(titles[name], []).append((32 * x["bytes"] / first, kl))
    svg = plots.lines_with_points(
        {name: sorted(x, key=lambda p: p[0]) for name, x in points.items()},
        x_label="bits a weight",
        y_label="KL, nats per token",
        log_y=True,
    )
    a = facts["adapter"]
    return (
        page.Text(
            "Each matrix in fewer bits. KL is how far the distribution of the next token moves, in nats; the last "
            "column how often the likeliest token stays the same. GPTQ looks at a little text and lets later rows make "
            "up for the rounding of earlier ones; the other formats look at nothing."
        ),
        Table(("model", "format", "MiB", "perplexity", "KL", "same likeliest token"), tuple(rows)),
        page.Figure(svg, "Bits against what they change, of all weights, embedding included"),
        page.Text(
            f"An adapter of rank {RANK} on every matrix of the layers, {a['numbers']:,} numbers or {a['share']:.1%} of "
            f"the model, learned {STEPS} steps of Hindi alone: {a['before']:.3f} to {a['after']:.3f} nats per token. "
            f"Its run keeps {a['bytes'] / 2**20:.1f} MiB, nothing of the model below it. Merged, it is a model of the "
            f"family {a['family']} in {Path(a['path']).name}, which transformers reads."
        ),
        page.Code(
            f"lmx quantize {tour.folder / 'model'} runs/int8 --method int8\n"
            f"lmx convert {tour.folder / 'model'} model.gguf --type Q4_K"
        ),
    )


CHAPTER = Chapter("fewer", "Fewer bits, and an adapter", run, show)


def _windows(tour: Tour, model: Trained, length: int) -> np.ndarray:
    """Windows of held-out text of both languages in turn, [n, length]; shorter ones where there is little text."""
    each = []
    for found in tour.facts["text"]["languages"].values():
        ids: list[int] = []
        for document in Jsonl(found["parts"]["valid"]["path"]):
            ids += model.tokenizer.encode(document["text"])
            if len(ids) >= (SEEN + JUDGED) * length:
                break
        each.append(np.array(ids, np.int32))
    length = min(length, *(len(ids) // 4 for ids in each))
    each = [ids[: len(ids) // length * length].reshape(-1, length) for ids in each]
    return np.stack([window for pair in zip(*each) for window in pair][: SEEN + JUDGED])
