"""The law of serving: a user's answer is the same in any mixed batch, alone, and by PEFT with the exported adapter."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from mta_ray.lora.adapter import Adapter, Factors, save_peft
from mta_ray.lora.fusion import fuse, stack
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.engine import Engine
from mta_ray.model.requests import EngineClosed, Piece, QueueFull, Request, RequestFailed
from mta_ray.model.settings import EngineConfig, Sampling
from mta_ray.serving.slot_table import NoFreeSlot, SlotTable, StackKey

ANCHORS, RANK, STACKS = 5, 4, 6


def adapters(routed: RoutedModel, count: int, rank: int, seed: int) -> list[Adapter]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Adapter(
            factors={
                name: Factors(
                    down=torch.randn(rank, layer.base.in_features, generator=draw) * 0.3,
                    up=torch.randn(layer.base.out_features, rank, generator=draw) * 0.3,
                )
                for name, layer in routed.layers.items()
            },
            scale=2.0,
        )
        for _ in range(count)
    ]


class World:
    """A tiny routed model with a filled bank and stacks."""

    def __init__(self, tiny_model, **config) -> None:
        self.tiny_model = tiny_model
        self.routed = RoutedModel(tiny_model())
        self.bank, self.own = adapters(self.routed, ANCHORS, RANK, 1), adapters(self.routed, STACKS, 1, 2)
        for shelf, filled in (("bank", self.bank), ("stack", self.own)):
            self.routed.add_shelf(shelf, slots=len(filled), rank=filled[0].rank, alpha=1.0)
            for slot, adapter in enumerate(filled):
                put(self.routed.layers, shelf, slot, adapter)
        defaults = {"max_requests": 4, "max_tokens": 48, "max_step_tokens": 20, "max_waiting": 100}
        self.engine = Engine(self.routed, ("bank", "stack"), EngineConfig(**(defaults | config)))

    def request(self, draw: random.Random, *, user: int | None = None, **more) -> Request:
        user = draw.randrange(STACKS + 2) if user is None else user
        routes = {} if user == STACKS + 1 else self.routes(user)
        fields = {"prompt": tuple(draw.randrange(1000, 3000) for _ in range(draw.randint(1, 30)))}
        fields |= {"max_new_tokens": draw.randint(1, 15), "routes": routes, "owner": str(user)}
        return Request(**(fields | more))

    def routes(self, user: int) -> dict[str, Route]:
        draw = random.Random(user)
        slots = tuple(draw.sample(range(ANCHORS), 3))
        bank = Route(slots=slots, weights=(0.5, 0.3, 0.2))
        return {"bank": bank} if user >= STACKS else {"bank": bank, "stack": Route(slots=(user,), weights=(1.0,))}

    def exported(self, routes: dict[str, Route]) -> Adapter:
        fused = fuse([self.bank[slot] for slot in routes["bank"].slots], routes["bank"].weights)
        return stack(fused, self.own[routes["stack"].slots[0]]) if "stack" in routes else fused


@pytest.fixture
def world(tiny_model):
    return World(tiny_model)


def plain(model, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    """Greedy, one forward pass over everything for each token: the slow, obvious form."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def run_mixed(engine: Engine, requests: list[Request], draw: random.Random) -> list[tuple[int, ...]]:
    """Submit at random moments between steps; every answer's tokens."""
    tickets = []
    while len(tickets) < len(requests) or any(not t.is_over for t in tickets):
        while len(tickets) < len(requests) and draw.random() < 0.4:
            tickets.append(engine.submit(requests[len(tickets)]))
        engine.step()
    return [ticket.answer().tokens for ticket in tickets]


def test_mixed_equals_alone_equals_peft(world, tmp_path):
    draw = random.Random(11)
    requests = [world.request(draw) for _ in range(40)]
    mixed = run_mixed(world.engine, requests, draw)
    assert world.engine.stats().cached_tokens == 0
    alone = [world.engine.generate([request])[0].tokens for request in requests]
    assert mixed == alone

    models = {}
    for user in {request.owner for request in requests}:
        model = world.tiny_model().model
        if routes := next(r.routes for r in requests if r.owner == user):
            folder = save_peft(world.exported(routes), tmp_path / user, base_model="tiny")
            model = PeftModel.from_pretrained(model, str(folder)).eval()
        models[user] = model
    for request, got in zip(requests, mixed, strict=True):
        assert got == plain(models[request.owner], request.prompt, request.max_new_tokens)
    same_prompt = [world.request(draw, user=u, prompt=(2000, 2001, 2002), max_new_tokens=8) for u in range(STACKS + 2)]
    assert len({a.tokens for a in world.engine.generate(same_prompt)}) > STACKS // 2, "adapters change the answers"


