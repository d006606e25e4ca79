"""Imports only go down. This file holds the list of floors and checks it over the source, imports in functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mta_ray"
JOBS = PACKAGE.parent / "jobs"

GROUND = ("errors", "files", "object_store", "settings", "console", "artifacts")
"""Single files that anybody may stand on; each knows nothing but libraries, and files before it."""
FLOORS = (
    ("lamp", "lora"),
    ("similarity", "model"),
    ("personalize",),
    ("cluster", "pipeline", "serving"),
    ("population", "evaluation", "benchmarks", "bank_commands"),
    ("comparison",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APART = ({"lamp", "lora"}, {"pipeline", "serving"})
"""Rooms of one floor that do not know each other."""
RAY_FROM_FLOOR = 3
IN_ONE_FILE = ("bitsandbytes", "deepspeed", "faiss")


def imports(path: Path, package: Path) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in it; of our package `mta_ray.room.module`."""
    names = set()
    here = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(package: Path) -> list[str]:
    """One line for each import that the house does not allow."""
    found = []
    users: dict[str, set[str]] = {library: set() for library in IN_ONE_FILE}
    for path in sorted(package.rglob("*.py")):
        where = str(path.relative_to(package))
        room = path.relative_to(package).with_suffix("").parts[0]
        if room == "__init__":
            room = "the package itself"
        elif room not in FLOOR and room not in GROUND:
            found.append(f"{where}: {room} has no floor; put it in the list")
            continue

        floor = FLOOR.get(room, 0)
        for name in sorted(imports(path, package)):
            library, *rest = name.split(".")
            other = rest[0] if rest else ""
            if library in users:
                users[library].add(where)
            if library == "ray" and floor < RAY_FROM_FLOOR:
                found.append(f"{where}: ray below floor {RAY_FROM_FLOOR}")
            if library != package.name or other not in (*FLOOR, *GROUND) or other == room:
                continue
            if room in GROUND and other in GROUND and GROUND.index(other) < GROUND.index(room):
                continue
            if room not in FLOOR:
                found.append(f"{where}: {room} is ground and knows {other}")
            elif FLOOR.get(other, 0) > floor:
                found.append(f"{where}: {room} imports {other}, which is above it")
            elif any({room, other} == pair for pair in APART):
                found.append(f"{where}: {room} and {other} do not know each other")

    found += [
        f"{library} in {len(files)} files: {', '.join(sorted(files))}"
        for library, files in users.items()
        if len(files) > 1
    ]
    return found


def test_the_house_stands() -> None:
    assert violations(PACKAGE) == []


def test_every_room_of_the_package_is_looked_at() -> None:
    """The check reads real files: ones that are certain to be there, with an import that is certain to be in them."""
    assert "mta_ray.console.progress" in imports(PACKAGE / "pipeline" / "progress.py", PACKAGE)
    assert "mta_ray.settings.load_settings" in imports(PACKAGE / "cli.py", PACKAGE)  # inside a function


def test_jobs_know_the_door_and_nothing_else() -> None:
    files = sorted(JOBS.glob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imports(path, JOBS) if name.startswith("mta_ray")}
        room, _, subject = path.stem.partition("_")
        is_own = room == "benchmark" and (PACKAGE / "benchmarks" / f"{subject}.py").exists()
        door = f"mta_ray.benchmarks.{subject}.main" if is_own else "mta_ray.cli.run_stage"
        assert ours == {door}, path.name


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("lamp/a.py", "from mta_ray.lora.bank import Bank", "lamp/a.py: lamp and lora do not know each other"),
        ("lora/a.py", "from ..lamp import users", "lora/a.py: lora and lamp do not know each other"),
        (
            "model/a.py",
            "import mta_ray.personalize.training",
            "model/a.py: model imports personalize, which is above it",
        ),
        ("model/a.py", "def f():\n    from mta_ray import cli", "model/a.py: model imports cli, which is above it"),
        ("serving/a.py", "from mta_ray.pipeline import x", "serving/a.py: serving and pipeline do not know each other"),
        ("personalize/a.py", "import ray.train", "personalize/a.py: ray below floor 3"),
        ("settings.py", "from mta_ray import console", "settings.py: settings is ground and knows console"),
        ("artifacts.py", "from mta_ray.lamp import users", "artifacts.py: artifacts is ground and knows lamp"),
        ("__init__.py", "import ray", "__init__.py: ray below floor 3"),
        (
            "evaluation/a.py",
            "from mta_ray.comparison import run",
            "evaluation/a.py: evaluation imports comparison, which is above it",
        ),
        ("utils/a.py", "", "utils/a.py: utils has no floor; put it in the list"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    path = tmp_path / "mta_ray" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "mta_ray") == [complaint]


def test_a_library_of_one_file_is_found_in_two(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / "mta_ray" / "similarity").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mta_ray" / "similarity" / name).write_text("import faiss")
    assert violations(tmp_path / "mta_ray") == ["faiss in 2 files: similarity/a.py, similarity/b.py"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("evaluation/a.py", "import ray\nfrom mta_ray.pipeline import x\nfrom mta_ray.population import y"),
        ("similarity/a.py", "from mta_ray.lamp.users import User\nfrom mta_ray.artifacts import publish\nimport faiss"),
        ("similarity/a.py", "from mta_ray.model import backbone"),
        ("lora/fusion.py", "from mta_ray.lora.adapter import Adapter\nfrom . import slots"),
    ],
)
def test_an_import_that_goes_down_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "mta_ray" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "mta_ray") == []


def test_who_only_passes_on_loads_no_model_library() -> None:
    """The HTTP front, the foreman and the board: each is a process of its own on every cluster, in a third of the
    memory that torch and transformers would take."""
    rooms = "mta_ray.serving.ingress, mta_ray.pipeline.bank.foreman, mta_ray.pipeline.progress"
    code = f"import sys, {rooms}; print(sorted({{'torch', 'transformers', 'faiss'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout == "[]\n", done.stdout + done.stderr
