import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """Starts small training runs as processes of their own; see tiny.py."""
    from tiny import Runner

    runner = Runner(str(tmp_path_factory.mktemp("cache")))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def references(runner, tmp_path_factory):
    """Undisturbed runs of the same settings: on one device, on eight, and on eight of two processes."""
    from tiny import Job, free_port

    folder = tmp_path_factory.mktemp("references")
    alone = Job(out=str(folder / "alone"), cache=runner.cache)
    eight = replace(alone, out=str(folder / "eight"), mesh=(8, 1, 1), devices=8)
    two = replace(eight, out=str(folder / "two"), devices=4, processes=2, port=free_port())
    runner.run(alone, eight, two)
    return {"alone": alone, "eight": eight, "two": two}
