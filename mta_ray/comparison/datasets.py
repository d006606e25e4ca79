"""Data sets by name: whose users are tested, and who teaches base and bank; then the tested users, ready to be cut.

A `users` artifact with teachers from elsewhere holds them beside its own users: without queries, so that they are never
tested, and under names of their own.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from jaxtyping import Float
from numpy import ndarray

from mta_ray.artifacts import Artifact, canonical_json, is_current, jsonable, open_artifact, publish
from mta_ray.comparison.results import ALL
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import FEW_SHOT_ITEMS, SCHEMA, Query, User, from_table, to_table
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.embed_users import EmbedUsersConfig, item_texts, read_embeddings
from mta_ray.pipeline.group import start_worker
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig, tested_of
from mta_ray.population.people import SIMULATED_TASKS
from mta_ray.similarity.embedding import Encoder

log = logging.getLogger(__name__)
SIMULATED = "simulated"
"""In place of a path: the simulated population of the data set's task."""
TESTED = "tested-users"
"""The kind of artifact of tested users, with their vectors at each budget."""
_TEACHER = "teacher"
_BATCH_USERS = 256
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """What is compared on, by name."""

    name: str
    task: str
    files: tuple[str, ...] = ()
    """LaMP files, joined; none: the simulated population."""
    teachers: tuple[str, ...] = ()
    """More LaMP files of the task, or `simulated`: their users only teach."""


def parse_datasets(simulated: Sequence[str], files: Sequence[str], teachers: Sequence[str]) -> list[DataSet]:
    """The data sets that the settings name: the simulated ones (`simulated_TASK`), then those of `NAME=TASK:PATH`.

    Raises ValueError for a setting that says something else, an unknown task, or teachers of no data set.
    """
    found: dict[str, DataSet] = {}
    for task in simulated:
        name = f"{SIMULATED}_{task_named(task).name}"
        found[name] = DataSet(name=name, task=_simulated_task(task))
    for text in files:
        name, task, path = _split_file(text)
        known = found.get(name)
        if known and known.task != task:
            raise ValueError(f"data set {name} is given files of {known.task} and of {task}; one name, one task")
        found[name] = DataSet(name=name, task=task, files=(*(known.files if known else ()), path))
    for text in teachers:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise ValueError(f"teachers are given as NAME=PATH or NAME={SIMULATED}, got {text!r}")
        if name not in found:
            raise ValueError(f"teachers of {name!r}, but the data sets are {', '.join(found) or 'none'}; correct it")
        if path == SIMULATED:
            _simulated_task(found[name].task)
        found[name] = replace(found[name], teachers=(*found[name].teachers, path))
    if not found:
        raise ValueError("no data set; name tasks with --simulated, or files with --files NAME=TASK:PATH")
    return list(found.values())


def join_teachers(own: str, teachers: Sequence[str], out: str) -> str:
    """Publish the users of `own` and, as teachers only, those of the other `users` artifacts with enough items."""
    opened = [open_artifact(path, kind="users", verify=False) for path in (own, *teachers)]
    inputs = {f"{number}": artifact.hash for number, artifact in enumerate(opened)}
    settings: dict[str, Any] = {"with_teachers": len(teachers)}
    if is_current(out, kind="users", settings=settings, inputs=inputs):
        return out
    with publish(out, kind="users", settings=settings, inputs=inputs) as draft:
        counts = [_write(draft.path / "users-0.parquet", read_users(own))]
        for number, path in enumerate(teachers, start=1):
            file = draft.path / f"users-{number}.parquet"
            counts.append(_write(file, _as_teachers(read_users(path), prefix=f"{_TEACHER}-{number}-")))
        labels = dict.fromkeys(label for artifact in opened for label in artifact.facts["labels"])
        draft.facts.update(task=opened[0].facts["task"], labels=list(labels))
        draft.facts.update(users=sum(counts), records=sum(counts), rejects=0, teachers_from_elsewhere=sum(counts[1:]))
    return out


def cut(user: User, budget: str) -> User:
    """The user with the latest items only, as many as the budget allows; the queries stay."""
    if budget == ALL:
        return user
    return replace(user, history=user.history[len(user.history) - min(int(budget), len(user.history)) :])


def is_cut(user: User, budget: str) -> bool:
    """Whether the budget is less than what the user has."""
    return budget != ALL and int(budget) < len(user.history)


