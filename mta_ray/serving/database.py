"""The SQL database of the service, opened and migrated: a SQLite file, or PostgreSQL by URL. Knows no table."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite

from mta_ray.serving.migrations import migrate

_WRITES = "mta_writes"
CHECKPOINT_WAIT_MS = 500
"""For readers, when the log is to be written back."""
AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)
"""What is raised where the database does not answer, or not in time, or cannot write: the same may succeed later."""
STORE = "runs/serving.db"
"""Where the service and its commands (keys, bank publish) look when nothing else is said: one place for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """Where the service keeps its state."""

    url: str = STORE
    """A SQLite file, or `postgresql://user@host/name`; leave its password to PGPASSWORD or ~/.pgpass."""
    connections: int = 8
    """Open at once by one process, at most."""
    busy_timeout_s: float = 10.0
    """How long a statement waits for another process's lock before it fails."""

    def __post_init__(self) -> None:
        if self.connections < 1 or self.busy_timeout_s <= 0:
            raise ValueError(
                f"connections is {self.connections} and busy_timeout_s {self.busy_timeout_s}, wanted at least 1 and "
                "more than 0"
            )


class Database:
    """Transactions on the database; one object a process, used by any number of threads."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float]) -> None:
        self.engine = engine
        self.clock = clock
        self._file = Path(str(engine.url.database)) if engine.dialect.name == "sqlite" else None
        self._inode: int | None = None
        self._owes_pages = self.is_sqlite  # what a process before this one may have left
        self._forgetting = threading.Lock()
        self._writing = engine.execution_options(**{_WRITES: True})
        # SQLite's connections begin nothing by themselves (see _open_sqlite); PostgreSQL is spared BEGIN and ROLLBACK
        self._reading = engine if self.is_sqlite else engine.execution_options(isolation_level="AUTOCOMMIT")

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection whose every statement sees what is committed; no transaction is held."""
        with self._reading.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of it, or on an exception nothing. On SQLite it is the only one that writes."""
        with self._writing.begin() as connection:
            yield connection

    def insert_missing(
        self, connection: sa.Connection, table: sa.Table, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> int:
        """Insert rows but those whose key is there; how many went in (of one row)."""
        insert = insert_sqlite if self.is_sqlite else insert_postgresql
        statement = insert(table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        return connection.execute(statement, rows).rowcount

    def insert_new(
        self,
        connection: sa.Connection,
        table: sa.Table,
        rows: Sequence[Mapping[str, Any]],
        returning: Sequence[sa.Column[Any]],
    ) -> list[sa.Row[Any]]:
        """Insert many rows but those whose key is there; those columns of the rows that went in."""
        insert = insert_sqlite if self.is_sqlite else insert_postgresql
        return list(connection.execute(insert(table).on_conflict_do_nothing().returning(*returning), list(rows)))

    def forget_pages(self) -> None:
        """After a deletion: write the log back, so that the file holds nothing of what is gone.

        Where that cannot be done now (somebody reads, the disk is full), it is owed: see `forget_owed_pages`.
        PostgreSQL's autovacuum does the like.
        """
        if not self.is_sqlite:
            return
        self._owes_pages = True
        with self._forgetting, suppress(*AWAY), self.reading() as connection:
            wait_ms = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {CHECKPOINT_WAIT_MS}")  # meanwhile nobody writes
            try:
                is_busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {wait_ms}")
            self._owes_pages = bool(is_busy)

    def forget_owed_pages(self) -> None:
        """Try again what a deletion could not do: to be called now and then."""
        if self._owes_pages:
            self.forget_pages()

    def check_place(self) -> None:
        """Raise ValueError where the SQLite file is gone, or another one lies in its place: what is written is lost."""
        if self._file is None:
            return
        try:
            inode = self._file.stat().st_ino
        except FileNotFoundError:
            raise ValueError(f"the database {self._file} is gone; put it back") from None
        if self._inode is None:
            self._inode = inode
        if inode != self._inode:
            raise ValueError(f"another file took the place of the database {self._file}")

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def open_database(
    config: DatabaseConfig, *, clock: Callable[[], float] = time.time, makes_file: bool = True
) -> Database:
    """The database, its file made if it is not there, brought to this program's schema."""
    url = _url(config.url)
    if url.get_backend_name() == "sqlite":
        engine = _open_sqlite(url, config, makes_file=makes_file)
    else:
        engine = _open_postgresql(url, config)
    database = Database(engine, clock)
    try:
        with database.writing() as connection:
            migrate(connection, clock())
        database.check_place()
    except BaseException:
        engine.dispose()
        raise
    return database


