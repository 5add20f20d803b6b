"""Quantizes a model: fewer bits for each weight, chosen with or without a look at what the model reads.

  lmx quantize SmolLM2.gguf runs/q8 --method int8                       no data needed
  lmx quantize runs/model runs/q4 --method gptq --bits 4 --calibration wiki.txt
  lmx quantize runs/model runs/q4 --method awq-gptq --calibration "data/*.jsonl" --report
  lmx quantize runs/model runs/q2.5 --method mixed --bits 2.5 --calibration wiki.txt     most bits where they count
  lmx quantize runs/model compared --frontier --calibration wiki.txt    every method beside the others, on one page

The result is a run of no steps, which `lmx generate`, `lmx chat`, `lmx eval` and `lmx convert` read. --report judges it
beside the model it came from: perplexity, KL divergence, share of equal likeliest tokens, the error of each layer.
--frontier keeps what it has measured: repeat the command to go on.

  bf16 fp8 int8      16- and 8-bit floats, 8-bit whole numbers        nf4 int4    4 bits, without data
  w8a8 w4a8          whole-number products: inputs are rounded too     smooth      w8a8 of inputs made even
  gptq               rounding errors made up for                       awq         finer steps where inputs are large
  awq-gptq  rotate-gptq    one after the other                         mixed       bits by measured sensitivity
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lmx import cli

if TYPE_CHECKING:
    import numpy as np

METHODS = (
    "bf16", "fp8", "int8", "w8a8", "w4a8", "nf4", "int4", "smooth", "gptq", "awq", "awq-gptq", "rotate-gptq", "mixed",
)  # fmt: skip
UNSEEING = ("bf16", "fp8", "int8", "w8a8", "w4a8", "nf4", "int4")
"""Methods that need no calibration text."""
GRIDS = ("int4", "gptq", "awq", "awq-gptq", "rotate-gptq", "mixed")
HEARD = {
    "bits": GRIDS,
    "group_size": (*GRIDS, "nf4", "w4a8"),
    "affine": (*GRIDS, "int8", "w8a8"),
    "act_order": tuple(m for m in GRIDS if m not in ("int4", "awq")),
}
"""Option -> the methods that it changes."""


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    method: Literal[METHODS] = "int8"
    """As listed above."""
    bits: float | None = None
    """Of each weight, 2 to 6 or 8; 4 if not given. For mixed the mean, such as 3.5."""
    group_size: int | None = None
    """Inputs that share a scale, 0 for all of an output. If not given, 128 (64 for nf4 and w4a8), or a half or less of
    it that divides the inputs of every matrix, as formats of others want it."""
    affine: bool = False
    """A zero point for each group, instead of steps that are the same on both sides of zero."""
    act_order: bool = True
    """With --no-act-order GPTQ takes inputs as they come, not by falling size: worse, but without a gather at each
    use."""
    embed: bool = False
    """Embedding and head in int8 too."""
    where: str | None = None
    """Pattern of the matrices; all of the layers if not given."""
    calibration: str | None = None
    """Text to see inputs of: a file, a pattern or a source."""
    samples: int = 64
    """Windows of the calibration text."""
    length: int = 512
    """Tokens of a window, for calibration and judging."""
    text: str | None = None
    """Text to judge by, other than the calibration text."""
    windows: int = 16
    """Windows to judge by."""
    report: bool = False
    """Judges the result and writes report.html beside it."""
    frontier: bool = False
    """Judges every method, and writes a report instead of a model."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "quantize")
    _check(asked)
    import numpy as np

    from lmx.cli.folder import new_folder
    from lmx.run import trained
    from lmx.tree import nbytes, nodes
    from lmx.weights import Quantized, Weight, dense

    step = cli.step_of(asked.model, asked.step) if (asked.model / "run.txt").exists() else 0
    model = trained(asked.model, step, asked.ema)
    already = [path for path, w in nodes(model.params, Quantized).items() if isinstance(w, Quantized)]
    if already:
        run = asked.model if (asked.model / "run.txt").exists() else "RUN"
        first = "" if run == asked.model else f"`lmx convert {asked.model} RUN`, then "
        raise ValueError(
            f"{asked.model}: {already[0]} is quantized already; give the model it was made from, or all that it is "
            f"now as plain numbers: {first}`lmx convert {run} OUT --layout dense`"
        )
    wrong = [path for path, w in nodes(model.params, Weight).items() if not np.isfinite(dense(w)).all()]
    if wrong:
        raise ValueError(
            f"{asked.model}: {wrong[0]} holds numbers that are not finite; train it anew, or fetch it"
        )
    if asked.frontier:
        from lmx.cli import frontier

        return frontier.compare(asked, model)
    with new_folder(asked.out) as folder:
        seen = windows(asked.calibration, model, asked.samples, asked.length) if asked.calibration else None
        if asked.report:  # before the work, which a text that cannot be read would undo
            windows(asked.text or asked.calibration, model, asked.windows, asked.length)
        began = time.monotonic()
        params, facts = made(asked, model, seen)
        facts |= {"seconds": time.monotonic() - began}
        _save(asked, model, params, facts, folder)
        if asked.report:
            found = judged(asked, model, params)
            (folder / "report.html").write_text(_page(asked, facts, found).html(), encoding="utf-8")
            for name, value in found.items():
                print(f"{name:11} {value}")
    small, large = (nbytes(x) for x in (params, model.params))
    print(
        f"wrote {asked.out}: {small / 2**20:,.1f} MiB of weights, {large / small:.2f} times less than before"
    )


