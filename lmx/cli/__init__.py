"""lmx: one small program per verb.

  lmx quickstart                                     the whole house in five minutes, with a report
  lmx train experiments/shakespeare_char.py          train a run; stop and repeat it to go on where it was
  lmx train FILE --variant V --set optim.lr=3e-4     another variant, with a setting changed
  lmx sweep FILE --seeds 3                           variants x seeds, a table and a plot with intervals
  lmx eval RUN TEXT                                  perplexity per token, word and byte, with intervals
  lmx generate RUN "Once upon"                       text from a model
  lmx tokenizer compare TEXT                         which tokenizer, which vocabulary size
  lmx plan FILE --topology v5e:4x4                   memory and FLOPs on a TPU that is not here
  lmx report RUN                                     one HTML page about a run or a sweep
  lmx info RUN                                       what a model or this machine is
  lmx explain ARTIFACT                               ancestry, from raw text to model

`lmx VERB --help` teaches each by example.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

VERBS = ("quickstart", "train", "sweep", "eval", "generate", "tokenizer", "plan", "report", "info", "explain")


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. A user's mistake ends with one line and status 2; LMX_TRACE=1 shows where it arose."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return
    if argv[0] in ("-V", "--version"):
        from lmx import __version__

        print(f"lmx {__version__}")
        return
    verb = argv[0]
    if verb not in VERBS:
        fail(f"no verb {verb!r}; there are {', '.join(VERBS)}")
    _settle_platform()
    try:
        importlib.import_module(f"lmx.cli.{verb}").main(argv[1:])
    except KeyboardInterrupt:
        fail(f"{verb}: stopped; repeat the command to go on from the last checkpoint", status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("LMX_TRACE"):
            raise
        fail(f"{verb}: {error}")


def fail(message: str, status: int = 2) -> None:
    print(f"lmx {message}", file=sys.stderr)
    raise SystemExit(status)


def options(kind: type, argv: list[str], doc: str, prog: str):
    """Reads a dataclass of options from the command line; the module's docstring is the help."""
    import tyro

    return tyro.cli(kind, args=argv, description=doc, prog=f"lmx {prog}", config=(tyro.conf.FlagCreatePairsOff,))


def changes(settings: list[str]) -> dict[str, str]:
    """`["optim.lr=3e-4"]` as a dict. Raises: ValueError for a setting without `=`."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"--set {setting}: write --set path.to.field=value, such as --set optim.lr=3e-4")
    return dict(setting.split("=", 1) for setting in settings)


def _settle_platform() -> None:
    """Keeps an installed libtpu from looking, loudly, for a TPU on a machine that has no accelerator."""
    devices = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")
    if "JAX_PLATFORMS" not in os.environ and not any(Path(d).exists() for d in devices):
        os.environ["JAX_PLATFORMS"] = "cpu"
