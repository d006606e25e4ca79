"""The histories of a few chosen users, taken out of all of them by Ray Data and kept one file each.

Neither the driver nor any worker holds more than a few batches of users: the candidates may be millions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mta_ray.artifacts import Artifact, is_current, open_artifact, publish
from mta_ray.lamp.users import User, from_table
from mta_ray.pipeline.prepare_users import users_dataset

KIND = "histories"
BATCH_USERS = 256


def collect_histories(users: str | Path, user_ids: Sequence[str], out: str, *, inputs: dict[str, str]) -> None:
    """Publish user number n of `user_ids` as the file `n.parquet` of an artifact, unless it is there already.

    Raises ValueError where one of them is not among the users.
    """
    settings = {"users": list(user_ids)}
    if is_current(out, kind=KIND, settings=settings, inputs=inputs):
        return
    number_of = {user_id: number for number, user_id in enumerate(user_ids)}
    found = users_dataset(users).map_batches(
        _keep_named,
        fn_kwargs={"names": list(number_of)},
        batch_size=BATCH_USERS,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    with publish(out, kind=KIND, settings=settings, inputs=inputs) as draft:
        missing = set(number_of)
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row, user_id in enumerate(batch["user_id"].to_pylist()):
                pq.write_table(batch.slice(row, 1), draft.path / f"{number_of[user_id]:05d}.parquet")
                missing.discard(user_id)
        if missing:
            raise ValueError(f"{len(missing)} of {len(number_of)} anchors are not among the users of {users}")


def open_histories(path: str) -> Artifact:
    """What `collect_histories` published."""
    return open_artifact(path, kind=KIND, verify=False)


def read_history(histories: Artifact, number: int) -> User:
    """User number `number` of those that were collected. Raises ValueError where the file holds somebody else."""
    user = from_table(pq.ParquetFile(histories.path / f"{number:05d}.parquet").read())[0]
    if user.id != histories.settings["users"][number]:
        raise ValueError(
            f"{histories.path}: file {number:05d}.parquet holds another user than the artifact says; "
            "remove that folder and run the same command again"
        )
    return user


def _keep_named(batch: pa.Table, names: list[str]) -> pa.Table:
    return batch.filter(pc.is_in(batch["user_id"], value_set=pa.array(names, pa.string())))
