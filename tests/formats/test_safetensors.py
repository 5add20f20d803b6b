"""Round trips, agreement with the library, shards in bounded memory, and folders that are not what they say."""

import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from lmx.formats import safetensors

RNG = np.random.default_rng(0)
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def whole(path):
    return {name: tensor.read() for name, tensor in safetensors.read(path).items()}


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("stored", safetensors.DTYPES)
def test_every_type_comes_back_bit_by_bit_and_is_what_the_library_wrote(stored, tmp_path):
    dtype = safetensors.DTYPES[stored]
    raw = RNG.integers(0, 2 if stored == "BOOL" else 256, 15 * dtype.itemsize, np.uint8)
    want = {"w": raw.view(dtype).reshape(3, 5), "scalar": raw.view(dtype)[:1].reshape(())}
    save_file(want, tmp_path / "theirs.safetensors", {"format": "pt"})
    (ours,) = safetensors.write(tmp_path, want.items())
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    tensors = safetensors.read(ours)
    for name, array in want.items():
        tensor = tensors[name]
        assert (tensor.name, tensor.shape, tensor.stored, tensor.dtype) == (name, array.shape, stored, dtype)
        assert same(tensor.read(), array)
    assert same(tensors["w"].read((slice(1, 3), slice(2, 4))), want["w"][1:3, 2:4])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("BF")), min_size=1, max_size=9)
)
def test_a_tensor_is_found_wherever_it_lies(tmp_path_factory, layout):
    """Types of several sizes among empty tensors: the library orders them, and we count bytes."""
    kinds = {"B": ml_dtypes.bfloat16, "F": np.float64}
    want = {f"{i}": RNG.normal(size=(n, m)).astype(kinds[k]) for i, (n, m, k) in enumerate(layout)}
    path = tmp_path_factory.mktemp("layout") / "a.safetensors"
    save_file(want, path)
    got = whole(path)
    assert got.keys() == want.keys() and all(same(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "array",
    [MATRIX.T, MATRIX[:, ::2], np.asfortranarray(MATRIX), MATRIX[:, [2, 0, 1, 3]].T, MATRIX.astype(">f4")],
    ids=["transposed", "strided", "fortran", "permuted", "big-endian"],
)
def test_what_is_written_is_the_array_and_not_the_memory_behind_it(array, tmp_path):
    """The library alone writes wrong values for most of these, and says nothing."""
    safetensors.write(tmp_path, [("w", array)])
    assert (load_file(tmp_path / "model.safetensors")["w"] == array).all()
    assert (whole(tmp_path)["w"] == array).all()


def test_shards_are_as_small_as_asked_and_their_index_names_every_tensor(tmp_path):
    want = {f"layer.{i}": np.full((25, 10), i, np.float32) for i in range(7)} | {"big": np.ones(1000)}
    files = safetensors.write(tmp_path, want.items(), max_shard_bytes=2500)
    names = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    assert sorted(os.listdir(tmp_path)) == [*names, "model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in want.values())
    assert {name: name_of for name_of in names for name in load_file(tmp_path / name_of)} == index[
        "weight_map"
    ]
    assert [len(load_file(tmp_path / name)) for name in names] == [2, 2, 2, 1, 1]
    got = whole(tmp_path)
    assert list(got) == list(want) and all(same(got[name], want[name]) for name in want)


def test_one_shard_and_one_array_are_in_memory_at_most(tmp_path):
    arrays = ((f"{i}", np.full(1 << 18, i, np.float32)) for i in range(32))
    tracemalloc.start()
    safetensors.write(tmp_path, arrays, max_shard_bytes=4 << 20)
    wrote = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for i, tensor in enumerate(safetensors.read(tmp_path).values()):
        assert (tensor.read() == i).all()
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(os.listdir(tmp_path)) == 9
    assert wrote < 6.5 * (1 << 20) and read < 3.5 * (1 << 20)


def test_a_shard_is_readable_by_whom_the_umask_allows(tmp_path):
    (tmp_path / "plain").touch()
    (path,) = safetensors.write(tmp_path, [("w", MATRIX)])
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


KILLED = """
import os, sys
import numpy as np
from lmx.formats import safetensors

before, after = map(int, sys.argv[2:])
at = 0

def die(event, args):
    global at
    at += event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")
    if at == fatal:
        os._exit(9)

def write(value, size):
    arrays = ((f"{i}", np.full(100, value)) for i in range(4))
    safetensors.write(folder, arrays, max_shard_bytes=size)

for fatal in range(1, 100):
    folder = os.path.join(sys.argv[1], f"{fatal:02}")
    write(0.0, before)
    child = os.fork()
    if not child:
        sys.addaudithook(die)
        write(1.0, after)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize("before, after", [(10**6, 800), (800, 10**6), (800, 800), (10**6, 10**6)])
def test_killed_at_any_step_it_leaves_old_or_new_weights_or_a_folder_that_is_refused(before, after, tmp_path):
    """The process dies at its first step that touches a file, at the second, ..., until one survives."""
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, f"{before}", f"{after}"], check=True)
    seen = []
    for folder in sorted(tmp_path.iterdir()):
        try:
            got = whole(folder)
        except (FileNotFoundError, ValueError):
            seen.append("refused")
            continue
        assert len(got) == 4
        seen += {f"{value}" for array in got.values() for value in array}
    assert len(seen) > 4 and seen[0] == "0.0" and seen[-1] == "1.0"
    assert sorted(seen, key=["0.0", "refused", "1.0"].index) == seen
    assert len(list(tmp_path.iterdir())) == len(seen)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_weights_are_rewritten_from_themselves(tmp_path):
    want = {f"{i}": RNG.normal(size=50) for i in range(6)}
    for size in (10**6, 400, 900, 10**6):
        safetensors.write(tmp_path, want.items(), max_shard_bytes=size)
        tensors = safetensors.read(tmp_path)
        safetensors.write(tmp_path, ((n, t.read() * 2) for n, t in tensors.items()), max_shard_bytes=800)
        got = whole(tmp_path)
        assert all((got[name] == 2 * want[name]).all() for name in want)


def test_a_full_disk_leaves_the_old_weights(tmp_path):
    """By a real limit of the operating system: writes beyond it fail."""
    safetensors.write(tmp_path, [("w", MATRIX)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            safetensors.write(tmp_path, ((f"{i}", np.zeros(900)) for i in range(4)), max_shard_bytes=15_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["model.safetensors"] and same(whole(tmp_path)["w"], MATRIX)


def test_what_cannot_be_written_is_refused_and_leaves_the_folder_as_it_was(tmp_path):
    safetensors.write(tmp_path, [("w", MATRIX)])
    for arrays, problem in [
        ([], "no arrays to write"),
        ([("a", MATRIX), ("a", MATRIX)], "tensor 'a' comes twice"),
        ([("__metadata__", MATRIX)], "'__metadata__' is a reserved name"),
        ([("a", MATRIX.astype(np.complex128))], "'a': safetensors has no type for complex128; cast it"),
        ([("a", np.array([{}]))], "no type for object"),
        ([("a", MATRIX.astype(ml_dtypes.int4))], "no type for int4"),
    ]:
        with pytest.raises(ValueError, match=problem):
            safetensors.write(tmp_path, arrays)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        safetensors.write(tmp_path / "file", [("w", MATRIX)])
    assert sorted(os.listdir(tmp_path)) == ["file", "model.safetensors"]
    assert same(whole(tmp_path)["w"], MATRIX)


def folder_of(tmp_path, weight_map, **shards):
    for name, arrays in shards.items():
        save_file(arrays, tmp_path / f"{name}.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    return tmp_path


A, B = {"a": MATRIX}, {"b": MATRIX}
AT = {"a": "1.safetensors", "b": "2.safetensors"}


@pytest.mark.parametrize(
    "weight_map, shards, error, problem",
    [
        (AT, {"1": A}, FileNotFoundError, r"lacks 2.safetensors, 1 of the 2 shards in .*; fetch them"),
        (AT | {"c": "2.safetensors"}, {"1": A, "2": B}, ValueError, r"2.safetensors lacks 'c' \(1 such\)"),
        (AT, {"1": A, "2": B | {"d": MATRIX}}, ValueError, r"2.safetensors also holds 'd'"),
        (AT, {"1": A, "2": A | B}, ValueError, r"2.safetensors also holds 'a'"),
        (AT, {"1": A, "2": B, "model": A}, ValueError, r"holds model.safetensors and an .*; remove"),
        (AT | {"b": "../2.safetensors"}, {"1": A}, ValueError, r"places 'b' in '\.\./2.safetensors', no"),
        (AT | {"b": "/etc/x.safetensors"}, {"1": A}, ValueError, r"places 'b' in '/etc/x.safetensors', no"),
        (AT | {"b": ".."}, {"1": A}, ValueError, r"places 'b' in '\.\.', no"),
        (AT | {"b": 3}, {"1": A}, ValueError, r"places 'b' in 3, no .safetensors file beside it; do not"),
        (
            '{"weight_map": {"a": "1.safetensors", "a": "1.safetensors"}}',
            {"1": A},
            ValueError,
            "'a' comes twice",
        ),
        ('{"weight_map": ["a"]}', {}, ValueError, "no index of shards.*weight_map is a list"),
        ("[]", {}, ValueError, "no index of shards"),
        ("{", {}, ValueError, "no index of shards"),
        ("[" * 10**5, {}, ValueError, "no index of shards"),
    ],
)
def test_an_index_that_its_shards_do_not_bear_out(weight_map, shards, error, problem, tmp_path):
    with pytest.raises(error, match=problem):
        safetensors.read(folder_of(tmp_path, weight_map, **shards))


def test_an_index_may_name_the_whole_file_and_links_to_elsewhere(tmp_path):
    """Both are seen in the wild; the second is how a download cache looks."""
    (tmp_path / "blob").mkdir()
    save_file(A, tmp_path / "blob" / "0123")
    (tmp_path / "1.safetensors").symlink_to(tmp_path / "blob" / "0123")
    assert whole(folder_of(tmp_path, AT | {"b": "model.safetensors"}, model=B)).keys() == {"a", "b"}


def test_pickles_are_not_opened(tmp_path):
    bomb = b"cos\n_exit\n(I3\ntR."
    for name in ("pytorch_model.bin", "model.pt", "last.ckpt"):
        (tmp_path / name).write_bytes(bomb)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(
                ValueError, match=f"{name} is a pickle, which runs any program .* convert it:"
            ):
                safetensors.read(path)
        safetensors.write(tmp_path / "beside", [("w", MATRIX)])
        (tmp_path / "beside" / name).write_bytes(bomb)
        assert whole(tmp_path / "beside").keys() == {"w"}
        (tmp_path / name).unlink()


def test_nothing_there(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(save(A))
    with pytest.raises(FileNotFoundError, match=r"neither .* but adapter_model.safetensors; give"):
        safetensors.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        safetensors.read(tmp_path / "x.safetensors")
    assert whole(tmp_path / "adapter_model.safetensors").keys() == {"a"}


def raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin, end, *shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not UTF-8": raw(b"\xff\xfe"),
    "not JSON": raw(b"{"),
    "deep": raw(b"[" * 10**5),
    "deep inside": raw(b'{"a":' * 10**5),
    "truncated": raw({"a": entry(0, 4, 1)}, b"123"),
    "with a rest": raw({"a": entry(0, 4, 1)}, b"12345"),
    "with a hole": raw({"a": entry(4, 8, 1)}, b"12345678"),
    "overlapping": raw({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)),
    "the same bytes twice": raw({"a": entry(0, 4, 1), "b": entry(0, 4, 1)}, bytes(4)),
    "backwards": raw({"a": entry(4, 0, 1)}, bytes(4)),
    "negative": raw({"a": entry(-4, 0, 1)}, bytes(4)),
    "a shape that lies": raw({"a": entry(0, 4, 2)}, bytes(4)),
    "a shape that overflows": raw({"a": entry(0, 4, 2**62, 2**62, 4)}, bytes(4)),
    "a negative shape": raw({"a": entry(0, 4, -1)}, bytes(4)),
    "4-bit floats": raw({"a": entry(0, 4, 8, dtype="F4")}, bytes(4)),
    "an unknown type": raw({"a": entry(0, 4, 1, dtype="Q4")}, bytes(4)),
    "gguf": b"GGUF" + bytes(100),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_file_is_refused_by_name(data, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a.safetensors(:| is no whole safetensors file).*; (fetch|convert) it"
    ):
        safetensors.read(path)


@pytest.mark.parametrize("shape", [(0, 2**62), (1,) * 100])
def test_a_shape_that_numpy_cannot_have_is_an_error_when_read(shape, tmp_path):
    n = 0 if 0 in shape else 4
    (tmp_path / "a.safetensors").write_bytes(raw({"a": entry(0, n, *shape)}, bytes(n)))
    with pytest.raises(ValueError):
        safetensors.read(tmp_path / "a.safetensors")["a"].read()
