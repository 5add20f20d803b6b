"""Our builder and reader, without TensorFlow (it is not installed beside the tests) and without a network."""

import json
import shutil
import struct
import sys
import warnings

import pytest

from lmx import artifact
from lmx.data import Documents, Jsonl, Report, Text, Tfds, prepare_tfds, source
from lmx.data.tfds import folder_of

pytest.importorskip("tensorflow_datasets")

HINDI = "नमस्ते दुनिया। क्षत्रिय और ज्ञानी हिन्दी में लिखते हैं।"
TEXTS = tuple(f"document {i} {HINDI}" for i in range(300))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    prepare_tfds(
        {"train": Documents(TEXTS), "valid": Documents(TEXTS[:7])}, "wiki40b/hi", root, version="1.3.0"
    )
    return root


def texts_of(src):
    return [document["text"] for document in src]


def test_a_stream_becomes_a_dataset_and_comes_back_in_order(root):
    assert (root / "wiki40b" / "hi" / "1.3.0" / "dataset_info.json").is_file()
    src = Tfds("wiki40b/hi", data_dir=str(root))
    assert src == Tfds(**{**vars(source("tfds:wiki40b/hi")), "data_dir": str(root)})
    assert texts_of(src) == list(TEXTS)
    assert texts_of(Tfds("wiki40b/hi:1.3.0", "valid", data_dir=str(root))) == list(TEXTS[:7])
    assert texts_of(Tfds("wiki40b/hi", "train[100:110]", data_dir=str(root))) == list(TEXTS[100:110])
    assert texts_of(Tfds(str(root / "wiki40b/hi/1.3.0"), "valid")) == list(TEXTS[:7])
    assert "tensorflow" not in sys.modules


def test_grain_reads_what_we_prepared(root):
    import grain
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder_of("wiki40b/hi", str(root))))
    dataset = grain.MapDataset.source(builder.as_data_source(split="train")).shuffle(seed=0)
    got = [example["text"].decode() for example in dataset]
    assert sorted(got) == sorted(TEXTS) and got != list(TEXTS)
    assert "tensorflow" not in sys.modules


