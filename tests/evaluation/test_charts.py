"""The plots hold the values that one computes by hand; as text they are the same every time and safe in a page."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mta_ray.evaluation.bands import Bands, by_history
from mta_ray.evaluation.charts import curve_charts, gains_chart, history_chart, map_chart, svg
from mta_ray.evaluation.summary import Curve, MapPoint


def test_bands_hold_the_means_of_their_users(summary, predictions):
    bands = by_history(summary, predictions)
    assert (bands.labels, bands.users) == (["4", "40"], [2, 2])
    assert bands.scores["mta"] == pytest.approx([3 / 4, 1 / 2])
    assert bands.scores["non_personalised"] == pytest.approx([1 / 4, 1 / 2])
    lower = by_history(summary | {"higher_is_better": False}, predictions)
    assert lower.scores["mta"] == pytest.approx([-3 / 4, -1 / 2])


def test_bands_of_few_users_are_joined_but_few_shot_users_never_to_others():
    items = [2] * 6 + [5] + [8] * 6 + [15] + [30] * 6 + [500] * 2
    frame = pd.DataFrame({"user_id": range(len(items)), "history_items": items, "method": "mta", "score": 1.0})
    bands = by_history({"methods": {"mta": {}}, "higher_is_better": True}, frame)
    # 5 joins 2-3; 15 is alone but its neighbours below are few-shot; 500 joins 21-50
    assert bands.labels == ["2–5", "8", "15", "30–500"]
    assert bands.users == [7, 6, 1, 8]


def test_gains_are_dots_on_their_intervals(summary):
    few, rest = gains_chart(summary).axes
    assert (few.get_title("left"), rest.get_title("left")) == ("few-shot users", "the rest")
    assert [label.get_text() for label in few.get_yticklabels()] == ["oppu", "mta", "zebra"]
    drawn = [np.column_stack([line.get_xdata(), line.get_ydata()]).tolist() for line in few.lines]
    assert [[pytest.approx(1 / 2), 1]] in drawn
    assert [[pytest.approx(1 / 3), 1], [pytest.approx(1), 1]] in drawn


def test_a_gain_without_interval_is_a_dot_alone():
    part = {"queries": 1, "gain": 0.25, "ci95_of_gain": None}
    figures = {"few_shot": part, "rest": {"queries": 0}}
    (panel,) = gains_chart({"methods": {"non_personalised": figures, "mta": figures}}).axes
    assert [line.get_xdata().tolist() for line in panel.lines[1:]] == [[0.25]]
    assert gains_chart({"methods": {"non_personalised": figures}}) is None


def test_lines_over_history_are_named_in_the_order_of_their_ends():
    bands = Bands(labels=["2", "8"], users=[3, 4], scores={"low": [0.9, 0.1], "high": [0.2, 0.8]})
    (axes,) = history_chart(bands, "f1").axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == bands.scores
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["high", "low"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2\n3 users", "8\n4 users"]
    assert history_chart(Bands(labels=["2"], users=[3], scores={"low": [0.9]}), "f1") is None


def test_the_map_joins_users_to_their_anchors_and_counts_them(facts):
    (axes,) = map_chart(facts.map_points).axes
    spokes, users, few, anchors = (list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines)
    assert (users, few, anchors) == ([(0.1, 0.1)], [(0.9, 0.8), (0.2, 0.0)], [(0.0, 0.0), (1.0, 1.0)])
    joined = [(spokes[i], spokes[i + 1]) for i in range(0, len(spokes), 3)]
    assert joined == [((0.1, 0.1), (0.0, 0.0)), ((0.9, 0.8), (1.0, 1.0)), ((0.2, 0.0), (0.0, 0.0))]
    assert [(text.xy, text.get_text()) for text in axes.texts] == [((0.0, 0.0), "2"), ((1.0, 1.0), "1")]
    dots = ElementTree.fromstring(svg(axes.figure)).iterfind(".//{*}use")
    assert len(list(dots)) == 3 + 2 + 3  # and three in the legend


def test_a_map_of_many_users_is_thinned_and_counts_them_all():
    points = [MapPoint("anchor", 0.0, 0.0, 0), *(MapPoint("user", float(i), 1.0, 0) for i in range(4000))]
    (axes,) = map_chart(points).axes
    assert 1000 < len(axes.lines[1].get_xdata()) <= 1500
    assert axes.texts[0].get_text() == "4000"
    assert map_chart(points[:1]) is None and map_chart(points[1:]) is None


def test_training_curves_share_a_panel_and_are_means_over_runs_of_steps():
    curves = [
        Curve("bank/anchor 0", range(1, 481), np.arange(1.0, 481.0)),
        Curve("bank/anchor 1", [1, 2, 3], [5.0, math.nan, 3.0]),
        Curve("base", [1, 2], [math.nan, 1.0]),
        Curve("empty", [], []),
    ]
    panels = {name: figure.axes[0] for name, figure in curve_charts(curves).items()}
    assert list(panels) == ["bank", "base"]
    long, short = panels["bank"].lines
    # 480 steps in 120 runs: the first is the mean of 1, 2, 3 and 4
    assert (long.get_xdata()[:2].tolist(), long.get_ydata()[:2].tolist()) == ([2.5, 6.5], [2.5, 6.5])
    assert (short.get_xdata().tolist(), short.get_ydata().tolist()) == ([1.0, 3.0], [5.0, 3.0])
    assert panels["bank"].get_xlabel() == "step (2 lines, mean 3.75 to 241)"
    assert panels["base"].lines[0].get_marker() == "o"


def test_a_picture_is_the_same_every_time_and_shows_names_as_they_are(hostile):
    bands = Bands(labels=["2", "8"], users=[3, 4], scores={hostile: [0.9, 0.1], "$a_b$ --> &amp;": [0.2, 0.8]})
    before = dict(matplotlib.rcParams)
    one, two = (svg(history_chart(bands, "f1")) for _ in range(2))
    assert one == two
    assert dict(matplotlib.rcParams) == before
    root = ElementTree.fromstring(one)
    assert not list(root.iterfind(".//{*}script"))
    assert {hostile, "$a_b$ --> &amp;", "2", "3 users"} <= {element.text for element in root.iterfind(".//{*}text")}
