"""Curves show every point, from the first step to the last."""

from xml.etree import ElementTree

import pytest

from dbkit.charts import chart, means, sparkline


def test_the_curve_goes_from_the_first_step_to_the_last_and_up_where_the_loss_is_high():
    lines = ElementTree.fromstring(chart([(1, 0.5), (3, 1.0), (5, 0.0)], "loss", recent=10)).iter("polyline")
    losses, smooth = ([[*map(float, point.split(","))] for point in line.get("points").split()] for line in lines)
    (x1, y1), (x2, y2), (x3, y3) = losses
    assert x2 - x1 == pytest.approx(x3 - x2) and x1 < x2
    assert y2 < y1 < y3 and y1 - y2 == pytest.approx(y3 - y1)
    # The means of 0.5; 0.5 and 1; all three.
    assert [x for x, _ in smooth] == [x1, x2, x3]
    assert [y for _, y in smooth] == pytest.approx([y1, (y1 + y2) / 2, y1])
    assert "nan" not in chart([(1, 0.5), (1, 0.5)], "loss")


def test_many_losses_become_few_means_that_leave_none_out():
    losses = [(step, float(step)) for step in range(1, 1001)]
    assert means(losses, 10) == [(100 * part, 100 * part - 49.5) for part in range(1, 11)]
    assert sparkline(losses, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(1, 2.0), (2, 2.0)]) == "▁▁"


def test_a_marked_step_is_where_its_point_is():
    picture = ElementTree.fromstring(chart([(0, 0.0), (10, 1.0), (40, 0.5)], "likeness & more", mark=10))
    (line,) = picture.iter("polyline")
    mark = [path.get("d") for path in picture.iter("path")][-1]
    assert mark.startswith("M" + line.get("points").split()[1].partition(",")[0] + " ")
    assert picture.get("aria-label") == "likeness & more from step 0 to 40"
    assert "dasharray" not in chart([(0, 0.0), (10, 1.0)], "x", mark=20)


def test_one_point_is_no_curve():
    assert chart([(1, 0.5)], "loss") == ""