def test_200_users_who_come_and_go_answer_as_alone_and_as_peft(world, tmp_path):
    """Each with a route, weights, a stack and lengths of its own; stacks move in and out of six slots meanwhile."""
    draw = random.Random(200)
    own = adapters(world.routed, 200, 1, seed=9)
    requests, exported = [], []
    for user in range(200):
        k = draw.randint(1, ANCHORS)
        slots, raw = tuple(draw.sample(range(ANCHORS), k)), [draw.uniform(0.1, 1) for _ in range(k)]
        route = Route(slots=slots, weights=tuple(weight / sum(raw) for weight in raw))
        requests.append(world.request(draw, user=0, routes={"bank": route}, owner=str(user)))
        fused = fuse([world.bank[slot] for slot in slots], route.weights)
        exported.append(stack(fused, own[user]) if user % 3 else fused)  # every third has no stack

    engine, table = world.engine, SlotTable(STACKS)
    under_way, answers, waiting, most = {}, {}, list(range(200)), 0
    while waiting or under_way:
        while waiting and (draw.random() < 0.4 or not under_way):
            user = waiting[0]
            request, slot = requests[user], None
            if user % 3:
                try:
                    seat = table.acquire(StackKey(tenant="t", user=str(user), version=1))
                except NoFreeSlot:
                    break
                slot = seat.slot
                engine.load("stack", slot, own[user])
                routes = request.routes | {"stack": Route(slots=(slot,), weights=(1.0,))}
                request = replace(request, routes=routes)
            under_way[waiting.pop(0)] = (engine.submit(request), slot)
            if draw.random() < 0.1:  # somebody who changes their mind
                engine.submit(world.request(draw)).cancel()
        engine.step()
        most = max(most, engine.stats().running)
        for user in [user for user, (ticket, _) in under_way.items() if ticket.is_over]:
            ticket, slot = under_way.pop(user)
            answers[user] = ticket.answer().tokens
            if slot is not None:
                table.release(slot)
    assert most == 4 and table.evictions > 100
    assert engine.stats().cached_tokens == 0

    peft = None
    for user, request in enumerate(requests):
        folder = str(save_peft(exported[user], tmp_path / str(user), base_model="tiny"))
        if peft is None:
            peft = PeftModel.from_pretrained(world.tiny_model().model, folder, adapter_name="u0").eval()
        else:
            peft.load_adapter(folder, adapter_name=f"u{user}")
            peft.set_adapter(f"u{user}")
            peft.delete_adapter(f"u{user - 1}")
        assert answers[user] == plain(peft, request.prompt, request.max_new_tokens), f"user {user}"
        routes = request.routes
        if user % 3:
            engine.load("stack", 0, own[user])
            routes = routes | {"stack": Route(slots=(0,), weights=(1.0,))}
        assert answers[user] == engine.generate([replace(request, routes=routes)])[0].tokens, f"user {user}"


def test_logprobs_are_the_models_own(world, tmp_path):
    request = world.request(random.Random(3), user=1, max_new_tokens=5, sampling=Sampling(logprobs=3))
    others = [world.request(random.Random(n)) for n in range(4)]
    ticket = world.engine.submit(request)
    world.engine.generate(others)
    pieces = list(ticket)

    folder = save_peft(world.exported(request.routes), tmp_path / "one", base_model="tiny")
    model = PeftModel.from_pretrained(world.tiny_model().model, str(folder)).eval()
    ids = torch.tensor([[*request.prompt, *(p.token for p in pieces)]])
    with torch.no_grad():
        wanted = torch.log_softmax(model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1], dim=-1)
    for place, piece in enumerate(pieces):
        assert piece.logprob == pytest.approx(float(wanted[place, piece.token]), abs=1e-4)
        values, tokens = wanted[place].topk(3)
        assert [token for token, _ in piece.alternatives] == tokens.tolist()
        assert [value for _, value in piece.alternatives] == pytest.approx(values.tolist(), abs=1e-4)


