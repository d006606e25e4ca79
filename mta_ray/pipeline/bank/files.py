"""A bank under construction, on disk or in an object store: each finished adapter, and each one on its way, by itself.

    OUT.adapters/
      1f0c55e97ab2/         one folder for each set of settings and inputs, named by their key
        histories/          the anchors' histories, so that no worker need read all users
        00012/              a finished adapter
        00012.checkpoint/   one on its way; gone when it is finished

Numbers are the anchors' places in the bank; users' ids never name a file. What was made with other settings or inputs
lies in another folder, and is neither seen nor touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mta_ray.artifacts import (
    ArtifactError,
    folder_names,
    is_current,
    open_artifact,
    publish,
    read_manifest,
    remove,
    remove_empty,
)
from mta_ray.files import alone_in
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.object_store import is_remote
from mta_ray.personalize.engines import SlotState
from mta_ray.personalize.lanes import Checkpoint

ADAPTER, CHECKPOINT, LANES = "adapter", "checkpoint", "lanes"
_STATES = ("values", "first", "second")
KEY_LETTERS = 12
"""Of a key that name its folder."""
KEY = re.compile(f"[0-9a-f]{{{KEY_LETTERS}}}")
"""Such a folder's name."""
OURS = re.compile(r"\.?(\d{5}(\.checkpoint)?|histories|lanes)(\.(tmp|old)-\w+)?")
"""What lies in the folder; anything else there is somebody else's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """The folder of one bank's adapters; any number of processes may use it at once, each adapter one at a time."""

    root: str
    """Path or fsspec URL, for adapters of all settings."""
    key: str
    """Of the settings and inputs that these are made with."""

    @property
    def folder(self) -> str:
        """Where these lie."""
        return f"{self.root}/{self.key[:KEY_LETTERS]}"

    @property
    def histories(self) -> str:
        return f"{self.folder}/histories"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else builds the same bank within the block. On this machine only: a store knows no locks.

        Raises ValueError where somebody does.
        """
        if is_remote(self.folder):
            yield
            return
        with alone_in(self.folder, "another build-bank with the same settings"):
            try:
                yield
            finally:
                remove_empty(self.folder)
                remove_empty(self.root)

    def others(self) -> list[str]:
        """Names of the folders beside this one: of other settings, never finished."""
        return [name for name in folder_names(self.root) if KEY.fullmatch(name) and name != self.key[:KEY_LETTERS]]

    def finished(self, count: int) -> set[int]:
        """Which of the first `count` adapters are there, whole and undamaged."""
        return {number for number in range(count) if self.is_finished(number)}

    def is_finished(self, number: int) -> bool:
        """Whether this adapter is there, whole and undamaged."""
        return is_current(self._adapter(number), kind=ADAPTER, settings=self._settings(number), inputs={}, verify=True)

    def publish(self, number: int, adapter: Adapter, losses: Sequence[float]) -> None:
        """Keep a finished adapter for good; its checkpoint goes."""
        tensors = {f"{module}.down": f.down.contiguous() for module, f in adapter.factors.items()}
        tensors |= {f"{module}.up": f.up.contiguous() for module, f in adapter.factors.items()}
        self._make_way(self._adapter(number), ADAPTER)
        with publish(self._adapter(number), kind=ADAPTER, settings=self._settings(number), inputs={}) as draft:
            save_file(tensors, draft.path / "adapter.safetensors")
            draft.facts.update(scale=adapter.scale, losses=[float(loss) for loss in losses])
        remove(self._checkpoint(number))

    def read(self, number: int) -> tuple[Adapter, list[float]]:
        """A finished adapter and its losses."""
        artifact = open_artifact(self._adapter(number), kind=ADAPTER)
        tensors = load_file(artifact.path / "adapter.safetensors")
        modules = sorted(name.removesuffix(".down") for name in tensors if name.endswith(".down"))
        factors = {m: Factors(down=tensors[f"{m}.down"], up=tensors[f"{m}.up"]) for m in modules}
        return Adapter(factors=factors, scale=artifact.facts["scale"]), artifact.facts["losses"]

    def keep(self, number: int, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Keep an adapter on its way, in place of an older checkpoint of it."""
        state = checkpoint.state
        tensors = {
            f"{kind}/{name}": tensor.contiguous()
            for kind in _STATES
            for name, tensor in zip(names, getattr(state, kind), strict=True)
        }
        self._make_way(self._checkpoint(number), CHECKPOINT)
        with publish(self._checkpoint(number), kind=CHECKPOINT, settings=self._settings(number), inputs={}) as draft:
            save_file(tensors, draft.path / "state.safetensors")
            draft.facts.update(steps=state.steps, losses=list(checkpoint.losses))

    def resume(self, number: int, names: Sequence[str]) -> Checkpoint | None:
        """The last checkpoint; None where there is none of these settings, or it is damaged: then it begins anew."""
        where = self._checkpoint(number)
        if not is_current(where, kind=CHECKPOINT, settings=self._settings(number), inputs={}, verify=True):
            return None
        try:
            artifact = open_artifact(where, kind=CHECKPOINT)
        except ArtifactError:  # of what lies in a store, only the manifest was looked at
            return None
        tensors = load_file(artifact.path / "state.safetensors")
        parts: dict[str, tuple[torch.Tensor, ...]] = {
            kind: tuple(tensors[f"{kind}/{name}"] for name in names) for kind in _STATES
        }
        state = SlotState(steps=artifact.facts["steps"], **parts)
        return Checkpoint(state=state, losses=tuple(artifact.facts["losses"]))

    def remember_lanes(self, device: str, lanes: int) -> None:
        """How many adapters fit a device at once, for the next run."""
        known = self.known_lanes()
        known[device] = min(lanes, known.get(device, lanes))
        with publish(f"{self.folder}/lanes", kind=LANES, settings={"key": self.key}, inputs={}) as draft:
            draft.facts.update(lanes=known)

    def known_lanes(self) -> dict[str, int]:
        """Device name to the number of adapters that fitted."""
        try:
            manifest = read_manifest(f"{self.folder}/lanes", kind=LANES)
        except ArtifactError:
            return {}
        return dict(manifest.facts["lanes"]) if manifest.settings == {"key": self.key} else {}

    def forget(self, number: int) -> None:
        """Take away a finished adapter that turned out to be damaged: it is to be trained again."""
        remove(self._adapter(number))

    def remove(self) -> None:
        """Everything of ours: the bank is whole."""
        for name in folder_names(self.folder):
            if OURS.fullmatch(name):
                remove(f"{self.folder}/{name}")
        remove_empty(self.folder)
        remove_empty(self.root)

    def _make_way(self, place: str, kind: str) -> None:
        """Take away what lies at a place of ours and cannot be read: a file system or a kill has left half of it."""
        try:
            read_manifest(place, kind=kind)
        except ArtifactError:
            remove(place)

    def _adapter(self, number: int) -> str:
        return f"{self.folder}/{number:05d}"

    def _checkpoint(self, number: int) -> str:
        return f"{self.folder}/{number:05d}.checkpoint"

    def _settings(self, number: int) -> dict[str, Any]:
        return {"key": self.key, "number": number}


def adapter_folder(out: str | Path) -> str:
    """Where the adapters of the bank at `out` lie until it is whole."""
    return f"{str(out).rstrip('/')}.adapters"
