"""`read(index)` is `whole[index]`, for fewer rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.formats import Tensor
from lmx.formats.tensor import reader


def tensor_of(whole, asked=None):
    def rows(start, stop):
        if asked is not None:
            asked.append((start, stop))
        return whole.reshape(-1 if whole.size else 0, *whole.shape[1:])[start:stop].copy()

    return Tensor("w", whole.shape, whole.dtype, "F32", rows)


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
slices = st.lists(st.slices(5), max_size=3).map(tuple)


@given(shapes, slices)
def test_a_part_is_that_part_of_the_whole(shape, index):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    index = index[: len(shape)]
    got = tensor_of(whole).read(index)
    assert got.shape == whole[index].shape and (got == whole[index]).all()


def test_only_the_rows_asked_for_are_read():
    asked, whole = [], np.arange(40).reshape(10, 4)
    tensor = tensor_of(whole, asked)
    for index in (slice(3, 5), (slice(3, 8, 2), slice(1)), slice(7, 2, -3), slice(5, 5), ()):
        assert (tensor.read(index) == whole[index]).all()
    assert asked == [(3, 5), (3, 8), (4, 8), (0, 0), (0, 10)]


@pytest.mark.parametrize("index", [(slice(1), slice(1), slice(1)), 3, (slice(1), 0), ...])
def test_an_index_that_is_not_slices_is_refused(index):
    with pytest.raises(ValueError, match=r"'w': index .* is not at most 2 slices"):
        tensor_of(np.zeros((2, 2))).read(index)


def test_a_file_that_changes_after_its_header_was_read_is_not_misread(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    read = reader(path)
    assert read(2, 3).tobytes() == b"cde"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"x has changed since its header was read; read the header again"):
        read(0, 6)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(0, 6)
