"""Everything needed to run a run again, written beside its results before the first step."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import lmx
from lmx import values
from lmx.data.released import KEPT

PACKAGES = ("lmx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "libtpu")
MOST = 200
FILES = ("tokenizer.json", "data.json", "environment.json", "overrides.json", "source.py", "metrics.jsonl")


def record(
    out: Path, run: Any, prepared: Any, devices: list, source: Path | None = None, base: Any = None
) -> None:
    """Writes run.txt, the tokenizer, environment.json, data.json, and if there are any overrides.json, source.py,
    uncommitted.diff, and in the folder KEPT what came with the tokenizer.

    source: the experiment file that made the run. base: the run it varies, for overrides.json.
    """
    (out / "run.txt").write_text(values.show(run) + "\n", encoding="utf-8")
    prepared.tokenizer.save(out)
    for name, text in prepared.beside.items():
        if name != "tokenizer.json":
            (out / KEPT).mkdir(exist_ok=True)
            (out / KEPT / name).write_text(text, encoding="utf-8")
    package = Path(lmx.__file__).parent
    tracked = bool(_git(package, "ls-files", "__init__.py"))
    environment = {
        "commit": _git(package, "rev-parse", "HEAD") if tracked else None,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: v for name in PACKAGES if (v := version(name))},
        "devices": [f"{d.platform}:{d.device_kind}" for d in devices],
        "processes": jax.process_count(),
        "command": sys.argv,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    _json(out / "environment.json", environment)
    data = {
        "train": prepared.train.fingerprint,
        "tokenizer": prepared.tokenizer.hash,
        "seed": run.seed,
        "padding_share": prepared.train.padding_share,
        "loss_share": prepared.train.loss_share,
        "text": prepared.report.to_json(),
    }
    _json(out / "data.json", data)
    if base is not None:
        changed = {k: v for k, v in values.diff(base, run).items() if k != "model.vocab_size"}
        _json(out / "overrides.json", {path: [_short(a), _short(b)] for path, (a, b) in changed.items()})
    if tracked and (change := _uncommitted(package)):
        (out / "uncommitted.diff").write_text(change, encoding="utf-8")
    if source is not None:
        shutil.copyfile(source, out / "source.py")


def _uncommitted(package: Path) -> str:
    """What the repository's files and the package's new modules differ in from the commit, for `git apply`."""
    changed = _git(package, "diff", "HEAD")
    parts = [f"{changed}\n"] if changed else []
    root = Path(_git(package, "rev-parse", "--show-toplevel") or package)
    new = _git(package, "ls-files", "-z", "--others", "--exclude-standard", "--full-name", "*.py") or ""
    for name in filter(None, new.split("\0")):
        lines = (root / name).read_text(encoding="utf-8", errors="replace").splitlines()
        parts.extend(difflib.unified_diff([], [f"{line}\n" for line in lines], "/dev/null", f"b/{name}"))
    return "".join(parts)


def _json(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(setting: Any) -> Any:
    """The setting, without the middle of a long text."""
    if isinstance(setting, str) and len(setting) > MOST:
        return f"{setting[: MOST // 2]} … {setting[-MOST // 2 :]}"
    return setting


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *command: str) -> str | None:
    """What git answers in a folder, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None
