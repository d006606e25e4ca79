"""LaMP files in, a `users` artifact out: Parquet shards of users, the rejects with their reasons, the labels found.

Ray Data gives each file, then each shard, to a task of its own, and the tasks write to disk themselves: Ray's Parquet
sink collects all blocks of a task before it writes, so a file would have to fit into memory. Here the reader holds some
MiB whatever the file's size, a merging task one shard, and the driver only counts.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.actor import ActorHandle

from mta_ray.artifacts import artifact_files, is_current, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.lamp.readers import LampFile, Reject
from mta_ray.lamp.tasks import Task, task_named
from mta_ray.lamp.users import FEW_SHOT_ITEMS, SCHEMA, User, from_table
from mta_ray.pipeline.on_each import on_each
from mta_ray.pipeline.progress import follow, open_board
from mta_ray.pipeline.user_shards import BATCH_USERS, Spill, join_rows, read_spilled, sort_out

log = logging.getLogger(__name__)

KIND = "users"
SHARDS_MAX = 500
"""A reader holds one open file a shard; systems allow about 1,000."""
TOLD_REJECTS = 5
"""So many rejects an error names, where too many of them stop the run."""

REJECT_SCHEMA = pa.schema(
    [("file", pa.string()), ("position", pa.int64()), ("id", pa.string()), ("reason", pa.string())]
)
_COUNTS = ("users", "few_shot_users", "history_items", "queries", "leaked_items", "left_out_items")
_READ, _WRITE = "read users", "write users"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareUsersConfig:
    """Which files become users, and how many bad records are too many."""

    files: tuple[str, ...] = ()
    """LaMP files of one task: NAME_questions.json (its NAME_outputs.json lies beside it) or the processed files of OPPU
    and Per-Pcs; paths or fsspec URLs."""
    task: str = "movie_tagging"
    """Name or LaMP id of the task: movie_tagging, LaMP-4, ..."""
    out: str = "users"
    """Folder or fsspec URL of the artifact."""
    max_reject_share: float = 0.05
    """More rejected records than this share of all stop the run."""
    limit: int = 0
    """Read at most so many records of each file; 0 reads all."""
    shard_mib: float = 64.0
    """About how much of the input goes into one shard; a merging task holds one shard in memory."""
    force: bool = False
    """Whether to run although the artifact with these settings and inputs is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_share <= 1:
            raise ValueError(f"max_reject_share is {self.max_reject_share}, wanted a share from 0 to 1")
        if self.limit < 0 or not 0 < self.shard_mib < math.inf:
            raise ValueError(f"got limit={self.limit}, shard_mib={self.shard_mib}; wanted 0 or more, and more than 0")


def prepare_users(config: PrepareUsersConfig) -> str:
    """Where the finished artifact lies.

    Users stand by shard (a hash of the id), within it in the order of the files. Questions that name the same
    user become one user; a processed user who comes twice, in whichever files, is rejected the second time.
    """
    config = located(config, "out")
    config = replace(config, files=tuple(f if "://" in f else str(Path(f).absolute()) for f in config.files))

    # 1. look at every file; nothing to do?
    task, sources = look_at(config)
    settings = {name: getattr(config, name) for name in ("max_reject_share", "limit", "shard_mib")} | {
        "task": task.name
    }
    inputs = _identities([file for source in sources for file in (source.file, source.outputs) if file])
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("users: %s is current, nothing to do", config.out)
        return config.out
    with connect(config.cluster):
        return _prepare(config, task, settings, inputs)


def look_at(config: PrepareUsersConfig) -> tuple[Task, list[LampFile]]:
    """The task and its files. Raises ValueError for an unknown task, no files, or a file that holds something else."""
    task = task_named(config.task)
    if not config.files:
        raise ValueError("no files; give at least one LaMP file of the task with --files")
    return task, [LampFile(file, task) for file in config.files]


