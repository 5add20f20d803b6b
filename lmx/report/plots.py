"""Plots as SVG text: learning curves, bars with intervals, lines with points, frontiers.

Words stay words in the SVG (`<text>`, not outlines), so the reader's browser draws them: Devanagari is shaped
by whichever font that device has, labels can be searched, and files stay small. matplotlib only measures:
with an installed Devanagari font where it finds one, else by its own missing-glyph box, which costs a little
space and shows nowhere. Text and axes take `currentColor` and no background is painted, so one plot serves
light and dark pages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmx.report.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]
"""(x, y) pairs in any order; a pair with a NaN leaves a gap."""

# Okabe and Ito 2008, "Color Universal Design", without yellow and black: told apart with any colour vision
# and on white and on black alike.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_INK = "#010203"
"""Stands for `currentColor` until the SVG is written."""
_FONTS = "system-ui, 'Noto Sans Devanagari', 'Kohinoor Devanagari', 'Nirmala UI', Mangal, sans-serif"


def curves(
    series: dict[str, Curve],
    *,
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: int = 0,
    size: tuple[float, float] = (7.0, 3.2),
) -> str:
    """One line per name. With over 8 * smooth points: their running mean, the points faint behind it.

    size is (width, height) in inches of 72 points. Returns SVG text.
    Raises: ValueError if there is no finite point at all.
    """
    return seed_curves(
        {name: [curve] for name, curve in series.items()},
        x_label=x_label, y_label=y_label, log_x=log_x, log_y=log_y, smooth=smooth, size=size,
    )  # fmt: skip


def seed_curves(
    series: dict[str, Sequence[Curve]],
    *,
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: int = 0,
    size: tuple[float, float] = (7.0, 3.2),
) -> str:
    """One line per name, the mean over its seeds; each seed is a thin line behind it.

    The mean is taken at each x that every seed of that name has reached. See `curves` for the rest.
    """
    _need_points(series, [curve for seeds in series.values() for curve in seeds])
    figure, axes = _canvas(size, x_label, y_label, log_x, log_y)
    for i, (name, seeds) in enumerate(series.items()):
        lines = [_line(curve) for curve in seeds if len(curve)]
        if not lines:
            continue
        mean = lines[0] if len(lines) == 1 else _mean_line(lines)
        rough = smooth > 1 and len(mean[0]) > 8 * smooth
        shown = (mean[0], running_mean(mean[1], smooth)) if rough else mean
        for line in lines if len(lines) > 1 or rough else ():
            axes.plot(*_thin(*line), color=_color(i), linewidth=0.6, alpha=0.35)
        few = len(shown[0]) <= 30
        axes.plot(
            *_thin(*shown), color=_color(i), linestyle=_dash(i), linewidth=1.6, label=_label(name),
            marker="o" if few else None, markersize=3,
        )  # fmt: skip
    return _finish(figure, axes, len(series))


def bars_with_intervals(
    values: dict[str, Interval | float],
    *,
    x_label: str = "",
    zero: bool = False,
    points: dict[str, Sequence[float]] | None = None,
    size: tuple[float, float] | None = None,
) -> str:
    """One row per name with a dot at the value and a whisker over its interval; names read horizontally.

    zero draws filled bars from 0, for quantities where length means amount; a loss is not one of those.
    points are single measurements behind a value, by the same names, drawn small.
    Raises: ValueError if `values` is empty.
    """
    found = {k: v if isinstance(v, Interval) else Interval(float(v)) for k, v in values.items()}
    found = {k: v for k, v in found.items() if math.isfinite(v.value)}
    if not found:
        raise ValueError(f"bars_with_intervals: no finite value among {list(values)}")
    figure, axes = _canvas(size or (7.0, 0.75 + 0.32 * len(found)), x_label, "", False, False)
    rows = range(len(found))
    for row, (name, value) in zip(rows, found.items()):
        single = (points or {}).get(name, ())
        axes.plot(single, [row + 0.22] * len(single), "o", color=PALETTE[0], markersize=2.5, alpha=0.6)
        if zero:
            axes.barh(row, value.value, height=0.6, color=PALETTE[0], alpha=0.6)
        if math.isfinite(value.low) and math.isfinite(value.high):
            axes.plot([value.low, value.high], [row, row], color=_INK if zero else PALETTE[0], linewidth=1.6)
        if not zero:
            axes.plot([value.value], [row], "o", color=PALETTE[0], markersize=5)
    axes.set_yticks(list(rows), [_label(name) for name in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    if zero:
        axes.axvline(0, color=_INK, linewidth=0.6)
    return _finish(figure, axes, 1)


def lines_with_points(
    series: dict[str, Sequence[tuple[float, float | Interval]]],
    *,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (7.0, 3.2),
) -> str:
    """y against x with every point marked, and a whisker where y is an Interval.

    Raises: ValueError if there is no finite point at all.
    """
    plain = {k: [(x, y.value if isinstance(y, Interval) else y) for x, y in v] for k, v in series.items()}
    _need_points(series, plain.values())
    figure, axes = _canvas(size, x_label, y_label, log_x, log_y)
    for i, (name, points) in enumerate(plain.items()):
        marker = "os^Dv<>P"[i % 8]
        axes.plot(
            *_line(points), marker=marker, markersize=4.5, color=_color(i), linestyle=_dash(i),
            linewidth=1.4, label=_label(name),
        )  # fmt: skip
        for x, y in series[name]:
            if isinstance(y, Interval) and math.isfinite(y.low):
                axes.plot([x, x], [y.low, y.high], color=_color(i), linewidth=1)
    if log_x:
        ticks = sorted({x for points in plain.values() for x, _ in points})
        if len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{x:,g}" for x in ticks], minor=False)
            axes.minorticks_off()
    return _finish(figure, axes, len(series))


def spread(
    series: dict[str, dict[int, tuple[float | Interval, Sequence[float]]]],
    *,
    x_label: str = "",
    y_label: str = "",
    size: tuple[float, float] = (7.0, 3.6),
) -> str:
    """name -> {x: (mean, the values it is of)}: a small dot for each value, a line through the means, and a whisker
    where a mean is an Interval. All x stand equally far apart, in order.

    Raises: ValueError if no mean is finite.
    """
    means = {
        name: [(x, y.value if isinstance(y, Interval) else y) for x, (y, _) in sorted(found.items())]
        for name, found in series.items()
    }
    _need_points(series, means.values())
    figure, axes = _canvas(size, x_label, y_label, False, False)
    ticks = sorted({x for found in series.values() for x in found})
    for i, (name, points) in enumerate(means.items()):
        beside = 0.16 * (i - (len(means) - 1) / 2)
        at = {x: ticks.index(x) + beside for x, _ in points}
        axes.plot(
            [at[x] for x, _ in points], [y for _, y in points], marker="os^Dv<>P"[i % 8], markersize=5,
            color=_color(i), linestyle=_dash(i), linewidth=1.2, label=_label(name),
        )  # fmt: skip
        for x, (mean, values) in series[name].items():
            axes.plot([at[x] + 0.05] * len(values), values, "o", color=_color(i), markersize=2.5, alpha=0.5)
            if isinstance(mean, Interval) and math.isfinite(mean.low):
                axes.plot([at[x]] * 2, [mean.low, mean.high], color=_color(i), linewidth=1)
    axes.set_xticks(range(len(ticks)), [f"{x:,}" for x in ticks])
    return _finish(figure, axes, len(series))


def frontier(
    families: dict[str, dict[str, tuple[float, float]]],
    *,
    x_label: str = "",
    y_label: str = "",
    more_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (7.0, 5.0),
) -> str:
    """Named points (x, y), a colour for each family, and a line through those that no other beats in both.

    Better is less y, and less x, or with more_x more of it.
    Raises: ValueError if there is no finite point at all.
    """
    found = {k: {n: p for n, p in v.items() if all(map(math.isfinite, p))} for k, v in families.items()}
    _need_points(families, [list(v.values()) for v in found.values()])
    figure, axes = _canvas(size, x_label, y_label, False, log_y)
    for i, (family, points) in enumerate(found.items()):
        xs, ys = zip(*points.values()) if points else ((), ())
        axes.plot(xs, ys, "os^Dv<>P"[i % 8], color=_color(i), markersize=5, label=_label(family))
    every = [(x, y, name) for points in found.values() for name, (x, y) in points.items()]
    best, least = [], math.inf
    for x, y, _ in sorted(every, key=lambda p: (-p[0] if more_x else p[0], p[1])):
        if y < least:
            best, least = [*best, (x, y)], y
    axes.plot(*zip(*best), color=_INK, alpha=0.4, linewidth=1, zorder=0)
    axes.margins(x=0.18)
    _name_points(axes, every)
    return _finish(figure, axes, len(families))


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str]], height: float = 9.0) -> None:
    """Names beside points, the lower ones first, each moved up as far as it would lie on one before it."""
    with _measuring():
        axes.figure.draw_without_rendering()  # places the axes
    scale, taken = 72 / axes.figure.dpi, []
    for x, y, name in sorted(points, key=lambda p: p[1]):
        left, middle = axes.transData.transform((x, y)) * scale
        width, up = 4.0 * len(name) + 8, middle
        for other, its_width, its_up in sorted(taken, key=lambda t: t[2]):
            if left < other + its_width and other < left + width and abs(up - its_up) < height:
                up = its_up + height
        taken.append((left, width, up))
        beside = axes.annotate(
            _label(name), (x, y), (7, up - middle), textcoords="offset points", fontsize=7, color=_INK, va="center",
            arrowprops={"arrowstyle": "-", "color": _INK, "alpha": 0.2, "linewidth": 0.5} if up > middle else None,
        )  # fmt: skip
        beside.set_in_layout(False)


@functools.cache
def devanagari_font() -> str | None:
    """The name of an installed font that has Devanagari and that matplotlib can read, or None."""
    from matplotlib import font_manager

    known = ("FreeSans", "Lohit Hindi", "Mangal", "Nirmala UI")
    for font in sorted(font_manager.fontManager.ttflist, key=lambda f: ("Sans" not in f.name, f.name)):
        named = "devanagari" in font.name.lower() or font.name in known
        if named and ord("क") in font_manager.get_font(font.fname).get_charmap():
            return font.name
    return None


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in a window around each point [n] -> [n], narrower towards the ends."""
    y = np.asarray(y, np.float64)
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, at[::-1]), window // 2)
    good = np.isfinite(y)
    totals, counts = np.cumsum([0.0, *np.where(good, y, 0.0)]), np.cumsum([0, *good])
    total, count = (sums[at + half + 1] - sums[at - half] for sums in (totals, counts))
    return np.divide(total, count, out=np.full(len(y), np.nan), where=count > 0)


