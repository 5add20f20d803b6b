"""A teacher's labels of a text: against its logits in float64, as a student sees the text, and through anything that
ends a labelling early."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx.adapt import Int8
from lmx.data import Bpe, Chat, Data, Documents, TeacherTopK, Word, prepare
from lmx.data.taught import UNITS, Taught, coded, decoded, folder_of
from lmx.distill import label
from lmx.models import build
from lmx.models.presets import gpt2, llama
from lmx.run import Run, Trained

LINES = ("नदी {} नावों को ले जाती है", "the river carries {} boats", "क्षेत्र {}: पुरानी चक्कियाँ", "{}")
TEXTS = (*(LINES[i % 4].format(i * i) for i in range(40)), "एक बहुत लंबा वाक्य, " * 9)


def data(seq_len=32, texts=TEXTS, **more):
    return Data((Documents(texts),), valid_share=0.0, seq_len=seq_len, batch_size=4, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare(data(), tmp_path_factory.mktemp("cache"))


def teacher_of(prepared, seed=0, padded=0, context=128, config=None):
    """Random, with logits as far apart as those of a trained model. `padded`: words it has beside the tokenizer's."""
    config = config or llama(16, 2, 2)
    model = build(replace(config, vocab_size=prepared.tokenizer.vocab_size + padded))
    params = jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, model.init(jax.random.key(seed)))
    return Trained(Run(), model, params, prepared.tokenizer, None, context)


@pytest.fixture(scope="module")
def teacher(made):
    return teacher_of(made)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """What a teacher was read from, as far as its hash goes."""
    path = tmp_path_factory.mktemp("origin") / "teacher"
    path.write_text("शिक्षक")
    return [path]


def log_probabilities(teacher, batch, words):
    """[B, T, V] float64, of the words of the tokenizer alone."""
    batch = {name: jnp.asarray(x) for name, x in batch.items() if x.ndim == 2}
    logits = np.asarray(teacher.model.apply(teacher.params, batch).logits, np.float64)[..., :words]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def batches_of(made, path, **more):
    taught = replace(made.data, teacher=TeacherTopK(str(path), **more)).teacher
    opened = tuple(taught.opened(store, made.data.seq_len, made.data.packing) for store in made.train_stores)
    return replace(made, taught=opened).train


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("padded", [0, 5])
def test_labels_are_the_teachers_likeliest_tokens_in_the_rows_of_a_student(
    made, origin, tmp_path, bits, padded
):
    teacher = teacher_of(made, padded=padded)
    k, words = 6, made.tokenizer.vocab_size
    label(
        teacher, made, tmp_path / "labels", origin=origin, k=k, bits=bits, batch_tokens=96, shard_tokens=300
    )
    off = 0.5 / UNITS[bits]
    for batch in batches_of(made, tmp_path / "labels").once():
        real = batch["segment_ids"] > 0
        right = log_probabilities(teacher, batch, words)
        kept = np.take_along_axis(right, batch["teacher_ids"], -1)
        best = -np.sort(-right, -1)[..., :k]
        np.testing.assert_allclose(kept[real], best[real], atol=1e-4)  # float32 logits: ties in another order
        np.testing.assert_allclose(batch["teacher_log_p"][real], best[real], atol=2 * off + 1e-4)
        tail = 1 - np.exp(batch["teacher_log_p"].astype(np.float64)).sum(-1)[real]
        rest = 1 - np.exp(best).sum(-1)[real]
        assert (np.abs(tail - rest) <= 1e-5 + 3 * off * np.minimum(rest, 1 - rest) + off * (rest > 0.4)).all()
        assert batch["teacher_ids"].dtype == np.int32 and batch["teacher_log_p"].dtype == np.float32
        assert not batch["teacher_ids"][~real].any() and not batch["teacher_log_p"][~real].any()


def test_rounding_stays_within_half_a_code_and_what_is_read_adds_up():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 40)) * rng.uniform(0.1, 6, (500, 1))
    log_p = -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True))), -1)
    for bits in (8, 16):
        for k in (1, 5, 39, 40):
            with np.errstate(divide="ignore"):
                tail = np.log(np.exp(log_p[:, k:]).sum(-1, keepdims=True))
            codes = coded(np.concatenate([log_p[:, :k], tail], 1), bits)
            found = decoded(codes, bits)
            assert found.dtype == np.float32
            seen = log_p[:, :k] > -((1 << bits) - 1) / UNITS[bits]
            assert np.abs(found - log_p[:, :k])[seen].max() <= 1.01 / UNITS[bits] * (1 if k > 1 else 2)
            if k == 40:
                np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("k", ["all", 6])
