"""Each kind of source: its documents, and what it counts, refuses and cuts."""

import gzip
import json
import random
import subprocess
import sys
import textwrap
import unicodedata
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from reading import HINDI, read

from lmx import values
from lmx.data import files
from lmx.data.sources import MANY_FILES, Documents, Jsonl, Parquet, Source, Text, source

RNG = random.Random(0)
DAMAGED_LINES = [json.dumps({"text": f"document {i} {RNG.random()}"}) for i in range(60_000)]


def test_a_text_file_is_one_document_and_keeps_every_character(tmp_path):
    path = tmp_path / "a.txt"
    text = f"First line.\n\n{HINDI}\n  indented\n"
    path.write_text(text, encoding="utf-8")
    texts, report = read(Text(str(path)))
    assert texts == [text]
    assert (report.documents, report.text_bytes, report.skipped) == (1, len(text.encode()), {})


def test_lines_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one\ntwo\n\n \n{HINDI}\n\n\nlast", encoding="utf-8")
    assert read(Text(str(path), unit="line"))[0] == ["one", "two", HINDI, "last"]
    assert read(Text(str(path), unit="paragraph"))[0] == ["one\ntwo", HINDI, "last"]
    ids = [d["id"] for d in Text(str(path), unit="paragraph")]
    assert ids == [f"{path}:1", f"{path}:5", f"{path}:8"]


@given(
    text=st.text(alphabet=st.sampled_from("ab é\nक्षि\u200d\n "), min_size=1, max_size=200),
    block=st.integers(8, 40),
)
def test_no_boundary_of_blocks_changes_lines_or_paragraphs(tmp_path_factory, text, block):
    """Blocks of a few bytes instead of a megabyte; the oracle is str.split and itertools on the whole
    text."""
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    lines = [line for line in text.split("\n") if line.strip()]
    paragraphs, held = [], []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            held.append(line)
        elif held:
            paragraphs.append("\n".join(held))
            held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        assert read_or_none(Text(str(path), unit="line")) == lines
        assert read_or_none(Text(str(path), unit="paragraph")) == paragraphs
        assert read_or_none(Text(str(path))) == ([text] if text.strip() else [])


def read_or_none(src):
    try:
        return read(src)[0]
    except ValueError as error:
        assert "no usable document" in str(error)
        return []


def test_empty_files_are_counted_and_nothing_else_at_all_is_an_error(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"\*.txt.*no usable document(.|\n)*skipped 3 empty file: .*a.txt"):
        read(Text(str(tmp_path / "*.txt")))
    (tmp_path / "c.txt").write_text("words")
    texts, report = read(Text(str(tmp_path / "*.txt")))
    assert texts == ["words"] and report.skipped == {"empty_file": 3}


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_counts_broken_lines_and_keeps_the_good_ones(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    data = "\n".join(
        [
            json.dumps({"text": "one"}),
            "{broken",
            json.dumps({"text": HINDI}, ensure_ascii=False),
            json.dumps({"body": "x", "n": 1}),
            json.dumps(["a list"]),
            json.dumps({"text": 5}),
            json.dumps({"text": "  "}),
            '{"text": "half \\ud800 pair"}',
            "",
            json.dumps({"text": "two"}) + "\r",
        ]
    ).encode()
    data += b'\n{"text": "caf\xe9"}'
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack[ending](data))
    texts, report = read(source(str(path)))
    assert texts == ["one", HINDI, "two"]
    assert report.skipped == dict.fromkeys(
        (
            "broken_line",
            "field_missing",
            "not_an_object",
            "not_text",
            "empty_text",
            "invalid_unicode",
            "invalid_utf8",
        ),
        1,
    )
    assert report.examples["broken_line"][0].startswith(f"{path}:2 ")
    assert report.examples["field_missing"] == [f"{path}:4 has 'body', 'n'"]
    assert "skipped 1 broken line" in str(report)


def test_jsonl_with_nothing_usable_says_what_it_saw(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n{"content": "y"}\n')
    with pytest.raises(
        ValueError,
        match=r"no usable document(.|\n)*2 field missing: .*a.jsonl:1 has 'content'(.|\n)*name another",
    ):
        read(Jsonl(str(path)))
    assert read(Jsonl(str(path), field="content"))[0] == ["x", "y"]
    path.write_text('[\n{"text": "x"}\n]\n')
    texts, report = read(Jsonl(str(path)))
    assert texts == ["x"] and report.skipped == {"broken_line": 2}
    path.write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match="one JSON array; write an object a line"):
        read(Jsonl(str(path)))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not_compressed", "trailing"])
