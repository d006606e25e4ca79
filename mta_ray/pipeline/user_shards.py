"""Users sorted onto disk by shard while they are read, and each shard put together afterwards.

Whoever comes again, in any file, comes to the same shard; so a shard alone tells who is new, and no task knows all ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mta_ray.lamp.readers import join, leaked_items
from mta_ray.lamp.users import SCHEMA, User, from_table, to_table

BATCH_USERS = 64
"""Users that become one Arrow batch."""
BUFFER_MIB = 32
"""What a reader gathers, over all shards, before it writes."""

_ORIGIN = [
    ("file", pa.int32()),
    ("position", pa.int64()),
    ("names_user", pa.bool_()),
    ("leaked_items", pa.int32()),
    ("left_out_items", pa.int32()),
]
_SPILL_SCHEMA = pa.schema([*SCHEMA, *_ORIGIN])


class Spill:
    """Users on their way to the shards' files: few as Python objects, some as Arrow, the rest on disk."""

    def __init__(self, folder: Path, file: int, shards: int, stack: ExitStack) -> None:
        self._folder, self._file, self._shards, self._stack = folder, file, shards, stack
        self._users: list[User] = []
        self._origins: list[dict[str, Any]] = []
        self._tables: list[list[pa.Table]] = [[] for _ in range(shards)]
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._buffered_bytes = 0

    def add(self, user: User, position: int, names_user: bool) -> None:
        """`names_user`: whether this is one question of possibly several of a user whom it names."""
        origin = {"file": self._file, "position": position, "names_user": names_user}
        self._users.append(user)
        self._origins.append(origin | {"leaked_items": leaked_items(user), "left_out_items": 0})
        if len(self._users) == BATCH_USERS:
            self._to_arrow()
            if self._buffered_bytes > BUFFER_MIB * 2**20:
                self._to_disk()

    def flush(self) -> None:
        self._to_arrow()
        self._to_disk()

    def _to_arrow(self) -> None:
        if not self._users:
            return
        table = _with_origins(self._users, self._origins)
        shard = np.array([_shard_of(user.id, self._shards) for user in self._users])
        for number in np.unique(shard):
            part = table.take(np.flatnonzero(shard == number))
            self._tables[number].append(part)
            self._buffered_bytes += part.nbytes
        self._users, self._origins = [], []

    def _to_disk(self) -> None:
        for number, tables in enumerate(self._tables):
            if not tables:
                continue
            if number not in self._writers:
                path = self._folder / f"shard-{number:05d}-{self._file:05d}.parquet"
                self._writers[number] = self._stack.enter_context(pq.ParquetWriter(path, _SPILL_SCHEMA))
            self._writers[number].write_table(pa.concat_tables(tables))
            tables.clear()
        self._buffered_bytes = 0


def read_spilled(folder: Path, shard: int) -> pa.Table | None:
    """The rows that were spilled for a shard, in the order of the files and of the records in them; None: none."""
    parts = [pq.ParquetFile(path).read() for path in sorted(folder.glob(f"shard-{shard:05d}-*.parquet"))]
    return pa.concat_tables(parts) if parts else None


def sort_out(rows: pa.Table) -> tuple[list[int], dict[int, list[int]], list[int]]:
    """First row of each user; for some of them the further rows that belong to it; rows of users met before.

    Further questions that name the same user belong to the first (time-based splits). The same question does not, nor a
    user with a profile and queries of its own, nor a question that names no user: then the user's id is the question's.
    """
    first: dict[str, int] = {}
    further: dict[int, list[int]] = {}
    again: list[int] = []
    asked: dict[int, set[str]] = {}
    names_user = rows["names_user"].to_pylist()
    for row, user_id in enumerate(rows["user_id"].to_pylist()):
        known = first.setdefault(user_id, row)
        if known == row:
            continue
        questions = asked.setdefault(known, _question_ids(rows, known))
        if names_user[row] and names_user[known] and questions.isdisjoint(_question_ids(rows, row)):
            further.setdefault(known, []).append(row)
            questions |= _question_ids(rows, row)
        else:
            again.append(row)
    return list(first.values()), further, again


def join_rows(rows: pa.Table, kept: list[int], further: dict[int, list[int]]) -> pa.Table:
    """The kept rows, in order, each with its further rows joined into it; `left_out_items` says what that cost.

    The history of a joined row is empty where its queries ask about all of it.
    """
    if not further:
        return rows.take(kept) if len(kept) < len(rows) else rows
    tables, alone = [], []
    for row in kept:
        if row not in further:
            alone.append(row)
            continue
        group = rows.take([row, *further[row]])
        users = from_table(group.select(SCHEMA.names))
        user = join(users)
        origin = group.select([name for name, _ in _ORIGIN]).slice(0, 1).to_pylist()[0]
        left_out = max(len(one.history) for one in users) - len(user.history)
        tables += [
            rows.take(pa.array(alone, pa.int64())),
            _with_origins([user], [origin | {"leaked_items": 0, "left_out_items": left_out}]),
        ]
        alone = []
    return pa.concat_tables([*tables, rows.take(pa.array(alone, pa.int64()))])


def _question_ids(rows: pa.Table, row: int) -> set[str]:
    return {query["id"] for query in rows["queries"][row].as_py()}


def _with_origins(users: Sequence[User], origins: list[dict[str, Any]]) -> pa.Table:
    table, extra = to_table(users), pa.Table.from_pylist(origins, schema=pa.schema(_ORIGIN))
    return pa.table([*table.columns, *extra.columns], schema=_SPILL_SCHEMA)


def _shard_of(user_id: str, shards: int) -> int:
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest()) % shards
