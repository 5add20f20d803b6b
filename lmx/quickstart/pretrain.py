"""Chapter: a small Transformer learns both languages in a couple of minutes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from lmx import tree
from lmx.data import Data, File, Jsonl
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig, MlpConfig
from lmx.optim import AdamW, Linear, Muon
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page, plots
from lmx.report.runs import read_metrics
from lmx.run import Run
from lmx.train import session
from lmx.train.live import Live
from lmx.train.standard import run as train


def recipe(tour: Tour) -> Run:
    """The run, from the text and the tokenizer of the chapters before."""
    parts = {name: found["parts"] for name, found in tour.facts["text"]["languages"].items()}
    return Run(
        model=TransformerConfig(
            d_model=128, n_layers=4, attention=AttentionConfig(4, qk_norm=True), mlp=MlpConfig("swiglu")
        ),
        data=Data(
            train=tuple(Jsonl(p["train"]["path"]) for p in parts.values()),
            valid=tuple(Jsonl(p["valid"]["path"]) for p in parts.values()),
            weights=(0.85, 0.15),
            tokenizer=File(tour.facts["tokens"]["path"]),
            seq_len=128,
            batch_size=16,
        ),
        optim=Muon(lr=0.01, schedule=Linear(), partner=AdamW(lr=3e-3, schedule=Linear(), clip=None)),
        steps=tour.options.steps,
        seed=tour.options.seed,
        eval_every=max(1, tour.options.steps // 6),
        eval_batches=24,
        save_every=max(1, tour.options.steps // 3),
        keep=1,
    )


def run(tour: Tour) -> dict:
    prepared = session(recipe(tour))
    out = tour.folder / f"model-{tour.made_from[:8]}"
    result = train(prepared, out, sinks=[Live(prepared.run.steps, title="English and Hindi")])
    if result.interrupted:
        raise KeyboardInterrupt
    _name(out, tour.folder / "model")
    metrics = read_metrics(out)
    return {
        "folder": str(out),
        "parameters": tree.count(result.state.params),
        "tokens": prepared.run.steps * prepared.run.data.batch_size * prepared.run.data.seq_len,
        "padding": prepared.prepared.train.padding_share,
        "tokens_per_sec": _median([x for _, x in metrics.get("tokens_per_sec", [(0, 0.0)])]),
        "first_step_seconds": metrics.get("first_step_seconds", [(0, None)])[0][1],
        "valid_loss": metrics["valid/loss"][-1][1],
        "device": jax.devices()[0].device_kind,
    }


def show(tour: Tour, facts: dict) -> tuple:
    metrics = read_metrics(facts["folder"])
    curves = {"train": metrics["loss"], "held out": metrics["valid/loss"]}
    return (
        page.KeyValues(
            {
                "parameters": facts["parameters"],
                "tokens read": facts["tokens"],
                "tokens per second": round(facts["tokens_per_sec"]),
                "held-out loss": f"{facts['valid_loss']:.3f} nats per token",
                "padding in batches": f"{facts['padding']:.2%}",
                "device": facts["device"],
            },
            tiles=True,
        ),
        page.Figure(
            plots.curves(curves, x_label="step", y_label="nats per token"),
            "Loss while training. Both languages in every batch, 85 to 15; documents never see each other.",
        ),
        page.Text(
            f"Train it further, or differently: lmx info {tour.folder / 'model'} shows what it is.", "quiet"
        ),
    )


CHAPTER = Chapter("pretrain", "Model: pretrain on both languages", run, show)


def _name(out: Path, link: Path) -> None:
    """Makes `link` the name of the newest model."""
    partial = link.with_name(f"{link.name}.{os.getpid()}.tmp")
    partial.symlink_to(out.name)
    os.replace(partial, link)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
