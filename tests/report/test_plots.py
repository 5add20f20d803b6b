import math
import re
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.report import plots
from lmx.report.stats import Interval

LOSS = [(step, 3.0 + 4.0 / step) for step in range(1, 200)]


def words(svg: str) -> list[str]:
    return [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def each_kind() -> dict[str, str]:
    return {
        "curves": plots.curves({"train": LOSS, "हिन्दी": LOSS[::50]}, y_label="वैधता हानि", smooth=5),
        "seed_curves": plots.seed_curves({"rope": [LOSS, [(x, y + 1) for x, y in LOSS]], "alibi": [LOSS]}),
        "bars": plots.bars_with_intervals(
            {"क्षत्रिय": Interval(1.0, 0.5, 1.5), "<b>&$x$": 2.0}, x_label="loss"
        ),
        "lines": plots.lines_with_points({"bpe": [(512, 2.0), (1024, Interval(1.5, 1.4, 1.7))]}, log_x=True),
        "spread": plots.spread({"समीक्षा": {0: (0.5, [0.5]), 1024: (Interval(0.7, 0.6, 0.8), [0.6, 0.8])}}),
        "frontier": plots.frontier({"आठ": {"int8": (8.0, 1e-3)}, "4": {"चार": (4.0, 0.2)}}, log_y=True),
    }


def test_labels_stay_words_so_devanagari_and_markup_are_drawn_by_the_reader():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = each_kind()
    assert {"train", "हिन्दी", "वैधता हानि", "step"} <= set(words(made["curves"]))
    assert {"rope", "alibi"} <= set(words(made["seed_curves"]))
    assert {"क्षत्रिय", "<b>&$x$"} <= set(words(made["bars"]))
    assert {"512", "1,024"} <= set(words(made["lines"]))
    assert {"0", "1,024"} <= set(words(made["spread"]))
    assert {"आठ", "int8", "चार"} <= set(words(made["frontier"]))


def test_plots_are_the_same_every_time_and_share_no_ids():
    first, second = each_kind(), each_kind()
    assert first == second
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in first.values()]
    assert all(ids) and len(set.union(*ids)) == sum(map(len, ids))
    for svg, own in zip(first.values(), ids):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', svg)) <= own


def test_plots_leave_matplotlibs_settings_and_pyplot_alone():
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    each_kind()
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_curve_is_drawn_where_its_points_are():
    svg = plots.curves({"one": [(0, 0.0), (10, 10.0)]})
    blue = f"stroke: {plots.PALETTE[0]}"
    lines = [
        e for e in ElementTree.fromstring(svg).iter() if "clip-path" in e.attrib and e.tag.endswith("}path")
    ]
    (path,) = [line for line in lines if blue in line.get("style")]
    x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", path.get("d")))
    assert x1 > x0 and y1 < y0


@pytest.mark.parametrize(("more_x", "corners"), [(False, 3), (True, 2)])
def test_a_frontier_joins_what_no_other_beats_in_both(more_x, corners):
    points = {"a": (1.0, 9.0), "b": (2.0, 3.0), "beaten": (3.0, 5.0), "c": (4.0, 1.0), "d": (6.0, 2.0)}
    svg = plots.frontier({"all": points}, more_x=more_x)  # with more x: d and c
    lines = [e.get("d") for e in ElementTree.fromstring(svg).iter() if "clip-path" in e.attrib]
    assert max(d.count("L") for d in lines if d and "M" in d) == corners - 1
    assert set(points) <= set(words(svg))


def test_the_mean_over_seeds_stops_where_the_shortest_seed_stops():
    long, short = [(x, 1.0) for x in range(10)], [(x, 3.0) for x in range(5)]
    x, y = plots._mean_line([plots._line(long), plots._line(short)])
    np.testing.assert_array_equal(x, np.arange(5))
    np.testing.assert_array_equal(y, 2.0)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(2, 9))
def test_running_mean_averages_a_window_around_each_point(values, window):
    got = plots.running_mean(np.array(values), window)
    for i in range(len(values)):
        half = min(i, len(values) - 1 - i, window // 2)
        assert got[i] == pytest.approx(np.mean(values[i - half : i + half + 1]), abs=1e-9)


def test_running_mean_skips_gaps():
    got = plots.running_mean(np.array([1.0, np.nan, 5.0]), 2)
    assert got[1] == 3.0 and got[0] == 1.0


@given(st.integers(0, 19_999))
def test_thinning_keeps_a_spike(at):
    x, y = np.arange(20_000.0), np.zeros(20_000)
    y[at] = 7.0
    thin_x, thin_y = plots._thin(x, y)
    assert len(thin_x) <= 1300 and thin_x[thin_y == 7.0].tolist() == [float(at)]
    assert thin_x[0] == 0 and thin_x[-1] == 19_999


def test_gaps_are_allowed_but_nothing_to_draw_is_an_error():
    assert "<svg" in plots.curves({"a": [(0, math.nan), (1, 2.0), (2, math.inf)]})
    for draw in (plots.curves, plots.lines_with_points):
        with pytest.raises(ValueError, match="no finite point"):
            draw({"a": [(0, math.nan)]})
    with pytest.raises(ValueError, match="no finite value"):
        plots.bars_with_intervals({})


def test_the_devanagari_font_has_devanagari():
    from matplotlib import font_manager

    name = plots.devanagari_font()
    if name is None:
        named = [f for f in font_manager.fontManager.ttflist if "devanagari" in f.name.lower()]
        assert named == []
    else:
        path = font_manager.findfont(name, fallback_to_default=False)
        assert set(map(ord, "हिन्दी क्षत्रिय")) <= set(font_manager.get_font(path).get_charmap())
