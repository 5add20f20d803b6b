"""What does a student of a half, a quarter, an eighth of SmolLM2-135M keep: pruned or fresh, by KL or by text alone?

Each student reads the same tokens. It starts as a pruned teacher (lmx.adapt.shrink) or at random, and learns the
teacher's distribution (forward KL, computed in the same step) or the next tokens alone. We expect a pruned start and
the teacher's distribution each to help, the start most of all while tokens are few.

Of the teacher's 134.5 M parameters 28.3 M are its embedding, which is its head too: 49,152 words of 576 numbers. A half
is reached by layers and their width; a quarter and an eighth need a narrower stream, and of the eighth more than half
is embedding still:
        half      68.1 M    15 layers,    d 576, 9 heads, feed-forward 1,024       embedding 28.3 M
        quarter   34.1 M    18 layers,    d 288, 9 heads, feed-forward   768       embedding 14.2 M
        eighth    16.8 M    15 layers,    d 192, 6 heads, feed-forward   512       embedding  9.4 M

Judged on held-out text: bits per byte, KL from the teacher and the share of equal likeliest tokens; tokens per second
of one row; and, as a draft of its teacher in speculative decoding, the share of its tokens that the teacher accepts,
4 drafted at a time, greedily.

Found:  the eighth alone, after 20 steps of 4 x 128 tokens, one seed, 4 windows of 256 tokens judged (1 December 2026,
        commit 7609db4, 2 CPU cores at a load of 8 to 13, jax 0.10.2). Ten thousand tokens tell starts apart and not yet
        what is learned. Bits per byte and KL: teacher 1.37; pruned and not yet trained 3.46, 5.78; pruned, by KL 2.77,
        3.85, by text 2.74, 3.93; at random, by KL 3.28, 5.43, by text 3.33, 5.71. A pruned start by text has the lower
        loss on text, by KL the lower KL; of 4 drafted tokens the teacher accepts 3.4 % from either pruned student,
        1.4 % from the others.
        The half and the quarter, and the whole setting, were not run to their end.

Run:    python experiments/distill_lm.py --small            (30 thousand tokens each; sized for 2 CPU cores)
        python experiments/distill_lm.py                    (16 million tokens each; sized for a GPU)
        python experiments/distill_lm.py --sizes half --ways kl gkd --seeds 3    (half of the batches its own writing)
        lmx train experiments/distill_lm.py --variant quarter-pruned-kl      (one, after --prune has made the starts)
        Each repeats nothing that is done: repeat a command to go on where it stopped.
Data:   $LMX_DATA, or data: the first half of wikitext2/valid.txt, shakespeare/input.txt and debian-summaries'
        train.jsonl, 40, 20 and 40 % of the rows, so that the first two are read many times in the large setting; the
        second half of wikitext2/valid.txt judges. The model is fetched once from the package registry.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from lmx import Run, artifact
from lmx import train as training
from lmx.data import Data, File, Jsonl, Text
from lmx.losses import Chunked, ForwardKL, NextToken, Term
from lmx.optim import AdamW, Linear
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2
from lmx.report.stats import Interval, mean_interval
from lmx.report.table import Table
from lmx.train import Enrich, Load, OnPolicy, Teacher

DATA = Path(os.environ.get("LMX_DATA", "data"))
WIKI = DATA / "wikitext2" / "valid.txt"
OUT = Path("runs/distill_lm")
SIZES = {
    "half": {"n_layers": 15, "d_ff": 1024},
    "quarter": {"n_layers": 18, "d_ff": 768, "d_model": 288},
    "eighth": {"n_layers": 15, "n_heads": 6, "d_ff": 512, "d_model": 192},
}
WAYS = {
    "kl": {"kd": Term(Chunked(ForwardKL()))},
    "ce": {"ce": Term(Chunked(NextToken()))},
    "gkd": {"kd": Term(Chunked(ForwardKL()))},
}
"""What is learned: of "gkd" half of the batches are the student's own (lmx.train.OnPolicy)."""
PROMPTS, DRAFTED, MOST = 4, 4, 32
"""Beginnings of held-out text that the teacher goes on with, tokens drafted in a round, and tokens written."""
MEASURES = {
    "bits_per_byte": "bits per byte",
    "kl": "KL, nats per token",
    "top1": "same likeliest token",
    "speed": "tokens/s",
    "accepted": "drafts accepted",
}


