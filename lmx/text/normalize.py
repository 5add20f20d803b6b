"""Unicode normal forms, and characters that no text needs.

NFC is the form in which almost all text is written. Beware that it takes the Devanagari letters with nukta
apart: क़ U+0958 becomes U+0915 U+093C, since Unicode excludes these from composition.
"""

from __future__ import annotations

import unicodedata

import regex

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

_NEWLINE = regex.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_NEEDLESS = regex.compile(r"(?![\t\n])\p{Cc}|\p{Cs}|\p{Noncharacter_Code_Point}|\ufeff")


def normalize(text: str, form: str | None = "NFC") -> str:
    """The text in a Unicode normal form, or as it is for None.

    Raises: ValueError for a form that is not in FORMS.
    """
    check_form(form)
    return text if form is None else unicodedata.normalize(form, text)


def check_form(form: str | None) -> None:
    """Raises: ValueError for a form that is neither None nor in FORMS."""
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown Unicode normal form {form!r}; use None, {', '.join(map(repr, FORMS))}")


def strip_controls(text: str) -> str:
    r"""The text with every line break as "\n", and without control characters (but tab), lone surrogates,
    noncharacters and byte order marks. Joiners U+200C and U+200D stay: they shape Devanagari.

    >>> strip_controls("a\r\nb\x00\tc")
    'a\nb\tc'
    """
    return _NEEDLESS.sub("", _NEWLINE.sub("\n", text))