def test_coefficients_are_served_without_a_slot(tiny_model, tmp_path):
    world = World(tiny_model, coefficients=True)
    torch.manual_seed(4)
    scales = {name: torch.rand(2, RANK) * 2 for name in world.routed.layers}
    route = Route(slots=(3, 1), weights=(0.6, 0.4), coefficients=scales)
    request = world.request(random.Random(5), routes={"bank": route}, max_new_tokens=10)
    got = world.engine.submit(request)
    world.engine.generate([world.request(random.Random(n)) for n in range(6)])

    parts = []
    for j, (slot, weight) in enumerate(zip(route.slots, route.weights, strict=True)):
        factors = {
            name: Factors(down=scales[name][j][:, None] * f.down, up=f.up)
            for name, f in world.bank[slot].factors.items()
        }
        parts.append((Adapter(factors=factors, scale=world.bank[slot].scale), weight))
    one = fuse([a for a, _ in parts], [w for _, w in parts])
    model = PeftModel.from_pretrained(tiny_model().model, str(save_peft(one, tmp_path / "c", base_model="tiny"))).eval()
    assert got.answer().tokens == plain(model, request.prompt, 10)


def test_a_seed_gives_the_same_answer_whoever_shares_the_batch(world):
    draw = random.Random(8)
    for sampling in (Sampling(temperature=1.0, seed=5), Sampling(temperature=0.8, top_p=0.7, seed=5)):
        request = world.request(draw, user=2, sampling=sampling, max_new_tokens=12)
        alone = world.engine.generate([request])[0]
        others = [
            world.request(draw, sampling=Sampling(temperature=1.3, top_p=0.9 if n % 2 else 1.0)) for n in range(9)
        ]
        assert world.engine.generate([*others, request, *others])[9] == alone
        other_seed = Sampling(temperature=1.0, seed=6)
        assert world.engine.generate([world.request(draw, user=2, prompt=request.prompt, sampling=other_seed)]) != [
            alone
        ]


def test_stop_tokens_end_the_answer_and_are_not_part_of_it(world):
    request = world.request(random.Random(2), user=0, max_new_tokens=10)
    tokens = world.engine.generate([request])[0].tokens
    stop = next(t for t in tokens[1:] if t not in tokens[: tokens.index(t)])
    stopped = world.request(random.Random(2), user=0, max_new_tokens=10, stop_ids=frozenset({stop}))
    answer = world.engine.generate([stopped])[0]
    assert answer.tokens == tokens[: tokens.index(stop)]
    assert answer.finish == "stop"


