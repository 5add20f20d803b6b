"""Clusters against Unicode's own rules: published examples, and the stream against a plain decode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.text.graphemes import assemble, clusters, split_complete

# U+0915 etc.: what Annex 29 (GB3, GB9, GB9a, GB9c, GB11, GB12) says of each, written out by hand.
EXAMPLES = {
    "क्षत्रिय": ["क्ष", "त्रि", "य"],
    "नमस्ते": ["न", "म", "स्ते"],
    "स्त्री": ["स्त्री"],
    "क्\u200dष": ["क्\u200dष"],
    "र्\u200cक": ["र्\u200c", "क"],
    "👨\u200d👩\u200d👧\u200d👦!": ["👨\u200d👩\u200d👧\u200d👦", "!"],
    "🇮🇳🇺🇸🇫": ["🇮🇳", "🇺🇸", "🇫"],
    "e\u0301\u0302x": ["e\u0301\u0302", "x"],
    "a\r\nb": ["a", "\r\n", "b"],
    "각": ["각"],
    "": [],
}
tricky = st.lists(
    st.sampled_from(
        [*"कषतस्ि़ंa1 \r\n", "\u200c", "\u200d", "\u0301", "🇮", "🇳", "👨", "👩", "🏽", "\U0001f3f3", "\ufe0f"]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("text", EXAMPLES)
def test_clusters_are_those_of_annex_29(text):
    assert clusters(text) == EXAMPLES[text]


@given(tricky)
def test_clusters_join_to_the_text(text):
    assert "".join(clusters(text)) == text


@given(tricky, tricky)
def test_nothing_appended_changes_the_complete_part(text, more):
    whole, rest = split_complete(text)
    assert whole + rest == text
    assert len(clusters(rest)) == (1 if text else 0)
    held = clusters(whole)
    assert clusters(text + more)[: len(held)] == held


def test_the_last_cluster_is_held_back():
    assert split_complete("नमस्") == ("नम", "स्")
    assert split_complete("a") == ("", "a")
    assert split_complete("🇮") == ("", "🇮")
    assert split_complete("") == ("", "")


@given(tricky, st.data())
def test_a_stream_of_bytes_never_splits_a_cluster(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    parts = list(assemble(pieces))
    assert "".join(parts) == text
    assert [cluster for part in parts for cluster in clusters(part)] == clusters(text)
    assert all(parts)


@given(st.lists(st.binary(max_size=6), max_size=6))
def test_broken_utf8_becomes_replacement_characters(pieces):
    assert "".join(assemble(pieces)) == b"".join(pieces).decode("utf-8", "replace")


def test_text_appears_before_the_stream_ends():
    seen = []

    def pieces():
        for byte in "नमस्ते".encode():
            yield bytes([byte])
            seen.append(len(parts))

    parts: list[str] = []
    for part in assemble(pieces()):
        parts.append(part)
    assert parts == ["न", "म", "स्ते"]
    assert seen[-1] == 2, "two clusters were out before the third was finished"
