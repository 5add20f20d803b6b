import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.report import plots
from lmx.report.page import (
    Code,
    Figure,
    Fold,
    KeyValues,
    Page,
    Row,
    Sample,
    Samples,
    Section,
    Text,
)
from lmx.report.table import Table

ATTACK = "</p></code><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
SVG = plots.curves({ATTACK: [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, y_label=ATTACK)


def page_of(text: str) -> str:
    blocks = (
        Text(text),
        Figure(SVG, text, text),
        Row((Figure(SVG), Text(text))),
        Samples((Sample(text, text, text),)),
        KeyValues({text: text, "n": 3}, tiles=True),
        Fold(text, (Code(text), Table((text,), ((text,),), text))),
    )
    return Page(
        text, (Section(text, blocks), Section("b"), Section("c")), text, head=(Text(text, "warning"),)
    ).html()


def test_markup_in_any_text_stays_text(elements):
    page = elements(page_of(ATTACK))
    assert not page.tags() & {"script", "img", "iframe", "link", "object"}
    for tag in ("title", "h1", "h2", "caption", "summary", "code", "dt", "dd", "figcaption", "footer"):
        assert page.text(tag)[0] == ATTACK, tag
    assert [w for w in page.text("text") if "script" in w]
    for attributes in (a for _, a, _ in page.all):
        assert not any(name.startswith("on") for name in attributes)
        assert all(v.startswith("#") for k, v in attributes.items() if k in ("href", "xlink:href", "src"))


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_at_all_makes_a_page_that_encodes_and_nests(elements, text):
    html = page_of("a" + text)
    html.encode("utf-8")
    page = elements(html)
    assert "script" not in page.tags() and len(page.text("section")) == 3


def test_hindi_is_kept_and_marked_as_hindi(elements):
    text = "एक छोटे से गाँव में एक किसान रहता था।"
    page = elements(
        Page(
            "हिन्दी", (Section("नमूने", (Samples((Sample("", text),)), Text(text), Text("A village."))),)
        ).html()
    )
    assert page.attributes("html") == [{"lang": "en"}]
    assert page.text("p") == [text, text, "A village."]
    assert [a.get("lang") for a in page.attributes("p")] == ["hi", "hi", None]
    assert [a.get("lang") for a in page.attributes("h1")] == ["hi"]


def test_nothing_is_fetched_and_scripts_are_forbidden(elements):
    page = elements(page_of("x"))
    policies = [
        a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    (style,) = page.text("style")
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_headings_name_their_sections_and_links_reach_them(elements):
    page = elements(page_of("x"))
    ids = [a["id"] for _, a, _ in page.all if "id" in a and not a["id"].startswith("p")]
    assert len(ids) == len(set(ids))
    assert [a["href"][1:] for a in page.attributes("a")] == [a["id"] for a in page.attributes("section")]
    assert [a["aria-labelledby"] for a in page.attributes("section")] == [
        a["id"] for a in page.attributes("h2")
    ]
    assert all(a["role"] == "img" and a["aria-label"] for a in page.attributes("svg"))


def test_control_characters_become_visible_and_line_breaks_stay(elements):
    page = elements(
        Page("t", (Section("s", (Samples((Sample("", "a\x00b\x1bc\r\nd\x7f\ud800"),)),)),)).html()
    )
    assert page.text("p") == ["a␀b␛c\nd␡\ufffd"]


@pytest.mark.parametrize(
    "svg",
    [
        "<p>not closed",
        '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        '<svg xmlns="http://www.w3.org/2000/svg"><use href="https://example.org/x.svg#a"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><rect style="fill: url(https://example.org/a)"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><foreignObject/></svg>',
    ],
)
def test_a_figure_refuses_an_svg_that_acts_or_reaches_out(svg):
    with pytest.raises(ValueError, match="Figure"):
        Figure(svg)


def test_an_unknown_kind_of_text_is_refused():
    with pytest.raises(ValueError, match="kind='loud'"):
        Text("x", "loud")
