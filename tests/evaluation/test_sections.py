"""A page of sections shows all that it is given, escaped, and its figures come back as they went in."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure
from test_page import Page

from mta_ray.evaluation.sections import Section, render_sections, write_sections

HOSTILE = '<script>alert("x")</script>'


def _section() -> Section:
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([1, 2], [3, 4], label=HOSTILE)
    return Section(
        title=f"Load {HOSTILE}",
        lead=HOSTILE,
        figures=[(f'a picture" onload="{HOSTILE}', figure)],
        rows=[("users", "ms"), (HOSTILE, "5")],
        notes=(HOSTILE,),
    )


def test_every_text_is_shown_and_none_of_it_is_code() -> None:
    page = Page(render_sections("Population & co", [_section(), Section(title="Empty")]))
    assert page.open == []
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 4
    assert {name for name, _ in page.attributes}.isdisjoint({"onload", "src", "href"})
    assert {"svg", "table"} <= set(page.tags)


def test_an_empty_section_has_no_table_and_no_picture() -> None:
    page = Page(render_sections("t", [Section(title="Empty")]))
    assert {"svg", "table"}.isdisjoint(page.tags)


def test_figures_are_written_beside_the_page(tmp_path: Path) -> None:
    write_sections(tmp_path, "t", [_section()], {"users": 3, "by_anchor": [1, 2]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"users": 3, "by_anchor": [1, 2]}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
