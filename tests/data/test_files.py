"""What lies between a path and its text: names, line ends, bytes that are no text, remembered hashes."""

import os
import random
import time
import tracemalloc

import pytest
from reading import HINDI, read

from lmx.data import files
from lmx.data.sources import Jsonl, Text, source
from lmx.data.tally import Report


def test_mixed_line_endings_become_one_kind_and_are_noted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\nthree\rfour\r\n" + b"x" * files.BLOCK + b"\r")
    for unit in ("line", "file"):
        texts, report = read(Text(str(path), unit=unit))
        assert "\n".join(texts).rstrip("\n").split("\n") == ["one", "two", "three", "four", "x" * files.BLOCK]
        assert report.noted == {"mixed_line_endings": 1}
        assert "CR and CRLF and LF" in report.examples["mixed_line_endings"][0]


def test_crlf_across_a_block_boundary_is_one_line_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"y" * (files.BLOCK - 1) + b"\r\n" + b"z\r\n")
    texts, report = read(Text(str(path), unit="line"))
    assert texts == ["y" * (files.BLOCK - 1), "z"] and report.noted == {}


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert read(Text(str(tmp_path / "a.txt")))[0] == read(Jsonl(str(tmp_path / "a.jsonl")))[0] == ["abc"]


def test_lines_that_are_not_utf8_are_counted_with_their_place_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"caf\xe9\n" + f"{HINDI}\n".encode() + b"\xff\xfe bad\nlast\n")
    for unit, expected in (("line", ["one", HINDI, "last"]), ("file", [f"one\n{HINDI}\nlast\n"])):
        texts, report = read(Text(str(path), unit=unit))
        assert texts == expected
        assert report.skipped == {"invalid_utf8": 2}
        assert report.examples["invalid_utf8"][0].startswith(f"{path}:2 ")
        assert report.examples["invalid_utf8"][1].startswith(f"{path}:4 ")


@pytest.mark.parametrize("end", [b"", b"\nlast line\n"])
def test_a_bad_byte_in_a_line_of_many_blocks_ends_that_line_and_says_how_many_bytes_are_lost(tmp_path, end):
    """Nothing that follows it in the line is joined to what came before."""
    path = tmp_path / "a.txt"
    words = b"".join(b"%d " % i for i in range(800_000))
    at = len(words) // 2
    path.write_bytes(b"first\n" + words[:at] + b"\xff" + words[at:] + end)
    kept, report = read(Text(str(path), unit="line"))
    assert kept[0] == "first" and kept[2:] == end.decode().split("\n")[1:2]
    assert words.startswith(kept[1].encode()) and at - files.BLOCK <= len(kept[1]) <= at
    lost = f"{len(words) + 1 + bool(end) - len(kept[1]):,} bytes left out"
    assert report.skipped == {"invalid_utf8": 1}
    (place,) = report.examples["invalid_utf8"]
    assert place.startswith(f"{path}:2 ") and f"byte {at:,} of the line; {lost}" in place
    (whole_file,), _ = read(Text(str(path)))
    assert whole_file.rstrip("\n").split("\n") == kept


def test_bytes_that_continue_no_character_are_left_out_in_little_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" + b"\x80" * 32 * files.BLOCK)
    tracemalloc.start()
    texts, report = read(Text(str(path), unit="line"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["good"] and report.skipped == {"invalid_utf8": 1}
    assert peak < 16 * files.BLOCK


def test_places_in_a_span_are_places_in_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n" + b"x" * 88 + b"\xff\r\nlast\r\n")
    src = Text(str(path), unit="line", span=(0.5, 1.0))
    report = Report()
    (document,) = src.documents(report)
    assert (document["text"], document["id"]) == ("last", f"{path}:4")
    assert report.examples["invalid_utf8"][0].startswith(f"{path}:3 (invalid start byte, byte 88 of the line")


@pytest.mark.parametrize("name", ["picture.txt", "utf16.txt", "picture.jsonl"])
def test_binary_files_are_refused_by_name(tmp_path, name):
    path = tmp_path / name
    data = "text".encode("utf-16") if "utf16" in name else random.Random(0).randbytes(5000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: .*(binary file|UTF-16)"):
        read(source(str(path)))


def test_missing_files_name_what_is_near_and_folders_say_how_to_name_their_files(tmp_path):
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"inptu.txt: no such file; .* holds input.txt"):
        read(Text(str(tmp_path / "inptu.txt")))
    with pytest.raises(ValueError, match=r"is a folder; .*/\*\.txt"):
        read(Text(str(tmp_path)))


def test_a_file_named_again_in_any_way_is_read_once(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to("a.txt")
    paths = (f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", f"{tmp_path}/../{tmp_path.name}/a.txt")
    assert read(Text(paths))[0] == ["b.txt", "a.txt"]


def test_a_pipe_is_named_as_one(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe.txt is a pipe or a device.*write it to a file first"):
        read(Text(str(tmp_path / "pipe.txt")))


def test_a_file_overwritten_with_its_size_and_time_kept_is_hashed_again(tmp_path, monkeypatch):
    """As rsync -t, tar and cp -p leave it."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    stat = path.stat()
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1.0)
    before = files.hash_of(path)
    time.sleep(0.05)
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.hash_of(path) != before


def test_the_hash_of_a_file_that_changed_just_now_is_not_remembered(tmp_path, monkeypatch):
    """It may change again within one tick of a coarse clock, and then has the same times."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    monkeypatch.setattr(files, "_hashes", {})
    files.hash_of(path)
    assert files._hashes == {}
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1.0)
    files.hash_of(path)
    assert len(files._hashes) == 1
