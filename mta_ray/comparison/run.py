"""Every method on every data set: `results.parquet` with one row a prediction, what it cost, and a report.

A run that was stopped goes on where it was: what is finished, an artifact or a cell, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mta_ray.artifacts import jsonable, located
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.comparison.answerer import Answerer
from mta_ray.comparison.cells import Cell, CellFiles, collect, versions
from mta_ray.comparison.datasets import SIMULATED, parse_datasets
from mta_ray.comparison.judge import BenchmarkFacts, facts_of
from mta_ray.comparison.materials import Materials, MaterialsConfig
from mta_ray.comparison.plan import PlanConfig, cells
from mta_ray.comparison.report import write_benchmark_report
from mta_ray.comparison.results import COSTS, RESULTS
from mta_ray.comparison.tables import terminal_table
from mta_ray.console import announce, progress, table_console
from mta_ray.evaluation.run import VERSIONS
from mta_ray.evaluation.sections import PAGE
from mta_ray.files import alone_in, replace_file
from mta_ray.object_store import is_remote
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig, crew
from mta_ray.pipeline.prepare_users import PrepareUsersConfig, look_at

log = logging.getLogger(__name__)
RESULTS_FILE, COSTS_FILE, FACTS_FILE = "results.parquet", "costs.parquet", "facts.json"
CELLS = "cells"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig(PlanConfig):
    """Which data sets, which methods, and where it all goes."""

    simulated: tuple[str, ...] = ("movie_tagging",)
    """Tasks whose simulated population is a data set: `simulated_TASK`."""
    files: tuple[str, ...] = ()
    """LaMP files as NAME=TASK:PATH; several for one NAME are joined."""
    teachers: tuple[str, ...] = ()
    """NAME=PATH or NAME=simulated: whose users teach base and bank for the data set NAME, beside its own."""
    out: str = "runs/benchmark"
    """Folder of results.parquet, costs.parquet and the report; every node of the cluster must reach it."""
    materials: MaterialsConfig = field(default_factory=MaterialsConfig)
    """Simulated people, who is tested, encoder, base model, bank."""
    allow_leaks: tuple[str, ...] = ()
    """Data sets that may be used although their questions leak; the report says how many do."""
    workers: ActorConfig = field(default_factory=ActorConfig)
    """The actors that answer; users of a cell share packs."""
    report_only: bool = False
    """Judge the results that lie in `out`, and make nothing."""
    force: bool = False
    """Answer again although the cells are there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        PlanConfig.__post_init__(self)
        prompts = self.materials.base.prompts
        if prompts.context_items:
            raise ValueError(
                "context_items puts items of the history into every method's prompts, the base model's "
                "too; leave it at 0: methods stand with retrieved items by --rag"
            )
        if prompts.rag_items < 1 and (self.rag != "none" or "rag" in self.methods):
            raise ValueError("rag_items of the prompts is 0, so there is no RAG; raise it, or leave rag out of methods")
        if is_remote(self.out):
            raise ValueError(f"out is {self.out}; give a folder of this machine, or one that all nodes share")
        if not self.report_only:
            for dataset in parse_datasets(self.simulated, self.files, self.teachers):
                for files in (dataset.files, *((path,) for path in dataset.teachers if path != SIMULATED)):
                    if files:
                        look_at(PrepareUsersConfig(files=files, task=dataset.task))


def benchmark(config: BenchmarkConfig) -> str:
    """The folder of the results; with `report_only` the report in it, so that the run's own settings stay beside it."""
    config = located(config, "out")
    home = Path(config.out)
    if config.report_only:
        _report(home)
        return str(home / PAGE)
    with alone_in(home / CELLS, "another benchmark"):
        _make(config, home)
    _report(home)
    return config.out


def _report(home: Path) -> None:
    """Of the results in a folder, wherever they were made."""
    if missing := [name for name in (RESULTS_FILE, COSTS_FILE, FACTS_FILE) if not (home / name).is_file()]:
        raise ValueError(f"{home} holds no {missing[0]}: no finished benchmark; run it there without --report-only")
    written = json.loads((home / FACTS_FILE).read_text())
    if written.pop("sha256", None) != {name: _sha256(home / name) for name in (RESULTS_FILE, COSTS_FILE)}:
        raise ValueError(
            f"{home}: {FACTS_FILE} belongs to other {RESULTS_FILE} and {COSTS_FILE} than lie there; run the benchmark "
            "there once more, or copy all three"
        )
    facts = facts_of(written)
    results, costs = (pq.read_table(home / name).to_pandas() for name in (RESULTS_FILE, COSTS_FILE))
    report = write_benchmark_report(home, results, costs, facts)
    for name, dataset in report["datasets"].items():
        table_console().print(terminal_table(name, dataset))


def _make(config: BenchmarkConfig, home: Path) -> None:
    sets = parse_datasets(config.simulated, config.files, config.teachers)
    files = CellFiles(home / CELLS)
    with connect(config.cluster):
        materials = [
            Materials(
                config.materials,
                dataset,
                str(home / "materials" / dataset.name),
                budgets=config.budgets,
                workers=config.workers,
                cluster=config.cluster,
            )
            for dataset in sets
        ]

        # 1. nothing is trained before it is known what leaks
        leaks = {one.dataset.name: one.leaks(config.allow_leaks) for one in materials}

        # 2. bases and banks
        planned = [cell for one in materials for cell in cells(config, one, config.workers)]

        # 3. answers, cell by cell
        _answer(config, planned, files)

    # 4. all of them
    wordings = {one.dataset.name: open_base(one.base()).wording for one in materials}
    results, costs = collect(planned, files, wordings)
    left_out = ("out", "report_only", "force", "cluster")
    facts = BenchmarkFacts(
        leaks=leaks,
        labels={one.dataset.name: one.labels() for one in materials if one.labels()},
        settings={name: value for name, value in jsonable(config).items() if name not in left_out},
        versions={name: metadata.version(name) for name in VERSIONS} | versions(),
    )
    replace_file(home / COSTS_FILE, lambda path: _write(costs, COSTS, path))
    replace_file(home / RESULTS_FILE, lambda path: _write(results, RESULTS, path))
    # last: it says which of the others it belongs to
    written = asdict(facts) | {"sha256": {name: _sha256(home / name) for name in (RESULTS_FILE, COSTS_FILE)}}
    replace_file(home / FACTS_FILE, lambda path: path.write_text(json.dumps(written, indent=1)))
    announce(f"benchmark: {len(results):,} answers in {len(planned)} cells, in {home / RESULTS_FILE}")


def _answer(config: BenchmarkConfig, planned: Sequence[Cell], files: CellFiles) -> None:
    missing = [cell for cell in planned if config.force or not files.is_there(cell)]
    if len(missing) < len(planned):
        log.info("benchmark: %d of %d cells are there already", len(planned) - len(missing), len(planned))
    if not missing:
        return
    workers = config.workers
    with (
        progress("cells", len(missing), "cells") as meter,
        crew(Answerer, workers, workers=workers, cluster=config.cluster, calls=len(missing)) as actors,
    ):
        named = {cell.key: cell for cell in missing}
        for key, answers in actors.map_unordered(lambda actor, cell: actor.keyed.remote(cell), missing):
            files.write(named[key], answers)
            meter.advance()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(frame: pd.DataFrame, schema: pa.Schema, path: Path) -> None:
    """The same bytes for the same rows: nothing of pandas, nothing of the time."""
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd")