def open_existing(config: DatabaseConfig) -> Database:
    """The database, which must be there: a mistyped path, or a lost file, is not made anew. Raises ValueError."""
    if not is_there(config):
        raise ValueError(
            f"no database is at {_url(config.url).database}; give the one that the service was started with (mta "
            "serve, mta keys make and mta bank publish begin a new one)"
        )
    return open_database(config, makes_file=False)


def told_of(error: Exception) -> str:
    """What the driver says, for a log: without the statement, and (see _open_postgresql) without anybody's row."""
    said = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}"


def is_there(config: DatabaseConfig) -> bool:
    """False for a SQLite file that would have to be made."""
    url = _url(config.url)
    return url.get_backend_name() != "sqlite" or Path(str(url.database)).is_file()


def is_path(url: str) -> bool:
    """Whether it is the path of a SQLite file, rather than a URL."""
    return "://" not in url


def _url(text: str) -> sa.URL:
    if "://" not in text:
        return sa.URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        raise ValueError("the database URL is not one; give a file, or postgresql://user@host/name") from None
    name = url.get_backend_name()
    if name == "sqlite" and url.database not in (None, "", ":memory:"):
        return url
    if name in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(
        f"the database URL begins with {url.drivername}; give a SQLite file, or postgresql://user@host/name"
    )


def _open_sqlite(url: sa.URL, config: DatabaseConfig, *, makes_file: bool) -> sa.Engine:
    file = Path(str(url.database))
    if makes_file:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The log and its index take over these rights. A file that is there is never opened beside SQLite: closing it
        # would give up SQLite's locks on it for all connections of this process, and another process would delete the
        # log.
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    there = f"file:{quote(str(file))}?mode=rw"  # SQLite itself would make a file that is gone anew, without its keys

    engine = sa.create_engine(
        url,
        creator=lambda: sqlite3.connect(there, uri=True, timeout=config.busy_timeout_s, check_same_thread=False),
        pool_size=config.connections,
        max_overflow=0,
        hide_parameters=True,  # of errors: they hold what users wrote
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, with DDL inside them
        _use_log(connection, config.busy_timeout_s)
        for pragma in ("synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get(_WRITES):
            # the write lock at once: one that is taken on the way fails where another process was faster
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _use_log(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Write-ahead logging, a property of the file. Changing to it does not wait for other processes' locks: we do."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise ValueError(f"SQLite keeps journal mode {mode} here; put the file on a local disk, or use PostgreSQL")


def _open_postgresql(url: sa.URL, config: DatabaseConfig) -> sa.Engine:
    timeout_ms = int(config.busy_timeout_s * 1000)
    engine = sa.create_engine(
        url,
        pool_size=config.connections,
        max_overflow=0,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"connect_timeout": 10, "options": f"-c lock_timeout={timeout_ms}", "application_name": "mta_ray"},
    )

    @sa.event.listens_for(engine, "handle_error")
    def hide_row(context: sa.engine.ExceptionContext) -> None:
        """The server's DETAIL quotes the row."""
        for error in (context.original_exception, context.sqlalchemy_exception):
            if error is not None and error.args:
                error.args = (str(error.args[0]).split("\nDETAIL")[0], *error.args[1:])

    return engine
