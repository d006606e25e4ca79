"""Opening and migrating: once, whole or not at all, whoever comes first."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mta_ray.serving.database import AWAY, Database, DatabaseConfig, open_database, open_existing
from mta_ray.serving.migrations import MIGRATIONS, Migration, migrate
from mta_ray.serving.tables import metadata


def names_of(database: Database) -> dict[str, set[str]]:
    """Table -> its columns, as the database has them."""
    inspector = sa.inspect(database.engine)
    return {table: {c["name"] for c in inspector.get_columns(table)} for table in inspector.get_table_names()}


def test_the_tables_that_are_made_are_those_that_are_queried(database: Database) -> None:
    made = names_of(database)
    assert made.pop("schema_versions") == {"number", "applied_at_s"}
    assert made == {table.name: {c.name for c in table.c} for table in metadata.tables.values()}
    inspector = sa.inspect(database.engine)
    for table in metadata.tables.values():
        assert inspector.get_pk_constraint(table.name)["constrained_columns"] == [c.name for c in table.primary_key]
        nullable = {c["name"] for c in inspector.get_columns(table.name) if c["nullable"]}
        assert nullable - {"anchor_key"} == {c.name for c in table.c if c.nullable} - {"anchor_key"}


def test_migrations_are_numbered_and_done_once(database: Database, database_url: str) -> None:
    assert [migration.number for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
    with database.writing() as connection:
        assert migrate(connection, 0.0) == 0
    open_database(DatabaseConfig(url=database_url, busy_timeout_s=60.0)).close()


def test_a_database_of_an_older_program_is_brought_forward_with_its_data(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE bank_state SET generation = 7"))
    newer = (*MIGRATIONS, Migration(number=99, statements=("ALTER TABLE bank_state ADD COLUMN note {text}",)))
    with database.writing() as connection:
        assert migrate(connection, 0.0, newer) == 1
        assert tuple(connection.execute(sa.text("SELECT generation, note FROM bank_state")).one()) == (7, None)


def test_a_migration_that_fails_leaves_nothing(database: Database) -> None:
    before = names_of(database)
    steps = ("CREATE TABLE half (a {text})", "UPDATE bank_state SET generation = 7", "CREATE TABLE half (a {text})")
    with pytest.raises(sa.exc.DBAPIError), database.writing() as connection:
        migrate(connection, 0.0, (*MIGRATIONS, Migration(number=99, statements=steps)))
    assert names_of(database) == before
    with database.reading() as connection:
        assert connection.execute(sa.text("SELECT generation FROM bank_state")).scalar() == 0
        assert 99 not in set(connection.execute(sa.text("SELECT number FROM schema_versions")).scalars())


def test_a_database_of_a_newer_program_is_refused(database: Database, database_url: str) -> None:
    with database.writing() as connection:
        connection.execute(sa.text("INSERT INTO schema_versions VALUES (1000, 0)"))
    with pytest.raises(ValueError, match="1000.*upgrade mta_ray"):
        open_database(DatabaseConfig(url=database_url, busy_timeout_s=60.0))


def test_processes_that_start_at_once_make_one_database(database_url: str, run_python: Callable[..., Any]) -> None:
    code = """
import sys
from mta_ray.serving.database import *
print("ready", flush=True)
sys.stdin.readline()
with open_database(DatabaseConfig(url=sys.argv[1], busy_timeout_s=60.0)).reading() as connection:
    print(connection.exec_driver_sql("SELECT count(*) FROM schema_versions").scalar())
