"""Plots: what is drawn lies where the numbers say, and nonsense draws nothing."""

import math
import re
from xml.etree import ElementTree

import pytest

from alphaedit_peft.report.charts import (
    HEIGHT,
    WIDTH,
    Axis,
    bar_chart,
    gauge,
    heat_map,
    line_chart,
    spectrum_chart,
)


def parsed(markup):
    """The <svg> of a figure, as XML: it has to be well-formed."""
    return ElementTree.fromstring(re.search(r'<svg class="chart".*</svg>', markup)[0])


def places(markup):
    lines = [e.get("points").split() for e in parsed(markup).iter("polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]


def test_lines_keep_the_order_and_the_proportions_of_their_points():
    first, second = places(line_chart("t", {"a": [(0, 0), (1, 1)], "b": [(0, 1), (0.5, 0.25)]}))
    (x0, y0), (x1, y1) = first
    assert x1 > x0
    assert y1 < y0  # up is more
    assert second[1] == (pytest.approx((x0 + x1) / 2), pytest.approx(y0 + (y1 - y0) / 4))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in [*first, *second])


def test_a_logarithmic_axis_gives_decades_equal_room_and_drops_zeros():
    ((a, b, c),) = places(line_chart("t", {"a": [(0, 1), (1, 10), (2, 100), (3, 0)]}, log_y=True))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11)


def test_values_beyond_the_range_are_drawn_at_its_ends():
    ((low, high),) = places(line_chart("t", {"a": [(0, -5), (1, 5)]}, y_range=(0, 1)))
    assert (low[1], high[1]) == (Axis(0, 1, 202, 10, False).place(0), 10)


@pytest.mark.parametrize("points", [[], [(math.nan, 1)], [(0, math.inf)]])
def test_nothing_finite_draws_nothing(points):
    assert "Nothing to draw" in line_chart("t", {"a": points})
    assert "Nothing to draw" in bar_chart("t", [("a", y) for _, y in points if y != 1])
    assert "Nothing to draw" in spectrum_chart("t", [0.0, 0.0], 2)
    assert "Nothing to draw" in heat_map("t", [])


def test_one_point_is_a_dot_and_equal_values_make_an_axis():
    assert "<circle" in line_chart("t", {"a": [(1, 2)]})
    assert len(places(line_chart("t", {"a": [(0, 3), (1, 3)]}))) == 1


def test_bars_are_as_long_as_their_values():
    found = parsed(bar_chart("t", [("a", 4.0), ("b", 1.0), ("c", 0.0)], unit=" %"))
    widths = [float(rect.get("width")) for rect in found.iter("rect")]
    assert widths == [pytest.approx(4 * widths[1], abs=0.3), widths[1], 0]
    assert "4 %" in "".join(found.itertext())
    assert "36,530" in bar_chart("t", [("a", 36530)])


def test_a_heat_map_has_a_cell_for_each_value_that_is_not_near_zero():
    drawn = parsed(heat_map("t", [[1.0, 0.01], [-0.5, math.nan]]))
    kinds = {path.get("class"): path for path in drawn.iter("path")}
    assert {name: path.get("d").count("M") for name, path in kinds.items()} == {
        "cells": 1,
        "below": 1,
    }
    assert [kinds[k].get("opacity") for k in ("cells", "below")] == ["1.0", "0.5"]


def test_labels_are_escaped_cut_and_left_out_where_there_are_many():
    few = heat_map("<t>", [[1.0]], ["<b>" + "x" * 30])
    assert "&lt;b&gt;" in few
    assert "<b>" not in few
    assert "xxx" not in heat_map("t", [[1.0] * 13] * 13, ["xxx"] * 13)


def test_a_spectrum_shades_what_is_kept_and_is_thinned():
    values = [10.0 ** (i / 500) for i in range(2000)]
    markup = spectrum_chart("t", values, 500)
    assert "500 of 2,000 kept" in markup
    area = next(e for e in parsed(markup).iter("rect") if e.get("class") == "area")
    line = places(markup)[0]
    share = float(area.get("width")) / (line[-1][0] - line[0][0])
    assert share == pytest.approx(0.25, abs=0.01)
    assert 400 <= len(line) <= 502
    assert [y for _, y in line] == sorted(y for _, y in line)  # falling: further down


def test_a_spectrum_of_a_projector_can_be_drawn():
    assert len(places(spectrum_chart("t", [0.0, 0.0, 1.0, 1.0], 2))[0]) == 4


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (-3, 1e6, False), (1e-9, 1e3, True), (2.0, 3.0, True)]
)
def test_ticks_are_few_round_and_within(low, high, log):
    ticks = Axis(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)


def test_a_gauge_shows_a_share_and_a_dash_for_none():
    assert 'width="25.0"' in gauge(0.25)
    assert "0.250" in gauge(0.25)
    assert gauge(None) == "\N{EN DASH}"