def test_a_cancelled_request_gives_its_row_back_and_disturbs_nobody(world):
    draw = random.Random(21)
    requests = [world.request(draw, max_new_tokens=15) for _ in range(12)]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]
    before = world.engine.stats()
    tickets = [world.engine.submit(request) for request in requests]
    in_time = []
    for n in range(6):
        for _ in range(draw.randint(0, 3)):
            world.engine.step()
        in_time.append(not tickets[2 * n].is_over)
        tickets[2 * n].cancel()
        tickets[2 * n].cancel()
        if in_time[-1]:
            world.engine.step()
            assert tickets[2 * n].is_over, "it leaves before the next step"
    while world.engine.stats().running or world.engine.stats().waiting:
        world.engine.step()
    assert sum(in_time) >= 5
    for n, ticket in enumerate(tickets):
        answer = ticket.answer()
        is_cancelled = n % 2 == 0 and in_time[n // 2]
        assert answer.finish == ("cancelled" if is_cancelled else "length")
        assert answer.tokens == (wanted[n][: len(answer.tokens)] if is_cancelled else wanted[n])
    after = world.engine.stats()
    assert (after.running, after.waiting, after.cached_tokens) == (0, 0, 0)
    assert after.cache_bytes == before.cache_bytes


def test_a_full_queue_refuses_at_once_and_impossible_requests_never_enter(tiny_model):
    engine = World(tiny_model, max_requests=2, max_waiting=3).engine
    request = Request(prompt=(5, 6), max_new_tokens=3)
    tickets = [engine.submit(request) for _ in range(5)]
    with pytest.raises(QueueFull):
        engine.submit(request)
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(request)
    while not tickets[0].is_over:
        engine.step()
    tickets.append(engine.submit(request))
    for wrong, words in (
        (Request(prompt=(5,) * 40, max_new_tokens=9), "a request has 48"),
        (Request(prompt=(5, 10**6), max_new_tokens=1), "outside 0 to"),
        (Request(prompt=(5,), max_new_tokens=1, routes={"bank": Route(slots=(9,), weights=(1.0,))}), "which has 5"),
        (Request(prompt=(5,), max_new_tokens=1, routes={"other": Route(slots=(0,), weights=(1.0,))}), "no shelf"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.submit(wrong)
    engine.close(drain=True)
    assert {ticket.answer().finish for ticket in tickets} == {"length"}
    with pytest.raises(EngineClosed):
        engine.submit(request)


def test_a_nan_fails_its_own_request_and_leaves_nothing_behind(world):
    draw = random.Random(31)
    requests = [world.request(draw, user=n % 4, max_new_tokens=12) for n in range(10)]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]
    layer = next(iter(world.routed.layers.values()))
    layer.shelves["stack"].down[5] = float("nan")  # behind the engine's back: `load` refuses such an adapter
    with pytest.raises(ValueError, match="not finite"):
        broken = Factors(down=world.own[0].factors[layer.name].down * float("nan"), up=torch.zeros(64, 1))
        world.engine.load("stack", 5, Adapter(factors={layer.name: broken}, scale=1.0))
    layer.shelves["stack"].down[5] = 0.0

    bad = world.routed.model.model.embed_tokens.weight
    bad[777] = float("nan")
    poisoned = Request(prompt=(1500, 777, 1501), max_new_tokens=12, routes=world.routes(1))
    for place in range(4):
        tickets = [world.engine.submit(r) for r in (*requests[:place], poisoned, *requests[place:])]
        while any(not t.is_over for t in tickets):
            world.engine.step()
        with pytest.raises(RequestFailed, match="not finite"):
            tickets.pop(place).answer()
        assert [t.answer().tokens for t in tickets] == wanted
    assert torch.isfinite(world.engine._cache.pool).all()


def test_an_error_in_a_step_fails_the_new_ones_and_the_others_go_on(world):
    draw = random.Random(41)
    requests = [world.request(draw, max_new_tokens=10) for _ in range(3)]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]

    def explode(module, args):
        if (args[0] == 666).any():
            raise MemoryError("out of memory, says the test")

    handle = world.routed.model.model.embed_tokens.register_forward_pre_hook(explode)
    tickets = [world.engine.submit(request) for request in requests]
    while not all(r.generated for r in world.engine._schedule.running) or not world.engine._schedule.running:
        world.engine.step()
    bad = world.engine.submit(Request(prompt=(5, 666, 7), max_new_tokens=3))
    while any(not t.is_over for t in (*tickets, bad)):
        world.engine.step()
    handle.remove()
    with pytest.raises(RequestFailed, match="out of memory, says the test"):
        bad.answer()
    assert [t.answer().tokens for t in tickets] == wanted


def test_an_error_after_the_forward_pass_costs_the_others_neither_a_token_nor_a_draw(world, monkeypatch):
    from mta_ray.model import engine

    draw = random.Random(43)
    warm = [Sampling(temperature=1.2, seed=n) for n in range(3)]
    requests = [world.request(draw, max_new_tokens=10, sampling=sampling) for sampling in warm]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]
    choose = engine.choose_tokens

    def explode(logits, settings, uniforms):
        if any(one.top_p == 0.123 for one in settings):
            raise MemoryError("out of memory, says the test")
        return choose(logits, settings, uniforms)

    monkeypatch.setattr(engine, "choose_tokens", explode)
    tickets = [world.engine.submit(request) for request in requests]
    while not world.engine._schedule.running or not all(r.generated for r in world.engine._schedule.running):
        world.engine.step()
    bad = world.engine.submit(Request(prompt=(5, 6, 7), max_new_tokens=3, sampling=Sampling(top_p=0.123)))
    while any(not t.is_over for t in (*tickets, bad)):
        world.engine.step()
    with pytest.raises(RequestFailed, match="out of memory, says the test"):
        bad.answer()
    assert [t.answer().tokens for t in tickets] == wanted


def test_a_load_that_breaks_off_leaves_the_slot_empty(world, monkeypatch):
    from mta_ray.model import engine

    mine = world.request(random.Random(5), user=2, max_new_tokens=8)
    bare = replace(mine, routes={"bank": mine.routes["bank"]})
    assert world.engine.generate([mine]) != world.engine.generate([bare])

    def break_off(layers, shelf, slot, adapter):
        next(iter(layers.values())).shelves[shelf].down[slot].fill_(7.0)
        raise RuntimeError("the device is full, says the test")

    monkeypatch.setattr(engine, "put", break_off)
    loading = world.engine.load("stack", 2, world.own[3])
    assert world.engine.generate([mine]) == world.engine.generate([bare])
    with pytest.raises(RuntimeError, match="the device is full"):
        loading.result()


