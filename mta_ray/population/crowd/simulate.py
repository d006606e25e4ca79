"""A population of any size through the real pipeline: users are made, embedded, routed and stored, part by part.

One streaming Ray Data job; the driver sees a summary of each part. A run that was stopped goes on with the parts that
are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from ray.actor import ActorHandle

from mta_ray.artifacts import canonical_json, is_current, jsonable, located, open_artifact, publish, refuse_stranger
from mta_ray.cluster import ClusterConfig, connect, fixed_cpus
from mta_ray.console import announce
from mta_ray.evaluation.sections import write_sections
from mta_ray.files import alone_in, replace_file
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.object_store import is_remote
from mta_ray.pipeline.memory import watch_memory
from mta_ray.pipeline.progress import follow, open_board
from mta_ray.population import words
from mta_ray.population.crowd import report as crowd_report
from mta_ray.population.crowd import sample as crowd_sample
from mta_ray.population.crowd.anchors import Anchors, anchors_of_bank, anchors_of_sample, publish_anchors
from mta_ray.population.crowd.bare import bare_users_per_s
from mta_ray.population.crowd.parts import HASH, PROGRESS, SUMMARY, CrowdPlan, run_parts
from mta_ray.population.crowd.quality import Evaluated, quality_by_cosine, read_evaluated
from mta_ray.population.crowd.vectors import EmbeddingModel, fit_model, load_model
from mta_ray.population.people import WorldConfig
from mta_ray.serving.database import DatabaseConfig, is_there, open_database, open_existing
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_store import UnknownUser, UserStore
from mta_ray.similarity.embedding import EMBEDDED

log = logging.getLogger(__name__)
KIND = "population"
MARK = ".mta-simulate-population"
"""A file in OUT.parts that says whose folder it is: only then may it be emptied and removed."""
PART_USERS = {"sampled": 5000, "encoded": 250}
HELD_OUT_MIN = 20
PART_USERS_MAX = 50_000
"""A block stays far below the size at which Ray Data cuts it (128 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatePopulationConfig:
    """How many users of which world, whom they are routed to, and where they go."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """What the people are like."""
    users: int = 100_000
    """How many: users 0 … users - 1 of the world."""
    embeddings: Literal["sampled", "encoded"] = "sampled"
    """`encoded`: every user's texts are made and encoded. `sampled`: vectors are drawn from a model of encoded users,
    and each user borrows the texts of one of those."""
    bank: str | None = None
    """The `bank` artifact that users are routed to; none: anchors are chosen from the sample, with nothing trained."""
    anchors: int = 50
    """Anchors to choose where no bank is given."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How a user's anchors are weighed."""
    encoder: str = EMBEDDED
    """As in embed-users; with a bank, the bank's is used."""
    max_items: int = 24
    """Latest history items of a user that are encoded."""
    max_words: int = 64
    """Words of each item's text that are encoded."""
    fitted_on: int = 2000
    """Encoded users that the model of embeddings is fitted on, and that anchors are chosen from."""
    held_out: int = 1000
    """More encoded users, which the fidelity of drawn vectors is measured on; 0: it is not measured."""
    store: str | None = None
    """User store to fill too: a SQLite file, or `postgresql://user@host/name`; users who are there already stay.
    Not inside OUT, which is replaced whole."""
    tenant: str = "simulated"
    """Tenant of the users in the store, and of anchors that are no bank's."""
    history_items: int = 3
    """Latest items of a user whose text goes into the store."""
    part_users: int | None = None
    """Users of a part, which is done as a whole or not at all; none: 5,000 sampled or 250 encoded ones."""
    workers: int = 2
    """Processes that draw or encode at once."""
    grow_from: tuple[int, ...] = ()
    """Sizes of smaller populations that run first, each into a store of its own that is thrown away: shows growth."""
    report: str | None = None
    """The `report` artifact of an evaluation with the same bank: gives the quality to expect by similarity."""
    evaluated: str | None = None
    """The `embeddings` artifact of the users in that report."""
    method: str = "mta_fusion"
    """Method of the report whose quality is expected."""
    out: str = "runs/population"
    """Folder of the artifact: part-*.parquet, report.json, report.html. Unfinished parts lie in OUT.parts."""
    force: bool = False
    """Run again although the artifact, or parts of it, are there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        least = {"users": 1, "anchors": 1, "max_items": 1, "max_words": 1, "held_out": 0, "history_items": 1}
        for name, count in (least | {"fitted_on": 20, "workers": 1}).items():
            if getattr(self, name) < count:
                raise ValueError(f"{name} must be at least {count}, got {getattr(self, name)}")
        if 0 < self.held_out < HELD_OUT_MIN:
            raise ValueError(
                f"held_out is {self.held_out}: fidelity takes at least {HELD_OUT_MIN}, or 0 to leave it out"
            )
        if self.users > crowd_sample.FIRST:
            raise ValueError(f"users must be at most {crowd_sample.FIRST:,}, got {self.users:,}")
        if self.part_users is not None and not 1 <= self.part_users <= PART_USERS_MAX:
            raise ValueError(f"part_users must lie between 1 and {PART_USERS_MAX}, got {self.part_users}")
        if any(not 0 < size < self.users for size in self.grow_from) or list(self.grow_from) != sorted(
            set(self.grow_from)
        ):
            raise ValueError(f"grow_from must be ascending sizes below users, {self.users}; got {self.grow_from}")
        if self.grow_from and self.store is not None and "://" in self.store and not self.store.startswith("sqlite"):
            raise ValueError(
                "grow_from fills a store of its own for each size, which only SQLite files can be; leave it out"
            )
        if self.store is not None and _has_password(self.store):
            raise ValueError("store holds a password, which would be written down; leave it to PGPASSWORD or ~/.pgpass")
        if (self.report is None) != (self.evaluated is None):
            raise ValueError("report and evaluated belong together: give both, or neither")
        if self.report is not None and self.bank is None:
            raise ValueError("a report says what to expect of the bank that it was made with; give that bank too")
        if is_remote(self.out):
            raise ValueError(f"out is {self.out}, wanted a folder that every worker can reach: parts are renamed there")
        file = None if self.store is None else _sqlite_file(self.store)
        for folder in (self.out, f"{self.out}.parts"):
            if file is not None and file.is_relative_to(Path(folder).expanduser().resolve()):
                raise ValueError(
                    f"store is {self.store}, which lies in {folder} and would be lost when that is replaced or "
                    "removed; choose another place"
                )


def simulate_population(config: SimulatePopulationConfig) -> str:
    """Publish the population with its report, and fill the store."""
    named = [name for name in ("bank", "report", "evaluated") if getattr(config, name) is not None]
    config = located(config, "out", *named)
    if config.store is not None and "://" not in config.store:
        config = replace(config, store=str(Path(config.store).expanduser().absolute()))
    kinds = {"bank": "bank", "report": "report", "evaluated": "embeddings"}
    inputs = {name: open_artifact(getattr(config, name), kind=kinds[name], verify=False).hash for name in named}
    settings = {k: v for k, v in jsonable(config).items() if k not in ("out", "force", "cluster", "workers", *kinds)}
    settings["edition"] = words.edition(config.world.task)
    is_there = is_current(config.out, kind=KIND, settings=settings, inputs=inputs)
    if not config.force and is_there and _is_stored(config):
        log.info("population: %s is current, nothing to do", config.out)
        return config.out

    evaluated = None
    if config.report is not None and config.evaluated is not None:
        evaluated = read_evaluated(
            config.report, config.evaluated, bank_hash=inputs["bank"], method=config.method, task=config.world.task,
            max_items=config.max_items, max_words=config.max_words,
        )  # fmt: skip
    refuse_stranger(config.out, KIND)
    work = Path(f"{config.out}.parts")
    with alone_in(work, "another simulation"):
        _claim(work)
        if config.force:
            _empty(work)
        report = _make(config, settings, inputs, work, evaluated)
        _empty(work)  # the mark goes last
        shutil.rmtree(work, ignore_errors=True)
    announce(crowd_report.told(report))
    log.info("population: %d users, in %s", config.users, config.out)
    return config.out


def _make(
    config: SimulatePopulationConfig, settings: dict, inputs: dict[str, str], work: Path, evaluated: Evaluated | None
) -> dict[str, Any]:
    """Publish it; its report."""
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        board = open_board()

        # 1. whom to draw from, and whom to route to
        crowd = _prepare(config, work, board)

        # 2. small populations, then the whole one
        growth = [_run(config, crowd, users, work, board, is_growth=True) for users in config.grow_from]
        run = _run(config, crowd, config.users, work, board, is_growth=False)

        # 3. what was seen
        summaries = [_summary(run.plan.file(part)) for part in range(run.plan.parts)]
        report = crowd_report.report_of(
            summaries,
            settings=settings,
            anchors=run.plan.anchors,
            growth=[one.facts for one in (*growth, run)],
            fidelity=crowd.fidelity,
            bare_users_per_s=run.bare_users_per_s,
            workers=config.workers,
        )
        if evaluated is not None:
            report["quality"] = quality_by_cosine(evaluated, run.plan.anchors, report["cosines"]["histogram"])
        for part in range(run.plan.parts):
            _link(run.plan.file(part), draft.path)
        write_sections(draft.path, "A simulated population", crowd_report.sections(report), report)
        draft.facts.update(users=config.users, anchors=report["anchors"]["count"], encoder=crowd.anchors.encoder)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crowd:
    """What is the same at every size."""

    anchors: Anchors
    model: EmbeddingModel | None
    texts: list[Any]
    fidelity: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    plan: CrowdPlan
    facts: dict[str, Any]
    bare_users_per_s: float | None


def _prepare(config: SimulatePopulationConfig, work: Path, board: ActorHandle) -> _Crowd:
    anchors = None if config.bank is None else anchors_of_bank(config.bank)
    is_sampled = config.embeddings == "sampled"
    if anchors is not None and not is_sampled:
        return _Crowd(anchors=anchors, model=None, texts=[], fidelity=None)

    # 1. encoded users, kept until all is done: drawing goes on with the same model after a stop
    encoder = config.encoder if anchors is None else anchors.encoder
    users = config.fitted_on + (config.held_out if is_sampled else 0)
    edition = words.edition(config.world.task)
    made_of = (asdict(config.world), edition, encoder, config.max_items, config.max_words, config.history_items, users)
    name = _digest(made_of)
    sample_file = work / f"sample-{name}.parquet"
    if _kept(pq.read_table, sample_file) is None:
        sample_file.unlink(missing_ok=True)
    with follow(board, crowd_sample.PROGRESS, users, "users"):
        sample = crowd_sample.encode_sample(
            sample_file,
            config.world,
            users,
            encoder=encoder,
            max_items=config.max_items,
            max_words=config.max_words,
            history_items=config.history_items,
            workers=config.workers,
            board=board,
        )
    fitted = slice(config.fitted_on)

    # 2. anchors, and the model
    if anchors is None:
        anchors = anchors_of_sample(
            sample.user_ids[fitted],
            sample.means[fitted],
            sample.items[fitted].tolist(),
            anchors=config.anchors,
            encoder=encoder,
            seed=config.world.seed,
        )
    if not is_sampled:
        return _Crowd(anchors=anchors, model=None, texts=[], fidelity=None)
    file = work / f"model-{name}-{config.fitted_on}.npz"
    model = _kept(load_model, file)
    if model is None:
        fit_model(sample.means[fitted], sample.items[fitted], encoded_items=config.max_items).save(file)
        model = load_model(file)
    fidelity = None
    if config.held_out:
        fidelity = crowd_sample.fidelity(model, sample.means[config.fitted_on :], anchors, seed=config.world.seed)
    return _Crowd(anchors=anchors, model=model, texts=sample.histories[fitted], fidelity=fidelity)


def _run(
    config: SimulatePopulationConfig, crowd: _Crowd, users: int, work: Path, board: ActorHandle, *, is_growth: bool
) -> _Run:
    """One population, from the first missing part to the last."""
    folder = work / str(users)
    store = config.store
    if is_growth and store is not None:
        store = str(folder / "store.db")
    anchors = crowd.anchors
    folder.mkdir(exist_ok=True)
    finished = folder / "finished.json"
    if is_growth:
        plan = _plan(config, crowd, anchors, users, folder, store)  # no anchor is retired in a store of its own
        facts = _kept(lambda file: json.loads(file.read_text()), finished) or {}
        _clear(folder)
        if facts.get("hash") == plan.hash and facts.get("workers") == config.workers:
            return _Run(plan=plan, facts=facts, bare_users_per_s=None)
    before_bytes = _store_bytes(store) if store is not None and is_there(DatabaseConfig(url=store)) else 0
    if store is not None:
        with closing(open_database(DatabaseConfig(url=store))) as database:
            anchors = publish_anchors(database, anchors, tenant=config.tenant, path=config.bank or config.out)
    plan = _plan(config, crowd, anchors, users, folder, store)

    # 1. what is there already: of a small population nothing, or its time would be that of a rest;
    # marks of parts whose users the store has lost count for nothing
    done = [] if is_growth else [part for part in range(plan.parts) if _is_done(plan, part)]
    if store is not None and done:
        kept = _are_stored(store, config.tenant, [plan.file(part) for part in done])
        done = [part for part, is_kept in zip(done, kept, strict=True) if is_kept]
    missing = sorted(set(range(plan.parts)) - set(done))
    if done:
        log.info("population: %d of %d parts are there", len(done), plan.parts)

    # 2. the encoder alone, to compare with
    bare = None
    if config.embeddings == "encoded" and missing and not is_growth:
        bare = bare_users_per_s(plan)

    # 3. the parts
    began_s = time.perf_counter()
    counted = f"{PROGRESS}, {users} users" if is_growth else PROGRESS
    plan = replace(plan, progress=counted)
    with watch_memory() as memory, follow(board, counted, sum(map(plan.rows, missing)), "users"):
        run_parts(plan, missing, board)
    facts = crowd_report.growth_of(
        [_summary(plan.file(part)) for part in missing],
        users=users,
        seconds=time.perf_counter() - began_s,
        memory=memory,
        store_bytes=_store_bytes(store),
        store_bytes_before=before_bytes,
    )
    others = sum(_summary(plan.file(part))["others"] for part in range(plan.parts))
    facts |= {"hash": plan.hash, "workers": config.workers, "users_kept_as_they_were": others}
    if others:
        log.warning(
            "population: %d of %d users were in the store already with another route or history, and stay as they were "
            "there: its users are not those of the files; take another store or --tenant for each population",
            *(others, users),
        )
    if is_growth:
        text = json.dumps(facts)
        replace_file(finished, lambda path: path.write_text(text))
        _clear(folder)
    return _Run(plan=plan, facts=facts, bare_users_per_s=bare)


def _plan(
    config: SimulatePopulationConfig, crowd: _Crowd, anchors: Anchors, users: int, folder: Path, store: str | None
) -> CrowdPlan:
    part_users = _part_users(config)
    decides = (
        *(asdict(config.world), part_users, config.embeddings, anchors.hash, anchors.retired, asdict(config.fusion)),
        *(config.max_items, config.max_words, config.history_items, config.fitted_on, config.held_out),
        *(config.tenant, store, words.edition(config.world.task)),
    )
    return CrowdPlan(
        world=config.world,
        users=users,
        part_users=part_users,
        cpus=fixed_cpus(config.cluster),
        anchors=anchors,
        fusion=config.fusion,
        model=crowd.model,
        texts=crowd.texts,
        max_items=config.max_items,
        max_words=config.max_words,
        history_items=config.history_items,
        workers=config.workers,
        store=store,
        tenant=config.tenant,
        folder=str(folder),
        hash=_digest(decides),
    )


def _claim(folder: Path) -> None:
    """Mark the folder as ours; ValueError where something else lies in it."""
    mark = folder / MARK
    if mark.exists():
        return
    if found := sorted(path.name for path in folder.iterdir()):
        raise ValueError(
            f"{folder} holds {found[0]!r} and no {MARK}: it was not made by this command, which would empty and remove "
            "it; choose another --out, or move it away (what an earlier version of mta-ray left there may be removed)"
        )
    mark.touch()


def _empty(folder: Path) -> None:
    """The folder itself stays, we hold its lock; so does its mark."""
    for path in folder.iterdir():
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Take away what a small population has written."""
    for file in (*folder.glob("part-*"), *folder.glob("store.db*")):
        file.unlink()


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def _is_done(plan: CrowdPlan, part: int) -> bool:
    found = _kept(pq.read_metadata, plan.file(part))
    if found is None or found.num_rows != plan.rows(part):
        return False
    return (found.metadata or {}).get(HASH) == plan.hash.encode()


def _kept(read: Callable[[Path], Any], file: Path) -> Any | None:
    """What an earlier run left in the file; None where there is nothing, or where it is damaged."""
    try:
        return read(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, pa.ArrowException, zipfile.BadZipFile):
        log.warning("population: %s is damaged and is made again", file)
        return None


def _summary(file: Path) -> dict[str, Any]:
    """What a part's file says of it."""
    summary: dict[str, Any] = json.loads(pq.read_metadata(file).metadata[SUMMARY])
    return summary


def _is_stored(config: SimulatePopulationConfig) -> bool:
    """Whether the store has this population: enough users, and the last one of every part as he should be."""
    if config.store is None:
        return True
    return all(_are_stored(config.store, config.tenant, sorted(Path(config.out).glob("part-*.parquet"))))


def _part_users(config: SimulatePopulationConfig) -> int:
    return config.part_users or PART_USERS[config.embeddings]


def _are_stored(store: str, tenant: str, parts: Sequence[Path]) -> list[bool]:
    """Of each part, whether its last user is in the store with the route that is his; of none where the tenant has
    fewer users than all of them together."""
    place = DatabaseConfig(url=store)
    if not parts or not is_there(place):
        return [False] * len(parts)
    summaries = [_kept(_summary, part) or {} for part in parts]
    with closing(open_existing(place)) as database:
        users = UserStore(database)
        if users.counts(tenant).users < sum(summary.get("users", 0) for summary in summaries):
            return [False] * len(parts)
        return [_is_stored_as(users, tenant, summary.get("last")) for summary in summaries]


def _is_stored_as(users: UserStore, tenant: str, last: dict[str, Any] | None) -> bool:
    """`last` as in a part's summary; parts of an earlier version have none."""
    if last is None:
        return False
    try:
        route = users.read(UserId(tenant=tenant, id=last["id"])).route
    except UnknownUser:
        return False
    return route is not None and jsonable(replace(route, history_version=0)) == last["route"]


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def _sqlite_file(store: str) -> Path | None:
    """None: it is another database."""
    if "://" not in store:
        return Path(store).expanduser().resolve()
    if not store.startswith("sqlite"):
        return None
    return Path(sa.make_url(store).database or "").resolve()


def _store_bytes(store: str | None) -> int | None:
    """Of a SQLite file, its log written back."""
    if store is None or "://" in store:
        return None
    with closing(open_database(DatabaseConfig(url=store))) as database:
        database.forget_pages()
    return Path(store).stat().st_size


def _link(file: Path, folder: Path) -> None:
    """Into the draft, without taking it from where a rerun would look for it."""
    try:
        os.link(file, folder / file.name)
    except OSError:  # a file system without links
        shutil.copyfile(file, folder / file.name)