def _check(asked: Options) -> None:
    if asked.method not in UNSEEING and not asked.frontier and asked.calibration is None:
        raise ValueError(f"--method {asked.method} looks at inputs; give it a text: --calibration FILE")
    if asked.frontier and asked.calibration is None:
        raise ValueError("--frontier tries methods that look at inputs; give them a text: --calibration FILE")
    if asked.report and asked.text is None and asked.calibration is None:
        raise ValueError("--report judges the result on a text; give one: --text FILE")
    for name, methods in HEARD.items():
        if _given(asked, name) and asked.method not in methods and not asked.frontier:
            raise ValueError(
                f"--{_option(asked, name)} says nothing to --method {asked.method}; it is for {', '.join(methods)}"
            )
    for name in ("method", "bits", "act_order", "embed"):
        if _given(asked, name) and asked.frontier:
            raise ValueError(f"--{_option(asked, name)} says nothing to --frontier, which tries its own")
    if asked.text is not None and not (asked.report or asked.frontier):
        raise ValueError("--text says what to judge by, which --report or --frontier asks for")
    if asked.frontier and asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"{asked.out} is a file; name a folder")
    if asked.bits is not None and not 2 <= asked.bits <= 8:
        raise ValueError(f"--bits {asked.bits}; use 2, 3, 4, 5, 6 or 8, or for --method mixed a mean of them")
    if asked.method in ("nf4", "w4a8") and asked.group_size == 0:
        raise ValueError(f"--group-size 0: {asked.method} has groups; use 2 or more")
    if asked.group_size is not None and asked.group_size != 0 and asked.group_size < 2:
        raise ValueError(f"--group-size {asked.group_size}; use 2 or more, or 0 for one scale an output")
    if asked.where == "":
        raise ValueError('--where "" fits no path; name a pattern such as "blocks/*mlp*", or leave it out')
    for name in ("calibration", "text"):
        if getattr(asked, name) == "":
            raise ValueError(
                f'--{name} "" names no text; give a file, a pattern or a source, or leave it out'
            )
    if asked.method != "mixed" and asked.bits is not None and asked.bits != int(asked.bits):
        raise ValueError(f"--bits {asked.bits} is no whole number; only --method mixed spends parts of bits")
    if asked.method != "mixed" and asked.bits == 7:
        raise ValueError("--bits 7: no format has them; use 2, 3, 4, 5, 6 or 8")
    for name in ("samples", "windows", "length"):
        if getattr(asked, name) < (2 if name == "length" else 1):
            raise ValueError(f"--{name} {getattr(asked, name)} is too few")
    if asked.out.exists() and not asked.frontier and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise ValueError(f"{asked.out} is already there; name a new folder")


