"""The Ray Serve application: an ingress, the replicas that hold the model, and the trainer of stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import is_there, open_database
from mta_ray.serving.ingress import Ingress
from mta_ray.serving.replica import Replica
from mta_ray.serving.router import ForgetfulRouter
from mta_ray.serving.stacker import Stacker
from mta_ray.settings import settings_of

CALLS_BESIDE = 32
"""Histories and other short calls that a replica takes beside a full engine, which itself refuses one more question."""


def build_app(args: ServingArgs | Mapping[str, Any]) -> Application:
    """The application of `import_path: mta_ray.serving.app:build_app`; Ray Serve hands `args` over as a mapping."""
    if isinstance(args, Mapping):
        args = settings_of(ServingArgs, args, source="args")
    # Made here, once: who finds it gone later does not begin an empty one, without its keys.
    if not is_there(args.database):
        open_database(args.database).close()
    replica = serve.deployment(Replica).options(
        name="Model",
        **_replicas(args),
        max_ongoing_requests=args.engine.max_requests + args.engine.max_waiting + CALLS_BESIDE,
        max_queued_requests=args.engine.max_requests + args.engine.max_waiting,
        health_check_period_s=2,  # how long a dead replica goes unnoticed
        graceful_shutdown_timeout_s=60,
        request_router_config=RequestRouterConfig(request_router_class=ForgetfulRouter),
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
    )
    stacker = serve.deployment(Stacker).options(
        name="Stacker",
        max_ongoing_requests=1,
        autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1, "downscale_delay_s": 60},
        ray_actor_options={"num_cpus": args.cpus_per_replica / 2, "num_gpus": args.gpus_per_replica / 2},
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )
    return ingress.bind(args, replica.bind(args), stacker.bind(args))


def _replicas(args: ServingArgs) -> dict[str, Any]:
    """How many replicas, as Ray Serve's options: a number, or the bounds between which requests decide."""
    scale = args.autoscale
    if not scale.max_replicas:
        return {"num_replicas": args.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": args.replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_ongoing_requests,
            "look_back_period_s": scale.look_back_s,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        }
    }
