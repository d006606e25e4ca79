"""Real workers over gloo, each in its own process, against AdamW written out by hand in one process."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mta_ray.lora.slots import Route, Router, Routing, SlotLinear
from mta_ray.personalize.engines import SlotState, TorchSlotEngine
from mta_ray.personalize.slot_adam import slot_norms
from mta_ray.pipeline.deepspeed_engine import DeepSpeedEngine, DeepSpeedSlotEngine

SLOTS, RANK, HIDDEN, ROWS, STEPS = 3, 8, 4200, 6, 10
"""SLOTS * RANK * HIDDEN > 100,000: below that, stage 3 keeps a parameter whole and would not be tested."""
LOUD = 0
"""The slot whose loss, and so its gradient, is a million times its neighbours'."""
MAX_NORM, DECAY = 0.05, 0.1
RATES = [1e-3 * (1 + step % 3) for step in range(STEPS)]

SETTINGS: list[tuple[int, int, bool, bool]] = [
    (1, 0, True, False),
    (1, 2, True, False),
    (1, 3, False, False),
    (1, 3, True, False),
    (2, 0, True, False),
    (2, 1, True, False),
    (2, 1, False, False),
    (2, 2, True, True),
    (2, 2, False, False),
    (2, 3, True, False),
    (2, 3, True, True),
]
"""Workers, ZeRO stage, whether it is an engine of slots, offload."""


class Model(nn.Module):
    """Two adapted layers and a norm; what is not on the shelf is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = Router()
        self.up = SlotLinear(nn.Linear(16, HIDDEN), name="up", router=self.router)
        self.norm = nn.LayerNorm(HIDDEN)
        self.down = SlotLinear(nn.Linear(HIDDEN, 16), name="down", router=self.router)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))

    def new_shelf(self, seed: int) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        trainable = []
        for layer in (self.up, self.down):
            layer.add_shelf("pack", slots=SLOTS, rank=RANK, scale=1.0)
            for parameter in layer.shelves["pack"].parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                trainable.append(parameter.requires_grad_(True))
        return trainable


def loss_of(model: Model, step: int, rows: range) -> Tensor:
    """The rows' share of the step's loss; all shares add up to the loss."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 4, 16, generator=generator), torch.randn(ROWS, 4, 16, generator=generator)
    slots = [row % SLOTS for row in rows]
    weights = torch.tensor([1e3 if slot == LOUD else 1e-3 for slot in slots])
    with model.router.using(pack=Routing.of([Route(slots=(slot,), weights=(1.0,)) for slot in slots])):
        return ((model(x[rows]) - y[rows]).square().mean((1, 2)) * weights).sum()