def _prepare(config: PrepareUsersConfig, task: Task, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    input_mib = sum(_size(file) for file in config.files) / 2**20
    shards = min(SHARDS_MAX, max(1, round(input_mib / config.shard_mib)))
    board = open_board()
    with publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        with tempfile.TemporaryDirectory(prefix="spill-", dir=draft.path) as folder:
            # 2. files -> rows on disk, by shard
            with follow(board, _READ, math.ceil(input_mib), "MiB"):
                reads = on_each(
                    len(config.files), _read_file, config=config, spill=Path(folder), shards=shards, board=board
                )
            errors = [row["error"] for row in reads if "error" in row]
            if errors:
                raise ValueError(errors[0])
            records = sum(row["records"] for row in reads)
            _check_share(config, reads, records)

            # 3. rows -> shards; who comes twice is joined or rejected
            with follow(board, _WRITE, shards, "shards"):
                merges = on_each(
                    shards, _merge_shard, files=config.files, spill=Path(folder), out=draft.path, board=board
                )
            _check_share(config, reads + merges, records)
            _collect_rejects(sorted(Path(folder).glob("rejects-*.parquet")), draft.path / "rejects.parquet")

        # 4. counts
        counts = {name: sum(row[name] for row in merges) for name in _COUNTS}
        if not counts["users"]:
            raise ValueError(f"no users in {', '.join(config.files)}; give files that hold some")
        reasons = _reasons(reads + merges)
        labels = list(dict.fromkeys(label for row in reads for label in row["labels"])) or list(task.labels)
        draft.facts.update(task=task.name, labels=labels, records=records, **counts)
        draft.facts.update(rejects=reasons.total(), rejects_by_reason=dict(sorted(reasons.items())))
    log.info("users: %d of %d records, %d rejects, in %s", counts["users"], records, reasons.total(), config.out)
    if counts["left_out_items"]:
        log.info("users: %d history items are left out, as other questions ask about them", counts["left_out_items"])
    if counts["leaked_items"]:
        log.warning(
            "users: %d of %d history items are asked about by their own user's queries: the answers stand in the "
            "history, so scores on those queries mean little; take these items out of the profiles",
            counts["leaked_items"],
            counts["history_items"],
        )
    return config.out


def read_users(path: str | Path) -> Iterator[User]:
    """The users of an artifact, shard by shard, a few in memory at a time."""
    for file in _shards_of(path):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_USERS):
            yield from from_table(pa.Table.from_batches([batch]))


def users_dataset(path: str | Path) -> ray.data.Dataset:
    """The users of an artifact as a Ray dataset with rows of `lamp.users.SCHEMA`; in a store, read where they lie."""
    files, store = artifact_files(path, kind=KIND)
    return ray.data.read_parquet([file for file in files if _is_shard(file)], filesystem=store)


def _shards_of(path: str | Path) -> list[Path]:
    artifact = open_artifact(path, kind=KIND)
    return [artifact.path / name for name in artifact.files if _is_shard(name)]


def _is_shard(name: str) -> bool:
    return PurePosixPath(name).match("users-*.parquet")


# ---- inputs


def _identities(files: Sequence[str]) -> dict[str, str]:
    """Size and sha256 of each file, by its place and name."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = pool.map(_sha256, files)
        return {
            f"{number} {file.rpartition('/')[2]}": f"{_size(file)} bytes, sha256 {digest}"
            for number, (file, digest) in enumerate(zip(files, hashes, strict=True))
        }


def _sha256(file: str) -> str:
    digest = sha256()
    with fsspec.open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(file: str) -> int:
    store, path = fsspec.core.url_to_fs(file)
    return int(store.size(path))


# ---- tasks


def _read_file(
    batch: dict[str, Any], config: PrepareUsersConfig, spill: Path, shards: int, board: ActorHandle
) -> dict[str, list[str]]:
    """One file's users and rejects onto disk. A file that cannot be read is told, not raised: Ray would wrap it."""
    number = int(batch["number"][0])
    try:
        told = _spill_file(number, config, spill, shards, board)
    except pa.ArrowException:
        raise
    except ValueError as error:
        told = {"error": str(error)}
    return {"told": [json.dumps({"number": number, **told})]}


