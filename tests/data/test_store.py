import multiprocessing

import numpy as np
import pytest

from lmx.data.store import TokenStore, Writer


def test_documents_come_back_as_they_were_written(tmp_path):
    documents = [np.array([1, 5, 9, 2]), np.array([1, 2]), np.arange(50)]
    with Writer(tmp_path / "s", 300, tokenizer="abc") as writer:
        for document in documents:
            writer.add(document)
        writer.facts["words"] = 7
    store = TokenStore(str(tmp_path / "s"))
    assert [d.tolist() for d in store] == [d.tolist() for d in documents]
    assert (len(store), store.n_tokens, store.tokenizer_hash, store.meta["words"]) == (3, 56, "abc", 7)
    assert store[-1].tolist() == documents[-1].tolist()
    assert eval_repr(store) == store
    with pytest.raises(IndexError, match="document 3 of 3"):
        store[3]


def eval_repr(store):
    assert repr(store) == f"TokenStore(path={store.path!r})"
    return TokenStore(path=store.path)


def test_parts_make_one_document_and_stores_can_be_joined(tmp_path):
    with Writer(tmp_path / "a", 300) as writer:
        writer.add([1, 2, 3], more=True)
        writer.add([4], more=True)
        writer.add([5, 6])
        writer.add([7, 8])
    a = TokenStore(str(tmp_path / "a"))
    assert [d.tolist() for d in a] == [[1, 2, 3, 4, 5, 6], [7, 8]]
    with Writer(tmp_path / "b", 300) as writer:
        writer.append(a, chunk=3)
        writer.add([9, 9])
        writer.append(a, chunk=1)
    b = TokenStore(str(tmp_path / "b"))
    assert [d.tolist() for d in b] == [*([[1, 2, 3, 4, 5, 6], [7, 8]]), [9, 9], [1, 2, 3, 4, 5, 6], [7, 8]]
    with Writer(tmp_path / "c", 300) as writer:
        for document in b:
            writer.add(document)
    assert TokenStore(str(tmp_path / "c")).hash == b.hash != a.hash


def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path):
    with (
        pytest.raises(ValueError, match=r"token id 300 outside \[0, 300\)"),
        Writer(tmp_path / "s", 300) as writer,
    ):
        writer.add([1, 300])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained_and_leaves_nothing_half_done(tmp_path, file_size_limit):
    with Writer(tmp_path / "before", 300) as writer:
        writer.add([1, 2])
    with (
        pytest.raises(OSError, match=r"cannot write .*after.* what was finished before is kept"),
        file_size_limit(3 << 20),
        Writer(tmp_path / "after", 300) as writer,
    ):
        for _ in range(100):
            writer.add(np.zeros(1 << 16, int))
    assert [p.name for p in tmp_path.iterdir()] == ["before"]
    assert len(TokenStore(str(tmp_path / "before"))) == 1


def test_a_disk_that_fills_up_at_the_last_byte_is_explained_too(tmp_path, file_size_limit):
    with (
        pytest.raises(OSError, match=r"cannot write"),
        file_size_limit(1000),
        Writer(tmp_path / "s", 300) as writer,
    ):
        writer.add(np.zeros(1000, int))
    assert list(tmp_path.iterdir()) == []


def test_no_write_permission_is_explained(open_folder, unwritable):
    folder = open_folder / "folder"
    folder.mkdir()
    message = r"cannot write .*choose a folder that you may write to"
    with pytest.raises(PermissionError, match=message), unwritable(folder):
        Writer(folder / "s", 300).__enter__()
    (folder / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=message):
        Writer(folder / "file" / "s", 300).__enter__()


def write_once(path, barrier):
    with Writer(path, 300) as writer:
        for i in range(50):
            writer.add([1, i, 2])
        barrier.wait()


def test_two_processes_may_write_the_same_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=write_once, args=(tmp_path / "s", barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert len(TokenStore(str(tmp_path / "s"))) == 50


def test_a_damaged_store_says_so(tmp_path):
    with Writer(tmp_path / "s", 300) as writer:
        writer.add([1, 2, 3])
    with open(tmp_path / "s" / "tokens.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(ValueError, match=r"tokens.bin: 7 bytes where meta.json says 6; delete the folder"):
        TokenStore(str(tmp_path / "s"))
    (tmp_path / "s" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        TokenStore(str(tmp_path / "s"))
    with pytest.raises(FileNotFoundError, match="no token store here"):
        TokenStore(str(tmp_path / "none"))