def worker(rank: int, workers: int, port: int, folder: str) -> None:
    """All that `workers` workers do in these tests; what each finds lies in `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for number, (wanted_workers, stage, is_slots, offload) in enumerate(SETTINGS):
        if wanted_workers == workers:
            torch.save(train(stage, is_slots, offload), Path(folder) / f"{number}.{rank}.pt")
            if is_slots:
                torch.save(come_and_go(stage, offload), Path(folder) / f"{number}.{rank}.slots.pt")
    if workers == 2:
        torch.save(clip(rank), Path(folder) / f"clip.{rank}.pt")
    torch.distributed.destroy_process_group()


def train(stage: int, is_slots: bool, offload: bool) -> list[list[Tensor]]:
    model = Model()
    packs = []
    engines = []
    kind = DeepSpeedSlotEngine if is_slots else DeepSpeedEngine
    for seed in (1, 2):  # two packs, one after the other, over the same model
        trainable = model.new_shelf(seed)
        engine = kind(model, trainable, zero_stage=stage, weight_decay=DECAY, max_grad_norm=MAX_NORM, offload=offload)
        for step in range(STEPS):
            engine.backward(loss_of(model, step, range(engine.rank, ROWS, engine.world_size)))
            engine.step({slot: RATES[step] for slot in range(SLOTS)} if is_slots else RATES[step])  # type: ignore
        engine.finish()
        packs.append([parameter.detach().clone() for parameter in trainable])
        engines.append(weakref.ref(engine.engine))
    gc.collect()
    assert engines[0]() is None, "the first pack's optimiser state is kept for ever"
    return packs


def come_and_go(stage: int | None, offload: bool = False) -> list[SlotState]:
    """Adapters that join, rest, leave and move to another slot while their neighbours go on. No stage: plain torch."""
    model = Model()
    trainable = model.new_shelf(3)
    if stage is None:
        engine: TorchSlotEngine | DeepSpeedSlotEngine
        engine = TorchSlotEngine(trainable, weight_decay=DECAY, max_grad_norm=MAX_NORM)
    else:
        engine = DeepSpeedSlotEngine(
            model, trainable, zero_stage=stage, weight_decay=DECAY, max_grad_norm=MAX_NORM, offload=offload
        )

    def go(steps: range, slots: list[int]) -> None:
        for step in steps:
            engine.backward(loss_of(model, step, range(engine.rank, ROWS, engine.world_size)))
            assert engine.step({slot: 1e-3 * (1 + slot) for slot in slots}) == []

    generator = torch.Generator().manual_seed(9)
    shapes = [(RANK, 16), (RANK, HIDDEN), (RANK, HIDDEN), (RANK, 16)]
    newcomer = SlotState.fresh([torch.randn(shape, generator=generator) * 0.05 for shape in shapes])
    go(range(3), [0, 1, 2])
    left = engine.read([1])[1]
    engine.load({1: newcomer})
    go(range(3, 5), [0, 1])  # slot 2 rests
    moved = engine.read([0, 2])
    engine.load({0: left, 2: moved[0]})
    go(range(5, 7), [0, 1, 2])
    end = engine.read([0, 1, 2])
    engine.finish()
    return [end[slot] for slot in range(SLOTS)]


def clip(rank: int) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """The clipped gradient of two slots whose gradients are given, and what becomes of one that is not finite."""
    from deepspeed.utils import safe_get_full_grad

    # Slot 0 has norm 3000 on the first worker and 1000 on the second, slot 1 has 0.06 and 0.02.
    parameter = nn.Parameter(torch.zeros(2, 4))
    gradient = torch.tensor([[3000.0, 0, 0, 0], [0, 0.06, 0, 0]]) / (1 if rank == 0 else 3)
    engine = DeepSpeedSlotEngine(nn.Module(), [parameter], zero_stage=1, weight_decay=0.0, max_grad_norm=1.0)
    seen: list[Tensor] = []
    inner = engine.engine.step
    engine.engine.step = lambda: (seen.append(safe_get_full_grad(parameter).clone()), inner())
    engine.backward((parameter * gradient).sum())
    engine.step({0: 1e-3, 1: 1e-3})

    before = parameter.detach().clone()
    engine.backward((parameter * torch.tensor([[1.0], [float("inf") if rank == 1 else 1.0]])).sum())
    bad = engine.step({0: 1e-3, 1: 1e-3})
    after = parameter.detach().clone()
    engine.backward(parameter.sum())  # goes on as if that had not been
    assert engine.step({0: 1e-3}) == []
    assert engine.read([0])[0].steps == 2
    return seen[0], bad, before, after


def train_by_hand(seed: int, *, per_slot: bool) -> list[Tensor]:
    model = Model()
    trainable = model.new_shelf(seed)
    first, second = [torch.zeros_like(p) for p in trainable], [torch.zeros_like(p) for p in trainable]
    for step in range(STEPS):
        gradients = list(torch.autograd.grad(loss_of(model, step, range(ROWS)), trainable))
        for slots in [[slot] for slot in range(SLOTS)] if per_slot else [list(range(SLOTS))]:
            norm = sum(float(g[slots].double().square().sum()) for g in gradients) ** 0.5
            for gradient in gradients:
                gradient[slots] *= min(1.0, MAX_NORM / norm)
        with torch.no_grad():
            for p, g, m, v in zip(trainable, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - RATES[step] * DECAY)
                p -= RATES[step] * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return [p.detach() for p in trainable]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker alone and two together found."""
    folder = tmp_path_factory.mktemp("workers")
    for workers in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(worker, (workers, port, str(folder)), nprocs=workers)
    return folder


