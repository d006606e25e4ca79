"""How fast the encoder is alone: as many encoders as the pipeline has, on the same texts, and nothing else at work."""

from __future__ import annotations

import time

import ray

from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.crowd.parts import CrowdPlan, cpus_each
from mta_ray.population.people import simulate_user
from mta_ray.similarity.embedding import Encoder

WARM_USERS = 8


def bare_users_per_s(plan: CrowdPlan) -> float:
    """Users per second, all encoders together: each encodes one part, made beforehand."""
    encoders = [
        ray.remote(_BareEncoder).options(num_cpus=cpus_each(plan.cpus, plan.workers)).remote(plan, number % plan.parts)
        for number in range(plan.workers)
    ]
    users = sum(ray.get([encoder.warm.remote() for encoder in encoders]))
    began_s = time.perf_counter()
    ray.get([encoder.encode.remote() for encoder in encoders])
    seconds = time.perf_counter() - began_s
    for encoder in encoders:
        ray.kill(encoder)
    return users / seconds


class _BareEncoder:
    """Has an encoder, and the texts of a part."""

    def __init__(self, plan: CrowdPlan, part: int) -> None:
        first = part * plan.part_users
        users = [simulate_user(plan.world, first + number) for number in range(plan.rows(part))]
        self.texts = [item_texts(user, plan.max_items, plan.max_words) for user in users]
        self.encoder = Encoder(plan.anchors.encoder)

    def warm(self) -> int:
        """How many users it has texts of."""
        self.encoder.embed_users(self.texts[:WARM_USERS])
        return len(self.texts)

    def encode(self) -> None:
        self.encoder.embed_users(self.texts)
