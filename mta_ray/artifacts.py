"""An artifact: a folder with a `manifest.json` that says what is in it, from which settings and which other artifacts.

It is written whole or not at all, and it lies in a local folder or in an object store (any fsspec URL). What the files
mean is not known here. On an object store the files lie in a folder named by the hash and `manifest.json`, put last,
points to it: so replacing an artifact is one atomic put there too.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mta_ray.object_store import Store, StoreAway, is_remote, open_store, told

ConfigT = TypeVar("ConfigT")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ArtifactError(ValueError):
    """This is not a finished, undamaged artifact of the wanted kind; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An artifact in the making: write files under `path`, put what a reader should know without them into `facts`."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished artifact, on this machine."""

    path: Path
    """The folder of the files; a copy in the cache where the artifact lies in an object store."""
    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Name of an input -> its hash."""
    facts: dict[str, Any]
    hash: str
    """sha256 over kind, settings, inputs and the files' checksums: what the next stage writes down as its input."""
    files: tuple[str, ...]
    """Names under `path`, sorted, that the manifest lists; whatever else lies there is not part of the artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact says of itself, read without its files."""

    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    facts: dict[str, Any]
    hash: str
    bytes: int
    """Of all files."""
    created_at: str
    """ISO 8601, UTC."""
    mta_ray: str
    """The version of this package that made it."""


@contextmanager
def publish(out: str | Path, *, kind: str, settings: dict[str, Any], inputs: dict[str, str]) -> Iterator[Draft]:
    """A draft to write into, which becomes the artifact `out` on a clean exit; on an exception nothing appears.

    An artifact of the same kind at `out` is replaced; anything else there is a ValueError, before work begins. Where
    the way to a store fails, what was to go there is kept on this machine, as a whole artifact; the error says where.
    """
    if is_remote(out):
        remote, home, name = str(out), cache_folder(), "upload"
        _refuse_stranger_in_store(remote, kind)
    else:
        destination = _local(out)
        remote, home, name = None, destination.parent, destination.name
        _restore(destination)
        _refuse_stranger(destination, kind)

    try:
        with _draft_folder(home, name) as folder:
            # 1. the caller writes
            draft = Draft(path=folder)
            yield draft

            # 2. checksums, then the manifest, last
            manifest = _manifest_of(folder, kind=kind, settings=settings, inputs=inputs, facts=draft.facts)

            # 3. into place
            if remote is None:
                _write_manifest(folder, manifest)
                _replace(folder, destination, kind)
            else:
                _upload_or_keep(folder, remote, manifest)
    except Exception as error:
        if not _says_full(error):
            raise
        raise OSError(errno.ENOSPC, _full_message(error, home, out)) from error
    size_mib = sum(entry["bytes"] for entry in manifest["files"].values()) / 2**20
    log.info("published %s: %s, %d files, %.1f MiB", kind, told(out), len(manifest["files"]), size_mib)