def test_the_divergence_from_a_store_is_that_of_the_teacher_online_up_to_the_tail(
    made, teacher, origin, tmp_path, k
):
    """Float64 numpy of forward KL over k + 1 cells, which the store's batches alone reproduce."""
    words = made.tokenizer.vocab_size
    k = words if k == "all" else k
    label(teacher, made, tmp_path / "labels", origin=origin, k=k)
    student = teacher_of(made, seed=1)
    for batch in batches_of(made, tmp_path / "labels").once():
        real = batch["segment_ids"] > 0
        p, q = (log_probabilities(x, batch, words)[real] for x in (teacher, student))
        ids, kept = batch["teacher_ids"][real], batch["teacher_log_p"][real].astype(np.float64)
        online, stored = cells(p, ids, np.take_along_axis(p, ids, -1), q), cells(p, ids, kept, q)
        np.testing.assert_allclose(stored, online, rtol=5e-3, atol=1e-3)
        assert abs(stored.mean() - online.mean()) < 1e-4 * online.mean() + 1e-5
        if k == words:
            full = (np.exp(p) * (p - q)).sum(-1)
            np.testing.assert_allclose(online, full, rtol=1e-9)


def cells(p, ids, kept, q):
    chosen = np.take_along_axis(q, ids, -1)
    rest_p, rest_q = (np.maximum(1 - np.exp(x).sum(-1), 1e-12) for x in (kept, chosen))
    rest = rest_p * np.log(rest_p / rest_q) if ids.shape[-1] < p.shape[-1] else 0
    return (np.exp(kept) * (kept - chosen)).sum(-1) + rest


def test_a_long_document_is_read_in_pieces_or_with_an_overlap(made, teacher, origin, tmp_path):
    (store,) = made.train_stores
    long = int(np.argmax(np.diff(store.offsets)))
    start, stop = map(int, store.offsets[long : long + 2])
    ids = np.asarray(store[long])
    assert len(ids) > 3 * 32
    label(teacher, made, tmp_path / "cut", origin=origin, k=3)
    label(teacher, made, tmp_path / "slid", origin=origin, k=3, context=40, overlap=31)
    for name, view in (
        ("cut", lambda t: t // 32 * 32),
        ("slid", lambda t: 0 if t < 40 else (t - 40) // 9 * 9 + 9),
    ):
        found = Taught(str(folder_of(tmp_path / name, store)))
        _, got, _ = found.read(np.arange(start, stop - 1))
        at = np.arange(len(ids) - 1)
        first = np.array([view(t) for t in at])
        for begin in np.unique(first):
            seen = np.resize(ids[begin : begin + 40].astype(np.int32), 40)  # what follows changes nothing
            right = log_probabilities(teacher, {"tokens": seen[None]}, made.tokenizer.vocab_size)[0]
            here = at[first == begin]
            np.testing.assert_allclose(got[here], -np.sort(-right[here - begin], -1)[:, :3], atol=1e-3)
    assert batches_of(made, tmp_path / "slid").taught  # shows no less than rows of 32 do


def test_conversations_are_labelled_where_their_replies_are(tmp_path, origin):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "भारत की राजधानी? " * n},
                {"role": "assistant", "content": "दिल्ली"},
            ]
        }
        for n in (1, 2, 9)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    chat = Data(
        (Chat(str(path), keep="tail"),), valid_share=0.0, tokenizer=Bpe(300), seq_len=64, batch_size=2
    )
    with pytest.warns(UserWarning):
        made = prepare(chat, tmp_path / "cache")
    teacher = teacher_of(made)
    label(teacher, made, tmp_path / "labels", origin=origin, k=4)
    for batch in batches_of(made, tmp_path / "labels").once():
        right = log_probabilities(teacher, batch, made.tokenizer.vocab_size)
        counted = batch["loss_mask"] > 0
        assert counted.any()
        np.testing.assert_allclose(
            batch["teacher_log_p"][counted], -np.sort(-right[counted], -1)[:, :4], atol=1e-3
        )


def test_a_quantized_teacher_labels_too(made, teacher, origin, tmp_path):
    codes = Int8()(teacher.params, jax.random.key(0))
    label(teacher._replace(params=codes), made, tmp_path / "labels", origin=origin, k=4)
    batch = next(batches_of(made, tmp_path / "labels").once())
    right = log_probabilities(teacher._replace(params=codes), batch, made.tokenizer.vocab_size)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(batch["teacher_log_p"][real], -np.sort(-right[real], -1)[:, :4], atol=1e-3)


