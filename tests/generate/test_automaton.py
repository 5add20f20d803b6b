"""Automata against the package regex, and the UTF-8 of ranges against Python's."""

import itertools
import re

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from lmx.generate.automaton import automaton, spelled

TEXTS = ["".join(chars) for n in range(5) for chars in itertools.product("abक", repeat=n)]

atoms = st.sampled_from(["a", "b", "क", ".", "[ab]", "[^a]", r"\w", "[क-ह]", "(?:)"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(expressions)
def test_an_automaton_accepts_what_matches_and_nothing_else(pattern):
    machine = automaton(pattern)
    assert [t for t in TEXTS if machine.matches(t.encode())] == [t for t in TEXTS if re.fullmatch(pattern, t)]


@pytest.mark.parametrize(
    "atom",
    [
        ".",
        r"\d",
        r"\w",
        r"\S",
        r"[^\w\s]",
        r"\p{Devanagari}",
        r"\P{L}",
        r"[\u0900-\u097F]",
        "[]a-]",
        "[^]^]",
        r"\n",
    ],
)
def test_a_set_holds_the_characters_that_regex_says(atom):
    machine = automaton(atom)
    points = [*range(0x3000), *range(0xD7F0, 0xD800), *range(0xE000, 0xE010), *range(0xFF00, 0x10FFFF, 997)]
    for char in map(chr, points):
        assert machine.matches(char.encode()) == bool(regex.fullmatch(atom, char)), (atom, hex(ord(char)))
    assert (
        not machine.matches(b"aa") and not machine.matches(b"\xed\xa0\x80") and not machine.matches(b"\xe0")
    )


@given(st.integers(0, 0x10FFFF), st.integers(0, 3000))
def test_spelled_is_the_utf8_of_every_code_point_once(first, more):
    last = min(first + more, 0x10FFFF)
    if last >= 0xD800 and first <= 0xDFFF:
        return
    found = [
        bytes(x) for s in spelled(first, last) for x in itertools.product(*(range(a, b + 1) for a, b in s))
    ]
    assert sorted(found) == sorted(chr(c).encode() for c in range(first, last + 1))


def test_characters_of_several_bytes_have_few_states():
    assert len(automaton("[^a]*").next) < 12


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ab(", r"character 2, in 'ab\(': a \( without its \)"),
        ("a)b", r"character 1.*a \) without its \("),
        ("हाँ[", r"character 3.*a \[ without its \]"),
        ("a**", r"character 2.*nothing to repeat before \*"),
        ("a|+", r"nothing to repeat before \+"),
        ("a++", "gives nothing back"),
        ("a{", r"write \\{ for the character"),
        ("(?=a)b", "kind of group"),
        ("(?i)a", "kind of group"),
        (r"\bword", "escape is not supported"),
        (r"(a)\1", "escape is not supported"),
        ("^a", r"leave \^ out"),
        ("a$", r"leave \$ out"),
        ("[z-a]", "bad character range"),
        (r"\p{Nowhere}", "unknown property"),
        ("a{3,1}", "from 3 to 1 times"),
        ("a{0,99999999999}", "999,999,999"),
        ("(" * 200 + ")" * 200, "100 groups"),
        ("\ud800", "surrogate"),
        ("x" * 70_000, "70,000 characters"),
    ],
)
def test_what_an_automaton_cannot_read_is_named_with_its_place(pattern, message):
    with pytest.raises(ValueError, match=message):
        automaton(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a|b)*a(a|b){30}", ".*a.{30}", "((a{1000}){1000}){1000}", "(a?){60000}", r"(\w?){400}", "a{999999999}"],
)
def test_a_pattern_that_would_take_too_much_is_refused(pattern):
    with pytest.raises(ValueError, match=r"needs more than .*; repeat fewer times"):
        automaton(pattern)


def test_nothing_repeated_is_nothing():
    assert automaton("(?:){999999999}(a{0}){0,999999999}(?:)*").matches(b"")
