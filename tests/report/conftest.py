"""Reads HTML back with the standard library's parser, so that tests see what a browser would."""

from html.parser import HTMLParser

import pytest

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use"}


class Elements(HTMLParser):
    """Every element in order as (tag, attributes, own and nested text); raises on tags that do not nest."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.all: list[tuple[str, dict, list]] = []
        self._open: list[tuple[str, dict, list]] = []

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.all.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {[e[0] for e in self._open]}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def text(self, tag: str) -> list[str]:
        return ["".join(words) for t, _, words in self.all if t == tag]

    def attributes(self, tag: str) -> list[dict]:
        return [a for t, a, _ in self.all if t == tag]

    def tags(self) -> set[str]:
        return {t for t, _, _ in self.all}


@pytest.fixture(scope="session")
def elements():
    """html -> Elements."""

    def read(html: str) -> Elements:
        reader = Elements()
        reader.feed(html)
        reader.close()
        assert not reader._open, f"never closed: {[e[0] for e in reader._open]}"
        return reader

    return read
