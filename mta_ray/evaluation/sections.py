"""A page of sections, each a heading, a sentence or two, pictures, a table, notes; and the figures that it was made of.

The page loads nothing and runs no script; every text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from mta_ray.evaluation.charts import svg
from mta_ray.evaluation.page import environment

TEMPLATE = "sections.html.j2"
PAGE, FIGURES = "report.html", "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a page."""

    title: str
    lead: str = ""
    """What is to be seen, in a sentence or two that are read off the numbers."""
    figures: Sequence[tuple[str, Figure]] = ()
    """Pictures, each with what it shows for somebody who does not see it."""
    rows: Sequence[Sequence[str]] = ()
    """A table: first its heading; the first cell of a row names it."""
    notes: Sequence[str] = ()


def render_sections(title: str, sections: Sequence[Section]) -> str:
    """The page."""
    shown = [
        {
            "title": section.title,
            "lead": section.lead,
            "pictures": [(label, Markup(svg(figure))) for label, figure in section.figures],
            "rows": section.rows,
            "notes": section.notes,
        }
        for section in sections
    ]
    return environment().get_template(TEMPLATE).render(title=title, sections=shown)


def write_sections(folder: Path, title: str, sections: Sequence[Section], figures: Mapping[str, Any]) -> None:
    """`report.html` (to look at) and `report.json` (to compute with), into the draft of an artifact."""
    (folder / PAGE).write_text(render_sections(title, sections))
    (folder / FIGURES).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
