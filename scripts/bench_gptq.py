"""GPTQ beside GPTQModel and GGUF types of as many bits: one model, one calibration text, one text to judge by.

    python scripts/bench_gptq.py SmolLM2-135M-Instruct.gguf --calibration a.txt --text b.txt --peer /path/to/python

The peer's Python has gptqmodel; it is given the very tokens that lmx sees, and its folder is read back here without
going through floats. GGUF rows have the numbers of a file whose errors are weighted by what the same text's inputs are
(llama.cpp's imatrix). All results are judged by the same code on the same windows: bits for each weight of the layers,
perplexity, KL to the original in nats per token, and the share of rounding's perplexity gap that is closed. The
embedding stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--peer", help="a Python that has gptqmodel; without it there is no peer")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gguf", nargs="*", default=["Q4_0", "Q4_K"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return work(json.loads(asked.worker))
    import jax

    jax.config.update("jax_platforms", "cpu")
    from bench_train import describe_machine

    from lmx import adapt
    from lmx.cli.quantize import windows
    from lmx.evals import agreement
    from lmx.models import layers, pretrained
    from lmx.report.table import Table
    from lmx.run import trained
    from lmx.tree import count, nbytes

    model, key = trained(asked.model), jax.random.key(0)
    parts = layers(model.run.model)
    seen = windows(asked.calibration, model, asked.samples, asked.length)
    judged = windows(asked.text, model, asked.windows, asked.length)
    bits, size = asked.bits, asked.group_size

    def calibrated(act_order):
        method = adapt.Gptq(bits, size, act_order)
        return adapt.calibrate(parts, model.params, seen, method).params

    inputs = adapt.importance(parts, model.params, seen) if asked.gguf else {}
    gguf = {f"GGUF {x}": adapt.Gguf(x, where=adapt.LAYERS, importance=inputs) for x in asked.gguf}

    def bits_of(name, params):
        only = {"blocks": params["blocks"]}
        return 8 * (gguf[name].nbytes(only) if name in gguf else nbytes(only)) / count(model.params["blocks"])

    with tempfile.TemporaryDirectory() as folder:
        made = {
            "original": lambda: model.params,
            "rounded": lambda: adapt.Quantize(bits, size)(model.params, key),
            "lmx GPTQ": lambda: calibrated(False),
            "lmx GPTQ, act-order": lambda: calibrated(True),
        }
        if asked.peer:
            found = pretrained.find(asked.model)
            pretrained.save(f"{folder}/float", found.config, model.params, like=found.fields, dtype="float32")
            model.tokenizer.save(Path(folder, "float"))
            for act_order in (False, True):
                name = "GPTQModel" + ", act-order" * act_order
                job = {
                    "model": f"{folder}/float",
                    "out": f"{folder}/{name}",
                    "bits": bits,
                    "group_size": size,
                    "act_order": act_order,
                    "tokens": seen.tolist(),
                }
                made[name] = lambda job=job: by_peer(asked.peer, job)
        made |= {name: lambda file=file: file(model.params, key) for name, file in gguf.items()}
        rows, plain = [], {}
        for name, make in made.items():
            begin = time.perf_counter()
            params = jax.block_until_ready(make())
            seconds = time.perf_counter() - begin
            near = agreement(model.model, model.params, params, judged)
            plain[name] = near.perplexity.value
            gap = plain.get("rounded", 0.0) - plain["original"]
            closed = (plain["rounded"] - plain[name]) / gap if "rounded" in plain else None
            rows.append((name, bits_of(name, params), near.perplexity, near.kl, near.top1, closed, seconds))
            print(f"{name}: {near.perplexity}, {seconds:.0f} s", file=sys.stderr)
    for name, value in describe_machine("jax").items():
        print(f"{name:12} {value}")
    columns = (
        f"{bits} bits, groups of {size}",
        "bits",
        "perplexity",
        "KL",
        "same top",
        "gap closed",
        "seconds",
    )
    said = f"{seen.size} calibration tokens, {judged.size} judged; seed 0"
    print(Table(columns, tuple(rows), said).text())


def by_peer(python: str, job: dict):
    """What the peer makes of the model, read by lmx."""
    from lmx.models import pretrained

    env = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
    where = Path(job["out"] + ".log")
    with where.open("w") as log:
        done = subprocess.run(
            [python, __file__, "m", "--calibration", "-", "--text", "-", "--worker", json.dumps(job)],
            stdout=log, stderr=log, env=env, cwd=Path(job["out"]).parent,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench_gptq: the peer failed: {where.read_text()[-2000:]}")
    return pretrained.load(pretrained.find(job["out"]))


def work(job: dict) -> None:
    """In the peer's Python."""
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], desc_act=job["act_order"], sym=True, format="gptq",
        offload_to_disk=False, act_group_aware=False,
    )  # fmt: skip
    model = GPTQModel.load(job["model"], settings, device="cpu")
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["tokens"]], batch_size=1
    )
    model.save(job["out"])


if __name__ == "__main__":
    main()