"""
    processes = [run_python(code) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        print(file=process.stdin, flush=True)
    for process in processes:
        assert process.stdout.read() == f"{len(MIGRATIONS)}\n", process.stderr.read()
        assert process.wait(timeout=600) == 0


def test_sqlite_is_opened_for_many_processes_and_for_keeps(tmp_path: Path) -> None:
    database = open_database(DatabaseConfig(url=f"sqlite:///{tmp_path}/a/b.db", busy_timeout_s=3.0))
    wanted = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 3000, "secure_delete": 1}
    for transaction in (database.reading, database.writing, database.reading):
        with transaction() as connection:
            assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted} == wanted
    database.close()


def test_a_transaction_is_all_or_nothing_and_readers_do_not_wait(database: Database) -> None:
    change = sa.text("UPDATE bank_state SET generation = generation + 1")
    look = sa.text("SELECT generation FROM bank_state")
    with pytest.raises(KeyError), database.writing() as connection:
        connection.execute(change)
        with database.reading() as other:
            assert other.execute(look).scalar() == 0
        raise KeyError
    with database.writing() as connection:
        connection.execute(change)
    with database.reading() as connection:
        assert connection.execute(look).scalar() == 1


@pytest.mark.parametrize("url", ["mysql://a:secret@b/c", "sqlite://", "sqlite:///:memory:", "://secret", "http://x"])
def test_other_urls_are_refused_without_telling_a_password(url: str) -> None:
    with pytest.raises(ValueError, match="give a") as told:
        open_database(DatabaseConfig(url=url))
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"busy_timeout_s": 0.0}])
def test_settings_that_make_no_pool_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted at least 1"):
        DatabaseConfig(**wrong)


def test_what_a_deletion_left_in_the_log_is_written_back_later(tmp_path: Path) -> None:
    file, log = tmp_path / "users.db", tmp_path / "users.db-wal"
    database = open_database(DatabaseConfig(url=str(file)))
    reader = sqlite3.connect(file)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM bank_state").fetchall()
    insert = "INSERT INTO retired_anchors (digest, retired_at_s) VALUES (:digest, 0)"
    for statement in (insert, "DELETE FROM retired_anchors WHERE digest = :digest"):
        with database.writing() as connection:
            connection.execute(sa.text(statement), {"digest": b"xyzzyplugh"})
    database.forget_pages()  # a reader holds it up, which is no error
    database.forget_owed_pages()
    assert b"xyzzyplugh" in log.read_bytes()
    reader.close()
    database.forget_owed_pages()
    assert b"xyzzyplugh" not in log.read_bytes() + file.read_bytes()
    database.close()


def test_a_lost_or_mistyped_file_is_not_made_anew(tmp_path: Path) -> None:
    config = DatabaseConfig(url=str(tmp_path / "users.db"))
    with pytest.raises(ValueError, match="no database is at"):
        open_existing(config)
    assert not list(tmp_path.iterdir())
    open_database(config).close()
    database = open_existing(config)
    database.check_place()
    (tmp_path / "users.db").rename(tmp_path / "away.db")
    with pytest.raises(ValueError, match="is gone"):
        database.check_place()
    database.close()  # and its connections
    with pytest.raises(AWAY), database.reading() as connection:
        connection.execute(sa.text("SELECT 1"))
    assert not (tmp_path / "users.db").exists()
    open_database(config).close()
    with pytest.raises(ValueError, match="another file took the place"):
        database.check_place()
    database.close()


TAKE_THE_LOG_AWAY = """
import sqlite3, sys
try:
    print(sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode = DELETE").fetchone()[0])
except sqlite3.OperationalError as error:
    print(error)
"""


def test_a_file_that_is_opened_again_keeps_the_locks_of_its_first_connection(tmp_path: Path) -> None:
    """Closing any descriptor of a file gives up all of a process's locks on it; another process would drop the log."""
    file = tmp_path / "users.db"
    first = open_database(DatabaseConfig(url=str(file)))
    with first.reading() as connection:
        connection.execute(sa.text("SELECT generation FROM bank_state")).scalar()
    open_database(DatabaseConfig(url=str(file))).close()
    command = [sys.executable, "-c", TAKE_THE_LOG_AWAY, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "database is locked"
    first.close()
    assert file.stat().st_mode & 0o777 == 0o600
