"""How many replicas are wanted, decided as Ray Serve's default policy decides it (ray/serve/autoscaling_policy.py)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerConfig:
    """Ray Serve's autoscaling_config, and how long a replica takes to start."""

    min_replicas: int = 1
    """Never fewer."""
    max_replicas: int = 4
    """Never more."""
    target_ongoing_requests: float = 24.0
    """Requests under way that one replica should have."""
    upscale_delay_s: float = 10.0
    """More must have been wanted for so long."""
    downscale_delay_s: float = 300.0
    """Fewer must have been wanted for so long."""
    look_back_s: float = 30.0
    """Ongoing requests are averaged over this."""
    startup_s: float = 20.0
    """From the decision until the replica serves: process, model, bank."""
    interval_s: float = 1.0
    """Between two decisions."""
    metrics_interval_s: float = 10.0
    """Between two looks at what is under way: Ray Serve's processes tell it that often."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}, wanted 1 ≤ min ≤ max"
            )
        for name in ("target_ongoing_requests", "interval_s", "metrics_interval_s", "look_back_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than 0 and finite, got {getattr(self, name)}")
        for name in ("upscale_delay_s", "downscale_delay_s", "startup_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


class Scaler:
    """The policy with what it remembers."""

    def __init__(self, config: AutoscalerConfig, replicas: int) -> None:
        self.config = config
        self.target = replicas
        self._seen: deque[tuple[float, int]] = deque()
        self._since_s: float | None = None  # when the present wish to grow (or to shrink) arose
        self._grows = False

    def decide(self, now_s: float, ongoing: int) -> int:
        """The new target, from the requests under way now and lately."""
        config = self.config
        self._seen.append((now_s, ongoing))
        while self._seen[0][0] < now_s - config.look_back_s:
            self._seen.popleft()
        mean = sum(count for _, count in self._seen) / len(self._seen)
        wanted = math.ceil(mean / config.target_ongoing_requests)
        wanted = min(max(wanted, config.min_replicas), config.max_replicas)
        if wanted == self.target:
            self._since_s = None
            return self.target
        if self._since_s is None or self._grows != (wanted > self.target):
            self._since_s, self._grows = now_s, wanted > self.target
        delay_s = config.upscale_delay_s if self._grows else config.downscale_delay_s
        if now_s - self._since_s >= delay_s - 1e-6:
            self._since_s = None
            self.target = wanted
        return self.target
