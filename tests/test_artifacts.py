"""An artifact is there whole or not at all, says when it is damaged, and is the same from a folder or a store."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mta_ray.artifacts import (
    ArtifactError,
    artifact_files,
    canonical_json,
    is_current,
    jsonable,
    open_artifact,
    publish,
)
from mta_ray.lamp.users import to_table
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.population.people import WorldConfig, simulate_user

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"rank": 8, "modules": ["q", "v"]}
INPUTS = {"users": "ab" * 32}


def write(out, text="one", *, kind="bank", settings=SETTINGS, inputs=INPUTS):
    with publish(out, kind=kind, settings=settings, inputs=inputs) as draft:
        (draft.path / "factors.bin").write_text(text)
        (draft.path / "part").mkdir()
        (draft.path / "part" / "0.bin").write_bytes(b"\0" * 100)
        draft.facts["anchors"] = 3
    return out


@pytest.fixture(params=["folder", "store"])
def out(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        return tmp_path / "here" / "bank"
    return f"memory://{tmp_path.name}-{os.getpid()}/bank"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_published_comes_back(out):
    write(out)
    bank = open_artifact(out, kind="bank")
    assert (bank.path / "factors.bin").read_text() == "one"
    assert (bank.path / "part" / "0.bin").read_bytes() == b"\0" * 100
    assert (bank.kind, bank.settings, bank.inputs, bank.facts) == ("bank", SETTINGS, INPUTS, {"anchors": 3})


def test_what_the_manifest_does_not_list_is_no_part_of_the_artifact(tmp_path):
    users = [simulate_user(WorldConfig(), number) for number in range(2)]
    with publish(tmp_path / "users", kind="users", settings={}, inputs={}) as draft:
        pq.write_table(to_table(users), draft.path / "users-0.parquet")
    with publish(tmp_path / "embeddings", kind="embeddings", settings={}, inputs={}) as draft:
        rows = [{"user_id": user.id, "items": 1, "queries": 1, "mean": [1.0]} for user in users]
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "embeddings-0.parquet")
        draft.facts["encoder"] = "any"
    for kind in ("users", "embeddings"):
        file = tmp_path / kind / f"{kind}-0.parquet"
        shutil.copyfile(file, file.with_name(f"{kind}-copy.parquet"))
    assert [user.id for user in read_users(tmp_path / "users")] == [user.id for user in users]
    assert read_embeddings(tmp_path / "embeddings").user_ids == sorted(user.id for user in users)
    assert artifact_files(tmp_path / "users", kind="users") == ([str(tmp_path / "users" / "users-0.parquet")], None)


def test_the_hash_is_the_one_that_a_reader_of_the_documentation_computes(out):
    write(out)
    files = {
        "factors.bin": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()},
        "part/0.bin": {"bytes": 100, "sha256": hashlib.sha256(b"\0" * 100).hexdigest()},
    }
    identity = {"kind": "bank", "settings": SETTINGS, "inputs": INPUTS, "files": files}
    want = hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert open_artifact(out, kind="bank").hash == want


def test_facts_and_time_do_not_change_the_hash_but_files_settings_and_inputs_do(tmp_path):
    first = open_artifact(write(tmp_path / "a"), kind="bank").hash
    assert open_artifact(write(tmp_path / "b"), kind="bank").hash == first
    assert open_artifact(write(tmp_path / "c", "two"), kind="bank").hash != first
    assert open_artifact(write(tmp_path / "d", settings={"rank": 4}), kind="bank").hash != first
    assert open_artifact(write(tmp_path / "e", inputs={}), kind="bank").hash != first


def test_publishing_again_replaces_the_artifact_and_leaves_nothing_behind(out, tmp_path):
    write(out)
    write(out, "two")
    assert (open_artifact(out, kind="bank").path / "factors.bin").read_text() == "two"
    if isinstance(out, Path):
        assert names(out.parent) == ["bank"]
    else:
        store, root = fsspec.core.url_to_fs(out)
        assert len(store.ls(root)) == 2  # the manifest, and one folder of files
        assert not [name for name in names(tmp_path / "cache") if ".tmp-" in name]


def test_an_exception_leaves_the_destination_as_it_was(out):
    write(out)
    with pytest.raises(KeyError), publish(out, kind="bank", settings={}, inputs={}) as draft:
        (draft.path / "factors.bin").write_text("half")
        raise KeyError("boom")
    assert not draft.path.exists()
    assert (open_artifact(out, kind="bank").path / "factors.bin").read_text() == "one"


def test_an_exception_in_the_first_publish_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "bank", kind="bank", settings={}, inputs={}):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_is_no_artifact_of_this_kind_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    write(tmp_path / "users", kind="users")
    for name in ("notes", "file", "users"):
        with pytest.raises(ValueError, match="choose another folder"):
            write(tmp_path / name)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    assert open_artifact(tmp_path / "users", kind="users").kind == "users"

    store = fsspec.filesystem("memory")
    store.pipe_file(f"/{tmp_path.name}/notes/thesis.txt", b"years of work")
    with pytest.raises(ValueError, match="choose another place"):
        write(f"memory://{tmp_path.name}/notes")


def test_what_lies_in_an_artifact_and_is_no_part_of_it_is_never_lost(tmp_path):
    users = write(tmp_path / "users", kind="users")
    with pytest.raises(ValueError, match="inside the artifact"):
        write(users / "runs" / "bank")
    (users / "part" / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"part/notes\.txt"):
        write(users, "two", kind="users")
    assert (users / "part" / "notes.txt").read_text() == "years of work"
    assert (open_artifact(users, kind="users").path / "factors.bin").read_text() == "one"
    assert names(tmp_path) == ["users"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "bank").mkdir()
    assert open_artifact(write(tmp_path / "bank"), kind="bank").facts == {"anchors": 3}


def test_every_way_to_be_unusable_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nothing there"):
        open_artifact(tmp_path / "none", kind="bank")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="unfinished"):
        open_artifact(tmp_path / "empty", kind="bank")
    write(tmp_path / "users", kind="users")
    with pytest.raises(ArtifactError, match="'users' artifact, wanted 'bank'"):
        open_artifact(tmp_path / "users", kind="bank")
    manifest = tmp_path / "users" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="upgrade mta_ray"):
        open_artifact(tmp_path / "users", kind="users")
    manifest.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(tmp_path / "users", kind="users")
    manifest.write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(tmp_path / "users", kind="users")


def test_a_changed_file_is_named(tmp_path):
    bank = write(tmp_path / "bank")
    (bank / "factors.bin").write_text("onf")
    with pytest.raises(ArtifactError, match=r"factors\.bin: checksum"):
        open_artifact(bank, kind="bank")
    assert open_artifact(bank, kind="bank", verify=False).facts == {"anchors": 3}  # same size: not looked into
    (bank / "factors.bin").write_text("longer")
    with pytest.raises(ArtifactError, match=r"factors\.bin holds 6 bytes, its manifest says 3"):
        open_artifact(bank, kind="bank", verify=False)
    (bank / "factors.bin").unlink()
    with pytest.raises(ArtifactError, match=r"lacks factors\.bin"):
        open_artifact(bank, kind="bank", verify=False)


def test_a_changed_manifest_is_noticed(tmp_path):
    bank = write(tmp_path / "bank")
    manifest = json.loads((bank / "manifest.json").read_text())
    manifest["settings"]["rank"] = 4
    (bank / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="does not match its own hash"):
        open_artifact(bank, kind="bank")


def test_changed_facts_are_noticed_and_manifests_without_their_checksum_open(tmp_path):
    bank = write(tmp_path / "bank")
    manifest = json.loads((bank / "manifest.json").read_text())
    manifest["facts"]["anchors"] = 30
    (bank / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="it was changed"):
        open_artifact(bank, kind="bank")
    del manifest["facts_sha256"]
    (bank / "manifest.json").write_text(json.dumps(manifest))
    assert open_artifact(bank, kind="bank").facts == {"anchors": 30}


def test_a_manifest_of_another_shape_is_no_artifact(tmp_path):
    bank = write(tmp_path / "bank")
    file = bank / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"]["factors.bin"]["sha256"]
    identity = {key: manifest[key] for key in ("kind", "settings", "inputs", "files")}
    manifest["hash"] = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
    for text in ("[" * 100_000, json.dumps(manifest)):
        file.write_text(text)
        with pytest.raises(ArtifactError, match="is damaged"):
            open_artifact(bank, kind="bank")
    file.unlink()
    file.mkdir()
    with pytest.raises(ArtifactError, match="unfinished, or no artifact"):
        open_artifact(bank, kind="bank")


def test_a_file_name_that_could_not_be_opened_again_is_not_published(tmp_path):
    with (
        pytest.raises(ValueError, match="choose another"),
        publish(tmp_path / "bank", kind="bank", settings={}, inputs={}) as draft,
    ):
        (draft.path / "a\\b").write_text("one")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape", "..\\escape"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path, name):
    bank = write(tmp_path / "bank")
    manifest = json.loads((bank / "manifest.json").read_text())
    manifest["files"] = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
    identity = {key: manifest[key] for key in ("kind", "settings", "inputs", "files")}
    manifest["hash"] = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
    (bank / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside its folder"):
        open_artifact(bank, kind="bank")


def test_a_damaged_copy_in_the_cache_is_fetched_again_and_a_damaged_store_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    url = write(f"memory://{tmp_path.name}/bank")
    copy = open_artifact(url, kind="bank").path
    (copy / "factors.bin").write_text("onf")
    assert (open_artifact(url, kind="bank").path / "factors.bin").read_text() == "one"

    store, root = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{root}/{copy.name}/factors.bin", b"onf")
    assert (open_artifact(url, kind="bank").path / "factors.bin").read_text() == "one"  # the good copy serves
    (copy / "factors.bin").unlink()
    with pytest.raises(ArtifactError, match=r"factors\.bin: checksum"):
        open_artifact(url, kind="bank")
    store.rm(f"{root}/{copy.name}/factors.bin")
    with pytest.raises(ArtifactError, match=r"lacks factors\.bin"):
        open_artifact(url, kind="bank")
    assert names(tmp_path / "cache") == []


def test_a_folder_copied_to_a_store_by_hand_opens_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    bank = write(tmp_path / "bank")
    store, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/copied"
    for path in bank.rglob("*"):
        if path.is_file():
            store.pipe_file(f"/{tmp_path.name}/copied/{path.relative_to(bank).as_posix()}", path.read_bytes())
    assert open_artifact(url, kind="bank").hash == open_artifact(bank, kind="bank").hash


def test_is_current_knows_kind_settings_inputs_and_missing_files(out):
    same = {"kind": "bank", "settings": SETTINGS, "inputs": INPUTS}
    assert not is_current(out, **same)
    write(out)
    assert is_current(out, **same)
    assert is_current(out, **same | {"settings": {"modules": ("q", "v"), "rank": 8}})  # order and tuples do not matter
    assert not is_current(out, **same | {"settings": SETTINGS | {"rank": 4}})
    assert not is_current(out, **same | {"inputs": {"users": "cd" * 32}})
    assert not is_current(out, **same | {"kind": "users"})
    if isinstance(out, Path):
        (out / "factors.bin").unlink()
        assert not is_current(out, **same)


KILLED = """
import os, signal, sys
from mta_ray.artifacts import publish
with publish(sys.argv[1], kind="bank", settings={}, inputs={}) as draft:
    (draft.path / "factors.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_publish_changes_nothing_and_is_swept_up_by_the_next(tmp_path):
    killed(tmp_path / "bank")
    with pytest.raises(ArtifactError, match="nothing there"):
        open_artifact(tmp_path / "bank", kind="bank")
    assert len(names(tmp_path)) == 1  # the dead draft

    write(tmp_path / "bank")
    assert names(tmp_path) == ["bank"]
    killed(tmp_path / "bank")
    assert (open_artifact(tmp_path / "bank", kind="bank").path / "factors.bin").read_text() == "one"


def test_a_living_draft_is_left_alone(tmp_path):
    with publish(tmp_path / "bank", kind="bank", settings={}, inputs={}) as slow:
        (slow.path / "factors.bin").write_text("slow")
        write(tmp_path / "bank", "quick")
        assert (slow.path / "factors.bin").read_text() == "slow"
    assert (open_artifact(tmp_path / "bank", kind="bank").path / "factors.bin").read_text() == "slow"
    assert names(tmp_path) == ["bank"]


def test_an_artifact_whose_replacement_died_between_two_renames_is_put_back(tmp_path):
    write(tmp_path / "bank")
    (tmp_path / "bank").rename(tmp_path / ".bank.old-0123456789abcdef")
    assert open_artifact(tmp_path / "bank", kind="bank").facts == {"anchors": 3}
    assert names(tmp_path) == ["bank"]


def test_a_killed_upload_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/bank"
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/bank/{'0' * 64}/factors.bin", b"half")
    with pytest.raises(ArtifactError, match="unfinished"):
        open_artifact(url, kind="bank")
    write(url)
    assert open_artifact(url, kind="bank").facts == {"anchors": 3}


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and sys.platform == "linux"
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode
    ):
        pytest.skip("mounting a tiny tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_clear_message_and_the_old_artifact_stays(tiny_disk):
    write(tiny_disk / "bank")
    with (
        pytest.raises(OSError, match=f"no space left in {tiny_disk}.*make room") as raised,
        publish(tiny_disk / "bank", kind="bank", settings={}, inputs={}) as draft,
    ):
        (draft.path / "factors.bin").write_bytes(b"\0" * 2**20)
    assert raised.value.errno == errno.ENOSPC
    assert open_artifact(tiny_disk / "bank", kind="bank").facts == {"anchors": 3}
    assert names(tiny_disk) == ["bank"]


def test_a_full_disk_while_the_manifest_is_written(tiny_disk):
    with (
        pytest.raises(OSError, match="no space left"),
        publish(tiny_disk / "bank", kind="bank", settings={}, inputs={}) as draft,
    ):
        draft.facts["much"] = "x" * 2**20
    assert names(tiny_disk) == []


def test_a_full_disk_that_a_library_reports_in_words_only(tmp_path):
    with (
        pytest.raises(OSError, match="make room"),
        publish(tmp_path / "bank", kind="bank", settings={}, inputs={}),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-4


@dataclass(frozen=True)
class Outer:
    folder: Path = Path("runs/a")
    names: tuple[str, ...] = ("q", "v")
    inner: Inner = Inner()


def test_jsonable_is_plain_json():
    want = {"folder": "runs/a", "names": ["q", "v"], "inner": {"rate": 1e-4}}
    assert jsonable(Outer()) == want
    assert json.loads(canonical_json(Outer())) == want
    with pytest.raises(ValueError, match="dataclass instance"):
        jsonable({"a": 1})


def test_facts_take_numpy_numbers_and_refuse_what_has_no_json_form(tmp_path):
    with publish(tmp_path / "bank", kind="bank", settings={}, inputs={}) as draft:
        draft.facts["loss"] = np.float32(0.5)
        draft.facts["sizes"] = np.array([1, 2])
    assert open_artifact(tmp_path / "bank", kind="bank").facts == {"loss": 0.5, "sizes": [1, 2]}
    with (
        pytest.raises(ValueError, match="got object"),
        publish(tmp_path / "other", kind="bank", settings={}, inputs={}) as draft,
    ):
        draft.facts["thing"] = object()
    assert names(tmp_path) == ["bank"]
