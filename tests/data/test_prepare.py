"""From sources to batches, end to end, with Hindi and English text and real tokenizers."""

import fcntl
import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmx import artifact, values
from lmx.data import (
    Bpe,
    Byte,
    Char,
    Data,
    Documents,
    Jsonl,
    Parquet,
    Text,
    Tfds,
    TokenStore,
    iterate,
    prepare,
    prepare_tfds,
)
from lmx.data import prepare as prepare_function

prepare_module = sys.modules[prepare_function.__module__]

ENGLISH = tuple(f"The quick brown fox number {i} jumps over {i % 7} lazy dogs." for i in range(200))
HINDI = tuple(f"नमस्ते दुनिया {i}। क्षत्रिय और ज्ञानी {i % 7} भाषाओं में लिखते हैं।" for i in range(120))


def words(batches_or_stores, tokenizer):
    """The texts of stores, decoded, without bos and eos."""
    return [tokenizer.decode(document[1:-1]) for store in batches_or_stores for document in store]


def test_from_files_to_batches(tmp_path):
    """JSONL and text in two languages; every token of the training part comes once an epoch, as it was."""
    (tmp_path / "en.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ENGLISH) + "\n{broken\n")
    (tmp_path / "hi.txt").write_text("\n".join(HINDI), encoding="utf-8")
    data = Data(
        train=(str(tmp_path / "en.jsonl"), Text(str(tmp_path / "hi.txt"), unit="line")),
        valid_share=0.1,
        seq_len=128,
        batch_size=8,
    )
    seen = []
    prepared = prepare(data, tmp_path / "cache", seed=1, progress=lambda *told: seen.append(told))
    tokenizer = prepared.tokenizer
    train, valid = words(prepared.train_stores, tokenizer), words(prepared.valid_stores, tokenizer)
    assert sorted(train + valid) == sorted(ENGLISH + HINDI) and valid
    assert [d["text"] for d in data.documents("train")] == train
    assert [d["text"] for d in data.documents("valid")] == valid
    assert prepared.report.skipped == {"broken_line": 1} and prepared.report.documents == 320
    assert {stage for stage, _, _ in seen} >= {"train 1/2", "train 2/2", "valid 1/2"}

    labels, shown = Counter(), []
    for batch in prepared.train.once():
        labels.update(batch["labels"][batch["loss_mask"] == 1].tolist())
        for row, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"]):
            for segment in range(1, segments.max() + 1):
                ids, where = row[segments == segment], positions[segments == segment]
                assert where.tolist() == list(range(len(ids)))
                shown.append((ids[0] == tokenizer.bos_id, ids.tolist()))
    wanted = Counter(int(i) for store in prepared.train_stores for document in store for i in document[1:])
    assert labels == wanted
    short = [tokenizer.decode(ids[1:]) for begins, ids in shown if begins and len(ids) < 100]
    assert short and set(short) <= set(train)
    rows = sum(len(batch["tokens"]) for batch in prepared.valid.once())
    assert rows >= prepared.valid.n_rows
    for _, batch in iterate(prepared.train, start=3, stop=5):
        assert batch["tokens"].shape == (8, 128) and batch["tokens"].max() < tokenizer.vocab_size


def test_every_kind_of_source_gives_the_same_stores(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("tensorflow_datasets")
    import zstandard

    lines = "\n".join(json.dumps({"text": t}) for t in HINDI).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.txt").write_text("\n".join(HINDI), encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": list(HINDI)}), tmp_path / "a.parquet")
    prepare_tfds(Documents(HINDI), "hindi", tmp_path / "tfds")
    sources = [
        Documents(HINDI),
        *(Jsonl(str(tmp_path / name)) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst")),
        Text(str(tmp_path / "a.txt"), unit="line"),
        Parquet(str(tmp_path / "a.parquet")),
        Tfds("hindi", data_dir=str(tmp_path / "tfds")),
    ]
    hashes = [
        prepare(Data(train=(source,), valid_share=0.2), tmp_path / "cache").train_stores[0].hash
        for source in sources
    ]
    assert len(set(hashes)) == 1


def test_the_characters_of_one_text_are_cut_as_nanogpt_cuts_them(tmp_path):
    path = tmp_path / "input.txt"
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 10_007))
    path.write_text(text)
    n = int(0.9 * len(text))
    for data in (
        Data(train=(Text(str(path), span=(0.0, 0.9)),), valid=(Text(str(path), span=(0.9, 1.0)),)),
        Data(train=(str(path),), valid_share=0.1),
    ):
        data = replace(data, tokenizer=Char(), packing="concat", seq_len=64, batch_size=4)
        prepared = prepare(data, tmp_path / "cache")
        assert words(prepared.train_stores, prepared.tokenizer) == [text[:n]]
        assert words(prepared.valid_stores, prepared.tokenizer) == [text[n:]]
        batch = prepared.train.batch(0)
        assert batch["segment_ids"].max() <= 2
        for ids, segments in zip(batch["tokens"], batch["segment_ids"]):
            assert prepared.tokenizer.decode(ids[segments == 1][1:]) in text


