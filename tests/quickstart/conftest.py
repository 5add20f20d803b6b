"""A small text in two languages; a package registry in a folder, and one that is out of reach."""

import os
from pathlib import Path

import pytest

from lmx.quickstart import Options

ENGLISH = "The river rose in the night, and by morning the {} road was gone.\n\n"
HINDI = "रात में नदी चढ़ी और सुबह तक {} सड़क बह चुकी थी।\n\n"
NOWHERE = "http://127.0.0.1:1/simple"


def _only(patch: pytest.MonkeyPatch, address: str) -> None:
    """Makes pip ask there and nowhere else, once."""
    settings = {"CONFIG_FILE": os.devnull, "INDEX_URL": address, "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}
    for name, value in (settings | {"RETRIES": "0", "NO_INDEX": "false"}).items():
        patch.setenv(f"PIP_{name}", value)


@pytest.fixture(scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        _only(patch, NOWHERE)
        yield


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder whose subfolders are packages that pip finds."""
    folder = tmp_path / "registry"
    folder.mkdir()
    _only(monkeypatch, folder.as_uri())
    return folder


@pytest.fixture(scope="session")
def options(tmp_path_factory) -> Options:
    """A tour of seconds, on text of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    for name, line in (("english", ENGLISH), ("hindi", HINDI)):
        (folder / name).write_text("".join(line.format(i) for i in range(120)), encoding="utf-8")
    return Options((str(folder / "english"),), (str(folder / "hindi"),), vocab_size=320, steps=6)