def _canvas(size, x_label: str, y_label: str, log_x: bool, log_y: bool) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(colors=_INK, labelsize=9, width=0.6, which="both")
    axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_xlabel(_label(x_label), color=_INK, fontsize=10)
    axes.set_ylabel(_label(y_label), color=_INK, fontsize=10)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    return figure, axes


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    """While matplotlib looks how large words are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        font = devanagari_font()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "lmx",
                "font.family": ["DejaVu Sans", *([font] if font else [])],
                "text.usetex": False,
            }
        )
        yield


def _finish(figure: Figure, axes: Axes, n_series: int) -> str:
    with _measuring():
        if n_series > 1:
            axes.legend(
                frameon=False, fontsize=9, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0, 1.0),
                ncols=min(n_series, 4), borderaxespad=0, handlelength=1.8, columnspacing=1.4,
            )  # fmt: skip
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _tidy(buffer.getvalue())


def _tidy(svg: str) -> str:
    """Keeps the <svg> element alone; its ids become unique to it, so that many plots share one page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", re.sub(r'<g id="[^"]*"', "<g", svg))
    svg = re.sub(r' d="([^"]*)"', _short_path, svg)
    tag = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{tag}', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{tag}", svg).replace(_INK, "currentColor")
    root = f'<svg color="#757575" font-family="{_FONTS}" stroke-linejoin="round" stroke-linecap="butt" '
    return svg.replace("<svg ", root, 1)


def _short_path(d: re.Match) -> str:
    """Hundredths of a point suffice on any screen."""
    short = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(d[1].split()))
    return f' d="{short}"'


