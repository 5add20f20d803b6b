import itertools
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.batches import BLOCK, Batches, iterate
from lmx.data.store import TokenStore, Writer


def make(path, documents, vocab_size=60_000):
    with Writer(path, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return TokenStore(str(path))


def unique_documents(lengths, start=1):
    """Documents in which no token id occurs twice, so that a token names its document and place."""
    ends = start + np.cumsum(lengths)
    return [np.arange(end - n, end) for n, end in zip(lengths, ends)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def store(folder):
    lengths = np.random.default_rng(0).integers(2, 90, 150)
    return make(folder / "a", unique_documents(lengths))


@pytest.fixture(scope="module")
def other(folder):
    lengths = np.random.default_rng(1).integers(2, 40, 60)
    return make(folder / "b", unique_documents(lengths, start=30_000))


def check_rows(batch, documents):
    """Each row, read token by token, against the documents it came from; returns a counter of the labels
    seen."""
    follows = {int(a): int(b) for d in documents for a, b in itertools.pairwise(d)}
    seen = Counter()
    for tokens, labels, mask, positions, segments in zip(
        *(batch[k].tolist() for k in ("tokens", "labels", "loss_mask", "positions", "segment_ids"))
    ):
        used = sum(s > 0 for s in segments)
        assert all(s == 0 for s in segments[used:]) and (used == 0 or segments[0] == 1)
        for t, (token, label, m, position, segment) in enumerate(
            zip(tokens, labels, mask, positions, segments)
        ):
            if segment == 0:
                assert (token, label, m, position) == (0, 0, 0.0, 0)
                continue
            assert m == 1.0 and label == follows[token]
            seen[label] += 1
            if t and segment == segments[t - 1]:
                assert position == positions[t - 1] + 1 and token == labels[t - 1]
            else:
                assert position == 0 and segment == (segments[t - 1] + 1 if t else 1)
    return seen


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("seq_len", [7, 64, 500])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_serves_every_label_exactly_once(store, other, packing, seq_len, shuffle):
    for stores in ((store,), (store, other)):
        batches = Batches(stores, seq_len, batch_size=9, seed=3, packing=packing, shuffle=shuffle)
        documents = [d for s in stores for d in s]
        seen = Counter()
        for batch in batches.once():
            assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
                **dict.fromkeys(("tokens", "labels", "positions", "segment_ids"), ((9, seq_len), "int32")),
                "loss_mask": ((9, seq_len), "float32"),
            }
            seen += check_rows(batch, documents)
        assert seen == Counter(int(t) for d in documents for t in d[1:])


@given(n=st.integers(0, 10**9), seed=st.integers(-(2**40), 2**70), P=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_batch_depends_on_seed_and_number_only(store, other, n, seed, P):
    for weights in ((), (3.0, 1.0)):
        batches = Batches((store, other), 32, 12, seed, weights)
        whole = batches.batch(n)
        parts = [
            Batches((store, other), 32, 12, seed, weights).batch(n, slice(12 * p // P, 12 * (p + 1) // P))
            for p in range(P)
        ]
        for name, value in whole.items():
            assert np.array_equal(value, np.concatenate([part[name] for part in parts])), name


def test_rows_come_in_a_new_order_each_epoch_and_under_each_seed(store):
    batches = Batches((store,), 32, 1, seed=0)
    rows = batches.n_rows

    def epoch(b, e):
        return [b.batch(e * rows + i)["tokens"][0].tobytes() for i in range(rows)]

    first, second, reseeded = epoch(batches, 0), epoch(batches, 1), epoch(replace(batches, seed=1), 0)
    assert Counter(first) == Counter(second) == Counter(reseeded)
    for one, two in ((first, second), (first, reseeded)):
        assert sum(a == b for a, b in zip(one, two)) < 8, (
            "a random order of many rows keeps about one in place"
        )


def test_concat_windows_move_between_epochs(store):
    batches = Batches((store,), 32, 1, packing="concat")
    starts = [
        {int(batches.batch(e * batches.n_rows + i)["tokens"][0, 0]) for i in range(batches.n_rows)}
        for e in (0, 1)
    ]
    assert len(starts[0] & starts[1]) < batches.n_rows / 2


def test_mixing_has_the_shares_asked_for_and_each_store_its_own_epochs(store, other):
    weights = (0.7, 0.3)
    batches = Batches((store, other), 32, BLOCK, seed=5, weights=weights)
    n_rows = [Batches((s,), 32, 1).n_rows for s in (store, other)]
    taken = [[], []]
    for n in range(3):
        batch = batches.batch(n)
        from_other = batch["tokens"][:, 0] >= 30_000
        assert abs(from_other.mean() - 0.3) <= 1 / BLOCK
        for row, b in zip(batch["tokens"], from_other):
            taken[int(b)].append(row.tobytes())
        thirds = [part.mean() for part in np.array_split(from_other, 8)]
        assert np.ptp(thirds) < 0.2, "mixed within a block, not one after the other"
    for rows, size in zip(taken, n_rows):
        for start in range(0, len(rows) - size + 1, size):
            assert len(set(rows[start : start + size])) == size, "no row twice before every row once"
    done = batches.epochs(3)
    assert done == pytest.approx([len(t) / r for t, r in zip(taken, n_rows)], rel=1e-3)


def test_many_weights_are_met_by_largest_remainders(folder):
    stores = tuple(make(folder / f"w{i}", unique_documents([9, 9, 9], 100 * i + 1)) for i in range(5))
    weights = (1.0, 2.0, 3.0, 4.0, 0.005)
    batches = Batches(stores, 8, BLOCK, weights=weights)
    owner = batches.batch(7)["tokens"][:, 0] // 100
    share = np.bincount(owner, minlength=5) / BLOCK
    assert np.abs(share - np.array(weights) / sum(weights)).max() <= 1 / BLOCK


def test_fewer_rows_than_a_batch_go_around(folder):
    tiny = make(folder / "tiny", unique_documents([4, 5]))
    batch = Batches((tiny,), 100, 6).batch(0)
    assert batch["tokens"].shape == (6, 100)
    assert (batch["tokens"] == batch["tokens"][0]).all() and batch["loss_mask"].sum() == 6 * 7
    (only,) = Batches((tiny,), 100, 6).once()
    assert only["loss_mask"].sum(1).tolist() == [7, 0, 0, 0, 0, 0]


def test_large_vocabularies_take_four_bytes(folder):
    big = make(folder / "big", [[1, 70_000, 2], [1, 65_535, 65_536, 2]], vocab_size=70_001)
    assert big.tokens.dtype == np.dtype("<u4")
    batch = Batches((big,), 3, 4).batch(0)
    assert set(batch["labels"][batch["loss_mask"] == 1].tolist()) == {2, 65_535, 65_536, 70_000}


def test_padding_share_is_what_is_served(store, other):
    for weights in ((), (1.0, 2.0)):
        batches = Batches((store, other), 61, 61, weights=weights)
        n = sum(batches.quotas)
        served = [batches.batch(i)["segment_ids"] for i in range(n)]
        share = np.mean([(s == 0).mean() for s in served])
        assert share == pytest.approx(batches.padding_share, abs=0.002)


def test_the_fingerprint_changes_with_anything_that_changes_batches(store, other):
    base = Batches((store,), 32, 4)
    changed = [
        replace(base, **c) for c in ({"seed": 1}, {"seq_len": 33}, {"batch_size": 5}, {"packing": "concat"})
    ]
    changed += [replace(base, stores=(other,)), replace(base, shuffle=False)]
    assert len({b.fingerprint for b in (base, *changed)}) == 7
    assert base.fingerprint == Batches((TokenStore(store.path),), 32, 4).fingerprint


def test_iterating_ahead_gives_the_same_batches_from_any_start(store):
    batches = Batches((store,), 32, 4)
    for depth in (0, 1, 3):
        got = list(iterate(batches, start=5, stop=9, rows=slice(2, 4), depth=depth))
        assert [n for n, _ in got] == [5, 6, 7, 8]
        for n, batch in got:
            assert np.array_equal(batch["tokens"], batches.batch(n)["tokens"][2:])


def test_errors_reach_the_caller_and_the_thread_ends(store):
    batches = Batches((store,), 32, 4)
    stream = iterate(batches, start=-2)
    with pytest.raises(ValueError, match="batch -2"):
        next(stream)
    stream = iterate(batches)
    next(stream)
    stream.close()
    for thread in [t for t in threading.enumerate() if t.name == "lmx-batches"]:
        thread.join(5)
        assert not thread.is_alive()


def test_settings_that_cannot_be_met_are_refused(store, other, folder):
    for settings, message in (
        ({"weights": (1.0,)}, "1 weights for 2 stores"),
        ({"weights": (1.0, 0.0)}, "must be positive"),
        ({"weights": (1.0, float("nan"))}, "must be positive"),
        ({"weights": (1.0, 1e-9)}, "less than 1/4096"),
        ({"packing": "tight"}, "best_fit"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Batches(**{"stores": (store, other), "seq_len": 8, "batch_size": 2, **settings})
    with pytest.raises(ValueError, match="no document"):
        Batches((make(folder / "none", []),), 8, 2)
