"""One LoRA for everybody, trained on tested users' and teachers' items: what users' own LoRAs have to beat."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mta_ray.artifacts import is_current, jsonable, open_artifact, publish
from mta_ray.comparison.datasets import cut, read_tested
from mta_ray.lamp.prompts import Example
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter, load_peft, save_peft
from mta_ray.lora.bank import load_bank
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import Wording, open_base, tokenised
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.group import start_worker
from mta_ray.pipeline.split import SplitConfig, teachers_of

log = logging.getLogger(__name__)
KIND = "pooled-adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledJob:
    """Whose items, over which base, as many as which bank has met."""

    users: str
    embeddings: str
    base: str
    bank: str
    tested: str
    """The `tested-users` artifact; their items count as far as the budget goes."""
    out: str
    budget: str
    context_items: int | None
    """Retrieved into each prompt; none: as the base's prompts have it."""
    examples_per_bank_step: int
    train: TrainConfig
    """Its steps are set by the bank."""
    split: SplitConfig
    cpus: int
    """That torch uses."""
    device: str
    devices: float | int
    """GPUs, or CPUs."""


def train_pooled(job: PooledJob) -> str:
    """Publish the adapter as a PEFT folder. A Ray task calls it."""
    inputs = {"users": open_artifact(job.users, kind="users", verify=False).hash}
    inputs |= {"base": open_base(job.base).hash, "bank": open_artifact(job.bank, kind="bank", verify=False).hash}
    inputs |= {"tested": read_tested(job.tested).digest(job.budget)}
    settings = {k: v for k, v in jsonable(job).items() if k in ("budget", "context_items", "train", "split")}
    if is_current(job.out, kind=KIND, settings=settings, inputs=inputs):
        return job.out
    start_worker(job.cpus)
    started_s = time.perf_counter()
    base = open_base(job.base)
    losses = load_bank(job.bank).facts["losses"]
    met = job.examples_per_bank_step * sum(len(anchor) for anchor in losses)
    train = replace(job.train, steps=math.ceil(met / job.train.examples_per_step))
    with publish(job.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        examples = pooled_examples(job, base.wording, met)
        routed = RoutedModel(base.load(device=job.device), base.targets)
        tokens = tokenised(routed.backbone, examples)
        result = train_pack(routed, [Job(id="everybody", examples=tokens)], train)
        save_peft(result.adapters[0], draft.path / "adapter", base_model=base.source)
        seconds = time.perf_counter() - started_s
        draft.facts.update(examples=len(tokens), steps=train.steps, seconds=seconds, devices=job.devices)
    log.info("pooled: %d examples, %d steps, in %s", len(tokens), train.steps, job.out)
    return job.out


def load_pooled(path: str) -> Adapter:
    """The adapter."""
    return load_peft(open_artifact(path, kind=KIND).path / "adapter")


def pooled_examples(job: PooledJob, wording: Wording, met: int) -> list[Example]:
    """All of the tested users' items, and drawn ones of teachers' up to `met`, in a drawn order."""
    rng = np.random.default_rng(job.train.seed)
    asked = (cut(user, job.budget) for user in read_tested(job.tested).users)
    own = _examples(asked, wording, job.context_items)
    others = _examples(teachers_of(job.users, read_embeddings(job.embeddings), job.split), wording, job.context_items)
    drawn = rng.permutation(len(others))[: max(0, met - len(own))]
    found = own + [others[i] for i in drawn]
    return [found[i] for i in rng.permutation(len(found))]


def _examples(users: Iterable[User], wording: Wording, context_items: int | None) -> list[Example]:
    found = [example for user in users for example in wording.history(user, context_items=context_items)]
    return sorted(found, key=lambda example: (example.user_id, example.item_id))