def test_damaged_compressed_files_are_named_and_what_came_before_is_given(tmp_path, ending, damage):
    lines = DAMAGED_LINES
    data = "\n".join(lines).encode()
    packed = bytearray(
        gzip.compress(data)
        if ending == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 255
    elif damage == "trailing":
        packed += b"not compressed"
    else:
        packed = bytearray(data)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed)
    given = []
    with pytest.raises(
        ValueError, match=rf"a.jsonl{ending}: damaged {ending} file, readable for [\d,]+ bytes"
    ):
        for document in Jsonl(str(path)):
            given.append(document["text"])
    if damage != "not_compressed":
        assert len(given) > 1000
        sure = len(lines) // 4 if damage == "flipped" else len(given)
        assert given[:sure] == [json.loads(line)["text"] for line in lines[: min(sure, len(given))]]


def test_several_compressed_frames_are_one_file(tmp_path):
    text = [f"line {i}" for i in range(1000)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(zstandard.compress(f"{line}\n".encode()) for line in text))
    (tmp_path / "a.txt.gz").write_bytes(b"".join(gzip.compress(f"{line}\n".encode()) for line in text))
    for name in ("a.txt.zst", "a.txt.gz"):
        assert read(Text(str(tmp_path / name), unit="line"))[0] == text


def test_parquet_is_read_by_batches_and_its_problems_are_clear(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"row {i} {HINDI}" for i in range(1000)]
    table = pyarrow.table({"text": [*texts, None, " "], "n": list(range(1002))})
    parquet.write_table(table, path, row_group_size=300)
    got, report = read(source(str(path)))
    assert got == texts and report.skipped == {"not_text": 1, "empty_text": 1}
    with pytest.raises(ValueError, match=r"no column 'body'; it has 'text', 'n'"):
        read(Parquet(str(path), field="body"))
    with pytest.raises(ValueError, match=r"column 'n' holds int64, not text"):
        read(Parquet(str(path), field="n"))
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    for damaged in (whole[:-20], whole[: -8 - footer] + b"\xff" * footer + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.parquet: not a readable Parquet file"):
            read(Parquet(str(path)))


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]
)
def test_parquet_text_of_any_type_is_read(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array(["one", HINDI, "one"])
    column = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(Parquet(str(tmp_path / "a.parquet")))[0] == ["one", HINDI, "one"]


def test_parquet_bytes_that_are_not_utf8_are_counted_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [b"one", b"\xff", b"two"]}), tmp_path / "a.parquet")
    texts, report = read(Parquet(str(tmp_path / "a.parquet")))
    assert texts == ["one", "two"] and report.skipped == {"invalid_utf8": 1}


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: 2 columns 'text'"):
        read(Parquet(str(tmp_path / "a.parquet")))


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'lmx\[parquet\]'"):
        read(Parquet(str(tmp_path / "a.parquet")))