def test_long_documents_keep_their_parts(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text((HINDI + "\n") * 60_000, encoding="utf-8")
    parts = list(Text(str(path)))
    assert len(parts) > 2
    prepare_tfds(Text(str(path)), "long", tmp_path)
    got = list(Tfds("long", data_dir=str(tmp_path)))
    assert [(d["text"], d.get("more", False)) for d in got] == [
        (d["text"], d.get("more", False)) for d in parts
    ]


def test_preparing_again_keeps_what_is_there(root):
    before = folder_of("wiki40b/hi", str(root)).stat().st_mtime_ns
    same = {"train": Documents(TEXTS), "valid": Documents(TEXTS[:7])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_tfds(same, "wiki40b/hi", root, version="1.3.0") == root / "wiki40b/hi/1.3.0"
    for other, told in (
        (same | {"valid": Documents(("other",))}, "split 'valid' of other documents; give another version"),
        (Documents(TEXTS), r"splits \['train', 'valid'\]; give another version"),
    ):
        with pytest.raises(ValueError, match=rf"wiki40b/hi/1.3.0 was made before, with {told}"):
            prepare_tfds(other, "wiki40b/hi", root, version="1.3.0")
    with pytest.warns(
        UserWarning, match="taken as it is: whether split 'train' has these documents is not known"
    ):
        prepare_tfds(same | {"train": iter(())}, "wiki40b/hi", root, version="1.3.0")
    assert folder_of("wiki40b/hi", str(root)).stat().st_mtime_ns == before


def test_the_dataset_names_what_it_was_made_from(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": HINDI}))
    made = artifact.read(prepare_tfds(Jsonl(str(path)), "corpus", tmp_path))
    assert (made.kind, [parent.hash for parent in made.made_from]) == ("tfds", [artifact.hash_path(path)])


def test_the_newest_version_is_taken(tmp_path):
    for version in ("1.9.0", "1.10.0"):
        prepare_tfds(Documents((version,)), "corpus", tmp_path, version=version)
    assert texts_of(Tfds("corpus", data_dir=str(tmp_path))) == ["1.10.0"]
    assert texts_of(Tfds("corpus:1.9.0", data_dir=str(tmp_path))) == ["1.9.0"]


def crc32c(data):
    """Castagnoli's CRC, bit by bit, masked as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.fixture
def tfrecords(tmp_path):
    """The same dataset in TFDS's other format, written by the published layout."""
    import tensorflow_datasets as tfds

    root = tmp_path / "records"
    folder = prepare_tfds(Documents(TEXTS[:20]), "corpus", root)
    builder = tfds.builder_from_directory(str(folder))
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records = list(builder.as_data_source(split="train", deserialize_method=raw))
    (array_file,) = folder.glob("*array_record*")
    with open(str(array_file).replace("array_record", "tfrecord"), "wb") as f:
        for record in records:
            head = struct.pack("<Q", len(record))
            f.write(head + struct.pack("<I", crc32c(head)) + record + struct.pack("<I", crc32c(record)))
    array_file.unlink()
    info = (folder / "dataset_info.json").read_text().replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(info.replace("ARRAY_RECORD", "TFRECORD"))
    assert json.loads(info)["fileFormat"] == "tfrecord"
    return root


def test_tfrecord_files_are_read_without_tensorflow(tfrecords):
    assert texts_of(Tfds("corpus", data_dir=str(tfrecords))) == list(TEXTS[:20])
    assert texts_of(Tfds("corpus", "train[5:9]", data_dir=str(tfrecords))) == list(TEXTS[5:9])
    (path,) = (tfrecords / "corpus/1.0.0").glob("*.tfrecord*")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"tfrecord.*damaged after record 19"):
        texts_of(Tfds("corpus", data_dir=str(tfrecords)))


def test_what_is_missing_is_named_with_the_way_to_it(root, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"tfds:wiki40b/en is not prepared in .*it has wiki40b/hi/1.3.0"
    ) as error:
        texts_of(Tfds("wiki40b/en", data_dir=str(root)))
    assert "builder('wiki40b/en'" in str(error.value) and "prepare_tfds" in str(error.value)
    with pytest.raises(FileNotFoundError, match="it has none"):
        folder_of("anything", str(tmp_path))
    with pytest.raises(ValueError, match=r"no text feature 'body'; it has .*'text' \(Text\)"):
        texts_of(Tfds("wiki40b/hi", field="body", data_dir=str(root)))
    with pytest.raises(ValueError, match=r"no split 'test'; it has 'train', 'valid'"):
        texts_of(Tfds("wiki40b/hi", "test", data_dir=str(root)))
    with pytest.raises(ValueError, match="lower-case"):
        prepare_tfds(Documents(("a",)), "My Corpus", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lmx\[tfds\]'"):
        folder_of("wiki40b/hi")


def test_a_source_that_fails_leaves_no_dataset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken")
    with pytest.raises(ValueError, match="no usable document"):
        prepare_tfds(Jsonl(str(path)), "corpus", tmp_path / "root")
    with pytest.raises(FileNotFoundError):
        folder_of("corpus", str(tmp_path / "root"))


def test_fingerprints_follow_the_files(root, tmp_path):
    src = Tfds("wiki40b/hi", data_dir=str(root))
    shutil.copytree(root / "wiki40b", tmp_path / "wiki40b")
    moved = Tfds("wiki40b/hi", data_dir=str(tmp_path))
    assert (
        moved.fingerprint()
        == src.fingerprint()
        != Tfds("wiki40b/hi", "valid", data_dir=str(root)).fingerprint()
    )
    report = Report()
    list(moved.documents(report))
    assert report.documents == len(TEXTS)