def prompt_hash(query: Query) -> str:
    """16 hex digits of the question as the data has it, which no method changes."""
    return blake2b(canonical_json([query.content, *query.options]).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """A `tested-users` artifact, read."""

    users: list[User]
    """With all of their history, by id."""
    means: Mapping[str, Float[ndarray, "users dim"]]
    """Budget to mean item vectors, as `embed_users` gives them."""
    encode_s: float
    """Seconds that one item took to encode."""
    max_items: int
    """Of a user, the latest, are encoded."""

    def digest(self, budget: str) -> str:
        """Of all that a budget's answers can depend on; other budgets do not count."""
        people = canonical_json([jsonable(cut(user, budget)) for user in self.users])
        return blake2b(people.encode() + self.means[budget].tobytes(), digest_size=16).hexdigest()


def write_tested(
    users: str,
    embeddings: str,
    out: str,
    *,
    budgets: Iterable[str],
    split: SplitConfig,
    embed: EmbedUsersConfig,
    workers: ActorConfig,
) -> str:
    """Publish the tested users with their mean item vectors at each budget, on the connected cluster."""
    wanted = list(dict.fromkeys([ALL, *budgets]))
    table = read_embeddings(embeddings)
    settings: dict[str, Any] = {
        "budgets": wanted,
        "split": split,
        "max_items": embed.max_items,
        "max_words": embed.max_words,
    }
    settings["edition"] = 2  # with encode_s in its facts
    inputs = {"users": open_artifact(users, kind="users", verify=False).hash, "embeddings": table.hash}
    if is_current(out, kind=TESTED, settings=settings, inputs=inputs):
        return out
    with publish(out, kind=TESTED, settings=settings, inputs=inputs) as draft:
        tested = tested_of(users, table, split)
        row = {user_id: number for number, user_id in enumerate(table.user_ids)}
        task = ray.remote(_cut_means).options(num_cpus=workers.cpus, num_gpus=workers.gpus)
        means, encode_s = ray.get(task.remote(tested, wanted, table.encoder, embed.max_items, embed.max_words, workers))
        means[ALL] = table.means[[row[user.id] for user in tested]]
        draft.facts.update(encode_s=encode_s)
        pq.write_table(to_table(tested), draft.path / "users.parquet")
        vectors = {budget: pa.array(list(rows), type=pa.list_(pa.float32())) for budget, rows in means.items()}
        pq.write_table(pa.table(vectors), draft.path / "vectors.parquet")
    return out


def read_tested(path: str) -> Subjects:
    """What `write_tested` has published."""
    artifact: Artifact = open_artifact(path, kind=TESTED)
    vectors = pq.read_table(artifact.path / "vectors.parquet")
    return Subjects(
        users=from_table(pq.read_table(artifact.path / "users.parquet")),
        means={name: np.array(vectors[name].to_pylist(), dtype=np.float32) for name in vectors.column_names},
        encode_s=artifact.facts["encode_s"],
        max_items=artifact.settings["max_items"],
    )


def _cut_means(
    tested: list[User], budgets: list[str], encoder: str, max_items: int, max_words: int, workers: ActorConfig
) -> tuple[dict[str, np.ndarray], float]:
    """Budget to the mean item vectors; and the seconds of one item."""
    start_worker(workers.cpus)
    model = Encoder(encoder, device=workers.device)
    model.embed_users([item_texts(tested[0], 1, max_words)])  # what only the first call does is not timed
    texts = {budget: [item_texts(cut(user, budget), max_items, max_words) for user in tested] for budget in budgets}
    started_s = time.perf_counter()
    found = {budget: model.embed_users(of_users) for budget, of_users in texts.items()}
    items = sum(len(own) for of_users in texts.values() for own in of_users)
    return found, (time.perf_counter() - started_s) / items


def _as_teachers(users: Iterable[User], *, prefix: str) -> Iterator[User]:
    for user in users:
        if len(user.history) > FEW_SHOT_ITEMS:
            yield replace(user, id=f"{prefix}{user.id}", queries=())


def _write(file: Any, users: Iterable[User]) -> int:
    count, waiting = 0, iter(users)
    with pq.ParquetWriter(file, SCHEMA) as writer:
        while batch := list(islice(waiting, _BATCH_USERS)):
            writer.write_table(to_table(batch))
            count += len(batch)
    return count


def _split_file(text: str) -> tuple[str, str, str]:
    name, is_named, rest = text.partition("=")
    task, has_task, path = rest.partition(":")
    if not (is_named and has_task and name and path):
        raise ValueError(f"files are given as NAME=TASK:PATH, such as news=news_headline:news.json; got {text!r}")
    if not _NAME.fullmatch(name) or name.startswith(f"{SIMULATED}_"):
        raise ValueError(
            f"a data set cannot be called {name!r}; wanted letters, digits and _.+-, not beginning with {SIMULATED}_"
        )
    return name, task_named(task).name, path


def _simulated_task(task: str) -> str:
    name = task_named(task).name
    if name not in SIMULATED_TASKS:
        raise ValueError(f"task {name} cannot be simulated; choose of {', '.join(SIMULATED_TASKS)}")
    return name