def test_the_second_time_everything_is_found(tmp_path):
    data = Data(train=(Documents(ENGLISH),), tokenizer=Bpe(vocab_size=300), batch_size=2)
    first = prepare(data, tmp_path)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "hashes" not in p.name}
    again = prepare(replace(data, seq_len=17, batch_size=3, packing="concat"), tmp_path, seed=9)
    assert {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "hashes" not in p.name
    } == made
    assert again.train_stores == first.train_stores and again.report == first.report
    assert again.train.batch(0)["tokens"].shape == (3, 17)
    assert not list(tmp_path.rglob("*.tmp"))


def test_whatever_changes_the_text_changes_the_stores(tmp_path):
    path = tmp_path / "a.jsonl"

    def stores(data, text=ENGLISH):
        path.write_text("\n".join(json.dumps({"text": t, "body": t.upper()}) for t in text))
        return prepare(data, tmp_path / "cache").train_stores[0].path

    base = Data(train=(str(path),), valid_share=0.1)
    paths = [
        stores(base),
        stores(base, ENGLISH[:-1]),
        stores(replace(base, valid_share=0.2)),
        stores(replace(base, clean=False)),
        stores(replace(base, tokenizer=Char())),
        stores(replace(base, train=(Jsonl(str(path), field="body"),))),
    ]
    assert len(set(paths)) == len(paths)
    assert stores(base) == paths[0]


def test_sources_with_weights_and_without(tmp_path):
    sources = (Documents(ENGLISH), Documents(HINDI))
    data = Data(train=sources, valid_share=0.1, seq_len=64, batch_size=64, weights=(1.0, 3.0))
    prepared = prepare(data, tmp_path)
    hindi = np.concatenate([prepared.train.batch(n)["tokens"] for n in range(8)]).max(1) > 3 + 0xE0 - 1
    assert abs(hindi.mean() - 0.75) < 0.1
    with pytest.raises(ValueError, match="1 weights for 2 training sources"):
        Data(train=sources, weights=(1.0,))


def test_a_batch_is_the_same_on_any_number_of_processes(tmp_path):
    prepared = prepare(Data(train=(Documents(ENGLISH),), seq_len=32, batch_size=12), tmp_path, seed=4)
    whole = prepared.train.batch(1000)
    for n in (1, 2, 3, 4, 6, 12):
        parts = [prepared.train.batch(1000, slice(12 * i // n, 12 * (i + 1) // n)) for i in range(n)]
        for name, value in whole.items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), value)


def test_a_document_longer_than_everything_else_and_rows_longer_than_any_document(tmp_path):
    text = " ".join(HINDI) * 3
    for seq_len in (7, 100_000):
        data = Data(train=(Documents((text, *ENGLISH)),), valid_share=0.1, seq_len=seq_len, batch_size=4)
        prepared = prepare(data, tmp_path)
        n = sum(int(batch["loss_mask"].sum()) for batch in prepared.train.once())
        assert n == sum(len(document) - 1 for store in prepared.train_stores for document in store)


def test_every_made_thing_names_what_it_was_made_from(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ENGLISH))
    prepared = prepare(
        Data(train=(str(path),), valid_share=0.1, tokenizer=Bpe(vocab_size=300)), tmp_path / "cache"
    )
    tokenizer, corpus, _ = (artifact.read(made) for made in prepared.made_from)
    raw = artifact.hash_path(path)
    assert (tokenizer.kind, corpus.kind) == ("tokenizer", "corpus")
    assert [parent.hash for parent in tokenizer.made_from] == [raw]
    assert {parent.hash for parent in corpus.made_from} == {raw, tokenizer.hash}
    text = "".join(d["text"] for d in replace(prepared.data).documents("train"))
    assert corpus.facts["text_words"] == len(" ".join(ENGLISH).split()) - sum(
        len(d["text"].split()) for d in prepared.data.documents("valid")
    )
    assert corpus.facts["text_bytes"] == len(text.encode())
    assert "content unchanged" in artifact.explain(prepared.made_from[1])