def copy_artifact(path: str | Path, out: str | Path, *, kind: str) -> bool:
    """Put the artifact at `path` at `out` too, the same to the last bit; whether it was not there already.

    What lies at `out` is never replaced: another artifact there is a ValueError.
    """
    # 1. it may be there
    manifest = _manifest_at(path, kind)
    if _is_there(out, kind, manifest["hash"]):
        return False
    if is_remote(out):
        _refuse_stranger_in_store(str(out), kind)
    else:
        _refuse_stranger(_local(out), kind)

    # 2. undamaged files, then the manifest, last
    folder = open_artifact(path, kind=kind).path
    if is_remote(out):
        _upload(folder, str(out), manifest)
        return True
    destination = _local(out)
    with _draft_folder(destination.parent, destination.name) as draft:
        for name in manifest["files"]:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, draft / name)
        _check_files(draft, manifest, verify=True)
        _write_manifest(draft, manifest | {"folder": ""})
        try:
            os.rename(draft, destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_there(out, kind, manifest["hash"]):
                raise
            return False  # another process was faster
    _sync_folder(destination.parent)
    return True


def remove_artifact(path: str | Path, *, kind: str) -> None:
    """Remove a finished artifact, its manifest first: nobody reads half of it. ArtifactError where there is none."""
    _manifest_at(path, kind)
    if is_remote(path):
        store = open_store(str(path))
        store.remove(MANIFEST)
        store.remove()
        return
    folder = _local(path)
    # Swept up by whoever publishes next, if need be.
    aside = folder.parent / f".{folder.name}.tmp-{secrets.token_hex(8)}"
    os.rename(folder, aside)
    shutil.rmtree(aside)


def read_manifest(path: str | Path, *, kind: str) -> Manifest:
    """What the artifact at `path` says of itself; its files are not looked at."""
    manifest = _manifest_at(path, kind)
    return Manifest(
        **{name: manifest[name] for name in ("kind", "settings", "inputs", "facts", "hash")},
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        created_at=str(manifest.get("created_at", "")),
        mta_ray=str(manifest.get("mta_ray", "")),
    )


@contextmanager
def inspected(path: str | Path, *, kind: str) -> Iterator[tuple[Artifact, list[str]]]:
    """The artifact's own files, and what is wrong with them, all of it: one line each, nothing where it is whole.

    Of an artifact in a store they are fetched for this alone: a good copy in the cache says nothing about the store.
    """
    manifest = _manifest_at(path, kind)
    if not is_remote(path):
        folder = _local(path) / manifest["folder"]
        yield _artifact(folder, manifest), list(_problems(folder, manifest, verify=True))
        return
    with _draft_folder(cache_folder(), "inspected") as folder:
        _fetch(open_store(str(path)), manifest, folder)
        problems = _problems(folder, manifest, verify=True, where=f"{told(path)}/{manifest['folder']}")
        yield _artifact(folder, manifest), list(problems)


def open_artifact(path: str | Path, *, kind: str | tuple[str, ...], verify: bool = True) -> Artifact:
    """The finished artifact at `path`; `verify` compares every file's checksum, else only sizes are looked at."""
    manifest = _manifest_at(path, kind)
    folder = _download(str(path), manifest, verify) if is_remote(path) else _local(path) / manifest["folder"]
    _check_files(folder, manifest, verify)
    return _artifact(folder, manifest)


def refuse_stranger(out: str | Path, kind: str) -> None:
    """ValueError where something else than an artifact of this kind lies: `publish` says so only when it is called."""
    if is_remote(out):
        _refuse_stranger_in_store(str(out), kind)
    else:
        _refuse_stranger(_local(out), kind)


def is_current(
    path: str | Path, *, kind: str, settings: dict[str, Any], inputs: dict[str, str], verify: bool = False
) -> bool:
    """Whether a finished artifact of this kind, settings and inputs is at `path`, so that a stage may rest.

    `verify` compares every file's checksum, else only sizes are looked at. Of what lies in a store, only the manifest.
    """
    try:
        manifest = _manifest_at(path, kind)
        if not is_remote(path):
            _check_files(_local(path) / manifest["folder"], manifest, verify=verify)
    except ArtifactError:
        return False
    have, want = (manifest["settings"], manifest["inputs"]), (settings, inputs)
    return canonical_json(have) == canonical_json(want)


def artifact_files(path: str | Path, *, kind: str) -> tuple[list[str], Any | None]:
    """The artifact's files where they lie, and fsspec's file system for them: nothing is fetched from a store.

    Files of a local artifact (no file system: None) are checked as by `open_artifact`.
    """
    if not is_remote(path):
        artifact = open_artifact(path, kind=kind)
        return [str(artifact.path / name) for name in artifact.files], None
    manifest, store = _manifest_at(path, kind), open_store(str(path))
    places = ["/".join(part for part in (store.root, manifest["folder"], name) if part) for name in manifest["files"]]
    return sorted(places), store.files


def folder_names(path: str | Path) -> list[str]:
    """What lies directly in a folder, here or in a store; nothing where there is none."""
    if is_remote(path):
        return open_store(str(path)).names()
    folder = _local(path)
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def remove_empty(path: str | Path) -> None:
    """Take away a local folder in which nothing is left. (A store has no empty folders.)"""
    if not is_remote(path):
        with suppress(OSError):
            _local(path).rmdir()


def remove(path: str | Path) -> None:
    """Take away a folder of artifacts that nobody reads any more, with all that is in it; nothing there is fine."""
    if is_remote(path):
        open_store(str(path)).remove()
    else:
        shutil.rmtree(_local(path), ignore_errors=True)


def located(config: ConfigT, *names: str) -> ConfigT:
    """The config with the artifacts that these fields name as absolute paths (URLs as they are).

    A stage's workers need not stand in the folder that the command was given in: Ray Train moves them elsewhere.
    """
    places = {name: getattr(config, name) for name in names}
    whole = {name: str(path if is_remote(path) else _local(path)) for name, path in places.items()}
    return dataclasses.replace(config, **whole)  # type: ignore[type-var]


def jsonable(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values: what goes into a manifest as `settings`."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"settings must be a dataclass instance, got {type(config).__name__}")
    return _plain(config)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces; tuples are lists."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def file_sha256(path: str | Path) -> str:
    """The hex sha256 of one local file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where copies of artifacts from object stores lie: $MTA_CACHE, else ~/.cache/mta_ray."""
    return Path(os.environ.get("MTA_CACHE", "~/.cache/mta_ray")).expanduser()


# Manifests


def _manifest_of(
    folder: Path, *, kind: str, settings: dict[str, Any], inputs: dict[str, str], facts: dict[str, Any]
) -> dict[str, Any]:
    if (folder / MANIFEST).exists():
        raise ValueError(f"a draft holds its own {MANIFEST}; that name is taken, choose another for the file")
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a manifest must never reach the disk before what it vouches for
        name = path.relative_to(folder).as_posix()
        if not _stays_inside(name):
            raise ValueError(
                f"a draft holds the file {name!r}, a name that no reader opens; choose another for the file"
            )
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    identity = {"kind": kind, "settings": _plain(settings), "inputs": _plain(inputs), "files": files}
    return {
        "format_version": FORMAT_VERSION,
        **identity,
        "folder": "",
        "facts": _plain(facts),
        "facts_sha256": _facts_sha256(facts),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "mta_ray": _version(),
        "hash": _hash_of(identity),
    }


def _hash_of(manifest: dict[str, Any]) -> str:
    identity = {key: manifest[key] for key in ("kind", "settings", "inputs", "files")}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def _facts_sha256(facts: dict[str, Any]) -> str:
    """Apart from the hash: facts may hold times, which make no other artifact."""
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry["bytes"], int) and _HASH.fullmatch(entry["sha256"]) is not None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        for name in manifest["files"]:  # whoever may read the manifest may read them: some libraries write 0600
            (folder / name).chmod(mode)
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _manifest_at(path: str | Path, kind: str | tuple[str, ...]) -> dict[str, Any]:
    """The manifest at `path`, checked in itself: readable, (one of) this kind, a format we know, its hash right."""
    kinds = (kind,) if isinstance(kind, str) else kind
    wanted = " or ".join(map(repr, kinds))
    text = _manifest_text(path, wanted)
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format {version}, made by mta_ray {manifest.get('mta_ray')}; this one reads up to "
                f"{FORMAT_VERSION}: upgrade mta_ray, or build the artifact again with this one"
            )
        if manifest["kind"] not in kinds:
            raise ArtifactError(f"{path} is a {manifest['kind']!r} artifact, wanted {wanted}; give that one's folder")
        folder, names = manifest["folder"], list(manifest["files"])
        is_sound = manifest["hash"] == _hash_of(manifest) and folder in ("", manifest["hash"])
        is_sound = is_sound and isinstance(manifest["facts"], dict) and all(map(_is_entry, manifest["files"].values()))
        if "facts_sha256" in manifest:  # older ones have none
            is_sound = is_sound and manifest["facts_sha256"] == _facts_sha256(manifest["facts"])
        if not all(_stays_inside(name) for name in names):
            raise ArtifactError(f"{path}/{MANIFEST} names files outside its folder; do not trust it, build it yourself")
    except ArtifactError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}/{MANIFEST} is damaged ({error!r}); build the artifact again") from error
    if not is_sound:
        raise ArtifactError(f"{path}/{MANIFEST} does not match its own hash: it was changed; build the artifact again")
    return manifest


