"""Bytes of any kind: a reader gives tensors or refuses, within memory that the file's size bounds."""

import struct
import tracemalloc

import gguf as library  # noqa: F401  so that no read is charged for its import
import gguf_file as made
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lmx.formats import gguf, safetensors

VALID = {
    "a.gguf": made.file(
        [
            made.key("general.alignment", made.U32, struct.pack("<I", 32)),
            made.key("a", made.F32, bytes(4)),
            made.key("b", made.ARRAY, made.array(made.U8, 3, b"abc")),
            made.key("c", made.ARRAY, made.array(made.STRING, 2, made.string("x") + made.string("अ"))),
        ],
        [made.info("p", (2, 3)), made.info("q", (32, 2), 2, 32), made.info("r", (256,), 14, 96)],
        bytes(range(256)) + bytes(96),
    ),
    "a.safetensors": save(
        {
            "p": np.arange(6, dtype=np.float32).reshape(2, 3),
            "q": np.ones((3, 1), ml_dtypes.float8_e4m3fn),
            "r": np.zeros((), ml_dtypes.bfloat16),
        },
        {"format": "pt"},
    ),
    "model.safetensors.index.json": b'{"metadata": {"total_size": 4}, "weight_map": {"a": "1.safetensors"}}',
}
LIES = [
    *(n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 32, 2**64 - 1)),
    *(n.to_bytes(4, "little") for n in (0, 8, 9, 2**16, 2**31 - 1, 2**32 - 1)),
    *(b"[", b'"', b"99999999999", b"-1", b"1e9", b"null", b"{}", b"../", b"\xff", b"\0"),
]


def damaged(whole):
    """The bytes with up to three places overwritten, or now and then replaced by more or fewer, and perhaps
    cut short."""
    at = st.integers(0, len(whole))
    places = st.tuples(
        at, st.sampled_from([None] * 4 + [0, 1, 8]), st.sampled_from(LIES) | st.binary(max_size=8)
    )

    def apply(places, cut, end):
        data = bytearray(whole)
        for at, n, piece in places:
            data[at : at + (len(piece) if n is None else n)] = piece
        return bytes(data[:end] if cut == 0 else data)

    return st.builds(apply, st.lists(places, max_size=3), st.integers(0, 4), at)


ATTACKS = {
    "random": lambda whole: st.binary(max_size=300),
    "random after a good start": lambda whole: st.binary(max_size=300).map((whole[:8]).__add__),
    "damaged": damaged,
}


def survives(path, data):
    """Whether the reader took the file."""
    path.write_bytes(data)
    if path.suffix == ".json":
        path.with_name("1.safetensors").write_bytes(save({"a": np.ones(1, np.float32)}))
    read = gguf.read if path.suffix == ".gguf" else safetensors.read
    tracemalloc.start()
    try:
        found = read(path.parent if path.suffix == ".json" else path)
        for tensor in (found.tensors if path.suffix == ".gguf" else found).values():
            values = tensor.read()
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
        return True
    except (ValueError, OSError):
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60 * len(data) + 2**18


def attack(path, strategy, n):
    taken = []

    @settings(max_examples=n, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(data):
        taken.append(survives(path, data))

    assert survives(path, VALID[path.name])
    one()
    print(f"{path.name}: {len(taken)} inputs, {sum(taken)} of them taken")
    assert len(taken) >= n


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("kind", ATTACKS)
def test_a_reader_takes_a_file_or_refuses_it(name, kind, tmp_path):
    """9 times 100 inputs."""
    attack(tmp_path / name, ATTACKS[kind](VALID[name]), 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("kind", ATTACKS)
def test_a_reader_takes_a_file_or_refuses_it_many_times(name, kind, tmp_path):
    """9 times 5,000 inputs."""
    attack(tmp_path / name, ATTACKS[kind](VALID[name]), 5_000)


@pytest.mark.parametrize("name", VALID)
def test_every_length_of_a_file_that_was_cut_short_is_refused(name, tmp_path):
    data = VALID[name]
    assert not any(survives(tmp_path / name, data[:n]) for n in range(len(data) - 96))