def teacher() -> Path:
    return unpacked(SMOLLM2, FILE, FILE_SHA256)


def base(small: bool = False, out: Path = OUT) -> Run:
    return variants(small, out)["half-pruned-kl"]


def variants(small: bool = False, out: Path = OUT) -> dict[str, Run]:
    """Size, start, way -> run; those of a pruned start read it from `out`, where --prune puts it."""
    from lmx.adapt import smaller
    from lmx.models import pretrained

    path = teacher()
    config = pretrained.find(path).config
    online = Teacher(str(path))
    enrich = {"kl": online, "ce": Enrich(), "gkd": OnPolicy(online, share=0.5, prompt=32, new=64)}
    data = Data(
        train=(
            Text(str(WIKI), span=(0.0, 0.5)),
            Text(str(DATA / "shakespeare" / "input.txt")),
            Jsonl(str(DATA / "debian-summaries" / "train.jsonl"), field="long"),
        ),
        weights=(0.4, 0.2, 0.4),
        valid_share=0.0,
        tokenizer=File(str(path)),
        clean=False,
        packing="concat",
        seq_len=128 if small else 512,
        batch_size=4 if small else 8,
    )
    found = {}
    for size, shape in SIZES.items():
        model = replace(smaller(config, **shape), remat="none" if small else "dots")
        for start in ("pruned", "random"):
            for way, objective in WAYS.items():
                found[f"{size}-{start}-{way}"] = Run(
                    model=model,
                    data=data,
                    optim=AdamW(lr=5e-4 if start == "pruned" else 1e-3, schedule=Linear(0.05)),
                    objective=objective,
                    start=(Load(str(out / "pruned" / size)),) if start == "pruned" else (),
                    enrich=enrich[way],
                    steps=60 if small else 4000,
                    eval_every=1000,
                    save_every=1000,
                    keep=1,
                )
    return found


def prune(out: Path, sizes: list[str]) -> None:
    """The starts that are not there yet, chosen by one look at the calibration text."""
    from lmx.cli import shrink
    from lmx.run import trained

    names = {"n_layers": "layers", "n_heads": "heads", "d_ff": "ff", "d_model": "d_model"}
    text = f'Text("{WIKI}", span=(0.0, 0.5))'
    missing = [size for size in sizes if not (out / "pruned" / size).exists()]
    if missing:
        model, look = trained(teacher()), shrink.Options(teacher(), out, text, samples=32, length=256)
        found, facts = shrink.measured(look, model)
        for size in missing:
            shape = {names[name]: n for name, n in SIZES[size].items()}
            shrink.write(replace(look, out=out / "pruned" / size, **shape), model, found, facts)


def trained_in(folder: Path, run: Run) -> None:
    """The run, to its end, from where it was."""
    from lmx.train.live import Live
    from lmx.train.standard import finished
    from lmx.train.standard import run as run_standard

    session = training.session(run)
    if not finished(session, folder):
        result = run_standard(
            session, folder, sinks=[Live(run.steps, title=str(folder))], source=Path(__file__)
        )
        if result.interrupted:
            raise KeyboardInterrupt(f"saved step {result.step}; repeat the command to go on")


def judge(folder: Path, large, windows: int, length: int) -> dict[str, float]:
    """The figures of MEASURES, of one model beside its teacher."""
    from lmx.cli.frontier import speed
    from lmx.cli.quantize import windows as windows_of
    from lmx.evals import agreement, perplexity
    from lmx.generate import Draft, Sampling, speculate
    from lmx.run import trained
    from lmx.tree import count

    student = large if folder == teacher() else trained(folder)
    held_out = f'Text("{WIKI}", span=(0.5, 1.0))'
    read = windows_of(held_out, large, windows, length)
    near = agreement(large.model, large.params, student.params, read, other_model=student.model)
    texts = [large.tokenizer.decode(row) for row in read.tolist()]
    end = student.tokenizer.eos_id  # stands before each text
    found = perplexity(
        student.model, student.params, texts, student.tokenizer, seq_len=length + 1, batch_size=4, bos=end
    )
    prompts = [row[:MOST].tolist() for row in windows_of(held_out, large, PROMPTS, MOST)]
    _, acceptance = speculate(
        large.model,
        large.params,
        large.tokenizer.ending_with(()),
        prompts,
        Sampling(temperature=0, max_tokens=MOST),
        draft=Draft(student.model, student.params, DRAFTED),
    )
    return {
        "parameters": count(student.params) / 1e6,
        "bits_per_byte": found.bits_per_byte.value,
        "kl": near.kl.value,
        "top1": near.top1.value,
        "speed": speed(student, student.params),
        "accepted": acceptance.rate,
        "tokens_per_step": acceptance.tokens_per_step,
    }


