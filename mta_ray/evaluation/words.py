"""A report's numbers as a reader sees them, and its finding in a few sentences."""

from __future__ import annotations

import math
from typing import Any

from mta_ray.evaluation.summary import BASELINE, COMPARISONS


def finding(summary: dict[str, Any]) -> str:
    """What the report shows; every sentence is read off the numbers."""
    methods, primary = summary["methods"], summary["primary"]
    group, who = ("few_shot", "few-shot users") if summary["few_shot_users"] else ("rest", "users")
    best = next((name for name in ("mta", "mta_fusion") if name in methods), None) or next(reversed(methods))
    figures, base = methods[best][group], methods[BASELINE][group]
    lower = "" if summary["higher_is_better"] else ", where lower is better,"
    said = {
        "better": "which is better than not personalising: the 95% interval of the gain excludes 0",
        "worse": "which is worse than not personalising: the 95% interval of the gain excludes 0",
        "open": "which this many users cannot tell from not personalising: the interval of the gain holds 0",
    }
    text = [
        f"On {figures['users']} {who} with {figures['queries']} queries, {best} takes {primary}{lower} from "
        f"{number(base[primary])} to {number(figures[primary])} (gain {gain(figures)}), {said[verdict(figures)]}."
    ]

    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for name, over in COMPARISONS:
        pair = summary["comparisons"].get(f"{name}_vs_{over}", {}).get(group)
        if pair and pair["gain"] is not None and name == best:
            found[verdict(pair)].append(f"{over} ({gain(pair)})")
    verbs = {"better": "is better than", "worse": "is worse than", "open": "cannot be told from"}
    parts = [f"{verbs[how]} {_listed(overs)}" for how, overs in found.items() if overs]
    if parts:
        text.append(f"Query by query, {best} {'; it '.join(parts)}.")

    oracle = methods.get("oracle", {}).get(group, {}).get("gain")
    if oracle and oracle > 0:
        text.append(f"Of what the best possible answers would gain, {best} reaches {figures['gain'] / oracle:.0%}.")
    if methods[best]["bytes_per_user"] is not None:
        kept = {name: methods[name]["bytes_per_user"] for name in (best, "oppu") if name in methods}
        text.append(f"A user costs {' and '.join(f'{size(cost)} with {name}' for name, cost in kept.items())}.")
    return " ".join(text)


def verdict(figures: dict[str, Any]) -> str:
    """Whether a gain is "better" or "worse" than 0 with 95% confidence, or "open"."""
    low, high = figures.get("ci95_of_gain") or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "open"


def gain(figures: dict[str, Any], digits: int = 3) -> str:
    """`+0.500 [+0.333, +1.000]`."""
    if figures.get("gain") is None:
        return "–"
    signed = [
        f"{v:+.{digits}f}".replace("-", "\N{MINUS SIGN}") for v in (figures["gain"], *(figures["ci95_of_gain"] or ()))
    ]
    return signed[0] + (f" [{signed[1]}, {signed[2]}]" if len(signed) == 3 else "")


def number(value: float | int | None) -> str:
    """Three digits after the point."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def size(count: float | int | None) -> str:
    """Bytes, with a unit."""
    if count is None or not math.isfinite(count):
        return "–"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float | int | None) -> str:
    """Seconds, with a unit."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if 0 < seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