def _label(text: str) -> str:
    text = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", re.sub(r"\s+", " ", text))
    return text.replace("$", r"\$")


def _color(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def _dash(i: int):
    return DASHES[(i // len(PALETTE)) % len(DASHES)]


def _line(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(sorted(curve, key=lambda p: p[0]), np.float64).reshape(-1, 2)
    return points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], np.nan)


def _mean_line(lines: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    at = [dict(zip(x.tolist(), y.tolist())) for x, y in lines]
    shared = sorted(set.intersection(*(set(points) for points in at)))
    return np.asarray(shared), np.asarray([float(np.mean([points[x] for points in at])) for x in shared])


def _thin(x: np.ndarray, y: np.ndarray, limit: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """At most about `limit` points: of each stretch its lowest and highest, so that spikes stay visible."""
    if len(x) <= limit:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), limit // 2):
        good = part[np.isfinite(y[part])]
        keep |= (
            {int(good[np.argmin(y[good])]), int(good[np.argmax(y[good])])} if len(good) else {int(part[0])}
        )
    kept = np.asarray(sorted(keep))
    return x[kept], y[kept]


def _need_points(series: dict, found: Iterable[Curve]) -> None:
    if not any(math.isfinite(x) and math.isfinite(y) for curve in found for x, y in curve):
        raise ValueError(f"plot: no finite point in {list(series) or 'an empty series'}")
