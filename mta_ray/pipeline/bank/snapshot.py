"""How the training of a bank stands: one picture, that the ledger gives and a table, metrics and charts are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["starting", "training", "lost", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One training group as it is now."""

    group: int
    state: State
    """Starting until its first report of steps."""
    reason: str
    """Why it was lost; empty unless it is."""
    workers: int
    devices: int
    lanes_busy: int
    """Adapters in training."""
    lanes: int
    """Adapters that fit."""
    adapters_done: int
    """Finished in this group, in this run."""
    tokens_per_s: float
    loss: float | None
    """Mean of the last losses of the adapters in training, in nats; none before the first report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole training as it is now. Plain numbers: it goes from process to process."""

    groups: tuple[GroupRow, ...]
    adapters: int
    """Of the whole bank."""
    adapters_done: int
    """Of the whole bank, with those that were there before this run."""
    adapters_done_here: int
    """Finished in this run."""
    failures: dict[int, str]
    """Why each adapter that failed did."""
    steps: int
    """Of all adapters, with those done before they resumed; each adapter's own count."""
    tokens: int
    """Of prompts and targets, in this run."""
    tokens_per_s: float
    """Of the groups that train."""
    elapsed_s: float
    """Since the first group started; stands still when the last one has ended."""
    devices: int
    """Most devices held at once."""
    device_seconds: float
    """Devices times the seconds they were held, from a group's start to its end or loss."""
    eta_s: float | None
    """Seconds left at the present rate; none until it is known."""

    @property
    def is_over(self) -> bool:
        """Whether every group that started has ended or was lost."""
        return bool(self.groups) and all(row.state in ("ended", "lost") for row in self.groups)

    def cost(self) -> str:
        """`cost: 3.4 device-seconds an adapter (14 adapters, 2 devices, 24 s), 6,150 tokens/s a device`.

        Adapters and time are this run's; the device-seconds of what failed are in them.
        """
        done = self.adapters_done_here
        price = f"{self.device_seconds / done:,.1f} device-seconds an adapter" if done else "no adapter done"
        what = ", ".join([_count(done, "adapter"), _count(self.devices, "device"), f"{self.elapsed_s:,.0f} s"])
        rate = self.tokens / self.device_seconds if self.device_seconds else 0.0
        return f"cost: {price} ({what}), {rate:,.0f} tokens/s a device"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