def _spill_file(
    number: int, config: PrepareUsersConfig, spill: Path, shards: int, board: ActorHandle
) -> dict[str, Any]:
    source = LampFile(config.files[number], task_named(config.task))
    rejects = _Rejects()
    records = 0
    with ExitStack() as stack:
        rejected = stack.enter_context(pq.ParquetWriter(spill / f"rejects-0-{number:05d}.parquet", REJECT_SCHEMA))
        rows = Spill(spill, number, shards, stack)
        for position, found in enumerate(islice(source, config.limit or None)):
            records += 1
            if isinstance(found, Reject):
                rejects.add(found, rejected)
            else:
                rows.add(found, position, source.names_user)
            if position % BATCH_USERS == 0:
                board.report.remote(_READ, str(number), source.bytes_read // 2**20)
        rows.flush()
        rejects.flush(rejected)
    board.report.remote(_READ, str(number), math.ceil(source.bytes_read / 2**20))
    return {"records": records, "labels": source.labels, **rejects.told()}


def _merge_shard(
    batch: dict[str, Any], files: tuple[str, ...], spill: Path, out: Path, board: ActorHandle
) -> dict[str, list[str]]:
    """One shard of the artifact out of what the readers wrote for it."""
    number = int(batch["number"][0])
    rejects = _Rejects()
    counts = dict.fromkeys(_COUNTS, 0)
    rows = read_spilled(spill, number)
    if rows is not None:
        kept, further, again = sort_out(rows)
        users = join_rows(rows, kept, further)
        is_empty = pc.equal(pc.list_value_length(users["history"]), 0)
        emptied = [row for row, empty in zip(kept, is_empty.to_pylist(), strict=True) if empty]
        refused = [(row, "duplicate id") for row in again]
        refused += [(one, "all of the profile is asked about") for row in emptied for one in (row, *further[row])]
        with pq.ParquetWriter(spill / f"rejects-1-{number:05d}.parquet", REJECT_SCHEMA) as rejected:
            for row, reason in refused:
                file, position, user_id = (rows[name][row].as_py() for name in ("file", "position", "user_id"))
                rejects.add(Reject(file=files[file], position=position, id=user_id, reason=reason), rejected)
            rejects.flush(rejected)
        users = users.filter(pc.invert(is_empty)) if emptied else users
        pq.write_table(
            users.select(SCHEMA.names), out / f"users-{number:05d}.parquet", row_group_size=256, compression="zstd"
        )
        items, queries = (pc.list_value_length(users[name]) for name in ("history", "queries"))
        counts["users"] = len(users)
        counts["few_shot_users"] = pc.sum(pc.less_equal(items, FEW_SHOT_ITEMS), min_count=0).as_py()
        counts["history_items"], counts["queries"] = (pc.sum(n, min_count=0).as_py() for n in (items, queries))
        for name in ("leaked_items", "left_out_items"):
            counts[name] = pc.sum(users[name], min_count=0).as_py()
    board.report.remote(_WRITE, str(number), 1)
    return {"told": [json.dumps({"number": number, **counts, **rejects.told()})]}


# ---- rejects


class _Rejects:
    """Rejects on their way to a file, and how many there were of each kind."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._reasons: Counter[str] = Counter()
        self._some: list[str] = []

    def add(self, reject: Reject, writer: pq.ParquetWriter) -> None:
        if len(self._some) < TOLD_REJECTS:
            self._some.append(f"{reject.file}, record {reject.position}: {reject.reason}")
        self._reasons[reject.kind] += 1
        self._rows.append(asdict(reject))
        if len(self._rows) == 1000:
            self.flush(writer)

    def flush(self, writer: pq.ParquetWriter) -> None:
        writer.write_table(pa.Table.from_pylist(self._rows, schema=REJECT_SCHEMA))
        self._rows = []

    def told(self) -> dict[str, Any]:
        return {"rejects": self._reasons, "some_rejects": self._some}


def _reasons(told: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(row["rejects"]) for row in told), Counter())


def _check_share(config: PrepareUsersConfig, told: list[dict[str, Any]], records: int) -> None:
    reasons = _reasons(told)
    if not reasons.total() or reasons.total() / records <= config.max_reject_share:  # 0.29 * 100 is less than 29
        return
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    some = [reject for row in told for reject in row["some_rejects"]][:TOLD_REJECTS]
    raise ValueError(
        f"{reasons.total()} of {records} records rejected, more than the share {config.max_reject_share:g}: {counted}; "
        f"the first: {'; '.join(some)}; nothing was published: mend the files, or raise max_reject_share to go on "
        "without these records"
    )


def _collect_rejects(parts: list[Path], out: Path) -> None:
    with pq.ParquetWriter(out, REJECT_SCHEMA) as writer:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                writer.write_batch(batch)