def test_a_vocabulary_the_text_cannot_fill_is_told_each_time(tmp_path):
    data = Data(train=(Documents(("abc abd " * 50,)),), tokenizer=Bpe(vocab_size=5000))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"vocab_size=5000.* reached \d+: the text supports no more"):
            prepared = prepare(data, tmp_path)
        assert prepared.tokenizer.vocab_size < 300
        assert prepared.report.noted["vocabulary_smaller_than_asked"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(replace(data, tokenizer=Byte()), tmp_path)


def test_no_validation_is_a_clear_choice(tmp_path):
    few = Documents(ENGLISH[:3])
    with pytest.raises(ValueError, match=r"valid_share=0.001 of 3 documents holds out none; raise it, name"):
        prepare(Data(train=(few,), valid_share=0.001), tmp_path)
    prepared = prepare(Data(train=(few,), valid_share=0.0), tmp_path)
    assert prepared.valid_stores == () and len(prepared.train_stores[0]) == 3
    with pytest.raises(ValueError, match="nothing to validate on"):
        prepared.valid  # noqa: B018
    with pytest.raises(ValueError, match="leaves no document to train on"):
        prepare(Data(train=(few,), valid_share=0.9999), tmp_path)
    with pytest.raises(ValueError, match="train is empty"):
        prepare(Data(), tmp_path)


def test_bad_files_are_named_and_nothing_is_left(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "broken.jsonl").write_text("{\n" * 5)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "words"}\n' * 100_000)[:200])
    for name, message in (
        ("empty.txt", "no usable document(.|\n)*1 empty file"),
        ("binary.txt", "binary.txt: a binary file"),
        ("broken.jsonl", "5 broken line: .*broken.jsonl:1"),
        ("cut.jsonl.gz", "cut.jsonl.gz: damaged .gz file, readable for"),
    ):
        for tokenizer in (Byte(), Bpe(vocab_size=300)):
            with pytest.raises(ValueError, match=message):
                prepare(Data(train=(str(tmp_path / name),), tokenizer=tokenizer), tmp_path / "cache")
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]
    assert all("tokenizers" in str(p) for p in left)


def many_files(tmp_path, n=6):
    for i in range(n):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(
            gzip.compress("\n".join(json.dumps({"text": f"{t} {i}"}) for t in HINDI).encode())
        )
    return Data(train=(str(tmp_path / "*.jsonl.gz"),), valid_share=0.1)


def test_one_damaged_file_of_many_loses_nothing_already_done(tmp_path, monkeypatch):
    """The groups of files before the damaged one are kept, and not tokenized again once it is mended."""
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    data = many_files(tmp_path)
    whole = prepare(data, tmp_path / "whole")
    good = (tmp_path / "4.jsonl.gz").read_bytes()
    (tmp_path / "4.jsonl.gz").write_bytes(good[:-50])
    with pytest.raises(ValueError, match=r"4.jsonl.gz: damaged"):
        prepare(data, tmp_path / "cache")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "parts").rglob("tokens.bin")}
    assert len(kept) == 4
    (tmp_path / "4.jsonl.gz").write_bytes(good)
    read = []
    reading = Jsonl._read_file
    monkeypatch.setattr(
        Jsonl, "_read_file", lambda self, path, report: read.append(path.name) or reading(self, path, report)
    )
    mended = prepare(data, tmp_path / "cache")
    assert [name for name in read if read.count(name) == 1] == [
        "0.jsonl.gz",
        "1.jsonl.gz",
        "2.jsonl.gz",
        "3.jsonl.gz",
    ]
    assert mended.train_stores[0].hash == whole.train_stores[0].hash
    assert mended.report == whole.report
    assert list((tmp_path / "cache" / "parts").iterdir()) == []


