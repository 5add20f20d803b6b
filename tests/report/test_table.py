import ctypes
import locale
import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.report.stats import Interval
from lmx.report.table import Table, pad, show, width

LANGUAGES = Table(
    ("language", "loss", "tokens"),
    (("हिन्दी", Interval(3.2, 3.1, 3.3, 3), 1200), ("English", 2.75, 45), ("漢字|<b>", None, 7)),
    caption="Held-out loss",
    best={"loss": "min"},
)


def test_numbers_end_in_the_same_terminal_column_after_devanagari_and_wide_characters():
    lines = LANGUAGES.text().splitlines()[2:]
    assert len({width(line) for line in lines}) == 1
    assert lines[0] == "language         loss  tokens"
    assert lines[3].startswith("English ")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the oracle is glibc's wcswidth")
def test_widths_are_glibcs():
    libc = ctypes.CDLL(None)
    old = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    try:
        for text in (
            "हिन्दी",
            "क्षत्रिय",
            "श्री",
            "नमस्ते दुनिया",
            "漢字かな",
            "한국어",
            "é",
            "e\u0301",
            "ไทย",
            "naïve –",
        ):
            assert width(text) == libc.wcswidth(ctypes.c_wchar_p(text), len(text)), text
    finally:
        locale.setlocale(locale.LC_CTYPE, old)


@given(st.text(alphabet="aé漢हिन्दी क्ष"), st.integers(0, 30), st.booleans())
def test_padding_reaches_the_asked_width_and_keeps_the_text(text, columns, right):
    padded = pad(text, columns, right=right)
    assert width(padded) == max(columns, width(text))
    assert padded.endswith(text) if right else padded.startswith(text)


def test_markdown_escapes_cells_and_sets_the_best_in_bold():
    lines = LANGUAGES.markdown().splitlines()
    assert lines[0] == "**Held-out loss**"
    assert lines[3] == "|---|---:|---:|"
    assert lines[5] == "| English | **2.75** | 45 |"
    assert lines[6] == "| 漢字\\|&lt;b&gt; | – | 7 |"


def test_html_has_a_caption_scoped_headers_and_no_markup_from_cells(elements):
    page = elements(LANGUAGES.html())
    assert page.text("caption") == ["Held-out loss"]
    assert page.text("th") == ["language", "loss", "tokens", "हिन्दी", "English", "漢字|<b>"]
    assert [a["scope"] for a in page.attributes("th")] == ["col"] * 3 + ["row"] * 3
    assert page.text("td") == ["3.20 ± 0.10", "1,200", "2.75", "45", "–", "7"]
    assert page.text("strong") == ["2.75"] and page.text("b") == []


def test_an_empty_table_still_prints_its_head():
    assert Table(("a", "b"), ()).text().splitlines()[0] == "a  b"


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table(("a", "b"), ((1, 2), (3,)))
    with pytest.raises(ValueError, match="best"):
        Table(("a",), (), best={"b": "min"})


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (0.0, "0"),
        (float("inf"), "inf"),
        (float("nan"), "–"),
        (999.96, "1000"),
        (-1234.5, "-1,234"),
        (False, "no"),
        ("x", "x"),
    ],
)
def test_cells_are_written_as_people_write_them(cell, text):
    assert show(cell) == text
