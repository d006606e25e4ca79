"""The `base` artifact: which base model, what it was taught, and the wording of prompts that later stages keep."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mta_ray.artifacts import open_artifact
from mta_ray.lamp.prompts import Example, Style, history_examples, query_examples
from mta_ray.lamp.tasks import Task, task_named
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import load_peft
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.model.backbone import Backbone, RoutedModel, load_backbone
from mta_ray.model.batches import Tokens, tokenise
from mta_ray.model.four_bit import Quantization

KIND = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How a question is put to the model, in training and in evaluation alike."""

    style: Style = "short"
    """`short` for small models, `lamp` for LaMP's full wording with the labels listed."""
    context_items: int = 0
    """Nearest other items of the user (BM25) that stand before each question."""
    rag_items: int = 2
    """The same for the method `rag`; the base model meets such prompts while it is taught."""
    max_words: int = 48
    """Words of each text that are kept."""

    def __post_init__(self) -> None:
        if self.max_words < 1 or self.context_items < 0 or self.rag_items < 0:
            raise ValueError(f"got {self}; wanted at least one word and no negative number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A task with its labels and prompt settings: from users to what the model reads."""

    task: Task
    labels: tuple[str, ...]
    prompts: PromptConfig

    def history(self, user: User, *, context_items: int | None = None) -> list[Example]:
        """The user's own items as training examples."""
        items = self.prompts.context_items if context_items is None else context_items
        return history_examples(user, self.task, context_items=items, **self._options())  # type: ignore[arg-type]

    def queries(self, user: User, *, context_items: int | None = None) -> list[Example]:
        """The user's queries, in their order."""
        items = self.prompts.context_items if context_items is None else context_items
        return query_examples(user, self.task, context_items=items, **self._options())  # type: ignore[arg-type]

    def _options(self) -> dict[str, object]:
        return {"style": self.prompts.style, "labels": self.labels or None, "max_words": self.prompts.max_words}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A `base` artifact, opened but not loaded."""

    path: Path
    hash: str
    """Of the artifact and the model that it stands for."""
    fingerprint: str
    source: str
    dtype: str
    quantization: Quantization
    targets: str
    mode: str
    wording: Wording
    losses: tuple[float, ...]

    def load(self, *, device: str = "cpu") -> Backbone:
        """The base model with what it was taught in its weights."""
        if self.mode == "full":
            backbone = load_backbone(str(self.path / "model"), device=device, dtype=self.dtype)
            backbone = Backbone(backbone.model, backbone.tokenizer, self.source, backbone.fingerprint)
        else:
            adapter = load_peft(self.path / "adapter") if self.mode == "adapter" else None
            backbone = load_backbone(
                self.source, device=device, dtype=self.dtype, quantization=self.quantization, adapter=adapter
            )
        if backbone.fingerprint != self.fingerprint:
            raise ValueError(
                f"the base model {self.source!r} is not the one that {self.path} was made with "
                f"({backbone.fingerprint[:12]}, not {self.fingerprint[:12]}); run train-base again, with --force"
            )
        return backbone

    def load_routed(self, bank_path: str | Path, *, device: str = "cpu") -> tuple[RoutedModel, Bank]:
        """The base model with slots, the bank on its shelf. Refuses a bank of another base model."""
        bank = load_bank(bank_path, base_fingerprint=self.fingerprint)
        routed = RoutedModel(self.load(device=device), self.targets)
        bank.load_into(routed.layers)
        return routed, bank


def open_base(path: str | Path) -> BaseModel:
    """What a `base` artifact says about itself."""
    artifact = open_artifact(path, kind=KIND)
    facts = artifact.facts
    wording = Wording(
        task=task_named(facts["task"]), labels=tuple(facts["labels"]), prompts=PromptConfig(**facts["prompts"])
    )
    return BaseModel(
        path=artifact.path,
        # The same settings over another model make the same files where nothing is trained.
        hash=hashlib.sha256(f"{artifact.hash}/{facts['fingerprint']}".encode()).hexdigest(),
        fingerprint=facts["fingerprint"],
        source=facts["source"],
        dtype=facts["dtype"],
        quantization=facts.get("quantization", "none"),
        targets=facts["targets"],
        mode=facts["mode"],
        wording=wording,
        losses=tuple(facts["losses"]),
    )


def tokenised(backbone: Backbone, examples: Sequence[Example]) -> list[Tokens]:
    """Examples as training sequences."""
    return [tokenise(backbone, example.prompt, example.target) for example in examples]