def test_batches_without_a_teacher_are_what_they_were_and_fewer_labels_may_be_read(
    made, teacher, origin, tmp_path
):
    label(teacher, made, tmp_path / "labels", origin=origin, k=6)
    plain, all_six, two = (
        made.train,
        batches_of(made, tmp_path / "labels"),
        batches_of(made, tmp_path / "labels", k=2),
    )
    for n in (0, 7):
        a, b, c = plain.batch(n), all_six.batch(n), two.batch(n)
        assert set(b) - set(a) == {"teacher_ids", "teacher_log_p", "teacher_mask"}
        np.testing.assert_array_equal(b["teacher_mask"], b["loss_mask"])
        assert all((a[name] == b[name]).all() for name in a)
        assert b["teacher_ids"].shape == (4, 32, 6)
        assert (c["teacher_log_p"] == b["teacher_log_p"][..., :2]).all()
        assert (all_six.batch(n, slice(1, 3))["teacher_ids"] == b["teacher_ids"][1:3]).all()
    assert len({x.fingerprint for x in (plain, all_six, two)}) == 3


def test_several_texts_mixed_by_weights(tmp_path, origin):
    parts = Documents(TEXTS[:20]), Documents(TEXTS[20:])
    made = prepare(
        Data(parts, valid_share=0.0, weights=(3.0, 1.0), seq_len=32, batch_size=8), tmp_path / "cache"
    )
    teacher = teacher_of(made)
    paths = label(teacher, made, tmp_path / "labels", origin=origin, k=3)
    assert len(paths) == 2
    batch = batches_of(made, tmp_path / "labels").batch(2)
    right = log_probabilities(teacher, batch, made.tokenizer.vocab_size)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(batch["teacher_log_p"][real], -np.sort(-right[real], -1)[:, :3], atol=1e-3)


def test_what_does_not_belong_together_is_refused(made, teacher, origin, tmp_path):
    out = tmp_path / "labels"
    label(teacher, made, out, origin=origin, k=4)
    other = tmp_path / "other"
    other.write_text("another teacher")
    with pytest.raises(ValueError, match=r"labels with another teacher .* choose another folder"):
        label(teacher, made, out, origin=[other], k=4)
    with pytest.raises(ValueError, match=r"another k \(4 there, 5 asked\)"):
        label(teacher, made, out, origin=origin, k=5)
    (path,) = out.glob("*/meta.json")
    hashed = json.loads(path.read_text())["teacher"]
    assert batches_of(made, out, teacher=hashed[:8]).taught
    with pytest.raises(ValueError, match=r"labels of the teacher .* and teacher='beef' is asked for"):
        batches_of(made, out, teacher="beef")
    with pytest.raises(ValueError, match="k=9, and 4 are kept"):
        batches_of(made, out, k=9)
    another = prepare(data(texts=TEXTS[:-1]), tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"no labels of this text .there are labels of"):
        batches_of(another, out)
    shorter = prepare(data(seq_len=48), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"32 at a time, 0 of them again.* --context 48 .*any_view=True"):
        batches_of(shorter, out)
    assert batches_of(shorter, out, any_view=True).taught
    concat = prepare(data(packing="concat"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"rows of 32 .concat."):
        batches_of(concat, out)
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"tokenizer": "0" * 64}))
    with pytest.raises(ValueError, match="labels of another tokenizer"):
        batches_of(made, out)
    path.write_text(json.dumps(meta | {"version": 9}))
    with pytest.raises(ValueError, match="version 9, this code reads 1"):
        batches_of(made, out)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        batches_of(made, out)


def test_a_teacher_that_does_not_fit_is_refused(made, teacher, origin, tmp_path):
    def refused(match, who=teacher, data=made, **more):
        with pytest.raises(ValueError, match=match):
            label(who, data, tmp_path / "labels", origin=origin, **more)

    refused(
        "context=32, and the teacher has positions for 16",
        teacher_of(made, config=gpt2(16, 1, 2, max_len=16)),
    )
    refused("was made to read 24 tokens; use 24", teacher_of(made, context=24))
    refused("k=0; use 1 to", k=0)
    refused("k=70,?000; use 1 to", k=70_000)
    refused("bits=4; use 16, or 8", bits=4)
    refused("context=32, overlap=32; use an overlap from 0", overlap=32)
    refused("the teacher's tokenizer changes texts", teacher._replace(tokenizer=Word(40).train(TEXTS)))
    assert not (tmp_path / "labels").exists()


