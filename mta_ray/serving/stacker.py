"""The deployment that trains stacks: claims waiting users, trains a pack of them, keeps what came of it.

It holds its own base and bank, lives while there is something to train, and loses nothing when it is killed: users are
claimed under a lease, and what is finished is in the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from mta_ray.lora.adapter import to_bytes
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import BANK, stack_users
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import AWAY, open_existing
from mta_ray.serving.personal import Personal, open_personaliser
from mta_ray.serving.served_bank import ServedBank, load_served
from mta_ray.serving.stack_queue import LeaseLost, StackJob, StackQueue
from mta_ray.serving.user_state import UserStack
from mta_ray.serving.user_store import UserStore
from mta_ray.serving.wording import Prompts
from mta_ray.similarity.embedding import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pupil:
    """A user whose stack is trained."""

    job: StackJob
    personal: Personal
    lessons: Sequence[Tokens]
    history_version: int


class Stacker:
    """One call of `train` trains whoever waits."""

    def __init__(self, args: ServingArgs) -> None:
        os.nice(10)  # answers go first
        torch.set_num_threads(args.threads)
        self.args = args
        database = open_existing(args.database)
        self.store, self.queue = UserStore(database, args.history), StackQueue(database, args.queue)
        base = open_base(args.base)
        self._fingerprint = base.fingerprint
        backbone = base.load(device=args.device)
        self.routed = RoutedModel(backbone, base.targets)
        self.personaliser = open_personaliser(
            args, self.store, Banks(database), base_fingerprint=base.fingerprint, device=args.device
        )
        self.personaliser.served.bank.load_into(self.routed.layers, BANK)
        self.prompts = Prompts(
            backbone=backbone, wording=base.wording, chat=args.wording, max_tokens=backbone.max_tokens
        )
        self._at_work = threading.Lock()

    async def train(self) -> int:
        """Train packs until nobody waits; how many stacks were kept."""
        return await asyncio.to_thread(self._train)

    def _train(self) -> int:
        kept = 0
        with self._at_work:  # of a call whose caller is gone
            while jobs := self.queue.claim(self.args.users_per_pack):
                # Whoever was in a pack that failed is trained alone, so that one user cannot spoil the others' turns.
                first = [job for job in jobs if job.attempt == 1]
                packs = [first] if first else []
                for pack in packs + [[job] for job in jobs if job.attempt > 1]:
                    kept += self._train_pack(pack)
        return kept

    def _train_pack(self, jobs: Sequence[StackJob]) -> int:
        # 1. the bank in force, and each user's lessons over the route beneath
        self._follow()
        served = self.personaliser.served
        pupils = []
        for job in jobs:
            try:
                pupil = self._pupil(job)
            except AWAY:  # nobody's fault: their leases run out, and they wait again
                raise
            except Exception as error:  # noqa: BLE001 - whatever a history holds, the others are trained
                log.exception("a stack cannot be trained")
                with suppress(LeaseLost):
                    self.queue.fail(job, type(error).__name__)
                continue
            if pupil is not None:
                pupils.append(pupil)
        if not pupils:
            return 0

        # 2. train, telling the queue now and then that we live
        try:
            with _Renewal(self.queue, [pupil.job for pupil in pupils]):
                result = stack_users(
                    self.routed,
                    [
                        (
                            pupil.job.user.digest.hex(),
                            pupil.lessons,
                            {BANK: pupil.personal.route} if pupil.personal.route else None,
                        )
                        for pupil in pupils
                    ],
                    self.args.stack,
                )
        except (ValueError, FloatingPointError, RuntimeError) as error:
            log.exception("a pack of %d stacks failed", len(pupils))
            for pupil in pupils:
                with suppress(LeaseLost):
                    self.queue.fail(pupil.job, type(error).__name__)
            return 0

        # 3. keep
        kept = 0
        for pupil, adapter in zip(pupils, result.adapters, strict=True):
            stack = UserStack(
                tensors=to_bytes(adapter),
                kind="lora",
                rank=adapter.rank,
                scale=adapter.scale,
                base_fingerprint=self._fingerprint,
                bank_version=served.version,
                history_version=pupil.history_version,
            )
            with suppress(LeaseLost):  # deleted meanwhile, or another trainer was faster
                kept += self.queue.finish(pupil.job, stack) is not None
        log.info("stacks: %d of %d kept, %d steps", kept, len(jobs), self.args.stack.steps)
        return kept

    def _pupil(self, job: StackJob) -> Pupil | None:
        """None: there is nothing to train on, which the queue is told."""
        personal = self.personaliser.model_of(job.user)
        state = personal.state
        lessons = []
        if state is not None and state.items:
            lessons = self.prompts.lessons(self.personaliser.history(job.user), state.task)
        if state is None or not lessons:
            with suppress(LeaseLost):
                self.queue.fail(job, "no examples")
            return None
        return Pupil(job=job, personal=personal, lessons=lessons, history_version=state.version)

    def _follow(self) -> None:
        other = self.personaliser.follow()
        if other is None:
            return
        try:
            served: ServedBank = load_served(other, base_fingerprint=self._fingerprint, fusion=self.args.fusion)
            encoder = self.personaliser.encoder
            if encoder.source != served.bank.encoder:
                encoder = Encoder(served.bank.encoder, device=self.args.device)
        except (OSError, ValueError) as error:
            log.error("bank %s is not taken, stacks are trained over the old one: %s", other.bank.version, error)
            return
        served.bank.load_into(self.routed.layers, BANK)
        self.personaliser.take(served, encoder)
        self.personaliser.follow()


class _Renewal:
    """Renews leases from a thread of its own within the block."""

    def __init__(self, queue: StackQueue, jobs: Sequence[StackJob]) -> None:
        self._queue, self._jobs = queue, jobs
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._queue.config.lease_s / 3):
            for job in self._jobs:
                with suppress(LeaseLost):
                    self._queue.renew(job)
