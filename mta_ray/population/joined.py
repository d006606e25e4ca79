"""The reports of several simulations on one page, with their figures in one file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mta_ray.artifacts import Artifact, located, open_artifact, publish
from mta_ray.evaluation.sections import FIGURES, Section, write_sections

KIND = "joined"
MODULES = {
    "population": "mta_ray.population.crowd.report",
    "what-if": "mta_ray.population.what_if",
    "drift": "mta_ray.population.drift",
    "load": "mta_ray.population.load.report",
    "capacity": "mta_ray.population.capacity.report",
}
"""Kind of artifact to the module whose `sections` show its report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinReportsConfig:
    """Which reports, and where the page goes."""

    of: tuple[str, ...]
    """Results of `mta simulate population, what-if, drift, load, capacity`, in the order in which they are shown."""
    out: str = "runs/simulation"
    """Folder of report.html and report.json."""
    title: str = "A million users before there are any"
    """Heading of the page."""

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of is empty; name the results of at least one simulation")


def join_reports(config: JoinReportsConfig) -> str:
    """Publish the page."""
    config = located(config, "out")
    reports: list[Mapping[str, Any]] = []
    sections: list[Section] = []
    inputs = {}
    names = _names(config.of)
    for number, path in enumerate(config.of):
        artifact = _open(path)
        reports.append(json.loads((artifact.path / FIGURES).read_text()))
        try:
            told = importlib.import_module(MODULES[artifact.kind]).sections(reports[-1])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} holds a report that this version of mta_ray does not know how to show ({error!r}); run "
                f"`mta simulate {artifact.kind}` again, with --force"
            ) from error
        sections += [replace(section, title=f"{section.title} ({names[number]})") for section in told]
        inputs[f"{number} {artifact.kind}"] = artifact.hash
    with publish(config.out, kind=KIND, settings={"title": config.title}, inputs=inputs) as draft:
        write_sections(draft.path, config.title, sections, {"simulation": KIND, "reports": reports})
    return config.out


def _names(paths: Sequence[str]) -> list[str]:
    """Folder names, or whole paths where two are the same."""
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _open(path: str) -> Artifact:
    artifact = open_artifact(path, kind=(*MODULES, KIND))
    if artifact.kind == KIND:
        raise ValueError(f"{path} is a joined page already; name the simulations themselves")
    return artifact
