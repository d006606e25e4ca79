"""A folder's identity: another one where anything of it is another, the same wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

from mta_ray.files import SMALL_BYTES, folder_identity


def test_a_folders_identity_is_of_names_and_contents(tmp_path: Path) -> None:
    one = tmp_path / "one"
    (one / "sub").mkdir(parents=True)
    (one / "config.json").write_text("{}")
    (one / "sub" / "weights").write_bytes(bytes(2 * SMALL_BYTES))
    mark = folder_identity(one)
    assert folder_identity(shutil.copytree(one, tmp_path / "copy")) == mark

    def changed(name: str) -> Path:
        return Path(shutil.copytree(one, tmp_path / name))

    text, more, renamed, fine, longer = (changed(name) for name in ("text", "more", "renamed", "fine", "longer"))
    (text / "config.json").write_text("[]")
    (more / "extra").touch()
    (renamed / "config.json").rename(renamed / "konfig.json")
    tuned = bytearray(2 * SMALL_BYTES)
    tuned[SMALL_BYTES : SMALL_BYTES + SMALL_BYTES // 16] = b"\1" * (SMALL_BYTES // 16)  # some layers in the middle
    (fine / "sub" / "weights").write_bytes(tuned)
    (longer / "sub" / "weights").write_bytes(bytes(2 * SMALL_BYTES + 1))
    assert len({mark, *map(folder_identity, (text, more, renamed, fine, longer))}) == 6
