"""What the tests of the stages share: a small world, embedded, with an untaught base model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from mta_ray.benchmarks.small_world import make_world


@pytest.fixture(scope="session")
def taught(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with users, embeddings and an untaught base; one for all processes of the test run."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = tmp_path_factory.getbasetemp().parent / "world"
    else:
        home = tmp_path_factory.mktemp("world")
    with FileLock(f"{home}.lock"):
        if not (home / "base").exists():  # the last that is made, and whole
            make_world(home, users=30)
    return home