def test_a_line_of_50_megabytes_takes_little_memory_and_is_one_document(tmp_path):
    """Run apart, so that the peak of resident memory is its own: reading 50 MB may add 25 MB."""
    path = tmp_path / "a.txt"
    words = (HINDI + " ") * 100
    with path.open("w", encoding="utf-8") as f:
        size = 0
        while size < 50_000_000:
            size += f.write(words) and len(words.encode())
    script = textwrap.dedent("""
        import resource, sys
        from lmx.data.sources import Text
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for unit in ("file", "line", "paragraph"):
            before, ends, size = peak(), 0, 0
            for part in Text(sys.argv[1], unit=unit):
                size += len(part["text"].encode())
                ends += not part.get("more", False)
                assert len(part["text"]) <= 1 << 20
            print(unit, ends, size, peak() - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        unit, ends, got, kilobytes = line.split()
        assert (unit, int(ends), int(got)) == (unit, 1, path.stat().st_size)
        assert int(kilobytes) < 25_000
    assert len(done.stdout.splitlines()) == 3


def test_a_jsonl_line_beyond_the_limit_is_passed_over(tmp_path, monkeypatch):
    from lmx.data import sources

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 200}) + "\n" + json.dumps({"text": "short"}) + "\n")
    monkeypatch.setattr(sources, "MAX_LINE", 100)
    texts, report = read(Jsonl(str(path)))
    assert texts == ["short"] and report.skipped == {"line_too_long": 1}


def test_long_texts_are_cut_between_graphemes_words_or_lines(tmp_path):
    word = "क्षत्रिय"
    for text in (
        (word * 20 + "\n") * 8000,
        (word + " ") * 160_000,
        word * 200_000,
        "e\u0301" * 800_000,
    ):
        parts = [d["text"] for d in Documents((text,))]
        assert "".join(parts) == text and len(parts) >= 2
        for left, right in pairwise(parts):
            assert len(left) <= files.BLOCK
            assert unicodedata.category(right[0])[0] != "M", "a part does not begin with a combining mark"
            if "\n" in text:
                assert left.endswith("\n") and not right.startswith("\n")
            elif " " in text:
                assert right.startswith(f" {word}") and left.endswith(word)


def test_spans_share_a_file_out_as_nanogpt_does(tmp_path):
    path = tmp_path / "input.txt"
    text = "".join(random.Random(0).choices("abc \n", k=12_347))
    path.write_text(text)
    n = len(text)
    train, valid = (read(Text(str(path), span=s))[0][0] for s in ((0.0, 0.9), (0.9, 1.0)))
    assert (train, valid) == (text[: int(n * 0.9)], text[int(n * 0.9) :])


@given(share=st.floats(0.01, 0.99))
def test_spans_never_cut_a_grapheme(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("s") / "a.txt"
    clusters = ["न", "म", "स्ते", " ", "क्षि", "e\u0301", "x", "\n"] * 40
    path.write_text("".join(clusters), encoding="utf-8")
    left, right = (read(Text(str(path), span=s))[0][0] for s in ((0.0, share), (share, 1.0)))
    assert left + right == "".join(clusters)
    ends = {0}
    for cluster in clusters:
        ends.add(max(ends) + len(cluster))
    assert len(left) in ends
    assert abs(len(left.encode()) - share * path.stat().st_size) < 20


def test_a_single_text_is_held_out_by_position_and_other_sources_are_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 1000)
    train, valid = Text(str(path)).holdout(0.1)
    assert (train.span, valid.span) == ((0.0, 0.9), (0.9, 1.0))
    train, valid = Documents((HINDI,)).holdout(0.2)
    assert train.texts[0] + valid.texts[0] == HINDI and valid.texts[0]
    assert Text(str(path), unit="line").holdout(0.1) is None
    assert Documents(("a", "b")).holdout(0.5) is None
    with pytest.raises(ValueError, match="needs a file that is not compressed"):
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"words"))
        read(Text(str(tmp_path / "b.txt.gz"), span=(0.0, 0.5)))


def test_sources_are_chosen_by_name_and_show_themselves(tmp_path):
    assert source("a/*.ndjson.zst") == Jsonl("a/*.ndjson.zst")
    assert source("b.parquet") == Parquet("b.parquet")
    assert source("dev.hi") == Text("dev.hi") and source("x.txt.gz") == Text("x.txt.gz")
    for src in (
        source("tfds:wiki40b/hi"),
        Text("a", unit="line", span=(0.0, 0.5)),
        Documents(("x", HINDI)),
        Jsonl(("a", "b")),
    ):
        assert source(src) is src
        assert values.parse(repr(src), Source) == src
    for name in ("d.json", "d.JSON.gz"):
        with pytest.raises(ValueError, match=rf"{name}: JSON is not .*Jsonl\('{name}'\).*jq -c"):
            source(name)
    with pytest.raises(ValueError, match="'paragraph'"):
        Text("a", unit="page")
    with pytest.raises(ValueError, match="start < end"):
        Text("a", span=(0.5, 0.5))


def test_a_share_of_a_text_too_short_to_have_it_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    train, _ = Text(str(tmp_path / "a.txt")).holdout(0.05)
    with pytest.raises(ValueError, match=r"empty span: .*a.txt: span=\(0.0, 0.95\) of 1 bytes has no text"):
        read(train)
    with pytest.raises(ValueError, match=r"a.txt.*valid_share=1e-20 holds out nothing of it; raise it"):
        Text(str(tmp_path / "a.txt")).holdout(1e-20)


def test_fingerprints_follow_content_and_settings_not_places(tmp_path):
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (Text(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt"))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert Text(a.path, unit="line").fingerprint() != a.fingerprint()
    before = c.fingerprint()
    (tmp_path / "c.txt").write_text("other text")
    assert c.fingerprint() != before


@pytest.mark.parametrize("n_files", [1, MANY_FILES + 1])
def test_what_documents_come_from_is_named_by_its_whole_path(tmp_path, monkeypatch, n_files):
    for i in range(n_files):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    monkeypatch.chdir(tmp_path)
    (made,) = Text("*.txt").artifacts()
    assert made.path == str(tmp_path if n_files > 1 else tmp_path / "0.txt")


def test_groups_read_the_same_documents_in_the_same_order(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 10)
    src = Text(str(tmp_path / "*.txt"))
    groups = src.groups(300)
    assert len(groups) > 2
    assert [t for g in groups for t in read(g)[0]] == read(src)[0]
    assert src.groups(1 << 30) == (src,)
