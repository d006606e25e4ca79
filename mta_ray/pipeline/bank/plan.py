"""What all groups that train one bank's adapters share."""

from __future__ import annotations

from dataclasses import dataclass

from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.bank.files import AdapterFiles
from mta_ray.pipeline.bank.tracking import TrackingConfig
from mta_ray.pipeline.group import GroupConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the missing adapters of a bank are trained."""

    base: str
    """The `base` artifact."""
    files: AdapterFiles
    train: TrainConfig
    group: GroupConfig
    lanes: int
    """Adapters at once; 0: as many as fit."""
    max_lanes: int
    """No group needs more: its share of the anchors."""
    anchors: int
    groups: int
    checkpoint_every_s: float
    max_failures: int
    tracking: TrackingConfig

    @property
    def devices(self) -> int:
        """Of one group: GPUs, or where there is none, CPU workers."""
        return self.group.workers * max(1, self.group.gpus_per_worker)
