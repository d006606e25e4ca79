"""`report.html`: one page that needs nothing else, from phone to desk, light and dark.

It loads nothing, runs no script, and shows no text and no id of a user.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from mta_ray.evaluation import charts, words
from mta_ray.evaluation.bands import by_history
from mta_ray.evaluation.summary import BASELINE, GROUPS, METHODS, ReportFacts
from mta_ray.lamp.users import FEW_SHOT_ITEMS

TEMPLATE = "report.html.j2"


def render_page(summary: dict[str, Any], facts: ReportFacts, predictions: pd.DataFrame) -> str:
    """The report's page."""
    bands = by_history(summary, predictions)
    base = summary["methods"][BASELINE]
    return environment().get_template(TEMPLATE).render(
        summary=summary,
        finding=words.finding(summary),
        baseline=BASELINE,
        descriptions=METHODS,
        few_shot_items=FEW_SHOT_ITEMS,
        groups={key: label for key, label in GROUPS.items() if base[key]["queries"]},
        metrics=list(takewhile(lambda name: name != "gain", base)),
        bands=bands,
        gains=_picture(charts.gains_chart(summary)),
        history=_picture(charts.history_chart(bands, summary["primary"])),
        map=_picture(charts.map_chart(facts.map_points)),
        curves={name: _picture(figure) for name, figure in charts.curve_charts(facts.curves).items()},
    )  # fmt: skip


def environment() -> Environment:
    """Of the templates beside this file: everything is escaped, and a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader("mta_ray", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": words.number,
        "gain": words.gain,
        "verdict": words.verdict,
        "size": words.size,
        "duration": words.duration,
        "colour": lambda name: charts.LINES.get(name, (charts.GREY, ""))[0].replace("black", "currentColor"),
    }
    return environment


def _picture(figure: Figure | None) -> Markup | None:
    return None if figure is None else Markup(charts.svg(figure))  # matplotlib has escaped the texts
