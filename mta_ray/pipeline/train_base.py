"""Teach the base model the task on other users' items: a task adapter, or every weight of a small model."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.actor import ActorHandle

from mta_ray.artifacts import is_current, jsonable, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect, room_for
from mta_ray.files import folder_identity
from mta_ray.lamp.tasks import task_named
from mta_ray.lora.adapter import Adapter, save_peft
from mta_ray.model.backbone import EMBEDDED, RoutedModel, embedded_path, load_backbone
from mta_ray.model.four_bit import Quantization, check_available, four_bit_mark
from mta_ray.personalize.base_model import KIND, PromptConfig, Wording, open_base, tokenised
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack, train_whole
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.group import (
    GroupConfig,
    cpus_per_worker,
    is_first_worker,
    start_group,
    start_worker,
)
from mta_ray.pipeline.group_engines import prepare_blocks, slot_engine, whole_engine
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.progress import follow, open_board
from mta_ray.pipeline.split import SplitConfig, split_users

log = logging.getLogger(__name__)
PROGRESS = "train base"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBaseConfig:
    """Which base model, and how it learns the task before anything is frozen."""

    users: str = "users"
    """The `users` artifact."""
    embeddings: str = "embeddings"
    """The `embeddings` artifact: says who has how many items."""
    out: str = "base"
    """Folder of the artifact."""
    base_model: str = EMBEDDED
    """all-MiniLM-L6-v2 (embedded, as a decoder), or any Hugging Face causal LM by name or path."""
    mode: Literal["full", "adapter", "none"] = "full"
    """`full`: all but token embeddings, for small models. `adapter`: one merged task LoRA (OPPU). `none`: as MTA."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantization: Quantization = "none"
    """`nf4`: the frozen layers in 4 bits, computed in `dtype`; modes adapter and none. A task adapter is trained over
    them, then merged into the weights before these are quantised."""
    targets: str = "qv"
    """Layers that adapters of this base adapt: qv, all-linear, or last names separated by commas."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """The wording, kept by all later stages."""
    rag_share: float = 0.15
    """Share of the examples that carry retrieved items, so that the method `rag` meets a model that knows them."""
    max_examples: int = 20_000
    """At most so many examples, drawn from all teachers' items."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=4e-4, steps=140, examples_per_step=16))
    """Steps and rates; rank and alpha count for mode `adapter`."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Who teaches."""
    group: GroupConfig = field(default_factory=GroupConfig)
    """The workers."""
    force: bool = False
    """Train again although the result is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.mode == "full" and self.quantization != "none":
            raise ValueError(
                f"mode full trains the weights themselves, and quantization {self.quantization} keeps them frozen in 4 "
                "bits: use mode adapter or none"
            )
        if self.quantization != "none" and self.group.zero_stage == 3:
            raise ValueError("zero_stage 3 cannot share out weights of 4 bits: use zero_stage 0, 1 or 2")
        if self.mode == "full" and self.group.zero_stage == 3:
            raise ValueError("mode full trains small models: use zero_stage 0, 1 or 2")
        if not 0 <= self.rag_share <= 1:
            raise ValueError(f"rag_share is {self.rag_share}, wanted a share from 0 to 1")
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")


def train_base(config: TrainBaseConfig) -> str:
    """Publish the `base` artifact: weights or adapter, fingerprint, wording, losses."""
    config = located(config, "users", "embeddings", "out")
    if Path(config.base_model).is_dir():
        config = located(config, "base_model")
    if config.quantization != "none":
        check_available()
    users = open_artifact(config.users, kind="users", verify=False)
    embeddings = open_artifact(config.embeddings, kind="embeddings", verify=False)
    if embeddings.inputs.get("users") != users.hash:
        raise ValueError(f"{config.embeddings} holds the embeddings of other users; run embed-users on {config.users}")
    settings = {
        k: v
        for k, v in jsonable(config).items()
        if k not in ("out", "force", "cluster", "users", "embeddings", "group")
    }
    inputs = {"users": users.hash, "embeddings": embeddings.hash}
    source = embedded_path() if config.base_model == EMBEDDED else config.base_model
    if Path(source).is_dir():  # a name says which model; a folder may hold another one today
        inputs["base_model"] = folder_identity(source)
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("base: %s is current, nothing to do", config.out)
        return config.out
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        if config.mode == "none":
            report = {"fingerprint": _fingerprint(config), "losses": []}
        else:
            board = open_board()
            room_for(config.cluster, 1, cpus=config.group.least_cpus, gpus=config.group.gpus)
            with follow(board, PROGRESS, config.train.steps, "steps"):
                cpus = cpus_per_worker(config.group, groups=1)
                settings_of_loop = {"config": config, "out": str(draft.path), "board": board}
                ray.get(start_group(_loop, settings_of_loop, config.group, cpus))
            report = json.loads((draft.path / "report.json").read_text())
        draft.facts.update(
            task=users.facts["task"],
            labels=users.facts["labels"],
            source=config.base_model,
            mode=config.mode,
            dtype=config.dtype,
            quantization=config.quantization,
            targets=config.targets,
            prompts=asdict(config.prompts),
            **report,
        )
    log.info("base: %s, %s", open_base(config.out).fingerprint[:12], config.out)
    return config.out


def _loop(settings: dict[str, Any]) -> None:
    start_worker(settings["cpus"])
    config: TrainBaseConfig = settings["config"]
    board: ActorHandle = settings["board"]
    out = Path(settings["out"])
    facts = open_artifact(config.users, kind="users", verify=False).facts
    wording = Wording(task=task_named(facts["task"]), labels=tuple(facts["labels"]), prompts=config.prompts)

    # 1. the model, and the teachers' examples; what is to be sharded over devices need not fit one
    device = "cpu" if config.group.zero_stage == 3 else config.group.device
    backbone = load_backbone(config.base_model, dtype=config.dtype, device=device, quantization=config.quantization)
    examples = tokenised(backbone, _examples(config, wording))
    if not examples:
        raise ValueError(
            f"no history item of the teachers makes an example of {wording.task.name}: none has what a question of the "
            "task asks for (profiles of LaMP-1's own files name no citation: give processed files)"
        )

    def on_step(step: int) -> None:
        if is_first_worker():
            board.report.remote(PROGRESS, "base", step)

    # 2. train
    if config.mode == "full":
        prepare_blocks(backbone.model, config.group)
        make = whole_engine(backbone.model, config.train, config.group)
        losses = train_whole(backbone, examples, config.train, make_engine=make, on_step=on_step)
    else:
        routed = RoutedModel(backbone, config.targets)
        prepare_blocks(routed.model, config.group)
        make_slots = slot_engine(routed.model, config.train, config.group)
        result = train_pack(
            routed, [Job(id="task", examples=examples)], config.train, make_engine=make_slots, on_step=on_step
        )
        losses = result.losses[0]

    # 3. save
    if not is_first_worker():
        return
    if config.mode == "full":
        backbone.model.save_pretrained(out / "model")
        backbone.tokenizer.save_pretrained(out / "model")
        mark = load_backbone(str(out / "model"), dtype=config.dtype).fingerprint
    else:
        save_peft(result.adapters[0], out / "adapter", base_model=config.base_model)
        mark = _fingerprint(config, result.adapters[0])
    (out / "report.json").write_text(json.dumps({"fingerprint": mark, "losses": losses}))


def _fingerprint(config: TrainBaseConfig, adapter: Adapter | None = None) -> str:
    """Of the base as later stages load it, without quantising anything."""
    mark = load_backbone(config.base_model, dtype=config.dtype, adapter=adapter).fingerprint
    return four_bit_mark(mark) if config.quantization == "nf4" else mark


def _examples(config: TrainBaseConfig, wording: Wording) -> list:
    """Teachers' items in a drawn order; the first `rag_share` of each user's with retrieved items before them."""
    table = read_embeddings(config.embeddings)
    split = split_users(table.user_ids, table.items, table.queries, config.split)
    teachers = {table.user_ids[row] for row in split.teachers}
    rng = np.random.default_rng(config.train.seed)
    examples = []
    for user in sorted((u for u in read_users(config.users) if u.id in teachers), key=lambda u: u.id):
        plain = wording.history(user)
        with_context = wording.history(user, context_items=config.prompts.rag_items) if config.rag_share else plain
        is_rag = rng.random(len(plain)) < config.rag_share
        examples += [rich if flag else bare for bare, rich, flag in zip(plain, with_context, is_rag, strict=True)]
    order = rng.permutation(len(examples))[: config.max_examples]
    return [examples[i] for i in order]
