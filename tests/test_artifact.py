"""Ancestry by hash: changes are seen, parents are kept, damage is told."""

import hashlib
import json
import multiprocessing
import os

import pytest

from lmx import artifact


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "train" / "a.txt", "नमस्ते दुनिया")
    write(folder / "b.txt", "hello")
    return folder


def test_the_hash_of_a_file_is_its_sha256(tmp_path):
    file = write(tmp_path / "a.txt", "क" * 100_000)
    assert artifact.hash_path(file) == hashlib.sha256(("क" * 100_000).encode()).hexdigest()
    assert artifact.hash_text("क") == hashlib.sha256("क".encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder / "b.txt", "hellO"),
        lambda folder: write(folder / "c.txt", ""),
        lambda folder: (folder / "b.txt").unlink(),
        lambda folder: (folder / "b.txt").rename(folder / "c.txt"),
        lambda folder: (folder / "b.txt").rename(folder / "train" / "b.txt"),
        lambda folder: write(folder / "my_artifact.json", "{}"),
        lambda folder: (folder / os.fsdecode(b"\xff.txt")).write_bytes(b""),
    ],
    ids=["byte", "new", "removed", "renamed", "moved", "similar name", "name that is not UTF-8"],
)
def test_a_changed_folder_is_seen(corpus, change):
    artifact.record(corpus, "corpus")
    assert "content unchanged" in artifact.explain(corpus)
    before = artifact.hash_path(corpus)
    change(corpus)
    assert artifact.hash_path(corpus) != before
    assert "CONTENT CHANGED" in artifact.explain(corpus)


def test_times_places_and_artifact_files_are_no_content(corpus, tmp_path):
    before = artifact.hash_path(corpus)
    artifact.record(corpus, "corpus")
    artifact.record(corpus / "b.txt", "text")
    write(corpus / "artifact.json.123.tmp", "left by a process that was killed")
    os.utime(corpus / "b.txt", (0, 0))
    assert artifact.hash_path(corpus) == before
    moved = corpus.rename(tmp_path / "elsewhere")
    assert artifact.hash_path(moved) == before and "content unchanged" in artifact.explain(moved)


def test_what_is_written_is_what_is_read(corpus):
    facts = {"documents": 2, "script": "देवनागरी", "nested": {"a": [1, 2]}}
    made = artifact.record(corpus, "corpus", facts=facts, at="/final/place")
    assert artifact.read(corpus) == made
    assert (made.kind, made.path, made.facts, made.made_from) == ("corpus", "/final/place", facts, ())
    assert artifact.read(corpus / "b.txt") is None
    assert not list(corpus.glob("*.tmp"))


def test_ancestry_reaches_down_to_raw_files(corpus, tmp_path):
    raw = write(tmp_path / "raw.txt", "text")
    store = write(tmp_path / "store.bin", "123")
    model = write(tmp_path / "model" / "w.bin", "456")
    artifact.record(store, "store", made_from=[raw, corpus], facts={"tokens": 3})
    tokenizer = artifact.Artifact("tokenizer", "f" * 64, "tokenizer.json")
    made = artifact.record(model.parent, "model", made_from=[store, tokenizer])
    assert [parent.kind for parent in made.made_from] == ["store", "tokenizer"]
    assert [parent.kind for parent in made.made_from[0].made_from] == ["file", "folder"]
    assert made.made_from[0].made_from[0].hash == hashlib.sha256(b"text").hexdigest()
    assert made.made_from[0].made_from[0].facts == {"bytes": 4}
    lines = artifact.explain(model.parent).splitlines()
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 3, 6, 6, 3]
    assert [line.split()[0] for line in lines] == ["model", "store", "file", "folder", "tokenizer"]
    assert "tokens=3" in lines[1]
    raw.unlink()
    store.unlink()
    assert artifact.explain(model.parent).splitlines()[1:] == lines[1:]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        "{}",
        '{"kind": "a", "hash": "b", "path": "c", "facts": []}',
        '{"kind": "a", "hash": "b", "path": "c", "facts": [], "made_from": []}',
        '{"kind": "a", "hash": 7, "path": "c", "facts": {}, "made_from": []}',
        '{"kind": "a", "hash": "b", "path": "c", "facts": {}, "made_from": [3]}',
        '{"a":' * 100_000,
        b"\xff\xfe",
    ],
    ids=lambda damage: str(damage[:20]) or "empty",
)
def test_a_damaged_file_is_told_with_its_name_and_the_way_out(corpus, damage):
    artifact.record(corpus, "corpus")
    (corpus / "artifact.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    for function in (artifact.read, artifact.explain, artifact.find):
        with pytest.raises(ValueError, match=r"artifact\.json: not an artifact file .*remove it and make"):
            function(corpus)


def test_a_file_cut_short_anywhere_is_told(corpus):
    artifact.record(corpus, "corpus", facts={"n": 1})
    whole = (corpus / "artifact.json").read_bytes()
    for size in range(len(whole)):
        (corpus / "artifact.json").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not an artifact file"):
            artifact.read(corpus)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        artifact.record(tmp_path / "nowhere", "corpus")
    file = write(tmp_path / "a.txt", "a")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        artifact.record(file, "text", made_from=[tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"no artifact here .*a\.txt\.artifact\.json is missing"):
        artifact.explain(file)


def test_a_record_is_replaced_whole(corpus):
    artifact.record(corpus, "corpus", facts={"long": "x" * 10_000})
    artifact.record(corpus, "corpus", facts={"n": 2})
    assert json.loads((corpus / "artifact.json").read_text())["facts"] == {"n": 2}


def _record_often(folder, n):
    for _ in range(50):
        artifact.record(folder, "corpus", facts={"by": n, "long": "x" * 5000})


def test_processes_that_record_at_once_leave_one_whole_file(corpus):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_often, args=(corpus, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = artifact.read(corpus)
        assert found is None or len(found.facts["long"]) == 5000
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert artifact.read(corpus).hash == artifact.hash_path(corpus)


def test_places_are_whole_and_no_name_adds_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write(tmp_path / "कर्म\u200dयोग\nforged", "text")
    made = write(tmp_path / "made.json", "{}")
    artifact.record("made.json", "results", [text.relative_to(tmp_path)])
    monkeypatch.chdir("/")
    told = artifact.explain(made, check_parents=True)
    assert len(told.splitlines()) == 2 and told.count("content unchanged") == 2
    assert f"{tmp_path}/कर्म\u200dयोग\ufffdforged" in told
