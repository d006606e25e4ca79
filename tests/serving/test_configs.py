"""The files of serve_configs/ are what Ray Serve and our own settings take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve import Deployment
from ray.serve.schema import ServeDeploySchema

from mta_ray.serving.app import build_app
from mta_ray.serving.args import ServingArgs
from mta_ray.settings import settings_of


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application makes its store, at a path that is seen from here."""
    monkeypatch.chdir(tmp_path)


FOLDER = Path(__file__).parents[2] / "serve_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_valid_for_ray_and_for_us(file: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    [application] = schema.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    args = settings_of(ServingArgs, application.args, source=file.name)
    app = build_app(application.args)
    assert {deployment.name for deployment in application.deployments} == {"Ingress", "Model", "Stacker"}
    assert app._bound_deployment.name == "Ingress"
    assert args.stack_slots >= args.engine.max_requests + args.engine.max_waiting
    assert not schema.logging_config.enable_access_log


def test_there_are_three_and_each_says_how_it_is_deployed() -> None:
    assert [file.stem for file in FILES] == ["autoscale", "gpu", "local"]
    for file in FILES:
        assert f"serve deploy serve_configs/{file.name}" in file.read_text()


def test_a_wrong_argument_is_told_by_its_name() -> None:
    with pytest.raises(ValueError, match="'stack_slot'; did you mean 'stack_slots'"):
        build_app({"stack_slot": 3})
    with pytest.raises(ValueError, match="stack_slots must be at least 1"):
        build_app({"stack_slots": 0})
    with pytest.raises(ValueError, match="max_waiting"):
        build_app({"engine": {"max_waiting": -1}})


def test_there_are_so_many_replicas_or_as_many_as_requests_ask_for() -> None:
    def model(args: dict) -> Deployment:
        return build_app(args)._bound_deployment.init_args[1]._bound_deployment

    fixed = model({"replicas": 3})
    assert fixed.num_replicas == 3 and fixed._deployment_config.autoscaling_config is None
    grows = model({"replicas": 2, "autoscale": {"max_replicas": 5, "downscale_delay_s": 7.0}})
    bounds = grows._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.downscale_delay_s) == (2, 5, 7.0)
    assert grows.max_ongoing_requests == fixed.max_ongoing_requests
    with pytest.raises(ValueError, match="at least replicas, 2"):
        build_app({"replicas": 2, "autoscale": {"max_replicas": 1}})
