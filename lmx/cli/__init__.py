"""lmx: one small program per verb.

  lmx quickstart                                     the whole house in nine minutes, with a report
  lmx train experiments/shakespeare_char.py          train a run; stop and repeat it to go on where it was
  lmx train FILE --variant V --set optim.lr=3e-4     another variant, with a setting changed
  lmx sweep FILE --seeds 3                           variants x seeds, a table and a plot with intervals
  lmx eval RUN TEXT                                  perplexity per token, word and byte, with intervals
  lmx tune MODEL TASK --ways full lora:16 head       fine-tuned for a task, way beside way: quality, forgetting, cost
  lmx distill label TEACHER TEXT --out labels        a teacher labels in bulk, for students to learn from
  lmx prompt score MODEL fruit --shots 8             prompts: their tokens, scores, spreads, a search for one
  lmx generate RUN "Once upon"                       text from a model
  lmx chat MODEL                                     a conversation with a model that was trained for it
  lmx tokenizer compare TEXT                         which tokenizer, which vocabulary size
  lmx plan FILE --topology v5e:4x4                   memory and FLOPs on a TPU that is not here
  lmx report RUN                                     one HTML page about a run or a sweep
  lmx convert MODEL OUT                              a released model into a run, or a run into a released model
  lmx adapt merge MODEL ADAPTER OUT                  adapters of PEFT: merge, extract, explain, for llama.cpp
  lmx quantize MODEL OUT --method gptq               fewer bits for each weight; --frontier compares every method
  lmx shrink MODEL OUT --layers 15 --calibration T   fewer layers, heads, units, features: those that do most are kept
  lmx info MODEL                                     what a model or this machine is
  lmx explain ARTIFACT                               ancestry, from raw text to model

`lmx VERB --help` teaches each by example. LMX_CACHE is the folder of prepared data and compiled programs;
with LMX_TRACE=1 an error shows where it arose.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lmx.cli.heap import keep_heap

VERBS = (
    "quickstart",
    "train",
    "sweep",
    "tune",
    "distill",
    "eval",
    "prompt",
    "generate",
    "chat",
    "tokenizer",
    "plan",
    "report",
    "convert",
    "adapt",
    "quantize",
    "shrink",
    "info",
    "explain",
)
RESUMABLE = ("quickstart", "train", "sweep", "tune", "distill")
MOST = 1200


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. A user's mistake ends with one line and status 2, a bug with its traceback.

    LMX_TRACE=1 shows where a mistake arose. Ctrl-C ends with status 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as `<&-` and some services do
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    try:
        _dispatch(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return
    if argv[0] in ("-V", "--version"):
        from lmx import __version__

        print(f"lmx {__version__}")
        return
    verb = argv[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fail(
            f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}")
        )
    _settle_platform()
    if verb in RESUMABLE:
        keep_heap()
    try:
        with _plain_warnings():
            importlib.import_module(f"lmx.cli.{verb}").main(argv[1:])
    except KeyboardInterrupt as stop:
        again = "; repeat the command to go on" if verb in RESUMABLE else ""
        fail(f"{verb}: {str(stop) or f'stopped{again}'}", status=130)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("LMX_TRACE") or _is_bug(error):
            raise
        fail(f"{verb}: {sentence(error)}")


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"lmx {one_line(message, MOST)}", file=sys.stderr)
    raise SystemExit(status)


def one_line(text: str, most: int) -> str:
    """`text` without line breaks, and without its middle if it is longer than `most` characters.

    >>> one_line("a\\n  b", 10), one_line("0123456789", 7)
    ('a; b', '01 … 89')
    """
    text = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def step_of(run: Path, asked: str) -> int:
    """The step that "latest", "best" or a number means in a run's folder.

    Raises: FileNotFoundError if there is no such checkpoint; ValueError for another word.
    """
    from lmx.models import pretrained
    from lmx.train import checkpoint

    if pretrained.is_released(run) and asked == "latest":
        return 0
    folder = run / checkpoint.FOLDER
    found = {
        "latest": lambda: max(checkpoint.steps(folder), default=None),
        "best": lambda: checkpoint.best_step(folder),
    }
    if asked not in found and not asked.isdecimal():
        raise ValueError(f"--step {asked}: give latest, best or a number")
    step = found[asked]() if asked in found else int(asked)
    if step not in checkpoint.steps(folder):
        raise FileNotFoundError(
            f"{run}: no checkpoint for --step {asked}; there are {checkpoint.steps(folder)}"
        )
    return step


def folder_name(variant: str, tiny: bool, changes: dict[str, str], runs: Iterable = ()) -> str:
    """The name of the folder for a variant with changed settings; long or odd values end in a hash.

    A setting goes by as much of the end of its path as tells it from all other settings of the runs.

    >>> folder_name("alibi", True, {"optim.lr": "3e-4"})
    'alibi-tiny-lr=3e-4'
    >>> folder_name("base", False, {"model.mlp.bias": "true", "model.norm.bias": "true"})
    'base-mlp.bias=true-norm.bias=true'
    """
    from lmx import values

    words = [variant.replace("/", "_"), *(["tiny"] if tiny else [])]
    paths = {*changes, *(path for run in runs for path in values.leaves(run))}
    for path, text in changes.items():
        names = path.split(".")
        ends = (".".join(names[i:]) for i in reversed(range(len(names))))
        others = [f".{other}" for other in paths - {path}]
        short = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), path)
        asked = f"{short}={text}"
        name = re.sub(r"[\s\"'(){}\[\]<>|:*?/\\,;&$!`]+", "_", asked)[:40]
        words.append(name if name == asked else f"{name}-{zlib.crc32(asked.encode()) & 0xFFFFFF:06x}")
    return "-".join(words)


def options(kind: type, argv: list[str], doc: str, prog: str):
    """Reads a dataclass of options from the command line; the module's docstring is the help."""
    import tyro

    return tyro.cli(
        kind, args=argv, description=doc, prog=f"lmx {prog}", config=(tyro.conf.FlagCreatePairsOff,)
    )


