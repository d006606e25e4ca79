"""Whoever shares a pack, since when, moved from where: every adapter is the one that was trained alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from mta_ray.lora.adapter import Adapter
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens, tokenise
from mta_ray.personalize.lanes import Checkpoint, Job, Wishes, by_length, train_lanes
from mta_ray.personalize.train_config import TrainConfig, budget
from mta_ray.personalize.training import train_pack

CONFIG = TrainConfig(
    rank=2, alpha=4.0, learning_rate=1e-2, steps=6, epochs=2.0, examples_per_step=2, max_grad_norm=0.05
)
TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home", "space", "rain")


@dataclass
class Office:
    """Gives jobs from a list and keeps what comes back; wishes what it is told to, at a step."""

    waiting: list[Job]
    keep_at: int = 0
    stop_at: int = 0
    together: list[set[str]] = field(default_factory=list)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Checkpoint] = field(default_factory=dict)

    def take(self, lanes: int) -> list[Job]:
        taken, self.waiting = self.waiting[:lanes], self.waiting[lanes:]
        return taken

    def wishes(self, has_free_lanes: bool) -> Wishes:
        step = len(self.together) + 1
        return Wishes(keep=step == self.keep_at, stop=step == self.stop_at)

    def stepped(self, done: Mapping[str, int], losses: Mapping[str, float], tokens: int) -> None:
        assert tokens > 0 and set(done) == set(losses)
        self.together.append(set(done))

    def finished(self, job: Job, adapter: Adapter, losses: Sequence[float]) -> None:
        self.adapters[job.id], self.losses[job.id] = adapter, list(losses)

    def failed(self, job: Job, reason: str) -> None:
        self.failures[job.id] = reason

    def keep(self, checkpoints: Sequence[tuple[Job, Checkpoint]]) -> None:
        self.kept = {job.id: checkpoint for job, checkpoint in checkpoints}


def jobs(backbone, count: int = 6) -> list[Job]:  # noqa: ANN001
    return [
        Job(id=f"user {n}", examples=[tokenise(backbone, f"film {n}: {t}", t.split()[-1]) for t in TEXTS[: n + 1]])
        for n in range(count)
    ]


def alone(tiny_model, job: Job, config: TrainConfig = CONFIG) -> tuple[Adapter, list[float]]:  # noqa: ANN001
    result = train_pack(RoutedModel(tiny_model()), [job], config)
    return result.adapters[0], result.losses[0]


def assert_same(got: Adapter, wanted: Adapter) -> None:
    """To 1e-4 over each tensor: Adam makes steps of full size out of single gradients that are near zero."""
    for module, factors in wanted.factors.items():
        for side in ("down", "up"):
            one, other = getattr(got.factors[module], side), getattr(factors, side)
            assert other.any() and (one - other).norm() <= 1e-4 * other.norm(), (module, side)


@pytest.mark.parametrize("shared_init", [True, False])
def test_a_free_lane_takes_the_next_job_at_once_and_all_equal_those_alone(tiny_model, shared_init):
    config = replace(CONFIG, shared_init=shared_init)
    office = Office(jobs(tiny_model()))
    train_lanes(RoutedModel(tiny_model()), 2, office, config)
    # Budgets are 1, 2, 3, 4, 5, 6 steps; by hand, two lanes: 0 and 1 begin, 2 follows 0 after a step, and so on.
    assert [budget(n + 1, CONFIG) for n in range(6)] == [1, 2, 3, 4, 5, 6]
    lanes = [{0, 1}, {1, 2}, {2, 3}, {2, 3}, {3, 4}, {3, 4}, {4, 5}, {4, 5}, {4, 5}, {5}, {5}, {5}]
    assert office.together == [{f"user {n}" for n in pair} for pair in lanes]
    for n, job in enumerate(jobs(tiny_model())):
        adapter, losses = alone(tiny_model, job, config)
        assert len(losses) == n + 1
        assert office.losses[job.id] == pytest.approx(losses, rel=1e-4)
        assert_same(office.adapters[job.id], adapter)


def test_a_stopped_adapter_goes_on_in_another_pack_as_if_never_stopped(tiny_model):
    config = replace(CONFIG, epochs=None)
    first = Office(jobs(tiny_model(), 3), stop_at=4)
    train_lanes(RoutedModel(tiny_model()), 3, first, config)
    assert not first.adapters and len(first.together) == 4
    assert [c.state.steps for c in first.kept.values()] == [4, 4, 4]

    again = [replace(job, start=first.kept[job.id]) for job in jobs(tiny_model(), 3)]
    second = Office([jobs(tiny_model())[4], again[2], again[0], again[1]])
    train_lanes(RoutedModel(tiny_model()), 2, second, config)
    for job in (*jobs(tiny_model(), 3), jobs(tiny_model())[4]):
        adapter, losses = alone(tiny_model, job, config)
        assert second.losses[job.id] == pytest.approx(losses, rel=1e-4)
        assert_same(second.adapters[job.id], adapter)


def test_a_checkpoint_is_kept_while_training_goes_on(tiny_model):
    config = replace(CONFIG, epochs=None)
    office = Office(jobs(tiny_model(), 2), keep_at=3)
    train_lanes(RoutedModel(tiny_model()), 2, office, config)
    for job in jobs(tiny_model(), 2):
        kept, (adapter, losses) = office.kept[job.id], alone(tiny_model, job, config)
        assert list(kept.losses) == pytest.approx(losses[:3], rel=1e-4)
        assert_same(office.adapters[job.id], adapter)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_adapter_that_is_not_finite_is_stopped_and_its_neighbours_do_not_notice(tiny_model, where):
    poison = 29_000
    many = jobs(tiny_model())
    bad = Job(id="bad", examples=[*many[4].examples, Tokens((101, poison, 7, 102), 2)])

    def poisoned() -> RoutedModel:
        inner = tiny_model()
        model, seen = inner.model.model, {}
        if where == "loss":
            with torch.no_grad():
                model.embed_tokens.weight[poison] = float("nan")
        else:
            model.embed_tokens.register_forward_hook(lambda _, args, out: seen.update(rows=(args[0] == poison).any(1)))
            model.layers[0].register_forward_hook(lambda _, args, out: _Explode.apply(out, seen["rows"]))
        return RoutedModel(inner)

    office = Office([many[3], bad, many[5]])
    train_lanes(poisoned(), 3, office, replace(CONFIG, epochs=None, steps=5))
    assert set(office.failures) == {"bad"}
    assert where in office.failures["bad"] and "not finite" in office.failures["bad"]
    for job in (many[3], many[5]):
        assert_same(office.adapters[job.id], alone(tiny_model, job, replace(CONFIG, epochs=None, steps=5))[0])


class _Explode(torch.autograd.Function):
    """The values as they are; on the way back, infinity for these rows."""

    @staticmethod
    def forward(ctx, hidden, rows):  # noqa: ANN001, ANN205
        ctx.save_for_backward(rows)
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        return gradient.masked_fill(ctx.saved_tensors[0][:, None, None], float("inf")), None


def test_rows_of_unlike_lengths_go_in_two_batches_and_alike_ones_in_one():
    assert by_length([5, 50, 6, 48], lambda n: n) == [[5, 6], [48, 50]]
    assert by_length([50, 45, 48], lambda n: n) == [[45, 48, 50]]
    assert by_length([7], lambda n: n) == [[7]]


def test_budgets_follow_the_examples_up_to_the_steps():
    config = TrainConfig(steps=10, examples_per_step=4, epochs=2.0)
    assert [budget(n, config) for n in (1, 2, 3, 19, 20, 500)] == [1, 1, 2, 10, 10, 10]
    assert budget(1, replace(config, epochs=None)) == 10
    with pytest.raises(ValueError, match="epochs"):
        replace(config, epochs=0.0)


def test_rows_that_a_cpu_takes_in_parts_give_the_same_adapters(tiny_model, monkeypatch):
    wanted = {job.id: alone(tiny_model, job)[0] for job in jobs(tiny_model())}
    monkeypatch.setattr("mta_ray.personalize.lanes.CPU_TOKENS", 30)  # two or three rows at once
    monkeypatch.setattr("mta_ray.personalize.lanes.CPU_NUMBERS", 0)
    office = Office(jobs(tiny_model()))
    train_lanes(RoutedModel(tiny_model()), 6, office, CONFIG)
    for name, adapter in wanted.items():
        assert_same(office.adapters[name], adapter)
