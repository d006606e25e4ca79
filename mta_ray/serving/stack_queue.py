"""Users who wait for a stack: one job a user, taken under a lease, so that a worker that is killed loses nothing."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from mta_ray.serving.database import Database
from mta_ray.serving.identity import UserId
from mta_ray.serving.tables import stack_jobs, users
from mta_ray.serving.user_state import UserStack
from mta_ray.serving.user_store import Conflict, UnknownUser, put_stack_within

log = logging.getLogger(__name__)
Status = Literal["none", "waiting", "training", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """How patient the queue is."""

    lease_s: float = 300.0
    """How long a worker may be silent before its jobs go to another; `renew` starts it anew."""
    attempts_max: int = 3
    """Leases that a job may let run out, or failures, before it is given up until it is asked for again."""

    def __post_init__(self) -> None:
        if self.lease_s <= 0 or self.attempts_max < 1:
            raise ValueError(
                f"lease_s is {self.lease_s} and attempts_max {self.attempts_max}, wanted more than 0 and at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StackJob:
    """A user whose stack is to be trained, by whoever holds the lease."""

    user: UserId
    history_version: int
    """Of the history when the stack was asked for last."""
    attempt: int
    """1 the first time."""
    lease: str


class LeaseLost(Exception):
    """The job was taken by another worker, or its user is gone."""


class StackQueue:
    """The waiting users of all tenants, longest waiting first."""

    def __init__(self, database: Database, config: QueueConfig | None = None) -> None:
        self.database = database
        self.config = config or QueueConfig()

    def enqueue(self, user: UserId) -> None:
        """Ask for a stack of the user's present history.

        Asked while one waits, it changes nothing; while one is trained, that one is followed by another.
        """
        with self.database.writing() as connection:
            lock = sa.select(users.c.version).where(_is(users, user)).with_for_update(read=True, key_share=True)
            version = connection.execute(lock).scalar()
            if version is None:
                raise UnknownUser("no such user")
            now_s = self.database.clock()
            asked = {"history_version": version, "asked_at_s": now_s}
            fresh = {"ready_at_s": now_s, "lease": None, "attempts": 0, "failure": None}
            row = {"tenant": user.tenant, "user_id": user.id, **asked, **fresh}
            if not self.database.insert_missing(connection, stack_jobs, row):
                connection.execute(sa.update(stack_jobs).where(_is(stack_jobs, user)).values(asked))
                has_failed = stack_jobs.c.ready_at_s.is_(None)
                connection.execute(sa.update(stack_jobs).where(_is(stack_jobs, user), has_failed).values(fresh))

    def claim(self, limit: int) -> list[StackJob]:
        """At most `limit` jobs that nobody else has, for the length of a lease."""
        with self.database.writing() as connection:
            # 1. those that are ready, passing over what another worker looks at just now
            now_s = self.database.clock()
            query = sa.select(stack_jobs).where(stack_jobs.c.ready_at_s <= now_s).order_by(stack_jobs.c.ready_at_s)
            rows = connection.execute(query.limit(limit).with_for_update(skip_locked=True)).all()

            # 2. ours now, or given up
            jobs = []
            for row in rows:
                user = UserId(tenant=row.tenant, id=row.user_id)
                if row.attempts >= self.config.attempts_max:
                    change = {"ready_at_s": None, "lease": None, "failure": row.failure or "workers died of it"}
                else:
                    lease = secrets.token_hex(16)
                    attempt = row.attempts + 1
                    change = {"ready_at_s": now_s + self.config.lease_s, "lease": lease, "attempts": attempt}
                    jobs.append(StackJob(user=user, history_version=row.history_version, attempt=attempt, lease=lease))
                connection.execute(sa.update(stack_jobs).where(_is(stack_jobs, user)).values(change))
        return jobs

    def renew(self, job: StackJob) -> None:
        """Start the lease anew; LeaseLost where it ran out and another worker has the job."""
        with self.database.writing() as connection:
            later = {"ready_at_s": self.database.clock() + self.config.lease_s}
            if not connection.execute(sa.update(stack_jobs).where(_is_held(job)).values(later)).rowcount:
                raise LeaseLost("another worker has the job, or its user is gone")

    def finish(self, job: StackJob, stack: UserStack) -> int | None:
        """Keep the stack and end the job, both or neither; the stack's version.

        A job that was asked for again since it was taken waits again. So it does, and the stack is not kept (None),
        where the history was replaced meanwhile.
        """
        with self.database.writing() as connection:
            version = None
            try:
                version = put_stack_within(
                    self.database, connection, job.user, stack
                )  # users before jobs, as delete does
            except UnknownUser:
                raise LeaseLost("the user is gone") from None
            except Conflict:
                log.info("a stack was trained on a history that was replaced meanwhile; it is trained again")
            ended = _is_held(job), stack_jobs.c.history_version == job.history_version
            if version is None or not connection.execute(sa.delete(stack_jobs).where(*ended)).rowcount:
                again = {"ready_at_s": self.database.clock(), "lease": None, "attempts": 0, "failure": None}
                if not connection.execute(sa.update(stack_jobs).where(_is_held(job)).values(again)).rowcount:
                    raise LeaseLost("another worker has the job")
        return version

    def fail(self, job: StackJob, reason: str) -> None:
        """Give a job back that went wrong: it waits again, or is given up after `attempts_max`."""
        is_over = job.attempt >= self.config.attempts_max
        change = {"ready_at_s": None if is_over else self.database.clock(), "lease": None, "failure": reason}
        with self.database.writing() as connection:
            if not connection.execute(sa.update(stack_jobs).where(_is_held(job)).values(change)).rowcount:
                raise LeaseLost("another worker has the job, or its user is gone")

    def status(self, user: UserId) -> Status:
        """Where the user's stack is on its way."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(stack_jobs).where(_is(stack_jobs, user))).first()
        if row is None:
            return "none"
        if row.ready_at_s is None:
            return "failed"
        return "training" if row.lease and row.ready_at_s > self.database.clock() else "waiting"

    def failure(self, user: UserId) -> str | None:
        """Why the user's last try was given up or waits again; none where there is nothing to tell."""
        query = sa.select(stack_jobs.c.failure).where(_is(stack_jobs, user))
        with self.database.reading() as connection:
            return connection.execute(query).scalar()

    def waiting(self) -> int:
        """How many jobs could be claimed now: what the trainers' number is scaled by."""
        query = (
            sa.select(sa.func.count()).select_from(stack_jobs).where(stack_jobs.c.ready_at_s <= self.database.clock())
        )
        with self.database.reading() as connection:
            return connection.execute(query).scalar_one()


def _is(table: sa.Table, user: UserId) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant == user.tenant, table.c.user_id == user.id)


def _is_held(job: StackJob) -> sa.ColumnElement[bool]:
    return sa.and_(_is(stack_jobs, job.user), stack_jobs.c.lease == job.lease)