def changes(settings: list[str]) -> dict[str, str]:
    """`["optim.lr=3e-4"]` as a dict in which the last word wins: a setting undoes earlier ones of what it sets.

    >>> changes(["optim.lr=1e-3", "optim=Lion()", "optim.lr=3e-4"])
    {'optim': 'Lion()', 'optim.lr': '3e-4'}

    Raises: ValueError for a setting without `=`.
    """
    found: dict[str, str] = {}
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"--set {setting}: write --set path.to.field=value, such as --set optim.lr=3e-4")
        found = {p: t for p, t in found.items() if not f"{p}.".startswith(f"{path}.")} | {path: text}
    return found


def source_of(name: str):
    """The source that a name, a pattern or a written source means. Raises: ValueError, FileNotFoundError."""
    from lmx import values
    from lmx.data import Source, source

    return values.parse(name, Source, name) if re.match(r"[A-Z]\w*\(", name) else source(name)


def sentence(error: Exception) -> str:
    """What a user is told of an error that their input caused."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED.* memory", text):
        return f"no memory left ({text}); make data.seq_len, data.batch_size or the model smaller"
    return text


def _is_bug(error: Exception) -> bool:
    """Whether it tells of our own code rather than of what it was given; so do jax's "not implemented" errors."""
    own_import = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "lmx"
    return own_import or isinstance(error, NotImplementedError | RecursionError)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings in one line, without the source line that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"warning: {one_line(str(message), MOST)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _settle_platform() -> None:
    """Keeps an installed libtpu from looking, loudly, for a TPU on a machine that has no accelerator."""
    devices = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")
    if "JAX_PLATFORMS" not in os.environ and not any(Path(d).exists() for d in devices):
        os.environ["JAX_PLATFORMS"] = "cpu"