def test_a_stack_is_loaded_while_others_are_decoded(world):
    draw = random.Random(51)
    steady = [world.request(draw, user=n, max_new_tokens=15) for n in range(3)]
    wanted = [world.engine.generate([request])[0].tokens for request in steady]
    world.engine.start()
    tickets = [world.engine.submit(request) for request in steady]
    new = adapters(world.routed, 1, 1, seed=99)[0]
    world.engine.load("stack", 5, new).result()
    world.own[5] = new
    got = world.engine.generate([world.request(random.Random(1), user=5, max_new_tokens=6)])
    assert [t.answer().tokens for t in tickets] == wanted
    with pytest.raises(ValueError, match="do not fit"):
        world.engine.load("stack", 5, adapters(world.routed, 1, 2, seed=1)[0]).result()
    world.engine.close()

    fresh = World(world.tiny_model)
    put(fresh.routed.layers, "stack", 5, new)
    assert fresh.engine.generate([fresh.request(random.Random(1), user=5, max_new_tokens=6)]) == got


def test_a_wiped_slot_adds_nothing_and_its_neighbours_stay(world):
    """A deleted user's stack, and a deleted anchor."""
    draw = random.Random(7)
    mine, other = (world.request(draw, user=user, max_new_tokens=8) for user in (2, 3))
    anchor = world.request(draw, user=STACKS, max_new_tokens=8, routes={"bank": Route(slots=(1,), weights=(1.0,))})
    bare = [replace(mine, routes={"bank": mine.routes["bank"]}), replace(anchor, routes={})]
    had = [answer.tokens for answer in world.engine.generate([mine, anchor])]
    wanted = [answer.tokens for answer in world.engine.generate(bare)]
    assert all(one != without for one, without in zip(had, wanted, strict=True))
    without_anchor = replace(other, routes={"stack": other.routes["stack"]})
    kept = world.engine.generate([without_anchor])[0].tokens

    world.engine.start()
    world.engine.wipe("stack", 2).result()
    assert world.engine.generate([mine])[0].tokens == wanted[0]
    world.engine.wipe("bank", 1).result()
    assert world.engine.generate([anchor])[0].tokens == wanted[1]
    assert world.engine.generate([without_anchor])[0].tokens == kept
    world.engine.close()


def test_streams_on_an_event_loop_and_a_client_that_leaves(world):
    draw = random.Random(61)
    requests = [world.request(draw, max_new_tokens=12) for _ in range(9)]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]
    world.engine.start()

    async def read(request: Request, stop_after: int | None) -> list[Piece]:
        pieces = []
        stream = world.engine.stream(request)
        async for piece in stream:
            pieces.append(piece)
            if stop_after is not None and len(pieces) == stop_after:
                await stream.aclose()
        return pieces

    async def everyone() -> list[list[Piece]]:
        return await asyncio.gather(*(read(r, 2 if n % 3 == 0 else None) for n, r in enumerate(requests)))

    for n, pieces in enumerate(asyncio.run(everyone())):
        tokens = tuple(p.token for p in pieces)
        assert tokens == (wanted[n][:2] if n % 3 == 0 else wanted[n])
    world.engine.close(drain=True)
    assert world.engine.stats().cached_tokens == world.engine.stats().running == 0


def test_many_threads_and_one_engine(world):
    draw = random.Random(71)
    requests = [world.request(draw) for _ in range(24)]
    wanted = [world.engine.generate([request])[0].tokens for request in requests]
    world.engine.start()
    got: dict[int, tuple[int, ...]] = {}

    def work(part: int) -> None:
        for n in range(part, len(requests), 6):
            got[n] = world.engine.submit(requests[n]).answer().tokens

    threads = [threading.Thread(target=work, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.engine.close()
    assert [got[n] for n in range(len(requests))] == wanted


@pytest.mark.parametrize("is_threaded", [False, True])
def test_closing_cancels_what_is_under_way(world, is_threaded):
    tickets = [world.engine.submit(world.request(random.Random(n), max_new_tokens=15)) for n in range(8)]
    world.engine.step()
    assert [t.is_over for t in tickets] == [False] * 8
    closing = threading.Event()
    if is_threaded:
        world.engine.between_steps(closing.wait)
        world.engine.start()
    threading.Timer(0.2, closing.set).start()
    world.engine.close()
    assert {t.answer().finish for t in tickets} == {"cancelled"}
    assert all(t.is_over for t in tickets) and world.engine.stats().cache_bytes == 0