def prepare_with_a_damaged_file(tmp_path, monkeypatch):
    """The data, mended since; and the parts that were finished before the damaged file."""
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    data = many_files(tmp_path)
    good = (tmp_path / "4.jsonl.gz").read_bytes()
    (tmp_path / "4.jsonl.gz").write_bytes(good[:-50])
    with pytest.raises(ValueError, match=r"4.jsonl.gz: damaged"):
        prepare(data, tmp_path / "cache")
    (tmp_path / "4.jsonl.gz").write_bytes(good)
    return data, list((tmp_path / "cache" / "parts").iterdir())


def test_what_a_killed_process_left_of_a_part_is_removed(tmp_path, monkeypatch):
    data, parts = prepare_with_a_damaged_file(tmp_path, monkeypatch)
    for part in parts:
        part.with_name(f".{part.name}.0123456789ab.tmp").mkdir()
    prepare(data, tmp_path / "cache")
    assert list((tmp_path / "cache" / "parts").iterdir()) == []


def test_parts_left_by_a_process_killed_after_joining_them_are_removed(tmp_path, monkeypatch):
    data, _ = prepare_with_a_damaged_file(tmp_path, monkeypatch)
    parts = tmp_path / "cache" / "parts"
    shutil.copytree(parts, tmp_path / "parts")
    (store,) = prepare(data, tmp_path / "cache").train_stores
    shutil.copytree(tmp_path / "parts", parts, dirs_exist_ok=True)
    (Path(store.path) / artifact.FILE).unlink()
    prepare(data, tmp_path / "cache")
    assert list(parts.iterdir()) == []


def test_a_part_is_opened_and_removed_under_its_lock(tmp_path, monkeypatch):
    """Two stores may share a part: one must not remove it between the other's finding and opening it."""
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    held = []

    def watched(act):
        def do(path, *args, **kwargs):
            if Path(path).parent.name == "parts":
                held.append(is_locked(tmp_path / "cache" / "locks", Path(path).name))
            return act(path, *args, **kwargs)

        return do

    monkeypatch.setattr(prepare_module, "TokenStore", watched(TokenStore))
    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    prepare(many_files(tmp_path), tmp_path / "cache")
    assert held == [True] * 2 * 2 * 6


def is_locked(locks, name):
    (path,) = locks.glob(f"*{name}")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_equal_files_among_many_are_each_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    data = many_files(tmp_path, n=2)
    shutil.copy(tmp_path / "0.jsonl.gz", tmp_path / "1.jsonl.gz")
    prepared = prepare(data, tmp_path / "cache")
    assert sum(map(len, (*prepared.train_stores, *prepared.valid_stores))) == 2 * len(HINDI)


def test_empty_files_among_many_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    data = many_files(tmp_path)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b"{broken\n"))
    prepared = prepare(data, tmp_path / "cache")
    assert prepared.report.skipped == {"broken_line": 1}
    assert sum(map(len, (*prepared.train_stores, *prepared.valid_stores))) == 5 * len(HINDI)
    for i in range(6):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(b"{broken\n"))
    with pytest.raises(ValueError, match=r"no usable document in 6 groups of files(.|\n)*6 broken line"):
        prepare(data, tmp_path / "cache")


def test_a_full_disk_keeps_what_was_finished(tmp_path, file_size_limit):
    small, large = Documents(ENGLISH), Documents(tuple(f"{t} {i}" for i in range(100) for t in ENGLISH))
    prepare(Data(train=(small,), valid=(small,)), tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match=r"cannot write .*stores.* make room"), file_size_limit(100_000):
        prepare(Data(train=(small, large), valid=(small,)), tmp_path)
    after = {p for p in tmp_path.rglob("*") if p.is_file() and "locks" not in str(p)}
    assert {p for p in before if "locks" not in str(p)} == after
    assert len(prepare(Data(train=(small, large), valid=(small,)), tmp_path).train_stores[1]) == 20_000


