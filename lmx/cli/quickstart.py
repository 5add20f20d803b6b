"""The main job, start to end: text, tokenizer, model, evaluation, samples, one page. In English and Hindi.

Fetches 11 MB of text once, and a released model of 93 MB to compare with; where that is out of reach, its chapter is
skipped. Stop it and repeat the command: finished chapters are kept.

  lmx quickstart                                         about nine minutes on 2 CPU cores
  lmx quickstart --steps 3000                            a better model, in more time
  lmx quickstart --english mine.txt --hindi meri.txt     on text of your own
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmx import cli


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/quickstart")
    """Folder of the results."""
    english: tuple[str, ...] = ()
    """Text files to use instead of Shakespeare."""
    hindi: tuple[str, ...] = ()
    """Text files to use instead of the news sentences."""
    vocab_size: int = 2048
    steps: int = 600
    """Updates of the model."""
    seed: int = 0


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "quickstart")
    from lmx.quickstart import CHAPTERS, Tour, take
    from lmx.quickstart import Options as Choices
    from lmx.train.loop import keep_compiled

    keep_compiled()
    choices = Choices(asked.english, asked.hindi, asked.vocab_size, asked.steps, asked.seed)
    print(f"report: {take(Tour(asked.out, choices), CHAPTERS).resolve()}")
