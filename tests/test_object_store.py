"""Artifacts on a real S3 server: whole or not at all, whatever dies, and whoever is away for a while."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from mta_ray import object_store
from mta_ray.artifacts import (
    ArtifactError,
    copy_artifact,
    inspected,
    is_current,
    open_artifact,
    publish,
    read_manifest,
    remove_artifact,
)
from mta_ray.object_store import StoreAway, is_away, open_store, told

ROOT = Path(__file__).resolve().parents[1]
PUBLISH = """
import sys
from mta_ray.artifacts import publish
with publish(sys.argv[1], kind="bank", settings={}, inputs={}) as draft:
    for name in ("a.bin", "b.bin", "c.bin"):
        (draft.path / name).write_bytes(name.encode() * 1000)
    draft.facts["anchors"] = 3
"""


def write(out: str, text: str = "a") -> None:
    with publish(out, kind="bank", settings={}, inputs={}) as draft:
        for name in ("a.bin", "b.bin", "c.bin"):
            (draft.path / name).write_text(text * 1000)
        draft.facts["anchors"] = 3


def test_an_artifact_goes_to_s3_and_comes_back(s3):
    write(f"{s3}/bank")
    bank = open_artifact(f"{s3}/bank", kind="bank")
    assert (bank.path / "b.bin").read_text() == "a" * 1000
    assert is_current(f"{s3}/bank", kind="bank", settings={}, inputs={})
    write(f"{s3}/bank", "b")
    assert (open_artifact(f"{s3}/bank", kind="bank").path / "b.bin").read_text() == "b" * 1000
    assert len(open_store(f"{s3}/bank").names()) == 2  # the manifest and one folder
    with pytest.raises(ArtifactError, match="nothing there"):
        open_artifact(f"{s3}/none", kind="bank")
    with pytest.raises(ValueError, match="choose another place"), publish(s3, kind="bank", settings={}, inputs={}):
        pass


def test_a_copy_is_the_same_to_the_last_bit_and_never_replaces_anything(s3, tmp_path):
    write(str(tmp_path / "bank"))
    here, there, back = str(tmp_path / "bank"), f"{s3}/bank", str(tmp_path / "back")
    assert copy_artifact(here, there, kind="bank") and copy_artifact(there, back, kind="bank")
    assert not copy_artifact(here, there, kind="bank")
    assert not copy_artifact(there, back, kind="bank")
    assert read_manifest(here, kind="bank") == read_manifest(there, kind="bank") == read_manifest(back, kind="bank")
    assert (tmp_path / "back" / "a.bin").read_text() == "a" * 1000

    write(str(tmp_path / "other"), "b")
    for taken in (there, back):
        with pytest.raises(ValueError, match="holds another artifact .* not replaced"):
            copy_artifact(tmp_path / "other", taken, kind="bank")
    assert (open_artifact(there, kind="bank").path / "a.bin").read_text() == "a" * 1000


def test_what_is_removed_is_gone_with_all_its_files(s3, tmp_path):
    for place in (f"{s3}/bank", str(tmp_path / "bank")):
        write(place)
        remove_artifact(place, kind="bank")
        with pytest.raises(ArtifactError, match="nothing there"):
            remove_artifact(place, kind="bank")
    assert open_store(f"{s3}/bank").names() == []
    assert not list(tmp_path.glob("*bank*"))


def test_damage_in_the_store_is_seen_though_a_good_copy_is_in_the_cache(s3):
    write(f"{s3}/bank")
    digest = open_artifact(f"{s3}/bank", kind="bank").hash
    store = open_store(f"{s3}/bank")
    store.write(f"{digest}/a.bin", b"b" + b"a" * 999)
    store.remove(f"{digest}/c.bin")
    with inspected(f"{s3}/bank", kind="bank") as (_, problems):
        assert [("a.bin: checksum" in p, "lacks c.bin" in p) for p in problems] == [(True, False), (False, True)]


def test_a_killed_upload_leaves_nothing_that_can_be_read_and_the_next_one_completes(s3, s3_server):
    with subprocess.Popen([sys.executable, "-c", PUBLISH, f"{s3}/bank"], cwd=ROOT) as process:
        s3_server.watch(lambda n: os.kill(process.pid, signal.SIGKILL) if n == 2 else None)
        assert process.wait(timeout=600) == -signal.SIGKILL
    s3_server.watch(None)
    assert fsspec.filesystem("s3").find(s3)  # something of it is there
    with pytest.raises(ArtifactError, match="unfinished"):
        open_artifact(f"{s3}/bank", kind="bank")
    subprocess.run([sys.executable, "-c", PUBLISH, f"{s3}/bank"], cwd=ROOT, timeout=600, check=True)
    assert open_artifact(f"{s3}/bank", kind="bank").facts == {"anchors": 3}


@pytest.mark.parametrize("lost", [2, 4])  # a file, the manifest
def test_a_store_that_goes_away_under_an_upload_and_comes_back_has_the_whole(s3, s3_server, lost, caplog):
    back = threading.Timer(5, s3_server.start)  # s3fs itself tries for 2 s

    def leave(n: int) -> None:
        if n == lost:
            s3_server.watch(None)
            threading.Thread(target=lambda: (s3_server.stop(), back.start())).start()
            time.sleep(1)  # until nobody new is let in
            raise ConnectionError

    s3_server.watch(leave)
    started_s = time.monotonic()
    with caplog.at_level(logging.WARNING):
        write(f"{s3}/bank")
    assert time.monotonic() - started_s > 5
    back.join()
    assert f"{s3}/bank does not answer" in caplog.text
    assert "testing-secret" not in caplog.text
    assert (open_artifact(f"{s3}/bank", kind="bank").path / "c.bin").read_text() == "a" * 1000


def test_a_store_that_stays_away_is_one_error_and_what_was_made_is_kept(s3, s3_server, monkeypatch, tmp_path):
    monkeypatch.setenv("MTA_STORE_PATIENCE_S", "1")
    write(f"{s3}/bank", "old")
    try:
        with (
            pytest.raises(StoreAway, match=r"did not answer for .* is not lost: it lies in ") as raised,
            publish(f"{s3}/bank", kind="bank", settings={}, inputs={}) as draft,
        ):
            (draft.path / "a.bin").write_text("new")
            s3_server.stop()
        with pytest.raises(StoreAway):
            open_artifact(f"{s3}/bank", kind="bank")
    finally:
        s3_server.start()

    kept = str(raised.value).rsplit(" ", 1)[-1]
    assert (open_artifact(kept, kind="bank").path / "a.bin").read_text() == "new"
    assert (open_artifact(f"{s3}/bank", kind="bank").path / "a.bin").read_text() == "old" * 1000
    assert copy_artifact(kept, f"{s3}/again", kind="bank")
    assert (open_artifact(f"{s3}/again", kind="bank").path / "a.bin").read_text() == "new"


def test_wrong_keys_are_told_at_once(s3, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr("mta_ray.object_store.Store.send", refuse)
    with pytest.raises(OSError, match="Access Denied; nothing was published, and what was made is not lost"):
        write(f"{s3}/bank")


def test_what_is_worth_another_try(monkeypatch):
    botocore = pytest.importorskip("botocore.exceptions")
    gone = botocore.EndpointConnectionError(endpoint_url="http://x")
    for error in (gone, TimeoutError(), ConnectionResetError(), OSError(16, "SlowDown"), OSError(121, "InternalError")):
        assert is_away(error), error
    for error in (FileNotFoundError(), PermissionError(), OSError(28, "full"), ValueError(), KeyError("a")):
        assert not is_away(error), error

    monkeypatch.setattr(object_store, "PAUSE_S", 0.01)
    answers = iter([gone, gone, b"there"])

    class Files:
        def invalidate_cache(self) -> None: ...

        def cat_file(self, _: str) -> bytes:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert object_store.Store("x://a", Files(), "a").read("b") == b"there"
    monkeypatch.setenv("MTA_STORE_PATIENCE_S", "long")
    with pytest.raises(ValueError, match="'long'"):
        object_store.patience_s()


def test_a_url_is_logged_without_its_password(monkeypatch):
    assert told("ftp://me:secret@host/a@b") == "ftp://***@host/a@b"
    assert told("s3://bucket/a") == "s3://bucket/a"
    with pytest.raises(ValueError, match="Protocol not known: none$"):
        open_store("none://me:secret@host")


def test_without_a_client_it_is_said_what_to_install(monkeypatch):
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://b/a: Install s3fs to access S3: pip install 'mta-ray\[s3\]'"):
        open_store("s3://b/a")
