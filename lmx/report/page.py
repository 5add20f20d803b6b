"""One self-contained HTML page: text, tables, figures, samples, settings. It opens anywhere and prints.

Everything given as text is escaped: samples are the output of a model, and nobody vouches for them. The page
holds no script and names no outside resource, and its content security policy forbids both.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from lmx.report.table import Cell, Table, escape, show


class Block(ABC):
    """A part of a section; html() returns markup whose texts are escaped."""

    @abstractmethod
    def html(self) -> str: ...


@dataclass(frozen=True)
class Text(Block):
    """Paragraphs, parted by empty lines. kind: "plain", "quiet" for side remarks, "warning" for trouble."""

    text: str
    kind: str = "plain"

    def __post_init__(self):
        if self.kind not in ("plain", "quiet", "warning"):
            raise ValueError(f"Text: kind={self.kind!r}; use 'plain', 'quiet' or 'warning'")

    def html(self) -> str:
        role = ' role="alert"' if self.kind == "warning" else ""
        paragraphs = [p for p in re.split(r"\n\s*\n", self.text) if p.strip()]
        return "".join(f'<p class="{self.kind}"{role}{_lang(p)}>{escape(p.strip())}</p>' for p in paragraphs)


@dataclass(frozen=True)
class Figure(Block):
    """A plot from `lmx.report.plots` (SVG text) with a caption; `alt` is what is read aloud in its place.

    Raises: ValueError if the SVG does not parse, or holds a script or a reference to anything outside itself.
    """

    svg: str
    caption: str = ""
    alt: str = ""

    def __post_init__(self):
        _check_svg(self.svg)

    def html(self) -> str:
        label = escape(self.alt or self.caption or "plot")
        caption = (
            f"<figcaption{_lang(self.caption)}>{escape(self.caption)}</figcaption>" if self.caption else ""
        )
        svg = self.svg.strip().replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        return f"<figure>{svg}{caption}</figure>"


@dataclass(frozen=True)
class Row(Block):
    """Blocks side by side where the screen is wide enough, else below one another."""

    blocks: tuple[Block | Table, ...]

    def html(self) -> str:
        return f'<div class="row">{"".join(f"<div>{_block(b)}</div>" for b in self.blocks)}</div>'


@dataclass(frozen=True)
class Sample:
    """A prompt, the text a model went on with, and a short note (step, temperature, why it stopped)."""

    prompt: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Samples(Block):
    """Model output, shown as it is: line breaks kept, control characters made visible, direction isolated."""

    samples: tuple[Sample, ...]

    def html(self) -> str:
        def one(s: Sample) -> str:
            note = f"<footer>{escape(s.note)}</footer>" if s.note else ""
            prompt = f"<b>{escape(s.prompt)}</b>" if s.prompt else ""
            words = f'<p dir="auto"{_lang(s.prompt + s.text)}>{prompt}{escape(s.text)}</p>'
            return f'<article class="sample">{words}{note}</article>'

        return "".join(map(one, self.samples))


@dataclass(frozen=True)
class KeyValues(Block):
    """Names with values. tiles sets them large in a grid, for the few numbers that matter most."""

    items: dict[str, Cell]
    tiles: bool = False

    def html(self) -> str:
        pairs = "".join(
            f'<div><dt>{escape(k)}</dt><dd dir="auto"{_lang(show(v))}>{escape(show(v))}</dd></div>'
            for k, v in self.items.items()
        )
        return f'<dl class="{"tiles" if self.tiles else "facts"}">{pairs}</dl>'


@dataclass(frozen=True)
class Code(Block):
    """Text in a fixed-width font, line breaks kept."""

    text: str

    def html(self) -> str:
        return f'<pre tabindex="0"><code>{escape(self.text)}</code></pre>'


@dataclass(frozen=True)
class Fold(Block):
    """Blocks behind a title, shown when it is clicked; open from the start if `unfolded`."""

    title: str
    blocks: tuple[Block | Table, ...]
    unfolded: bool = False

    def html(self) -> str:
        state = " open" if self.unfolded else ""
        inside = "".join(map(_block, self.blocks))
        return f"<details{state}><summary>{escape(self.title)}</summary>{inside}</details>"


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block | Table, ...] = ()


@dataclass(frozen=True)
class Page:
    """A document. `lang` is the language of its own words; Devanagari text inside is marked as Hindi.

    >>> Page("Loss", (Section("Result", (Text("3.2 < 3.4"),)),)).html().count("3.2 &lt; 3.4")
    1
    """

    title: str
    sections: tuple[Section, ...] = ()
    subtitle: str = ""
    lang: str = "en"
    head: tuple[Block | Table, ...] = ()

    def html(self) -> str:
        title = escape(self.title)
        subtitle = (
            f'<p class="subtitle"{_lang(self.subtitle)}>{escape(self.subtitle)}</p>' if self.subtitle else ""
        )
        links = "".join(
            f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(self.sections)
        )
        nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(self.sections) > 2 else ""
        sections = "".join(
            f'<section id="s{i}" aria-labelledby="h{i}"><h2 id="h{i}"{_lang(s.title)}>{escape(s.title)}</h2>'
            f"{''.join(map(_block, s.blocks))}</section>"
            for i, s in enumerate(self.sections)
        )
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        return (
            f'<!doctype html>\n<html lang="{html.escape(self.lang)}"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{title}</title>\n<style>\n{css}</style></head>\n"
            f"<body><header><h1{_lang(self.title)}>{title}</h1>{subtitle}{nav}</header>\n"
            f"<main>{''.join(map(_block, self.head))}{sections}</main></body></html>\n"
        )


def _block(block: Block | Table) -> str:
    return (
        f'<div class="scroll" tabindex="0">{block.html()}</div>' if isinstance(block, Table) else block.html()
    )


def _lang(text: str) -> str:
    devanagari = len(re.findall(r"[\u0900-\u0963\u0970-\u097f]", text))
    return ' lang="hi"' if devanagari > sum(c.isascii() and c.isalpha() for c in text) else ""


def _check_svg(svg: str) -> None:
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"Figure: not an SVG ({error}): {svg[:60]!r}") from None
    for element in root.iter():
        tag = element.tag.rpartition("}")[2].lower()
        if tag in ("script", "foreignobject", "style", "image", "iframe", "a", "set", "animate"):
            raise ValueError(f"Figure: <{tag}> has no place in a plot")
        for name, value in element.attrib.items():
            name = name.rpartition("}")[2].lower()
            outside = name == "href" and not value.startswith("#")
            if name.startswith("on") or outside or re.search(r"url\(\s*[^#\s]", value):
                raise ValueError(f"Figure: <{tag} {name}={value[:40]!r}> reaches outside the plot")