def _given(asked: Options, name: str) -> bool:
    return getattr(asked, name) != getattr(Options, name)


def _option(asked: Options, name: str) -> str:
    return ("no-" if getattr(asked, name) is False else "") + name.replace("_", "-")


def how(asked: Options, method: str, size: int | None) -> Any:
    """The surgery, or the calibrated method, that a name means; size: of groups."""
    from lmx import adapt

    bits = 4 if asked.bits is None else int(asked.bits)
    where = asked.where or adapt.LAYERS
    plain = adapt.Quantize(bits, size, not asked.affine, where)
    gptq = adapt.Gptq(bits, size, asked.act_order, symmetric=not asked.affine)
    found = {
        "bf16": lambda: adapt.Cast(where=asked.where or adapt.EVERY),
        "fp8": lambda: adapt.Fp8(where=where),
        "int8": lambda: adapt.Int8(symmetric=not asked.affine, where=where),
        "w8a8": lambda: adapt.W8A8(symmetric=not asked.affine, where=where),
        "w4a8": lambda: adapt.W4A8(group_size=size, where=where),
        "nf4": lambda: adapt.Nf4(size or 64, where),
        "int4": lambda: plain,
        "smooth": lambda: adapt.Smooth(then=adapt.Rounded(adapt.W8A8())),
        "gptq": lambda: gptq,
        "awq": lambda: adapt.Awq(plain, adapt.Rounded(plain)),
        "awq-gptq": lambda: adapt.Awq(plain, gptq),
        "rotate-gptq": lambda: gptq,
    }
    return found[method]()


