"""One folder with an experiment and texts in two languages, and one tiny run trained in it by a command."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

from lmx import cli

EXPERIMENT = '''"""Does the whole way work, in English and Hindi?"""

from dataclasses import replace
from pathlib import Path

import widths_beside_it

from lmx import Run
from lmx.data import Bpe, Data, Text
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig
from lmx.optim import AdamW

HERE = Path(__file__).parent


def base():
    return Run(
        model=TransformerConfig(d_model=widths_beside_it.D_MODEL, n_layers=1, attention=AttentionConfig(2)),
        data=Data(
            train=tuple(Text(str(HERE / name), unit="line") for name in ("english.txt", "hindi.txt")),
            valid_share=0.2,
            tokenizer=Bpe(320),
            seq_len=32,
            batch_size=8,
        ),
        optim=AdamW(lr=1e-2),
        steps=10,
        eval_every=5,
        save_every=5,
    )


def variants():
    slow = replace(base(), optim=AdamW(lr=1e-3))
    return {"slow": slow, "broken": replace(base(), mesh=MeshConfig(data=3))}
'''


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where commands run: experiment.py with a module beside it, two texts, and a cache of its own."""
    folder = tmp_path_factory.mktemp("lmx_cli")
    (folder / "experiment.py").write_text(EXPERIMENT, encoding="utf-8")
    (folder / "widths_beside_it.py").write_text("D_MODEL = 32\n", encoding="utf-8")
    english = (
        f"The river carries {i} boats past {i * i % 97} old mills near town {i % 13}." for i in range(120)
    )
    hindi = (f"नदी {i} नावों को {i * i % 97} पुरानी चक्कियों के पास ले जाती है।" for i in range(120))
    (folder / "english.txt").write_text("\n".join(english), encoding="utf-8")
    (folder / "hindi.txt").write_text("\n".join(hindi), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LMX_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture(scope="session")
def run(folder):
    """The folder of a finished run, and what training it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as at:
        at.setenv("LMX_CACHE", str(folder / "cache"))
        at.chdir(folder)
        with contextlib.redirect_stdout(printed):
            cli.main(["train", "experiment.py", "--set", "optim.b2=0.99", "--tensorboard"])
    return Path("runs/experiment/base-b2=0.99"), printed.getvalue()


@pytest.fixture
def lmx(capsys):
    """Runs a command in this process: its standard output."""

    def command(*argv: str | os.PathLike) -> str:
        capsys.readouterr()
        cli.main([os.fspath(word) for word in argv])
        return capsys.readouterr().out

    return command


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line on standard error: that line."""

    def command(*argv: str | os.PathLike) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([os.fspath(word) for word in argv])
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith(f"lmx {argv[0]}: ")
        return lines[0]

    return command
