"""A folder that a command makes: there when it is whole, and not before."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which takes its name once all is there, and goes if that fails.

    Raises: ValueError if there is something at `out` already, other than an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there; name a new folder")
    if out.is_mount() or (out.exists() and out.samefile(".")):
        raise ValueError(
            f"{out} is a mounted disk or the folder you are in, which a new one cannot replace; name a folder in it"
        )
    out = out.resolve()
    short = out.name[:60]  # 240 bytes at most
    folder = out.with_name(f"{short}.partial-{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} was filled by another process in the meantime; name a new folder")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
