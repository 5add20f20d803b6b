"""Words, and the scripts they are written in.

A word is a run of letters, marks and digits. Marks belong to words because Devanagari writes vowels as
marks (Unicode classes Mc and Mn): the usual `\\w+` of `re` cuts हिन्दी into four. The joiners U+200C and
U+200D shape the letters around them and are part of the word too.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import regex

# fmt: off
SCRIPTS = (
    "Latin", "Devanagari", "Arabic", "Armenian", "Bengali", "Bopomofo", "Cyrillic", "Ethiopic", "Georgian",
    "Greek", "Gujarati", "Gurmukhi", "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer",
    "Lao", "Malayalam", "Meetei_Mayek", "Mongolian", "Myanmar", "Ol_Chiki", "Oriya", "Sinhala", "Tamil",
    "Telugu", "Thaana", "Thai", "Tibetan",
)
# fmt: on
OTHER = "other"

_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in SCRIPTS))
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}][\p{L}\p{M}\p{N}\u200c\u200d]*")


@lru_cache(maxsize=1 << 16)
def script_of(char: str) -> str:
    """The Unicode script of one character, by name; "other" for a script not in SCRIPTS, and for characters
    that many scripts share (digits, punctuation, the danda, emoji, combining accents).

    >>> script_of("क"), script_of("z"), script_of("।")
    ('Devanagari', 'Latin', 'other')
    """
    match = _SCRIPT.match(char)
    return match.lastgroup if match else OTHER


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word, in characters of the text."""
    return [match.span() for match in _WORD.finditer(text)]


def words(text: str) -> list[str]:
    """The words of the text, without what stands between them.

    >>> words("यह हिन्दी है, don't!")
    ['यह', 'हिन्दी', 'है', 'don', 't']
    """
    return _WORD.findall(text)


@lru_cache(maxsize=1 << 16)
def word_script(word: str) -> str:
    """The script of most of the word's letters, the earlier one in a tie; "other" if it has none."""
    scripts = Counter(script_of(char) for char in word if char.isalpha())
    return scripts.most_common(1)[0][0] if scripts else OTHER


def words_by_script(text: str) -> dict[str, list[str]]:
    """The words of the text in their order, under the script of each.

    >>> words_by_script("एक word 12")
    {'Devanagari': ['एक'], 'Latin': ['word'], 'other': ['12']}
    """
    grouped: dict[str, list[str]] = {}
    for word in words(text):
        grouped.setdefault(word_script(word), []).append(word)
    return grouped
