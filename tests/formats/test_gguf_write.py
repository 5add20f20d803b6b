"""Files that we write, as we read them and as the gguf package does."""

import resource
import tracemalloc

import gguf as library
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.formats import gguf
from lmx.formats.gguf_blocks import quantize
from lmx.formats.gguf_write import write

RNG = np.random.default_rng(0)
LLAMA = {"general.architecture": "llama"}
whole = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2**64 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
one = text | whole | st.booleans() | st.floats(width=32, allow_nan=False)
many = (
    st.lists(text)
    | st.lists(st.integers(-(2**63), 2**63 - 1))
    | st.lists(st.floats(width=32, allow_nan=False))
)
metadata = st.dictionaries(text, one | many | st.lists(st.booleans()), max_size=5)


@st.composite
def layouts(draw):
    found = {}
    for name in draw(st.lists(text, unique=True, max_size=4)):
        kind = draw(st.sampled_from(list(gguf.BLOCKS)))
        outer = draw(st.lists(st.integers(1, 3), max_size=3))
        found[name] = (*outer, gguf.BLOCKS[kind][0] * draw(st.integers(1, 3))), kind
    return found


@given(metadata, layouts())
def test_what_is_written_is_read(tmp_path_factory, said, layout):
    said = LLAMA | said
    arrays = {name: RNG.normal(size=shape).astype(np.float32) for name, (shape, _) in layout.items()}
    path = tmp_path_factory.mktemp("gguf") / "नाम.gguf"
    write(path, said, layout, arrays.items())
    found = gguf.read(path)
    assert found.metadata == said
    assert all(type(found.metadata[key]) is type(value) for key, value in said.items())
    assert list(found.tensors) == list(layout) and [x.name for x in path.parent.iterdir()] == [path.name]
    theirs = {x.name: x for x in library.GGUFReader(path).tensors} if layout else {}
    for name, (shape, kind) in layout.items():
        tensor = found.tensors[name]
        assert (tensor.shape, tensor.stored) == (shape, kind)
        raw = quantize(arrays[name], kind)
        assert np.asarray(theirs[name].data).tobytes() == raw.tobytes()
        want = (
            raw.view(gguf.PLAIN[kind])
            if kind in gguf.PLAIN
            else library.dequantize(raw, theirs[name].tensor_type)
        )
        assert tensor.read().tobytes() == np.asarray(want, tensor.dtype).tobytes()


def test_numbers_have_the_types_that_llama_cpp_reads(tmp_path):
    said = LLAMA | {"n": 7, "x": 0.5, "yes": True, "types": [1, 3], "scores": [-1.5], "none": [], "below": -1}
    write(tmp_path / "a.gguf", said, {"w": ((1,), "F32")}, [("w", np.ones(1, np.float32))])
    fields = library.GGUFReader(tmp_path / "a.gguf").fields
    names = {key: [kind.name for kind in fields[key].types] for key in said}
    assert names == {
        "general.architecture": ["STRING"],
        "n": ["UINT32"],
        "x": ["FLOAT32"],
        "yes": ["BOOL"],
        "types": ["ARRAY", "INT32"],
        "scores": ["ARRAY", "FLOAT32"],
        "none": ["ARRAY"],
        "below": ["INT32"],
    }


def test_importance_goes_to_its_tensor(tmp_path):
    x, importance = RNG.normal(size=(8, 256)).astype(np.float32), RNG.random(256)
    layout = dict.fromkeys("ab", (x.shape, "Q4_K"))
    write(tmp_path / "a.gguf", LLAMA, layout, [("a", x), ("b", x)], {"b": importance})
    found = {x.name: x.data for x in library.GGUFReader(tmp_path / "a.gguf").tensors}
    assert (found["a"] == quantize(x, "Q4_K")).all() and (found["b"] == quantize(x, "Q4_K", importance)).all()


def test_one_tensor_is_held_at_a_time(tmp_path):
    layout = {f"blk.{i}": ((512, 1024), "Q8_0") for i in range(8)}
    arrays = ((name, np.zeros(shape, np.float32)) for name, (shape, _) in layout.items())
    tracemalloc.start()
    write(tmp_path / "a.gguf", LLAMA, layout, arrays)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 3 * 512 * 1024 * 4 + 8e6


X = np.ones((2, 32), np.float32)
GOOD = {"w": ((2, 32), "Q8_0")}


@pytest.mark.parametrize(
    "said, layout, tensors, message",
    [
        ({}, GOOD, [("w", X)], "metadata lack general.architecture"),
        (LLAMA | {"a.b": None}, GOOD, [("w", X)], "metadata: a.b=None is neither text nor numbers"),
        (LLAMA | {"a": [1, "b"]}, GOOD, [("w", X)], r"metadata: a=\[1, 'b'\] is neither"),
        (LLAMA | {"a": 2**64}, GOOD, [("w", X)], "a=.18446744073709551616. has more than 64 bits"),
        (
            LLAMA,
            {"w": ((2, 31), "Q8_0")},
            [],
            r"tensor w: Q8_0 with shape \(2, 31\); rows are whole blocks of 32",
        ),
        (LLAMA, {"w": ((0, 32), "F32")}, [], r"tensor w: F32 with shape \(0, 32\)"),
        (LLAMA, {"w": ((2, 32), "Q9_0")}, [], "tensor w: 'Q9_0' is no type of tensor; use F32"),
        (LLAMA, GOOD, [("w", X[:1])], r"tensor w has shape \(1, 32\), and \(2, 32\) in the layout"),
        (LLAMA, GOOD, [("v", X)], "tensor v came where the layout has w"),
        (LLAMA, GOOD, [("w", X), ("w", X)], "tensor w came where the layout has no more"),
        (LLAMA, GOOD, [], "tensor w of the layout is missing"),
        (LLAMA, GOOD, [("w", X * np.nan)], "tensor w: some values are not finite"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(said, layout, tensors, message, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.gguf", said, layout, tensors)
    assert [x.name for x in tmp_path.iterdir()] == ["a.gguf"] and (
        tmp_path / "a.gguf"
    ).read_bytes() == b"before"


def test_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="large"):
            write(
                tmp_path / "a.gguf", LLAMA, {"w": ((1 << 16,), "F32")}, [("w", np.zeros(1 << 16, np.float32))]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
