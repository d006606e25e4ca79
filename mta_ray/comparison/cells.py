"""Cells: one method at one budget with one seed on one data set; planned, written one by one, and put together again.

A cell's name is a hash of everything that decides its answers, so one that is there need not be made again. A user whom
a budget does not cut is answered as with the whole history: such users stand in the cell of the budget `all` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mta_ray.artifacts import canonical_json, jsonable
from mta_ray.comparison.datasets import Subjects, cut, is_cut, prompt_hash, read_tested
from mta_ray.comparison.recipes import Recipe
from mta_ray.comparison.results import ALL, COSTS, GROUPS, RESULTS
from mta_ray.files import replace_file
from mta_ray.lamp.leaks import persons
from mta_ray.lamp.metrics import query_score
from mta_ray.lamp.users import User
from mta_ray.personalize.base_model import Wording
from mta_ray.pipeline.actors import ActorConfig

ORDER = ["dataset", "method", "rag", "budget", "seed"]
_ANSWERS_VERSION = 2
"""Raised by whoever changes what a method answers: cells from before are then made anew."""
_ANSWERS = pa.schema(
    [("user_id", pa.string()), ("query_id", pa.string()), ("prompt_hash", pa.string()), ("prediction", pa.string())]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What has to be answered, and with what."""

    dataset: str
    recipe: Recipe
    rag: bool
    budget: str
    seed: int
    whole: bool
    """Whether the same method's cell with the whole history is there too: then only those are in here whom it does not
    answer alike; see `asks`."""
    tested: str
    """Path of the `tested-users` artifact, as are the following of theirs."""
    base: str
    bank: str = ""
    pooled: str = ""
    users_per_pack: int
    """Who shares a pack decides how sums are rounded."""
    inputs: tuple[str, ...]
    """Hashes of those artifacts; of `tested`, of what the budget leaves."""
    made_by: tuple[str, ...] = ()
    """What computes the answers; see `made_by`."""
    devices: float | int = 1
    """GPUs of the actor that answers, or its CPUs."""
    bank_device_seconds: float = 0.0
    pooled_device_seconds: float = 0.0

    @property
    def key(self) -> str:
        """Of all that decides the answers; where things lie and what they took does not."""
        places = ("tested", "base", "bank", "pooled", "devices", "bank_device_seconds", "pooled_device_seconds")
        deciding = {name: value for name, value in jsonable(self).items() if name not in places}
        return hashlib.sha256(canonical_json(deciding).encode()).hexdigest()[:32]

    def asks(self, user: User) -> bool:
        """Whether the user is answered here; if not, as in the same method's cell with the whole history."""
        is_other = self.recipe.reads_history(self.rag) and is_cut(user, self.budget)
        return not self.whole or self.budget == ALL or is_other


def made_by(workers: ActorConfig) -> tuple[str, ...]:
    """What decides answers beside what they are answers to: threads too, for they decide how sums are rounded."""
    packages = [f"{name} {number}" for name, number in versions().items()]
    threads = [f"{workers.cpus} threads"] if workers.device == "cpu" else []
    return (f"answers {_ANSWERS_VERSION}", *packages, workers.device, *threads)


