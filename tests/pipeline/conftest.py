"""What the tests of the stages share: a small world, embedded, with an untaught base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ray.benchmarks.small_world import make_world


@pytest.fixture(scope="session")
def taught(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with users, embeddings and an untaught base."""
    home = tmp_path_factory.mktemp("run")
    make_world(home, users=30)
    return home