def test_a_cache_that_may_not_be_written_is_named_but_may_be_read(open_folder, unwritable):
    cache = open_folder / "cache"
    cache.mkdir()
    data = Data(train=(Documents(ENGLISH),))
    with (
        pytest.raises(PermissionError, match=r"cannot write .*choose a folder that you may write to"),
        unwritable(cache),
    ):
        prepare(data, cache)
    prepare(data, cache)
    for folder in (cache, *(p for p in cache.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
    with unwritable(cache):
        assert len(prepare(data, cache).train_stores[0]) > 100


def prepare_in_child(folder, results):
    data = Data(train=(Text(f"{folder}/a.txt", unit="line"),), tokenizer=Bpe(vocab_size=300), valid_share=0.1)
    prepared = prepare(data, Path(folder) / "cache")
    results.put((os.getpid(), prepared.tokenizer.hash, prepared.train_stores[0].hash))


def test_processes_that_prepare_at_once_end_with_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(ENGLISH * 20))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=prepare_in_child, args=(str(tmp_path), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({pid for pid, *_ in got}) == 3 and len({tuple(rest) for _, *rest in got}) == 1
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2


def test_a_process_that_is_killed_leaves_a_cache_that_works(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(ENGLISH * 50))
    script = textwrap.dedent("""
        import os, signal, sys
        from lmx.data import Data, Text, prepare
        from lmx.data.store import Writer
        add = Writer.add
        def dying(self, ids, *more):
            add(self, ids, *more)
            if self._n_documents == 500:
                os.kill(os.getpid(), signal.SIGKILL)
        Writer.add = dying
        prepare(Data(train=(Text(sys.argv[1], unit="line"),)), sys.argv[2])
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.txt"), str(tmp_path / "cache")])
    assert done.returncode == -9
    assert [p.name for p in (tmp_path / "cache/stores").iterdir() if not p.name.startswith(".")] == []
    prepared = prepare(Data(train=(Text(str(tmp_path / "a.txt"), unit="line"),)), tmp_path / "cache")
    assert sum(map(len, (*prepared.train_stores, *prepared.valid_stores))) == 10_000
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_artifact_lost_between_two_steps_is_written_again(tmp_path):
    prepared = prepare(Data(train=(Documents(ENGLISH),)), tmp_path)
    store = Path(prepared.train_stores[0].path)
    (store / artifact.FILE).unlink()
    prepare(Data(train=(Documents(ENGLISH),)), tmp_path)
    assert artifact.read(store).kind == "corpus"
    shutil.rmtree(store)
    assert prepare(Data(train=(Documents(ENGLISH),)), tmp_path).train_stores[0] == TokenStore(str(store))


def test_data_is_a_value_that_shows_itself():
    data = Data(
        train=("a.jsonl", Text("b", unit="line"), Tfds("wiki40b/hi")),
        weights=(1.0, 2.0, 0.5),
        tokenizer=Bpe(vocab_size=512),
    )
    assert values.parse(repr(data), Data) == data
    assert values.override(data, {"seq_len": "64", "packing": "concat"}) == replace(
        data, seq_len=64, packing="concat"
    )
    for wrong, message in (
        ({"train": "a.txt"}, "write a tuple"),
        ({"valid_share": 1.0}, "valid_share=1.0"),
        ({"packing": "tight"}, "'best_fit' or 'concat'"),
        ({"seq_len": 0}, "seq_len=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Data(**wrong)


def test_texts_given_as_values_do_not_flood_errors_and_artifacts(tmp_path):
    long = Documents(("word " * 5000, "other " * 5000))
    with pytest.raises(ValueError, match=r"holds out none|leaves no document") as error:
        prepare(Data(train=(long,), valid_share=1e-9), tmp_path)
    with pytest.raises(ValueError, match="no usable document") as blank:
        prepare(Data(train=(Documents((" " * 5000,) * 3),), valid_share=0.0), tmp_path)
    assert len(str(error.value)) < 1000 and len(str(blank.value)) < 1000
    store = prepare(Data(train=(long,), valid_share=0.0), tmp_path).train_stores[0]
    assert len(artifact.read(store.path).facts["source"]) <= 300
