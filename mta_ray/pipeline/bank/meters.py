"""The training of a bank as metrics of the Ray cluster: Prometheus reads them from each node's metrics port.

Ray puts `ray_` before each name. Groups are numbers in the one label that there is; users do not appear.
"""

from __future__ import annotations

import math

from ray.util import metrics

from mta_ray.pipeline.bank.snapshot import Snapshot


class Meters:
    """Of one process that holds the ledger. Counters go up by what a snapshot has more than the one before."""

    def __init__(self) -> None:
        self._done = metrics.Gauge("mta_bank_adapters_done", "Adapters of the bank that are there.")
        self._failed = metrics.Gauge("mta_bank_adapters_failed", "Adapters that were given up.")
        self._tokens = metrics.Counter("mta_bank_tokens_total", "Tokens of prompts and targets.")
        self._device_seconds = metrics.Counter("mta_bank_device_seconds_total", "Devices times seconds held.")
        self._lanes_busy = metrics.Gauge("mta_bank_lanes_busy", "Adapters in training.", tag_keys=("group",))
        self._loss = metrics.Gauge("mta_bank_loss", "Mean of the adapters in training, nats.", tag_keys=("group",))
        self._eta_seconds = metrics.Gauge("mta_bank_eta_seconds", "Time left; absent until it is known.")
        self._told = (0, 0.0)

    def observe(self, snapshot: Snapshot) -> None:
        """The training as it is now. What is NaN, Ray leaves out of the page."""
        self._done.set(snapshot.adapters_done)
        self._failed.set(len(snapshot.failures))
        self._eta_seconds.set(math.nan if snapshot.eta_s is None else snapshot.eta_s)
        for row in snapshot.groups:
            group = {"group": str(row.group)}
            self._lanes_busy.set(row.lanes_busy, tags=group)
            self._loss.set(math.nan if row.loss is None else row.loss, tags=group)

        tokens, device_seconds = self._told
        if snapshot.tokens > tokens:
            self._tokens.inc(snapshot.tokens - tokens)
        if snapshot.device_seconds > device_seconds:
            self._device_seconds.inc(snapshot.device_seconds - device_seconds)
        self._told = (snapshot.tokens, snapshot.device_seconds)
