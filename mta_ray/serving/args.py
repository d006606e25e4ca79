"""The settings of the service: the `args` of serve_configs/*.yaml, and the flags of `mta serve`. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.serving.database import STORE, DatabaseConfig
from mta_ray.serving.identity import DEFAULT_TENANT, TENANT_CHARS_MAX, check_name
from mta_ray.serving.schema import Limits
from mta_ray.serving.stack_queue import QueueConfig
from mta_ray.serving.user_store import HistoryLimits

STACK_RANK_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleConfig:
    """How replicas come and go with the requests under way, where no serve_configs/*.yaml says it."""

    max_replicas: int = 0
    """Most replicas; the least are `replicas`. 0: there are always `replicas`."""
    target_ongoing_requests: float = 24.0
    """Of a replica, in its batch or waiting: for more than that another replica is started."""
    look_back_s: float = 30.0
    """Over which the requests under way are averaged; above 10, for Ray Serve counts them every ten seconds."""
    upscale_delay_s: float = 10.0
    """How long there must be too many requests before a replica is started."""
    downscale_delay_s: float = 300.0
    """How long there must be too few before one ends; it takes its loaded stacks with it."""

    def __post_init__(self) -> None:
        if self.max_replicas < 0 or self.target_ongoing_requests <= 0 or self.look_back_s <= 10:
            raise ValueError(
                f"max_replicas must be at least 0, target_ongoing_requests above 0, look_back_s above 10; got {self}"
            )
        if self.upscale_delay_s < 0 or self.downscale_delay_s < 0:
            raise ValueError(f"upscale_delay_s and downscale_delay_s must be at least 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingArgs:
    """What is served, to whom, and how much of it."""

    base: str = "runs/quickstart/base"
    """The `base` artifact."""
    bank: str = "runs/quickstart/bank"
    """The bank of a store that has none yet; later ones come by `mta bank publish`."""
    store: str = STORE
    """Where users, keys and banks are kept: a SQLite file, or postgresql://user@host/name (password in PGPASSWORD)."""
    model_name: str = "mta"
    """What clients pass as `model`."""
    tenant: str = DEFAULT_TENANT
    """Whose users the bank's anchors are, and whose requests come without a key while there are no keys."""
    wording: Literal["task", "chat"] = "task"
    """How a chat becomes a prompt. `task`: its last user message is the question, worded as in training; `chat`: the
    tokenizer's own chat template over all messages."""
    encoded_words: int = 64
    """Words of each history item that are encoded; as the bank's users were (embed-users)."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How anchors are weighed."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_waiting=32))
    """How much one replica decodes at once."""
    stack_slots: int = 48
    """Users' own stacks on the device at once; fewer than the engine's requests means 503 where all have one."""
    stack: TrainConfig = field(
        default_factory=lambda: TrainConfig(rank=1, alpha=2.0, learning_rate=1e-2, steps=12, examples_per_step=4)
    )
    """How a user's stack is trained; the rank is that of all stacks in the store."""
    users_per_pack: int = 16
    """Waiting users whose stacks are trained at once."""
    queue: QueueConfig = field(default_factory=QueueConfig)
    """How long a silent trainer keeps its users."""
    limits: Limits = field(default_factory=Limits)
    """How much one request may ask for."""
    history: HistoryLimits = field(default_factory=HistoryLimits)
    """How much is kept of one user."""
    replicas: int = 1
    """Processes that each hold base, bank, encoder and engine. serve_configs/autoscale.yaml overrides it."""
    cpus_per_replica: float = 1.0
    """CPUs of each, all of which torch uses."""
    gpus_per_replica: float = 0.0
    """GPUs of each."""
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    """Whether there are more replicas while many ask."""

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant", TENANT_CHARS_MAX)
        for name in ("encoded_words", "stack_slots", "users_per_pack", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cpus_per_replica <= 0 or self.gpus_per_replica < 0:
            raise ValueError(
                f"cpus_per_replica is {self.cpus_per_replica} and gpus_per_replica {self.gpus_per_replica}, wanted "
                "more than 0 and at least 0"
            )
        if 0 < self.autoscale.max_replicas < self.replicas:
            raise ValueError(
                f"autoscale.max_replicas is {self.autoscale.max_replicas}, wanted at least replicas, {self.replicas}"
            )
        if self.stack.rank > STACK_RANK_MAX:
            raise ValueError(f"stack.rank is {self.stack.rank}; a user's own LoRA has rank 1 or 2 (at most 4)")
        if self.fusion.mode != "exact":
            raise ValueError("only fusion mode exact is served without merging; leave fusion.mode out")

    @property
    def database(self) -> DatabaseConfig:
        return DatabaseConfig(url=self.store)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_replica else "cpu"

    @property
    def threads(self) -> int:
        """Of torch, in each replica."""
        return max(1, int(self.cpus_per_replica))
