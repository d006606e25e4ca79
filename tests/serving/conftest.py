"""What serving's tests stand on: the whole service where one asks for it, and real databases.

Those are a SQLite file, and a PostgreSQL server of this test run's own, on a socket in a folder of its own.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mta_ray.serving.database import Database, DatabaseConfig, open_database

if TYPE_CHECKING:
    from running import Service


@pytest.fixture(scope="module")
def service(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The whole service, for one file of tests."""
    from running import serving

    with serving(tmp_path_factory.mktemp("serving")) as service:
        yield service


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[sa.URL]:
    """A PostgreSQL server, as the URL of its first database; it lives as long as the test run."""
    programs = postgresql_programs()
    folder = Path(tempfile.mkdtemp(prefix="mta-pg-"))  # short: a socket's path has at most 107 bytes
    become = []
    if os.geteuid() == 0:  # it refuses to run as root
        owner = "postgres" if subprocess.run(["id", "postgres"], capture_output=True).returncode == 0 else "nobody"
        shutil.chown(folder, owner)
        become = ["setpriv", f"--reuid={owner}", "--clear-groups", "--pdeathsig=KILL"]
    data = str(folder / "data")
    initdb = [f"{programs}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    done = subprocess.run([*become, *initdb], capture_output=True, text=True, timeout=600, cwd="/")
    assert done.returncode == 0, done.stderr

    settings = ["-h", "", "-k", str(folder), "-c", "fsync=off", "-c", "shared_buffers=32MB", "-c", "max_connections=60"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([*become, f"{programs}/postgres", "-D", data, *settings], stderr=log, cwd="/")
    try:
        url = sa.URL.create("postgresql", username="postgres", query={"host": str(folder)}, database="postgres")
        wait_for(url, server, folder / "log")
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def postgresql_programs() -> str:
    """The folder of initdb and postgres: Debian's newest, or what PATH holds; installed where we may."""
    for attempt in range(2):
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(path.split("/")[4]))
        found += filter(None, [shutil.which("initdb")])
        if found:
            return str(Path(found[-1]).parent)
        if attempt == 0 and os.geteuid() == 0 and shutil.which("apt-get"):
            subprocess.run(["apt-get", "-qq", "update"], capture_output=True, timeout=300)
            install = ["apt-get", "-qq", "-y", "install", "--no-install-recommends", "postgresql"]
            subprocess.run(install, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
    pytest.skip("PostgreSQL is not installed, and we may not install it: apt-get install postgresql")


def wait_for(url: sa.URL, server: subprocess.Popen[bytes], log: Path) -> None:
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            engine.connect().close()
            return
        except sa.exc.OperationalError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture
def postgresql_url(postgresql_server: sa.URL) -> Iterator[str]:
    """An empty database of that server."""
    name = f"test_{os.getpid()}_{time.monotonic_ns()}"
    admin = sa.create_engine(postgresql_server.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield postgresql_server.set(database=name).render_as_string()
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return str(tmp_path / "state" / "users.db")
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def database(database_url: str, clock: Clock) -> Iterator[Database]:
    opened = open_database(DatabaseConfig(url=database_url, busy_timeout_s=60.0), clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def run_python(database_url: str) -> Iterator[object]:
    """A function (code) -> a process that runs it with `url` set; whatever still runs is killed at the end."""
    started = []

    def start(code: str, *args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, database_url, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
