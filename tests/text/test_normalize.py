import pytest

from lmx.text.normalize import normalize, strip_controls


def test_nfc_joins_latin_and_takes_nukta_apart():
    assert normalize("e\u0301") == "\u00e9"
    assert normalize("\u0958") == "\u0915\u093c"
    assert normalize("e\u0301", None) == "e\u0301"
    assert normalize("ﬁ", "NFKC") == "fi"


def test_an_unknown_form_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'NFX'.*'NFC'"):
        normalize("a", "NFX")


def test_controls_go_and_joiners_stay():
    assert strip_controls("\ufeffक\u200dष\x00\x1b\u200c\ud800\ufffe\uffff\t.") == "क\u200dष\u200c\t."


def test_every_line_break_is_a_newline():
    assert strip_controls("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h\n") == "a\nb\nc\nd\ne\nf\ng\nh\n"
