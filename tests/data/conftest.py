"""Disks that are full and folders that may not be written, by the operating system's own means."""

import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def file_size_limit():
    return _file_size_limit


@pytest.fixture
def unwritable():
    return _unwritable


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike tmp_path, which only its owner can."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def _file_size_limit(n_bytes):
    """A real limit of the operating system: writes beyond it fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _unwritable(folder):
    """A folder this process may not write to; root gives its rights away for the while."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
