"""Settings that make no sense are refused before anything starts; not one of them may fail in a worker, or hang."""

from __future__ import annotations

import pytest

from mta_ray.cluster import ClusterConfig, room_for
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.base_model import PromptConfig
from mta_ray.personalize.searched_weights import SearchConfig
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.prepare_users import PrepareUsersConfig
from mta_ray.pipeline.split import SplitConfig
from mta_ray.pipeline.train_base import TrainBaseConfig
from mta_ray.population.people import WorldConfig


def test_of_more_processes_than_have_room_so_many_are_made(ray_local) -> None:
    assert room_for(ClusterConfig(), 5, cpus=1, gpus=0) == 2
    assert room_for(ClusterConfig(), 1, cpus=1, gpus=0) == 1
    assert room_for(ClusterConfig(), 5, cpus=0.5, gpus=0) == 4
    assert room_for(ClusterConfig(address="host:1"), 5, cpus=9, gpus=9) == 5  # may grow
    group = GroupConfig(workers=3)
    for each in ({"cpus": 3, "gpus": 0}, {"cpus": 1, "gpus": 0.5}, {"cpus": group.least_cpus, "gpus": group.gpus}):
        with pytest.raises(ValueError, match="this machine's cluster has 2 and 0"):
            room_for(ClusterConfig(), 2, **each)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "name", "wrong"),
    [
        *((FusionConfig, "temperature", value) for value in (0.0, -1.0, NAN, INF)),
        *((FusionConfig, "shrinkage", value) for value in (-1.0, NAN, INF)),
        *((SearchConfig, "spread", value) for value in (0.0, NAN, INF)),
        *((SearchConfig, name, value) for name, value in (("generations", 0), ("candidates", 1), ("max_examples", 0))),
        *((TrainConfig, "learning_rate", value) for value in (0.0, NAN, INF)),
        *((TrainConfig, "warmup_fraction", value) for value in (-0.1, 1.1, NAN)),
        *((TrainConfig, "weight_decay", value) for value in (-0.1, NAN, INF)),
        *((ActorConfig, name, value) for name in ("actors", "cpus", "users_per_pack") for value in (0, -1)),
        *((ActorConfig, "gpus", value) for value in (-1.0, NAN)),
        *((SplitConfig, name, -1) for name in ("max_few_shot", "max_rest")),
        *((TrainBaseConfig, "rag_share", value) for value in (-0.1, 1.1, NAN)),
        (TrainBaseConfig, "max_examples", 0),
        *((PromptConfig, name, -1) for name in ("max_words", "context_items", "rag_items")),
        *((PrepareUsersConfig, "shard_mib", value) for value in (0.0, NAN, INF)),
        *((WorldConfig, name, -1) for name in ("archetypes", "median_items", "max_items", "queries", "seed")),
        *((WorldConfig, "exposure", value) for value in (-1.0, NAN, INF)),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(config: type, name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=name):
        config(**{name: wrong})
