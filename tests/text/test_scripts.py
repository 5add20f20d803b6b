import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.text.scripts import SCRIPTS, script_of, word_script, word_spans, words, words_by_script


def test_hindi_words_keep_their_marks():
    assert words("यह हिन्दी में लिखा है।") == ["यह", "हिन्दी", "में", "लिखा", "है"]
    assert words("क्\u200dष र्\u200cक") == ["क्\u200dष", "र्\u200cक"]


def test_words_are_letters_marks_and_digits():
    assert words("It's 3.14—naïve e\u0301te\u0301! 👨\u200d👩") == [
        "It",
        "s",
        "3",
        "14",
        "naïve",
        "e\u0301te\u0301",
    ]


@given(st.text())
def test_spans_cut_out_the_words(text):
    assert [text[a:b] for a, b in word_spans(text)] == words(text)


@given(st.characters(categories=["Lu", "Ll"]))
def test_script_agrees_with_the_character_name(char):
    """An independent source: names of letters begin with the script in the Unicode character database."""
    name = unicodedata.name(char, "")
    for script in ("Latin", "Greek", "Cyrillic", "Armenian"):
        if name.startswith(f"{script.upper()} "):
            assert script_of(char) == script


@pytest.mark.parametrize(
    ("word", "script"),
    [("हिन्दी", "Devanagari"), ("word", "Latin"), ("слово", "Cyrillic"), ("漢字", "Han"), ("2024", "other"),
     ("१२", "other"), ("aक", "Latin"), ("aकख", "Devanagari"), ("தமிழ்", "Tamil"), ("\U00010400", "other")],
)  # fmt: skip
def test_word_script_is_that_of_most_letters(word, script):
    assert word_script(word) == script


def test_words_by_script_keeps_every_word_in_order():
    grouped = words_by_script("एक one दो two 3")
    assert grouped == {"Devanagari": ["एक", "दो"], "Latin": ["one", "two"], "other": ["3"]}


def test_scripts_are_named_once():
    assert len(set(SCRIPTS)) == len(SCRIPTS)