def versions() -> dict[str, str]:
    """Name to version of the packages that a prediction is computed by."""
    found = {}
    for name in ("mta-ray", "torch", "transformers", "tokenizers", "numpy", "bm25s", "cma", "faiss-cpu", "faiss-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAnswers:
    """What became of a cell."""

    rows: list[tuple[str, str, str, str]]
    """user id, query id, hash of the question that was asked, prediction"""
    bytes: dict[str, float]
    """User id to what is kept of the user."""
    seconds: dict[str, float]
    """User id to the time that personalising took, the user's share of the pack's."""
    decode_tokens: int
    decode_s: float


class CellFiles:
    """A folder of finished cells: KEY.parquet with the answers, and KEY.json, written last, with what they took.

    The latter says whose both are, and the digest of either: what is damaged or another cell's is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_there(self, cell: Cell) -> bool:
        try:
            written = json.loads(self._file(cell, "json").read_bytes())
            digest = written.pop("sha256")
            return bool(written["key"] == cell.key and digest == self._digest(cell, written))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def write(self, cell: Cell, answers: CellAnswers) -> None:
        columns = zip(*answers.rows, strict=True) if answers.rows else [()] * len(_ANSWERS)
        table = pa.table([pa.array(column, pa.string()) for column in columns], schema=_ANSWERS)
        costs = {k: v for k, v in asdict(answers).items() if k != "rows"}
        named = {"dataset": cell.dataset, "method": cell.recipe.name, "rag": cell.rag, "budget": cell.budget}
        replace_file(self._file(cell, "parquet"), lambda path: pq.write_table(table, path))
        facts = named | {"seed": cell.seed, "key": cell.key} | costs
        text = json.dumps({"sha256": self._digest(cell, facts)} | facts)
        replace_file(self._file(cell, "json"), lambda path: path.write_text(text))

    def read(self, cell: Cell) -> CellAnswers:
        table = pq.read_table(self._file(cell, "parquet"), schema=_ANSWERS)
        costs = json.loads(self._file(cell, "json").read_text())
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True)) if len(table) else []
        names = ("bytes", "seconds", "decode_tokens", "decode_s")
        return CellAnswers(rows=rows, **{name: costs[name] for name in names})

    def _digest(self, cell: Cell, facts: Mapping[str, Any]) -> str:
        whole = self._file(cell, "parquet").read_bytes() + json.dumps(facts, sort_keys=True).encode()
        return hashlib.sha256(whole).hexdigest()

    def _file(self, cell: Cell, ending: str) -> Path:
        return self.folder / f"{cell.key}.{ending}"


def collect(cells: Sequence[Cell], files: CellFiles, wordings: dict[str, Wording]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of `RESULTS`, rows of `COSTS`) of finished cells, sorted. `wordings` are by data set."""
    subjects = cache(read_tested)
    person_of = cache(lambda tested: persons(subjects(tested).users))
    whole = {_method(cell): cell for cell in cells if cell.budget == ALL}
    read = cache(lambda number: files.read(cells[number]))
    number_of = {cell.key: number for number, cell in enumerate(cells)}
    results: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        people, own = subjects(cell.tested), read(number)
        parts = [own]
        if cell.whole and cell.budget != ALL:
            parts.append(_rest_of(cell, read(number_of[whole[_method(cell)].key]), people))
        names = {name: getattr(cell, name) for name in ("dataset", "budget", "seed", "rag")}
        names["method"] = cell.recipe.name
        rows = [row for part in parts for row in part.rows]
        results += _scored(names, cell, rows, people, person_of(cell.tested), wordings[cell.dataset])
        costs += [names | spent for spent in _costs(cell, parts, own, people)]
    answered = pd.DataFrame(results).sort_values([*ORDER, "user_id", "query_id"], ignore_index=True)
    spent = pd.DataFrame(costs).sort_values([*ORDER, "group"], ignore_index=True)
    return answered[RESULTS.names], spent[COSTS.names]


def _method(cell: Cell) -> tuple[str, str, bool, int]:
    return (cell.dataset, cell.recipe.name, cell.rag, cell.seed)


def _rest_of(cell: Cell, answers: CellAnswers, people: Subjects) -> CellAnswers:
    """Of the answers with the whole history, those of users whom the cell does not ask."""
    same = {user.id for user in people.users if not cell.asks(user)}
    return CellAnswers(
        rows=[row for row in answers.rows if row[0] in same],
        bytes={user_id: kept for user_id, kept in answers.bytes.items() if user_id in same},
        seconds={user_id: spent for user_id, spent in answers.seconds.items() if user_id in same},
        decode_tokens=0,
        decode_s=0.0,
    )


def _scored(
    names: dict[str, Any],
    cell: Cell,
    rows: Sequence[tuple[str, str, str, str]],
    people: Subjects,
    person_of: Mapping[str, str],
    wording: Wording,
) -> Iterator[dict[str, Any]]:
    said = {(user_id, query_id): (asked, prediction) for user_id, query_id, asked, prediction in rows}
    wanted = [(user, query) for user in people.users for query in user.queries]
    if len(said) != len(rows) or set(said) != {(user.id, query.id) for user, query in wanted}:
        raise ValueError(
            f"{cell.dataset}, {cell.recipe.name}, budget {cell.budget}: {len(rows)} answers for {len(wanted)} "
            f"questions; remove the cell {cell.key} and run the same command again"
        )
    for user, query in wanted:
        asked, prediction = said[user.id, query.id]
        if asked != prompt_hash(query):
            raise ValueError(
                f"{cell.dataset}, {cell.recipe.name}, budget {cell.budget}: another question was answered than the one "
                f"asked; remove the cell {cell.key} and run the same command again"
            )
        yield names | {
            "task": wording.task.name,
            "user_id": user.id,
            "person": person_of[user.id],
            "query_id": query.id,
            "history_items": len(cut(user, cell.budget).history),
            "full_history_items": len(user.history),
            "few_shot": user.is_few_shot,
            "prompt_hash": asked,
            "gold": query.target or "",
            "prediction": prediction,
            "score": query_score(wording.task, prediction, query.target or "", wording.labels or None),
        }


def _costs(
    cell: Cell, parts: Sequence[CellAnswers], own: CellAnswers, people: Subjects
) -> Iterator[dict[str, str | float]]:
    kept = {user_id: kept for part in parts for user_id, kept in part.bytes.items()}
    spent = {user_id: spent for part in parts for user_id, spent in part.seconds.items()}
    few = {user.id for user in people.users if user.is_few_shot}
    for group, users in zip(GROUPS, (kept.keys() & few, kept.keys() - few, kept.keys()), strict=True):
        if users:
            seconds = sum(spent[user_id] for user_id in sorted(users))
            yield {
                "group": group,
                "bytes_per_user": sum(kept[user_id] for user_id in sorted(users)) / len(users),
                "seconds_per_user": seconds / len(users),
                "training_device_seconds": seconds * cell.devices + cell.pooled_device_seconds,
                "bank_device_seconds": cell.bank_device_seconds,
                "decode_tokens_per_s": own.decode_tokens / own.decode_s if own.decode_s else float("nan"),
            }