@pytest.fixture(scope="module")
def by_hand() -> dict[bool, list[list[Tensor]]]:
    return {per_slot: [train_by_hand(seed, per_slot=per_slot) for seed in (1, 2)] for per_slot in (True, False)}


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def test_any_stage_and_workers_give_what_adamw_gives(
    by_hand: dict[bool, list[list[Tensor]]], found: Path, number: int
) -> None:
    workers, _, is_slots, _ = SETTINGS[number]
    for rank in range(workers):
        for got, want in zip(torch.load(found / f"{number}.{rank}.pt"), by_hand[is_slots], strict=True):
            for one, other in zip(got, want, strict=True):
                assert one.shape == other.shape
                assert (one - other).norm() < 1e-5 * other.norm()


def test_clipping_of_slots_and_of_the_pack_differ(by_hand: dict[bool, list[list[Tensor]]]) -> None:
    """Else the test above could not tell one from the other."""
    for slots, pack in zip(by_hand[True][0], by_hand[False][0], strict=True):
        assert (slots - pack).norm() > 1e-3 * pack.norm()


@pytest.mark.parametrize("number", [n for n, (_, _, is_slots, _) in enumerate(SETTINGS) if is_slots])
def test_adapters_come_and_go_as_in_plain_torch(found: Path, number: int) -> None:
    wanted = come_and_go(None)
    assert [state.steps for state in wanted] == [5, 4, 7]
    for rank in range(SETTINGS[number][0]):
        states = torch.load(found / f"{number}.{rank}.slots.pt", weights_only=False)
        for got, want in zip(states, wanted, strict=True):
            assert got.steps == want.steps
            for kind in ("values", "first", "second"):
                for one, other in zip(getattr(got, kind), getattr(want, kind), strict=True):
                    assert (one - other).norm() <= 1e-5 * other.norm(), kind


def test_a_huge_gradient_is_clipped_and_its_neighbour_is_not(found: Path) -> None:
    for rank in (0, 1):
        clipped = torch.load(found / f"clip.{rank}.pt")[0]
        assert torch.allclose(clipped, torch.tensor([[1.0, 0, 0, 0], [0, 0.08, 0, 0]]), rtol=1e-6)


def test_a_gradient_that_is_not_finite_on_one_worker_is_known_to_all_and_updates_nothing(found: Path) -> None:
    for rank in (0, 1):
        _, bad, before, after = torch.load(found / f"clip.{rank}.pt")
        assert bad == [1]
        assert before.any() and torch.equal(before, after)


def test_norms_are_per_slot_over_all_tensors() -> None:
    gradients = [torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[0.0], [4.0]], [[2.0], [2.0]]])]
    assert slot_norms(gradients).tolist() == [5.0, 3.0]


KINDS = (DeepSpeedEngine, DeepSpeedSlotEngine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "offload", "word"), [(4, False, "wanted one of"), (0, True, "pass zero_stage 1")])
def test_settings_that_cannot_be_are_refused(kind: type, stage: int, offload: bool, word: str) -> None:
    parameters = [nn.Parameter(torch.zeros(2, 4))]
    with pytest.raises(ValueError, match=word):
        kind(nn.Module(), parameters, zero_stage=stage, weight_decay=0.0, max_grad_norm=1.0, offload=offload)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_it_says_what_to_do(kind: type) -> None:
    with pytest.raises(RuntimeError, match="TorchTrainer"):
        kind(nn.Module(), [nn.Parameter(torch.zeros(2, 4))], zero_stage=1, weight_decay=0.0, max_grad_norm=1.0)