def test_a_store_cut_short_is_refused_and_made_whole(made, teacher, origin, tmp_path):
    out = tmp_path / "labels"
    (path,) = label(teacher, made, out, origin=origin, k=4, shard_tokens=200)
    whole = {x.name: x.read_bytes() for x in path.glob("*.bin")}
    assert len(whole) > 3
    assert "content unchanged" in lmx.artifact.explain(path) and "teacher" in lmx.artifact.explain(path)
    (path / "00002.bin").write_bytes(whole["00002.bin"][:-2])
    for again in (
        lambda: batches_of(made, out),
        lambda: label(teacher, made, out, origin=origin, k=4, shard_tokens=200),
    ):
        with pytest.raises(ValueError, match=r"00002.bin: \d+ bytes where meta.json says \d+: cut short"):
            again()
    (path / "00002.bin").unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ shards are missing, the first 2; repeat"):
        batches_of(made, out)
    told = []
    label(teacher, made, out, origin=origin, k=4, shard_tokens=200, seen=lambda *x: told.append(x))
    assert {x.name: x.read_bytes() for x in path.glob("*.bin")} == whole
    n = made.train_stores[0].n_tokens
    assert told[-1] == (n, n) and [x for x, _ in told] == sorted(x for x, _ in told)


def work(cache, texts, origin, out, ready=None, seconds=0.0):
    """The body of a labelling process, slowed down so that it can be hit."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    made = prepare(data(texts=texts), cache)
    teacher = teacher_of(made)
    if ready is not None:
        ready.wait(60)
    label(
        teacher,
        made,
        out,
        origin=origin,
        k=4,
        batch_tokens=64,
        shard_tokens=100,
        seen=lambda *_: time.sleep(seconds),
    )


@pytest.fixture(scope="module")
def undisturbed(made, teacher, origin, tmp_path_factory):
    (path,) = label(
        teacher, made, tmp_path_factory.mktemp("whole"), origin=origin, k=4, batch_tokens=64, shard_tokens=100
    )
    return {x.name: x.read_bytes() for x in path.iterdir() if not x.name.startswith("artifact")}


@pytest.fixture
def start(made, origin, tmp_path):
    context = multiprocessing.get_context("spawn")
    running = []

    def begin(out, **more):
        process = context.Process(target=work, args=(tmp_path / "cache", TEXTS, origin, out), kwargs=more)
        process.start()
        running.append(process)
        return process

    prepare(made.data, tmp_path / "cache")
    yield begin
    for process in running:
        process.kill()
        process.join()


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, process.exitcode
        time.sleep(0.002)


def test_killed_and_labelled_on_is_as_undisturbed(made, start, undisturbed, tmp_path):
    out = tmp_path / "labels"
    for shards in (2, 5):
        process = start(out, seconds=0.03)
        wait_for(lambda n=shards: len(list(out.glob("*/*.bin"))) >= n, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not list(out.glob("*/artifact.json"))
        with pytest.raises(ValueError, match="shards are missing"):
            batches_of(made, out)
    (folder,) = out.glob("[!.]*")
    (folder / ".00099.bin.0123.tmp").write_bytes(b"")  # of a shard that is not to be: stays out of the way
    kept = {x.name: x.stat().st_mtime_ns for x in folder.glob("*.bin")}
    process = start(out)
    process.join(120)
    assert process.exitcode == 0
    (folder / ".00099.bin.0123.tmp").unlink()
    assert {
        x.name: x.read_bytes() for x in folder.iterdir() if not x.name.startswith("artifact")
    } == undisturbed
    assert all((folder / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert batches_of(made, out).taught


def test_two_processes_share_the_work_and_do_no_damage(made, start, undisturbed, tmp_path):
    out = tmp_path / "labels"
    ready = multiprocessing.get_context("spawn").Event()
    two = [start(out, ready=ready, seconds=0.02) for _ in range(2)]
    ready.set()
    for process in two:
        process.join(120)
        assert process.exitcode == 0
    (folder,) = out.glob("[!.]*")
    assert {
        x.name: x.read_bytes() for x in folder.iterdir() if not x.name.startswith("artifact")
    } == undisturbed
    assert "content unchanged" in lmx.artifact.explain(folder)


def test_one_that_dies_leaves_its_shard_to_the_other(made, start, undisturbed, tmp_path):
    out = tmp_path / "labels"
    first = start(out, seconds=0.05)
    wait_for(lambda: list(out.glob("*/*.bin")), first)
    second = start(out, seconds=0.01)
    wait_for(lambda: len(list(out.glob("*/*.bin"))) > 4, second)
    os.kill(first.pid, signal.SIGKILL)
    second.join(120)
    assert second.exitcode == 0
    (folder,) = out.glob("[!.]*")
    assert {
        x.name: x.read_bytes() for x in folder.iterdir() if not x.name.startswith("artifact")
    } == undisturbed
