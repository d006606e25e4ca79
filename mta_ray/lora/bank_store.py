"""A bank store: a folder or fsspec URL of bank versions that never change, each a `bank` artifact at STORE/VERSION.

A version's name is the beginning of the artifact's hash, so that other content has another name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mta_ray.artifacts import (
    ArtifactError,
    Manifest,
    copy_artifact,
    folder_names,
    inspected,
    read_manifest,
    remove_artifact,
)
from mta_ray.object_store import told

log = logging.getLogger(__name__)
VERSION_CHARS = 12
"""Of the artifact's hash: the version of a bank that was not given one."""
PREFIX_CHARS_MIN = 4
"""So much of a version is enough to name it, where no other one begins so."""


def version_of(digest: str) -> str:
    """The version of the bank whose artifact has that hash."""
    return digest[:VERSION_CHARS]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankVersion:
    """One version in a store."""

    version: str
    path: str
    """Folder or URL of the artifact."""
    manifest: Manifest


class BankStore:
    """The versions in one place. Nothing here is ever rewritten: a version is put whole, and removed whole."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def path(self, version: str) -> str:
        """Where that version lies, or would."""
        return f"{self.url}/{version}"

    def versions(self) -> list[BankVersion]:
        """All finished versions, newest first by the time they were built; uploads under way are not seen."""
        found = []
        for name in self._names():
            try:
                manifest = read_manifest(self.path(name), kind="bank")
            except ArtifactError as error:
                log.warning("%s is passed over: %s", told(self.path(name)), error)
                continue
            found.append(BankVersion(version=name, path=self.path(name), manifest=manifest))
        return sorted(found, key=lambda one: (one.manifest.created_at, one.version), reverse=True)

    def find(self, version: str) -> str:
        """The path of a version, or of the only one that begins so. ValueError where there is none, or several."""
        if not re.fullmatch(r"[0-9a-f]+", version) or not PREFIX_CHARS_MIN <= len(version) <= VERSION_CHARS:
            raise ValueError(
                f"{version!r} is no bank version; give {PREFIX_CHARS_MIN} to {VERSION_CHARS} of the characters that "
                f"`mta bank list --store {told(self.url)}` shows"
            )
        found = [name for name in self._names() if name.startswith(version)]
        if len(found) != 1:
            told_found = ", ".join(found) or "nothing"
            raise ValueError(
                f"{told(self.url)} holds {told_found} for version {version}; "
                "`mta bank list` shows the versions there are, a whole one names one"
            )
        return self.path(found[0])

    def put(self, path: str | Path) -> tuple[str, bool]:
        """Take a bank artifact in; its version, and whether it was not there already. What is whole stays as it is; a
        damaged copy gives way to a good one."""
        version = version_of(read_manifest(path, kind="bank").hash)
        place = self.path(version)
        if copy_artifact(path, place, kind="bank"):
            return version, True
        with inspected(place, kind="bank") as (_, problems):
            is_whole = not problems
        if is_whole:
            return version, False
        remove_artifact(place, kind="bank")
        return version, copy_artifact(path, place, kind="bank")

    def to_prune(self, keep: int, *, published: Collection[str] = ()) -> list[BankVersion]:
        """The versions beyond the newest `keep`, oldest first, but for artifacts whose hash is in `published`."""
        if keep < 1:
            raise ValueError(f"keep is {keep}, wanted at least 1: the newest version always stays")
        return [one for one in self.versions()[keep:] if one.manifest.hash not in published][::-1]

    def remove(self, version: str) -> None:
        """Remove one version, for good."""
        remove_artifact(self.path(version), kind="bank")

    def _names(self) -> list[str]:
        return [name for name in folder_names(self.url) if re.fullmatch(rf"[0-9a-f]{{{VERSION_CHARS}}}", name)]
