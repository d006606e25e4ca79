"""Bank versions, in a folder and on a real S3 server: named by content, never rewritten, listed newest first."""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path

import pytest
from small_banks import saved

from mta_ray.artifacts import ArtifactError, folder_names, open_artifact, read_manifest
from mta_ray.lora.bank import load_bank
from mta_ray.lora.bank_check import problems_of
from mta_ray.lora.bank_store import BankStore, version_of
from mta_ray.object_store import open_store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path) -> BankStore:
    return BankStore(str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3')}/banks")


def built_at(bank: str, when: str) -> str:
    """The bank, as if it had been built then: the time is no part of its hash."""
    file = Path(bank) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created_at": when}))
    return bank


def test_a_version_is_the_beginning_of_the_hash_and_holds_the_same_bank(store, tmp_path):
    bank = saved(tmp_path / "bank")
    version, is_new = store.put(bank)
    assert (
        is_new
        and version == version_of(open_artifact(bank, kind="bank").hash)
        and re.fullmatch("[0-9a-f]{12}", version)
    )
    assert [one.version for one in store.versions()] == [version]
    assert store.versions()[0].manifest == read_manifest(bank, kind="bank")
    assert (load_bank(store.path(version)).up["layers.0.q"] == load_bank(bank).up["layers.0.q"]).all()


def test_the_same_bank_again_changes_nothing(store, tmp_path):
    version, _ = store.put(built_at(saved(tmp_path / "bank"), "2026-01-01T00:00:00+00:00"))
    assert store.put(built_at(saved(tmp_path / "again"), "2026-02-01T00:00:00+00:00")) == (version, False)
    assert store.versions()[0].manifest.created_at.startswith("2026-01-01")


def test_a_damaged_version_gives_way_to_a_whole_one(store, tmp_path):
    bank = saved(tmp_path / "bank")
    version, _ = store.put(bank)
    held = open_store(store.path(version)) if "://" in store.url else None
    name = next(iter(json.loads((Path(bank) / "manifest.json").read_text())["files"]))
    if held is None:
        (Path(store.path(version)) / name).write_bytes(b"cut off")
    else:
        (folder,) = [one for one in held.names() if one != "manifest.json"]
        held.write(f"{folder}/{name}", b"cut off")
    assert problems_of(store.path(version))
    assert store.put(bank) == (version, True)
    assert not problems_of(store.path(version)) and store.put(bank) == (version, False)


def test_other_content_never_lands_under_a_version(store, tmp_path):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", (4, 5))
    version, _ = store.put(one)
    digest = open_artifact(other, kind="bank").hash
    if "://" in store.url:  # as if two hashes began alike
        place = open_store(store.path(version_of(digest)))
        for name in open_store(store.path(version)).names():
            held = open_store(store.path(version))
            for file in (
                [name] if name == "manifest.json" else [f"{name}/{f}" for f in open_store(f"{held.url}/{name}").names()]
            ):
                place.write(file, held.read(file))
    else:
        Path(store.path(version)).rename(store.path(version_of(digest)))
    with pytest.raises(ValueError, match="not replaced"):
        store.put(other)


def test_a_bank_is_found_by_as_much_of_its_version_as_names_it(store, tmp_path):
    version, _ = store.put(saved(tmp_path / "bank"))
    assert store.find(version) == store.find(version[:4]) == store.path(version)
    for wrong, why in (("0" * 12, "holds nothing"), (version[:3], "is no bank version"), ("../../etc", "is no bank")):
        with pytest.raises(ValueError, match=why):
            store.find(wrong)


def test_prune_leaves_the_newest_and_the_published(store, tmp_path):
    versions = []
    for month in (3, 1, 2, 4):
        bank = built_at(saved(tmp_path / str(month), (month, 9)), f"2026-0{month}-01T00:00:00+00:00")
        versions.append(store.put(bank)[0])
    third, first, second, fourth = versions
    assert [one.version for one in store.versions()] == [fourth, third, second, first]
    assert [one.version for one in store.to_prune(1)] == [first, second, third]
    published = open_artifact(tmp_path / "1", kind="bank").hash
    leaving = store.to_prune(2, published={published})
    assert [one.version for one in leaving] == [second]
    store.remove(second)
    assert [one.version for one in store.versions()] == [fourth, third, first]
    with pytest.raises(ArtifactError, match="nothing there"):
        open_artifact(store.path(second), kind="bank")
    with pytest.raises(ValueError, match="keep is 0"):
        store.to_prune(0)


def test_many_who_put_the_same_bank_at_once_all_succeed(tmp_path):
    store, bank = BankStore(str(tmp_path / "store")), saved(tmp_path / "bank")
    done: list[tuple[str, bool]] = []
    threads = [threading.Thread(target=lambda: done.append(store.put(bank))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 6 and sum(is_new for _, is_new in done) == 1
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [done[0][0]]


def test_an_upload_under_way_is_no_version(store, tmp_path, monkeypatch):
    version, _ = store.put(saved(tmp_path / "bank"))
    if "://" in store.url:
        open_store(store.path(version)).remove("manifest.json")
    else:
        (Path(store.path(version)) / "manifest.json").unlink()
    assert folder_names(store.url) == [version]
    told = []
    log = logging.Logger("alone")  # what libraries of other tests make of the logging tree does not matter to it
    log.addFilter(lambda record: told.append(record.getMessage()))
    monkeypatch.setattr("mta_ray.lora.bank_store.log", log)
    assert store.versions() == []
    assert len(told) == 1 and "passed over" in told[0] and "unfinished" in told[0]


def test_a_store_that_is_not_there_is_empty(tmp_path):
    assert BankStore(str(tmp_path / "none")).versions() == []
