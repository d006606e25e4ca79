"""The queue of users who wait for a stack: nobody is trained twice at once, nobody is lost with a worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mta_ray.lamp.users import HistoryItem
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.stack_queue import LeaseLost, QueueConfig, StackQueue
from mta_ray.serving.user_state import ItemSum, UserStack
from mta_ray.serving.user_store import UnknownUser, UserStore

ANA, BO, CY = (UserId(tenant="acme", id=name) for name in ("ana", "bo", "cy"))
STACK = UserStack(
    tensors=b"t", kind="lora", rank=1, scale=2.0, base_fingerprint="f", bank_version="b", history_version=2**62
)


@pytest.fixture
def store(database: Database) -> UserStore:
    return UserStore(database)


@pytest.fixture
def queue(database: Database, store: UserStore) -> StackQueue:
    """With three users in the store, none of whom waits yet."""
    for user in (ANA, BO, CY):
        write(store, user)
    return StackQueue(database, QueueConfig(lease_s=60.0, attempts_max=2))


def write(store: UserStore, user: UserId) -> None:
    one = ItemSum(total=np.ones(4, dtype=np.float32), items=1, encoder="e")
    store.append_history(user, [HistoryItem(id="i", content="c", target="t")], one, task="movie_tagging")


def test_the_longest_waiting_comes_first_and_each_once(queue: StackQueue, clock: Any) -> None:
    for user in (BO, ANA, CY, BO):
        clock.now_s += 1
        queue.enqueue(user)
    assert queue.waiting() == 3
    assert [job.user for job in queue.claim(2)] == [BO, ANA]
    assert [job.user for job in queue.claim(2)] == [CY]
    assert queue.claim(2) == [] and queue.waiting() == 0
    assert [queue.status(user) for user in (ANA, UserId(tenant="acme", id="di"))] == ["training", "none"]


def test_a_finished_job_leaves_a_stack_and_no_job(queue: StackQueue, store: UserStore) -> None:
    queue.enqueue(ANA)
    assert queue.status(ANA) == "waiting"
    (job,) = queue.claim(5)
    version = queue.finish(job, STACK)
    assert store.read(ANA).stack_version == version and queue.status(ANA) == "none"
    with pytest.raises(LeaseLost):
        queue.finish(job, STACK)
    assert store.read(ANA).stack_version == version


def test_a_lease_that_runs_out_gives_the_job_to_another(queue: StackQueue, store: UserStore, clock: Any) -> None:
    queue.enqueue(ANA)
    (first,) = queue.claim(1)
    clock.now_s += 50
    queue.renew(first)
    clock.now_s += 50
    assert queue.claim(1) == []
    clock.now_s += 11
    assert queue.status(ANA) == "waiting"
    (second,) = queue.claim(1)
    assert (first.attempt, second.attempt) == (1, 2)

    for late in (lambda: queue.renew(first), lambda: queue.finish(first, STACK), lambda: queue.fail(first, "slow")):
        with pytest.raises(LeaseLost):
            late()
    assert store.read(ANA).stack_version is None
    queue.finish(second, STACK)
    assert store.read(ANA).stack_version is not None


def test_a_late_worker_whose_job_nobody_took_still_counts(queue: StackQueue, store: UserStore, clock: Any) -> None:
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    clock.now_s += 1000
    queue.finish(job, STACK)
    assert store.read(ANA).stack_version is not None and queue.claim(1) == []


def test_a_job_that_kills_its_workers_is_given_up_until_it_is_asked_for_again(queue: StackQueue, clock: Any) -> None:
    queue.enqueue(ANA)
    for _ in range(2):
        assert len(queue.claim(1)) == 1
        clock.now_s += 61
    assert queue.claim(1) == [] and queue.status(ANA) == "failed"
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    assert job.attempt == 1


def test_a_job_that_goes_wrong_is_tried_again_and_then_given_up(queue: StackQueue) -> None:
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    queue.fail(job, "NaN")
    assert queue.status(ANA) == "waiting"
    (job,) = queue.claim(1)
    queue.fail(job, "NaN")
    assert queue.status(ANA) == "failed" and queue.claim(1) == []


def test_history_that_came_during_training_is_trained_too(queue: StackQueue, store: UserStore) -> None:
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    write(store, ANA)
    queue.enqueue(ANA)
    assert queue.status(ANA) == "training" and queue.claim(1) == []
    queue.finish(job, STACK)
    (again,) = queue.claim(1)
    assert again.history_version == store.read(ANA).version > job.history_version
    assert again.attempt == 1
    queue.finish(again, STACK)
    assert queue.claim(1) == []


def test_a_history_replaced_during_training_is_trained_again(queue: StackQueue, store: UserStore) -> None:
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    before = store.read(ANA).version
    nothing = ItemSum(total=np.zeros(4, dtype=np.float32), items=0, encoder="e")
    store.replace_history(ANA, [], nothing, task="movie_tagging")
    assert queue.finish(job, replace(STACK, history_version=before)) is None
    assert store.read(ANA).stack_version is None and queue.status(ANA) == "waiting"
    (again,) = queue.claim(1)
    assert queue.finish(again, replace(STACK, history_version=store.read(ANA).version)) is not None


def test_a_user_who_is_deleted_during_training_is_not_made_again(queue: StackQueue, store: UserStore) -> None:
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    store.delete(ANA)
    for act in (lambda: queue.finish(job, STACK), lambda: queue.renew(job), lambda: queue.fail(job, "gone")):
        with pytest.raises(LeaseLost):
            act()
    write(store, ANA)  # somebody new of that name
    with pytest.raises(LeaseLost):
        queue.finish(job, STACK)
    assert store.read(ANA).stack_version is None
    with pytest.raises(UnknownUser):
        queue.enqueue(UserId(tenant="acme", id="di"))


WORKER = """
import json, sys, time
from mta_ray.serving.database import *
from mta_ray.serving.stack_queue import *
database = open_database(DatabaseConfig(url=sys.argv[1], busy_timeout_s=60.0))
queue = StackQueue(database, QueueConfig(lease_s=float(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline()
while jobs := queue.claim(3):
    print(json.dumps([job.user.id for job in jobs]), flush=True)
    if len(sys.argv) > 3:
        time.sleep(60)
"""


def test_claimers_in_threads_and_processes_never_get_the_same_job(
    database_url: str, run_python: Callable[..., Any]
) -> None:
    database = open_database(DatabaseConfig(url=database_url, busy_timeout_s=60.0))
    store, queue = UserStore(database), StackQueue(database)
    waiting = {f"u{n}" for n in range(150)}
    for name in waiting:
        write(store, UserId(tenant="t", id=name))
        queue.enqueue(UserId(tenant="t", id=name))
    processes = [run_python(WORKER, "60") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        print(file=process.stdin, flush=True)
    took: list[str] = []

    def claim() -> None:
        while jobs := queue.claim(2):
            took.extend(job.user.id for job in jobs)

    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        theirs = [name for line in process.stdout for name in json.loads(line)]
        assert process.wait(timeout=600) == 0, process.stderr.read()
        took += theirs
    # PostgreSQL passes over rows that another claimer looks at: what is left over is there for the next call
    took += [job.user.id for job in queue.claim(150)]
    assert sorted(took) == sorted(waiting)
    database.close()


def test_the_job_of_a_killed_worker_comes_back_after_its_lease(
    database_url: str, run_python: Callable[..., Any]
) -> None:
    database = open_database(DatabaseConfig(url=database_url, busy_timeout_s=60.0))
    store, queue = UserStore(database), StackQueue(database, QueueConfig(lease_s=60.0))
    write(store, ANA)
    queue.enqueue(ANA)
    worker = run_python(WORKER, "1.5", "then sleep")
    assert worker.stdout.readline() == "ready\n", worker.stderr.read()
    print(file=worker.stdin, flush=True)
    assert json.loads(worker.stdout.readline()) == ["ana"]
    taken_s = time.monotonic()
    worker.kill()
    worker.wait()

    assert queue.claim(1) == []
    while not (jobs := queue.claim(1)):
        assert time.monotonic() - taken_s < 60
        time.sleep(0.05)
    assert time.monotonic() - taken_s > 1.0
    assert jobs[0].user == ANA and jobs[0].attempt == 2
    queue.finish(jobs[0], STACK)
    assert store.read(ANA).stack_version is not None
    database.close()


@pytest.mark.parametrize("wrong", [{"lease_s": 0.0}, {"attempts_max": 0}])
def test_settings_that_make_no_queue_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted more than 0"):
        QueueConfig(**wrong)