def _manifest_text(path: str | Path, wanted: str) -> bytes:
    store = open_store(str(path)) if is_remote(path) else None
    try:
        if store is not None:
            return store.read(MANIFEST)
        _restore(_local(path))
        return (_local(path) / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        message = f"{path} has no {MANIFEST}: unfinished, or no artifact; run the stage that makes {wanted} again"
        if not (_local(path).exists() if store is None else store.exists()):
            message = f"{path}: nothing there; run the stage that makes {wanted} first, or correct the path"
        raise ArtifactError(message) from None


def _artifact(folder: Path, manifest: dict[str, Any]) -> Artifact:
    parts = {name: manifest[name] for name in ("kind", "settings", "inputs", "facts", "hash")}
    return Artifact(path=folder, files=tuple(sorted(manifest["files"])), **parts)


def _check_files(folder: Path, manifest: dict[str, Any], verify: bool) -> None:
    for problem in _problems(folder, manifest, verify):
        raise ArtifactError(f"{problem}; build the artifact again, with --force")


def _problems(folder: Path, manifest: dict[str, Any], verify: bool, *, where: str = "") -> Iterator[str]:
    where = where or str(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{where} lacks {name}, which its manifest lists"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{where}/{name} holds {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
        elif verify and file_sha256(path) != entry["sha256"]:
            yield f"{where}/{name}: checksum does not match the manifest: damaged or changed"


def _is_there(out: str | Path, kind: str, digest: str) -> bool:
    """Whether this very artifact is at `out`; a ValueError where it is another one."""
    try:
        found = _manifest_at(out, kind)["hash"]
    except ArtifactError:
        return False
    if found != digest:
        raise ValueError(f"{out} holds another artifact ({found[:12]}, not {digest[:12]}); it is not replaced")
    return True


def _stays_inside(name: str) -> bool:
    """Whether a manifest's file name is a plain relative path: a manifest from a store may be anybody's."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _plain(value: Any) -> Any:
    """JSON values only; what has no JSON form is an error, never its repr."""
    if value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=canonical_json)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise ValueError(f"settings, inputs and facts are JSON values, got {type(value).__name__}; convert it first")


def _version() -> str:
    try:
        return metadata.version("mta-ray")
    except metadata.PackageNotFoundError:
        return "not installed"


# Local folders


@contextmanager
def _draft_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `.NAME.tmp-RANDOM` under `parent`, gone afterwards unless it was renamed.

    It is locked (flock) while this process lives, so that whoever publishes next knows a dead one's and removes it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent, f".{name}.tmp-")
    while True:
        folder = parent / f".{name}.tmp-{secrets.token_hex(8)}"
        folder.mkdir()
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # somebody took it for stale before it was opened
            continue
        if _lock(handle) is not False and folder.exists():  # else somebody did after that
            break
        os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    for folder in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _lock(handle) is True:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _lock(handle: int) -> bool | None:
    """True: ours; False: another's; None: this file system has no locks (then nothing is ever taken for stale)."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _replace(folder: Path, destination: Path, kind: str) -> None:
    """Rename the draft to its destination; what was there steps aside first and is removed after."""
    try:
        while True:
            try:
                os.rename(folder, destination)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _refuse_stranger(destination, kind)
            with suppress(FileNotFoundError):
                os.rename(destination, destination.parent / f".{destination.name}.old-{secrets.token_hex(8)}")
    finally:
        _restore(destination)
    _sync_folder(destination.parent)
    for old in _asides(destination):
        shutil.rmtree(old, ignore_errors=True)


def _restore(destination: Path) -> None:
    """Put back what stepped aside for a process that died before its own rename."""
    if not destination.exists() and destination.parent.is_dir():
        for old in _asides(destination)[:1]:
            with suppress(FileNotFoundError, PermissionError):
                os.rename(old, destination)


def _asides(destination: Path) -> list[Path]:
    return sorted(p for p in destination.parent.iterdir() if p.name.startswith(f".{destination.name}.old-"))


def _refuse_stranger(destination: Path, kind: str) -> None:
    _refuse_inside(destination)
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    found, listed = "a file" if destination.is_file() else "a folder without a manifest", None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        manifest = json.loads((destination / MANIFEST).read_bytes())
        found = f"an artifact of kind {manifest['kind']!r}"
        listed = set(manifest["files"])
    if listed is None and not destination.exists():  # another process is replacing it
        return
    if found != f"an artifact of kind {kind!r}":
        raise ValueError(f"{destination} is {found}, not of kind {kind!r}; choose another folder, or remove it")
    if listed is None:
        return
    for file in sorted(destination.rglob("*")):
        name = file.relative_to(destination).as_posix()
        if file.is_file() and name != MANIFEST and name not in listed:
            raise ValueError(
                f"{destination} holds {name}, which is no part of the artifact there and would be lost when that is "
                "replaced; move it elsewhere, or choose another folder"
            )


def _refuse_inside(destination: Path) -> None:
    """ValueError where a folder above is an artifact: it, and all in it, goes when it is made again."""
    for above in destination.parents:
        with suppress(OSError, ValueError, RecursionError):
            manifest = json.loads((above / MANIFEST).read_bytes())
            if isinstance(manifest, dict) and {"format_version", "kind", "files", "hash"} <= manifest.keys():
                break
    else:
        return
    raise ValueError(
        f"{destination} would lie inside the artifact {above} and be lost when that is made again; choose a folder "
        "outside of it"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _local(path: str | Path) -> Path:
    text = str(path).removeprefix("file://").removeprefix("local://")
    return Path(text).expanduser().resolve()


# Object stores


def _upload_or_keep(folder: Path, url: str, manifest: dict[str, Any]) -> None:
    """Upload; where that fails, the files stay on this machine as a whole artifact: hours of work may be in them."""
    try:
        _upload(folder, url, manifest)
    except Exception as error:
        if _says_full(error):
            raise
        kept = cache_folder() / "unsent" / manifest["hash"]
        kept.parent.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, manifest)
        _replace(folder, kept, manifest["kind"])
        kind = StoreAway if isinstance(error, StoreAway) else OSError
        raise kind(f"{error}; nothing was published, and what was made is not lost: it lies in {kept}") from error


def _upload(folder: Path, url: str, manifest: dict[str, Any]) -> None:
    """Files to URL/HASH, then the manifest, then the last artifact's files go. A killed upload leaves URL as it was."""
    store = open_store(url)
    old = _folder_in_store(store)
    for name in manifest["files"]:
        store.send(folder / name, f"{manifest['hash']}/{name}")
    store.write(MANIFEST, json.dumps(manifest | {"folder": manifest["hash"]}, indent=1).encode())
    if old not in (None, manifest["hash"]):
        try:
            store.remove(str(old))
        except PermissionError as error:  # what is new is there; what was there before stays beside it
            log.warning("%s", error)


def _folder_in_store(store: Store) -> str | None:
    try:
        name = json.loads(store.read(MANIFEST))["folder"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and _HASH.fullmatch(name) and store.exists(name) else None


def _refuse_stranger_in_store(url: str, kind: str) -> None:
    store = open_store(url)
    names = store.names()
    if all(_HASH.fullmatch(name) for name in names):
        return  # nothing, or uploads that were killed before their manifest
    found = "something without a manifest"
    if MANIFEST in names:
        with suppress(ValueError, KeyError, TypeError):
            found = f"an artifact of kind {json.loads(store.read(MANIFEST))['kind']!r}"
    if found != f"an artifact of kind {kind!r}":
        raise ValueError(f"{url} is {found}, not of kind {kind!r}; choose another place, or remove it")


def _download(url: str, manifest: dict[str, Any], verify: bool) -> Path:
    """The artifact's files in the cache, in a folder named by its hash: fetched once, whole or not at all."""
    home, digest = cache_folder(), manifest["hash"]
    with suppress(ArtifactError):
        _check_files(home / digest, manifest, verify)
        return home / digest
    shutil.rmtree(home / digest, ignore_errors=True)
    try:
        with _draft_folder(home, digest) as folder:
            _fetch(open_store(url), manifest, folder)
            _check_files(folder, manifest, verify=True)
            with suppress(OSError):  # another process was faster: its copy is as good
                os.rename(folder, home / digest)
    except OSError as error:
        if not _says_full(error):
            raise
        raise OSError(errno.ENOSPC, _full_message(error, home, url)) from error
    return home / digest


def _fetch(store: Store, manifest: dict[str, Any], folder: Path) -> None:
    for name in manifest["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # reported, with its name, by the check that follows
            store.fetch("/".join(part for part in (manifest["folder"], name) if part), folder / name)


# Full disks


def _says_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind it; writers in C and Rust, and Ray, hand on the words but not the number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full_message(error: BaseException, home: Path, out: str | Path) -> str:
    named = getattr(error, "filename", None)
    folder = Path(os.fsdecode(named)).parent if named else home
    free = ""
    with suppress(OSError):
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    return f"no space left in {folder}{free}; {out} is as it was: make room, or choose another folder, and run again"
