"""Rows of fields: the same ones from every format; what is bad is counted and named, never fatal by itself."""

import gzip
import json

import pytest

from lmx.data import Records, Report, prepare_tfds

ROWS = [{"text": "बहुत अच्छी, सच में", "label": "1"}, {"text": 'he said "no"', "label": "0"}]


def write(path, rows=ROWS):
    kind = path.name.split(".", 1)[1]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif kind == "csv":
        quoted = ['"' + r["text"].replace('"', '""') + f'",{r["label"]}' for r in rows]
        path.write_bytes("\r\n".join(["\ufefftext,label", *quoted]).encode())
    elif kind == "tsv":
        path.write_text("\n".join(["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in rows)]), "utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path, report = write(tmp_path / f"a.{kind}"), Report()
    assert [row for _, row in Records(path).rows(["text", "label"], report)] == ROWS
    assert report.documents == 2 and not report.skipped
    assert report.text_bytes == sum(len(x.encode()) for row in ROWS for x in row.values())
    renamed = Records(path, rename={"y": "label"})
    assert [row for _, row in renamed.rows(["y"])] == [{"y": "1"}, {"y": "0"}]
    assert [set(row) for _, row in renamed.rows()] == [{"text", "y"}] * 2


def test_given_rows_parallel_files_and_patterns(tmp_path):
    assert [row for _, row in Records(ROWS).rows()] == ROWS
    for name, text in (
        ("a.hi", "नदी\nपहाड़\n"),
        ("a.en.0", "river\nmountain"),
        ("a.en.1", "a river\r\nhill\r\n"),
    ):
        (tmp_path / name).write_bytes(text.encode())
    both = Records({"hi": f"{tmp_path}/a.hi", "en": (f"{tmp_path}/a.en.0", f"{tmp_path}/a.en.1")})
    assert [row for _, row in both.rows()] == [
        {"hi": "नदी", "en": ["river", "a river"]},
        {"hi": "पहाड़", "en": ["mountain", "hill"]},
    ]
    (tmp_path / "a.en.1").write_text("a river\n")
    with pytest.raises(ValueError, match="not parallel, some end after 1 lines"):
        list(both.rows())
    write(tmp_path / "b1.jsonl"), write(tmp_path / "b2.jsonl")
    assert [row for _, row in Records(f"{tmp_path}/b*.jsonl").rows()] == ROWS * 2


def test_a_prepared_tfds_dataset(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder = prepare_tfds([{"text": "नमस्ते", "id": "x", "more": False}], "small", tmp_path)
    assert [row for _, row in Records(f"tfds:{folder}").rows(["text", "more"])] == [
        {"text": "नमस्ते", "more": 0}
    ]
    with pytest.raises(ValueError, match="no field 'label'; it has"):
        list(Records(f"tfds:{folder}").rows(["label"]))


def test_bad_rows_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0]).encode()
    bad = [b"{", b"[1]", b'{"text": 1}', b'{"text": null, "label": 1}', b'{"text": ["a", 1], "label": 1}']
    path.write_bytes(
        b"\n".join([good, *bad, b'{"text": "\xff", "label": 1}', b'{"text": "\\ud800", "label": 1}'])
    )
    report = Report()
    assert [where for where, _ in Records(str(path)).rows(["text", "label"], report)] == [f"{path}:1"]
    assert report.skipped == {
        "broken_line": 1, "not_an_object": 1, "field_missing": 1, "wrong_type": 2, "invalid_utf8": 2,
    }  # fmt: skip
    assert report.examples["field_missing"] == [f"{path}:4 lacks 'label'; it has 'text'"]
    assert report.examples["wrong_type"][1] == f"{path}:6 holds [int, str] in 'text'"


def test_bad_csv_rows_cost_themselves_only(tmp_path):
    path, report = tmp_path / "a.csv", Report()
    path.write_bytes('text,label\na,1\n"क\nख",0\nb\n"x"y,1\n'.encode() + b"\xff,1\n\nc,0\n")
    rows = [row for _, row in Records(str(path)).rows(["text", "label"], report)]
    assert rows == [{"text": "a", "label": "1"}, {"text": "क\nख", "label": "0"}, {"text": "c", "label": "0"}]
    assert report.skipped == {"wrong_number_of_fields": 1, "broken_line": 1, "invalid_utf8": 1}
    assert report.examples["invalid_utf8"] == [f"{path}:7 is no UTF-8 in 'text'"]


def test_what_a_user_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"no field 'y'; it has 'text', 'label': name one of these, or give Rec"
    ):
        list(Records(write(tmp_path / "a.csv")).rows(["y"]))
    with pytest.raises(ValueError, match=r"(?s)no usable row.*skipped 2 field missing"):
        list(Records(ROWS).rows(["y"]))
    with pytest.raises(ValueError, match=r"a\.txt has no fields that are known; give \*\.jsonl"):
        Records("a.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(Records(f"{tmp_path}/none.jsonl").rows())
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match="names a field twice: a, a"):
        list(Records(f"{tmp_path}/twice.csv").rows())
