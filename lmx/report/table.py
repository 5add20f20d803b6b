"""Rows and columns, printed for a terminal, for Markdown, or for a web page."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmx.report.stats import Interval

Cell = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Table:
    """Columns of names and rows of cells; a column of mostly numbers is aligned to the right.

    best names columns where the smallest ("min") or largest ("max") number is set in bold.

    >>> print(Table(("भाषा", "loss"), (("हिन्दी", 3.25), ("English", 12))).text())
    भाषा     loss
    ─────────────
    हिन्दी    3.25
    English    12

    Raises: ValueError if a row has another length than `columns`, or `best` names no column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    best: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table: row {i} has {len(row)} cells for {len(self.columns)} columns: {row}"
                )
        for name, way in self.best.items():
            if name not in self.columns or way not in ("min", "max"):
                raise ValueError(
                    f"Table: best={{{name!r}: {way!r}}} wants one of {self.columns} with 'min' or 'max'"
                )

    def text(self) -> str:
        """Aligned for a terminal with a fixed-width font; no colours, no trailing spaces."""
        body = [[_one_line(cell) for cell in row] for row in self._shown()]
        widths = [max(map(width, column)) for column in zip(self.columns, *body)]
        right = self._right()

        def line(cells: Sequence[str]) -> str:
            padded = (pad(cell, w, right=r) for cell, w, r in zip(cells, widths, right))
            return "  ".join(padded).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        title = [self.caption, ""] if self.caption else []
        return "\n".join([*title, line(self.columns), rule, *map(line, body)])

    def markdown(self) -> str:
        """A GitHub-flavoured table; pipes, newlines and angle brackets in cells are escaped."""
        bold = self._bold()
        head = "| " + " | ".join(map(_markdown, self.columns)) + " |"
        rule = "|" + "|".join("---:" if r else "---" for r in self._right()) + "|"
        lines = [head, rule]
        for i, row in enumerate(self._shown()):
            cells = [_markdown(cell) for cell in row]
            cells = [f"**{c}**" if (i, j) in bold else c for j, c in enumerate(cells)]
            lines.append("| " + " | ".join(cells) + " |")
        title = [f"**{_markdown(self.caption)}**", ""] if self.caption else []
        return "\n".join([*title, *lines])

    def html(self) -> str:
        """A <table> with a caption and scoped headers; every cell is escaped."""
        bold, right = self._bold(), self._right()
        kind = [' class="n"' if r else "" for r in right]
        head = "".join(f'<th scope="col"{k}>{escape(c)}</th>' for c, k in zip(self.columns, kind))
        lines = []
        for i, row in enumerate(self._shown()):
            cells = []
            for j, cell in enumerate(row):
                shown = escape(cell)
                shown = f"<strong>{shown}</strong>" if (i, j) in bold else shown
                opening, closing = (
                    ('<th scope="row"', "</th>") if j == 0 and not right[0] else ("<td", "</td>")
                )
                cells.append(f'{opening}{kind[j]} dir="auto">{shown}{closing}')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _shown(self) -> list[tuple[str, ...]]:
        return list(zip(*map(_show_column, zip(*self.rows))))

    def _right(self) -> list[bool]:
        columns = zip(*self.rows) if self.rows else ((),) * len(self.columns)
        known = [[c for c in column if c is not None] for column in columns]
        return [2 * sum(map(_is_number, column)) > len(column) for column in known]

    def _bold(self) -> set[tuple[int, int]]:
        found = set()
        for name, way in self.best.items():
            j = self.columns.index(name)
            numbers = {i: _value(row[j]) for i, row in enumerate(self.rows) if _is_number(row[j])}
            numbers = {i: x for i, x in numbers.items() if math.isfinite(x)}
            if numbers:
                top = (min if way == "min" else max)(numbers.values())
                found |= {(i, j) for i, x in numbers.items() if x == top}
        return found


def show(cell: Cell) -> str:
    """A cell as people write it: four significant digits, thousands separated, an en dash for nothing.

    >>> [show(x) for x in (None, 12345, 3.14159, 1.2e-5, 48213.7, True)]
    ['–', '12,345', '3.142', '1.2e-05', '48,214', 'yes']
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        if cell == 0 or not math.isfinite(cell):
            return f"{cell:g}"
        if abs(cell) >= 1000:
            return f"{cell:,.0f}" if abs(cell) < 1e15 else f"{cell:.4g}"
        return f"{cell:.4g}"
    return str(cell)


def _show_column(cells: Sequence[Cell]) -> list[str]:
    """Numbers of like size get as many decimals as the largest needs for four digits, less shared zeros."""
    floats = [abs(c) for c in cells if isinstance(c, float) and math.isfinite(c) and c != 0]
    if not floats or max(floats) >= 1000 or max(floats) > 1000 * min(floats) or min(floats) < 1e-4:
        return [show(c) for c in cells]
    decimals = 3 - math.floor(math.log10(max(floats)))
    while decimals and all(f"{x:.{decimals}f}".endswith("0") for x in floats):
        decimals -= 1
    return [f"{c:.{decimals}f}" if isinstance(c, float) and math.isfinite(c) else show(c) for c in cells]


def escape(text: str) -> str:
    """Escaped for HTML; control characters become visible pictures, lone surrogates U+FFFD.

    >>> escape("a<b\\x07")
    'a&lt;b␇'
    """
    text = re.sub(r"[\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", _picture, text))


def width(text: str) -> int:
    """Terminal columns that `text` takes: 2 for East Asian wide, 0 for nonspacing marks, 1 for the rest.

    Spacing vowel signs such as Devanagari ी take a column of their own, as in glibc's wcwidth, which xterm,
    VTE, Alacritty and tmux agree with. Terminals that shape whole clusters may draw Devanagari narrower.
    """
    return sum(_width(char) for char in text)


def pad(text: str, columns: int, *, right: bool = False) -> str:
    """`text` filled with spaces to `columns` terminal columns, on its left side if `right`."""
    space = " " * max(0, columns - width(text))
    return space + text if right else text + space


def _picture(control: re.Match) -> str:
    code = ord(control[0])
    return chr(0x2421 if code == 0x7F else 0x2400 + code)


def _width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float | Interval) and not isinstance(cell, bool)


def _value(cell: Cell) -> float:
    return cell.value if isinstance(cell, Interval) else float(cell)


def _one_line(text: str) -> str:
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)


def _markdown(text: str) -> str:
    return (
        html.escape(_one_line(text), quote=False)
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("*", "\\*")
    )