def made(asked: Options, model, seen: np.ndarray | None) -> tuple[Any, dict]:
    """The quantized parameters, and what is to be said of them."""
    import jax

    from lmx import adapt
    from lmx.cli.progress import Steps
    from lmx.models import layers

    key, where = jax.random.key(0), asked.where or adapt.LAYERS
    params, lost, facts = model.params, {}, {"method": asked.method}
    if asked.embed and asked.method != "bf16":
        whole = asked.method in ("w8a8", "w4a8", "smooth")
        params = (adapt.W8A8 if whole else adapt.Int8)(where="embed|head")(params, key)
    size = _group_size(asked, params, where) if asked.group_size is None else asked.group_size or None
    if asked.method == "mixed":
        with Steps("sensitivity of layers") as progress:
            losses = adapt.sensitivity(
                layers(model.run.model),
                params,
                seen[: -(-len(seen) // 16)],
                group_size=size,
                where=where,
                seen=progress,
            )
        chosen = adapt.spend(losses, 4.0 if asked.bits is None else asked.bits)
        facts |= {"bits of each layer": " ".join(map(str, chosen))}
        each = {b: adapt.Gptq(b, size, asked.act_order, symmetric=not asked.affine) for b in chosen}
        method: Any = tuple(each[b] for b in chosen)
    else:
        method = how(asked, asked.method, size)
    facts |= {"how": repr(method)}
    if asked.method in UNSEEING:
        params = method(params, key)
    else:
        if asked.method == "rotate-gptq":
            params = adapt.Rotate(where)(params, key)
        with Steps("layers") as progress:
            params, lost = adapt.calibrate(
                layers(model.run.model), params, seen, method, where=where, seen=progress
            )
        facts |= {
            "calibration": asked.calibration,
            "calibration tokens": int(seen.size),
            "calibration hash": hashed(seen),
            "lost": lost,
        }
    return jax.block_until_ready(params), facts


def _group_size(asked: Options, params, where: str) -> int:
    """The usual one, or a half or less of it that divides the inputs of every matrix if 8 or more does."""
    from lmx.adapt.matrices import found
    from lmx.weights import shape_of

    usual = 64 if asked.method in ("nf4", "w4a8") else 128
    inputs = {shape_of(w)[-2] for path, w in found(params, where).items() if path != "embed"}
    sizes = (usual >> halved for halved in range(8))
    return next((size for size in sizes if size >= 8 and not any(d_in % size for d_in in inputs)), usual)


def _save(asked: Options, model, params, facts: dict, folder: Path) -> None:
    from lmx.cli.convert import write_run

    beside, made_from = origin(asked.model, asked.step, asked.calibration)
    write_run(
        folder,
        asked.out,
        replace(model.run, start=(), trainable="*"),
        params,
        model.tokenizer,
        beside,
        made_from,
        {"source": str(asked.model), "quantization": {k: v for k, v in facts.items() if k != "lost"}},
    )
    (folder / "quantization.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")


def origin(model: Path, step: str, calibration: str | None) -> tuple[dict[str, str], list[Path]]:
    """What came with a model, name -> text, and the files that another one is made from with a text."""
    from lmx.models import pretrained
    from lmx.train.checkpoint import FOLDER

    if (model / "run.txt").exists():
        beside = pretrained.beside(model / pretrained.KEPT)
        made_from = [model / FOLDER / str(cli.step_of(model, step))]
    else:
        found = pretrained.find(model)
        beside, made_from = found.beside(), found.files()
    return beside, made_from + ([Path(calibration)] if calibration and Path(calibration).is_file() else [])


def windows(name: str, model, n: int, length: int) -> np.ndarray:
    """n windows of the tokens of a text, evenly spread over it, [n, length]; fewer if it is shorter."""
    import numpy as np

    ids: list[int] = []
    for document in cli.source_of(name):
        ids += model.tokenizer.encode(document["text"] + "\n")
        if len(ids) > 40 * n * length:
            break
    whole = len(ids) // length
    if not whole:
        raise ValueError(
            f"{name}: {len(ids)} tokens make no window of {length}; give a longer text or a shorter --length"
        )
    at = np.linspace(0, whole - 1, min(n, whole)).round().astype(int)
    return np.array(ids[: whole * length], np.int32).reshape(whole, length)[at]


def hashed(tokens: np.ndarray) -> str:
    from lmx.artifact import hash_text

    return hash_text(" ".join(map(str, tokens.ravel())))[:16]


def judged(asked: Options, model, params) -> dict:
    from lmx.evals import agreement

    text = asked.text or asked.calibration
    found = agreement(model.model, model.params, params, windows(text, model, asked.windows, asked.length))
    return {
        "perplexity": found.perplexity,
        "ratio": found.ratio,
        "kl": found.kl,
        "top1": found.top1,
    }


def _page(asked: Options, facts: dict, found: dict):
    from lmx.report import plots
    from lmx.report.page import Figure, KeyValues, Page, Section, Table

    lost = facts.get("lost") or {}
    kinds: dict[str, list] = {}
    for path, share in lost.items():
        _, layer, *rest = path.split("/")
        kinds.setdefault("/".join(rest[:-1]), []).append((int(layer), share))
    table = Table(
        ("perplexity", "times that of the original", "KL, nats per token", "same likeliest token"),
        ((found["perplexity"], found["ratio"], found["kl"], found["top1"]),),
        f"{asked.windows} windows of {asked.length} tokens of {asked.text or asked.calibration}; intervals of 95 %",
    )
    sections = [Section("Beside the original", (table,))]
    if kinds:
        svg = plots.lines_with_points(kinds, x_label="layer", y_label="share of the output lost", log_y=True)
        sections.append(Section("What each matrix loses", (Figure(svg, "on the calibration text"),)))
    told = {k: str(v) for k, v in facts.items() if k != "lost"}
    return Page(f"{asked.model.name} in {asked.method}", (*sections, Section("How", (KeyValues(told),))))
