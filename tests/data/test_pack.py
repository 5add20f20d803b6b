"""Every label exactly once, whatever the lengths: counted here token by token, from the definition."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.pack import BestFit, Concat, plan

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def positions_of(made, offsets, rows, shift):
    """Counter of the token indices that stand as inputs, and the pieces row by row."""
    counts, begin, length = made.pieces(np.asarray(rows), np.asarray(shift))
    assert counts.shape == (len(rows),) and counts.sum() == len(begin) == len(length)
    inputs, by_row, at = Counter(), [], 0
    for count in counts:
        row = [(int(b), int(n)) for b, n in zip(begin[at : at + count], length[at : at + count])]
        at += count
        by_row.append(row)
        for b, n in row:
            document = np.searchsorted(offsets, b, "right") - 1
            assert n >= 1 and b + n < offsets[document + 1], "a piece and its last label lie in one document"
            inputs.update(range(b, b + n))
    return inputs, by_row


@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 50),
    shift=st.integers(0, 49),
    name=st.sampled_from(["best_fit", "concat"]),
)
def test_every_label_is_in_exactly_one_row(lengths, seq_len, shift, name):
    offsets = offsets_of(lengths)
    made = plan(name, offsets, seq_len)
    inputs, by_row = positions_of(
        made, offsets, np.arange(made.n_rows), np.full(made.n_rows, shift % seq_len)
    )
    wanted = {int(offsets[d]) + i: 1 for d, n in enumerate(lengths) for i in range(n - 1)}
    assert inputs == wanted
    filled = [sum(n for _, n in row) for row in by_row]
    assert max(filled) <= seq_len
    assert made.padding_share == pytest.approx(1 - sum(filled) / (seq_len * made.n_rows), abs=1e-12)


@given(lengths=LENGTHS, seq_len=st.integers(1, 50))
def test_best_fit_cuts_only_what_is_longer_than_a_row_and_is_near_the_optimum(lengths, seq_len):
    offsets = offsets_of(lengths)
    made = BestFit(offsets, seq_len)
    _, by_row = positions_of(made, offsets, np.arange(made.n_rows), np.zeros(made.n_rows, int))
    pieces = [p for row in by_row for p in row]
    assert len(pieces) == sum(-(-(n - 1) // seq_len) for n in lengths)
    bound = -(-sum(n - 1 for n in lengths) // seq_len)
    assert made.n_rows <= 11 / 9 * bound + 1 + sum((n - 1) % seq_len * 2 > seq_len for n in lengths)
    half_empty = [row for row in by_row if sum(n for _, n in row) * 2 <= seq_len]
    assert len(half_empty) <= 1, "two rows at most half full would have been one"


def best_fit_decreasing(lengths, room):
    """The algorithm as it is usually written, one piece at a time: rooms left in each row."""
    rows = []
    for n in sorted(lengths, reverse=True):
        fits = [r for r in rows if r >= n]
        if fits:
            rows.remove(min(fits))
            rows.append(min(fits) - n)
        else:
            rows.append(room - n)
    return sorted(rows)


@given(lengths=st.lists(st.integers(2, 33), min_size=1, max_size=80))
def test_best_fit_equals_the_textbook_algorithm(lengths):
    offsets = offsets_of(lengths)
    made = BestFit(offsets, 32)
    _, by_row = positions_of(made, offsets, np.arange(made.n_rows), np.zeros(made.n_rows, int))
    rooms = sorted(32 - sum(n for _, n in row) for row in by_row)
    assert rooms == best_fit_decreasing([n - 1 for n in lengths], 32)


def test_concat_of_one_long_text_gives_consecutive_windows_and_cuts_elsewhere_each_epoch():
    made = Concat(np.array([0, 101]), 10)
    counts, begin, length = made.pieces(np.arange(10), np.zeros(10, int))
    assert counts.tolist() == [1] * 10 and begin.tolist() == list(range(0, 100, 10)) and set(length) == {10}
    counts, begin, length = made.pieces(np.arange(10), np.full(10, 3))
    assert begin.tolist() == [*range(3, 93, 10), 93, 0] and length.tolist() == [10] * 9 + [7, 3]
    assert counts.tolist() == [1] * 9 + [2]


def test_documents_of_nothing_are_passed_over():
    offsets = np.array([0, 0, 1, 4, 4, 6])
    for made in (BestFit(offsets, 4), Concat(offsets, 4)):
        inputs, _ = positions_of(made, offsets, np.arange(made.n_rows), np.zeros(made.n_rows, int))
        assert sorted(inputs) == [1, 2, 4]


def test_a_million_documents_pack_in_seconds_with_little_padding():
    import time

    rng = np.random.default_rng(0)
    offsets = offsets_of(np.maximum(3, rng.lognormal(np.log(400), 1.0, 1_000_000)).astype(np.int64))
    start = time.process_time()
    made = BestFit(offsets, 1024)
    assert time.process_time() - start < 15
    assert made.padding_share < 0.001


def test_wrong_settings_say_what_to_use():
    with pytest.raises(ValueError, match="best_fit"):
        plan("worst_fit", np.array([0, 5]), 4)
    with pytest.raises(ValueError, match="seq_len=0"):
        BestFit(np.array([0, 5]), 0)