def page(rows: dict[str, dict[str, Interval]], how: str):
    from lmx.report import plots
    from lmx.report.page import Figure, Page, Section

    table = Table(
        ("student", "M parameters", *MEASURES.values(), "tokens a step"),
        tuple(
            (name, row["parameters"].value, *(row[m] for m in MEASURES), row["tokens_per_step"])
            for name, row in rows.items()
        ),
        how,
    )
    figures = []
    for x, label in (("parameters", "million parameters"), ("speed", "tokens/s of one row")):
        for measure in ("bits_per_byte", "kl"):
            points: dict[str, dict] = {}
            for name, row in rows.items():
                size, _, way = name.partition("-")
                if way != "untrained" and (way or measure != "kl"):
                    points.setdefault(way or "teacher", {})[size] = row[x].value, row[measure].value
            svg = plots.frontier(points, x_label=label, y_label=MEASURES[measure], more_x=x == "speed")
            figures.append(Figure(svg, f"{MEASURES[measure]} against {label}"))
    return table, Page(
        "Students of SmolLM2-135M", (Section("Quality and cost", tuple(figures)), Section("All", (table,)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="60 steps of 4 x 128 tokens")
    parser.add_argument("--steps", type=int, help="updates, of both settings")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--ways", nargs="+", default=["kl", "ce"], choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, help="of held-out text, 16 of 512 tokens or 8 of 256")
    parser.add_argument("--prune", action="store_true", help="make the pruned starts, and nothing else")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    prune(asked.out, asked.sizes)
    if asked.prune:
        return
    from lmx.run import trained

    windows, length = (asked.windows or 8, 256) if asked.small else (asked.windows or 16, 512)
    runs = {
        f"{name}/{seed}": replace(run, seed=seed, steps=asked.steps or run.steps)
        for seed in range(asked.seeds)
        for name, run in variants(asked.small, asked.out).items()
        if name.split("-")[0] in asked.sizes and name.split("-")[2] in asked.ways
    }
    steps = next(iter(runs.values())).steps
    setting = f"{steps} steps{', small' if asked.small else ''}, {windows} windows of {length}"
    file = asked.out / "results.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    done = known.setdefault(setting, {})
    large = trained(teacher())
    folders = {"teacher/0": teacher()}
    folders |= {f"{size}-untrained/0": asked.out / "pruned" / size for size in asked.sizes}
    folders |= {name: asked.out / f"{steps}{'-small' if asked.small else ''}" / name for name in runs}
    for name, folder in folders.items():
        if name in done:
            continue
        if name in runs:
            trained_in(folder, runs[name])
        done[name] = judge(folder, large, windows, length)
        artifact.write(file, json.dumps(known, indent=1) + "\n")
        print(name, " ".join(f"{k} {v:.4g}" for k, v in done[name].items()), flush=True)
    rows: dict[str, dict[str, Interval]] = {}
    for name in dict.fromkeys(name.split("/")[0] for name in folders):
        seeds = [row for key, row in done.items() if key.split("/")[0] == name]
        rows[name] = {m: mean_interval([row[m] for row in seeds]) for m in seeds[0]}
    run = next(iter(runs.values()))
    tokens = steps * run.data.batch_size * run.data.seq_len
    how = (
        f"{tokens:,} tokens each, {asked.seeds} seeds; {windows} windows of {length} tokens of held-out text. Speed as "
        "measured once, while the machine may do other work."
    )
    table, whole = page(rows, how)
    artifact.write(asked.out / "report.html", whole.html())
    print(table.text())
    print(f"wrote {asked.out / 'report.html'}")


if __name__ == "__main__":
    main()
