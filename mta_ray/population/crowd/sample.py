"""Some encoded users, kept in a folder: those that the model of embeddings is fitted on, and those that judge it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from jaxtyping import Float, Int
from numpy import ndarray
from ray.actor import ActorHandle

from mta_ray.files import replace_file
from mta_ray.lamp.users import HistoryItem
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.pipeline.actors import lets_go
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.crowd.anchors import Anchors
from mta_ray.population.crowd.parts import vectors_column
from mta_ray.population.crowd.vectors import EmbeddingModel
from mta_ray.population.people import WorldConfig, simulate_user, user_name
from mta_ray.similarity.embedding import Encoder
from mta_ray.similarity.neighbours import nearest

FIRST = 1_000_000_000
"""Number of the sample's first user: nobody of a population of up to a billion is in its own sample."""
BATCH_USERS = 64
SPLITS = 20
"""Random halves over which fidelity is averaged."""
PROGRESS = "encode a sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Encoded users of the world, none of them in the population."""

    user_ids: list[str]
    means: Float[ndarray, "users dim"]
    items: Int[ndarray, " users"]
    histories: list[tuple[HistoryItem, ...]]
    """The latest items of each."""


@lets_go
def encode_sample(
    file: Path,
    world: WorldConfig,
    users: int,
    *,
    encoder: str,
    max_items: int,
    max_words: int,
    history_items: int,
    workers: int,
    board: ActorHandle,
) -> Sample:
    """The sample in that file, made there if it is not."""
    if not file.exists():
        rows = ray.data.from_items(
            [{"number": FIRST + number} for number in range(users)], override_num_blocks=-(-users // BATCH_USERS)
        ).map_batches(
            _EncodeUsers,
            fn_constructor_args=(world, encoder, max_items, max_words, history_items, board),
            batch_size=BATCH_USERS,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0.5,
        )
        table = pa.concat_tables(rows.iter_batches(batch_size=None, batch_format="pyarrow")).sort_by("number")
        replace_file(file, lambda path: pq.write_table(table, path))
    table = pq.read_table(file)
    return Sample(
        user_ids=[user_name(world.seed, number) for number in table["number"].to_pylist()],
        means=np.array(table["mean"].to_pylist(), dtype=np.float32),
        items=table["items"].to_numpy(),
        histories=[tuple(HistoryItem(**item) for item in history) for history in table["history"].to_pylist()],
    )


class _EncodeUsers:
    """Loads the encoder once, then some users a call."""

    def __init__(
        self,
        world: WorldConfig,
        encoder: str,
        max_items: int,
        max_words: int,
        history_items: int,
        board: ActorHandle,
    ) -> None:
        self.world, self.encoder, self.board = world, Encoder(encoder), board
        self.max_items, self.max_words, self.history_items = max_items, max_words, history_items

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        users = [simulate_user(self.world, int(number)) for number in batch["number"]]
        means = self.encoder.embed_users([item_texts(user, self.max_items, self.max_words) for user in users])
        self.board.add.remote(PROGRESS, len(users))
        kept = [
            [{"id": i.id, "content": i.content, "target": i.target} for i in user.history[-self.history_items :]]
            for user in users
        ]
        columns = {"number": batch["number"], "items": [len(user.history) for user in users], "history": kept}
        return pa.table(columns | {"mean": vectors_column(means)})


def fidelity(
    model: EmbeddingModel, held_out: Float[ndarray, "users dim"], anchors: Anchors, *, seed: int
) -> dict[str, Any]:
    """How far drawn users are from encoded ones, beside how far two halves of encoded ones are from each other.

    Every figure is of two groups of the same size, and a mean over random halves: 0 would be no difference, and what
    the halves have is what chance alone makes.
    """
    half = len(held_out) // 2
    real = _Place(held_out, anchors)
    drawn = _Place(model.draw(seed, 0, 20 * half).means, anchors)
    rng = np.random.default_rng(seed)
    apart: dict[str, list[dict[str, float]]] = {"sampled": [], "noise_floor": []}
    for _ in range(SPLITS):
        order = rng.permutation(len(held_out))
        one, other = order[:half], order[half : 2 * half]
        some = rng.choice(len(drawn.nearest), half, replace=False)
        apart["sampled"].append(_apart(real, one, drawn, some))
        apart["noise_floor"].append(_apart(real, one, real, other))
    return {
        "users_of_a_group": half,
        "mean_nearest_cosine": {"encoded": float(real.first.mean()), "sampled": float(drawn.first.mean())},
        "mean_kth_cosine": {"encoded": float(real.last.mean()), "sampled": float(drawn.last.mean())},
    } | {name: {key: float(np.mean([one[key] for one in some])) for key in some[0]} for name, some in apart.items()}


class _Place:
    """Where users lie among the anchors."""

    def __init__(self, means: Float[ndarray, "users dim"], anchors: Anchors, k: int = 4) -> None:
        found = nearest(encode(means, anchors.center), anchors.embeddings, min(k, len(anchors.ids)))
        self.nearest, self.first, self.last = found.indices[:, 0], found.similarities[:, 0], found.similarities[:, -1]
        self.anchors = len(anchors.ids)


def _apart(a: _Place, rows_a: ndarray, b: _Place, rows_b: ndarray) -> dict[str, float]:
    from scipy.stats import ks_2samp

    shares = [np.bincount(p.nearest[r], minlength=p.anchors) / len(r) for p, r in ((a, rows_a), (b, rows_b))]
    return {
        "nearest_cosine_ks": float(ks_2samp(a.first[rows_a], b.first[rows_b]).statistic),
        "anchor_share_distance": float(np.abs(shares[0] - shares[1]).sum() / 2),
        "kth_cosine_difference": float(abs(a.last[rows_a].mean() - b.last[rows_b].mean())),
    }
