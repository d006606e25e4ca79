"""The population's job is killed again and again: is a user lost in the end, or stored twice?

    python -m mta_ray.benchmarks.killed_population --json FILE

One command, `mta simulate population` with a user store. At random moments between its first part and its last it is
killed (`kill -9`) with every process of its cluster, as when the machine goes down, and given again, until it has had
its kills and comes to its end. Store and Parquet files are then compared with those of a run that was left in peace.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mta_ray.benchmarks.command import settings_from_words, show
from mta_ray.benchmarks.session import LOOK_S, kill_all

log = logging.getLogger(__name__)
TIMES = ("version", "valid_from", "route_version", "created_at_s", "updated_at_s", "published_at_s")
"""Columns of the store that say when something was written."""
MOMENT_S = 1.0
"""At most so long after a part's file a kill comes: in another part's store, or between the two."""
TABLES = ("users", "histories", "citations", "anchors", "bank_anchors")


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationKillConfig:
    """The population, and how often its job is killed."""

    kills: int = 8
    users: int = 100_000
    part_users: int = 2_000
    embeddings: str = "sampled"
    fitted_on: int = 100
    limit_s: float = 1200.0
    """After so long a command is given up."""
    seed: int = 0


def kill_population(config: PopulationKillConfig) -> dict[str, Any]:
    """What became of the users. Raises RuntimeError where the command fails or does not end."""
    with tempfile.TemporaryDirectory(prefix="mta-population-kills-") as name:
        home = Path(name)
        (home / "whole").mkdir()
        (home / "killed").mkdir()

        # 1. undisturbed
        began_s = time.monotonic()
        _run_for(config, home / "whole", None)
        whole_s = time.monotonic() - began_s
        log.info("undisturbed: %.0f s", whole_s)

        # 2. the same with deaths: each once so many parts are there, and a moment later
        draw = random.Random(config.seed)
        whole_parts = -(-config.users // config.part_users)
        targets = sorted(draw.sample(range(1, whole_parts), config.kills))
        parts: list[int] = []
        began_s = time.monotonic()
        for drawn in targets:
            target = max(drawn, _parts_there(home / "killed") + 1)
            if _run_for(config, home / "killed", target, draw.uniform(0, MOMENT_S)):
                break
            parts.append(_parts_there(home / "killed"))
            log.info("killed (%d); %d of %d parts are there", len(parts), parts[-1], whole_parts)
        else:
            _run_for(config, home / "killed", None)
        killed_s = time.monotonic() - began_s

        # 3. what came of it
        whole, killed = stored_rows(home / "whole" / "store.db"), stored_rows(home / "killed" / "store.db")
        ours, theirs = parts_table(home / "killed" / "population"), parts_table(home / "whole" / "population")
        numbers = ours["number"].to_pylist()
        return {
            "kills": len(parts),
            "users_missing": len(set(range(config.users)) - set(numbers)),
            "users_twice": len(numbers) - len(set(numbers)),
            "rows_that_differ": sum(len(set(whole[table]) ^ set(killed[table])) for table in TABLES)
            + sum(abs(len(whole[table]) - len(killed[table])) for table in TABLES),
            "files_equal": ours.equals(theirs),
            "population_kills": {
                "undisturbed_s": whole_s,
                "killed_s": killed_s,
                "parts_there": parts,
                "rows": {table: len(rows) for table, rows in killed.items()},
                "config": asdict(config),
            },
        }


def _run_for(config: PopulationKillConfig, folder: Path, parts: int | None, wait_s: float = 0.0) -> bool:
    """Whether the command came to its end; else it and its cluster are killed, `wait_s` after that many parts."""
    settings = {
        "users": config.users,
        "part-users": config.part_users,
        "embeddings": config.embeddings,
        "fitted-on": config.fitted_on,
        "held-out": 0,
        "anchors": 8,
        "max-items": 4,
        "store": folder / "store.db",
        "out": folder / "population",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with (folder / "log").open("a") as told:
        command = subprocess.Popen(
            [sys.executable, "-m", "mta_ray.cli", "simulate", "population", *words],
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        until_s = time.monotonic() + config.limit_s
        try:
            while command.poll() is None:
                if time.monotonic() > until_s:
                    raise RuntimeError(f"the command has not ended in {config.limit_s:.0f} s: {_last_lines(folder)}")
                if parts is not None and _parts_there(folder) >= parts:
                    time.sleep(wait_s)
                    return False
                time.sleep(LOOK_S)
        finally:
            kill_all(command)
    if command.returncode:
        raise RuntimeError(f"the command ended with {command.returncode}: {_last_lines(folder)}")
    return True


def _parts_there(folder: Path) -> int:
    return len(list(folder.glob("population.parts/*/part-*.parquet")))


def _last_lines(folder: Path) -> str:
    return (folder / "log").read_text()[-2000:]


def stored_rows(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that is in the store but times."""
    found = {}
    with closing(sqlite3.connect(store)) as connection:
        for table in TABLES:
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(name for name in names if name not in TIMES)
            found[table] = connection.execute(f"SELECT {kept} FROM {table}").fetchall()
    return found


def parts_table(out: Path) -> pa.Table:
    """All parts of a population's artifact."""
    return pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("part-*.parquet")))


def main() -> int:
    """Print and write what became of the users; 1 where the end is another one, or came too soon."""
    config, file = settings_from_words(PopulationKillConfig, __doc__)
    figures = kill_population(config)
    show(figures, file)
    is_equal = figures["files_equal"] and not figures["rows_that_differ"]
    is_whole = not figures["users_missing"] and not figures["users_twice"]
    return 0 if is_equal and is_whole and figures["kills"] == config.kills else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    sys.exit(main())
