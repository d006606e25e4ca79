"""From candidate users' embeddings to the anchors: by clusters, by how well they cover the users, or by chance."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mta_ray.similarity.neighbours import cluster

AnchorChoice = Literal["longest", "medoid", "cover", "random"]
BLOCK_USERS = 4096
"""Users whose cosines to the candidates are in memory at once."""


def choose_anchors(
    user_ids: Sequence[str],
    embeddings: Float[ndarray, "users dim"],
    items: Sequence[int],
    *,
    anchors: int,
    min_items: int,
    seed: int,
    choice: AnchorChoice = "longest",
) -> list[int]:
    """Row numbers of the anchors, ascending; at most `anchors` of them, each with at least `min_items` items.

    longest: k-means, and in each cluster the longest history (MTA, stage 1; Per-Pcs, section 3.2). medoid: k-means, and
    in each cluster the user nearest to all others of it. cover: greedy facility location, so that all users are near
    some anchor (`cover`). random: drawn by `seed`.
    The order of users changes nothing: they are looked at in the order of their ids, and ties go to the smaller id.
    """
    in_order = sorted(range(len(user_ids)), key=lambda row: user_ids[row])
    eligible = [row for row in in_order if items[row] >= min_items]
    if not eligible:
        raise ValueError(f"none of {len(user_ids)} candidate users has {min_items} items or more; lower --min-items")
    count = min(anchors, len(eligible))
    if choice == "random":
        drawn = np.random.default_rng(seed).choice(len(eligible), count, replace=False)
        return sorted(eligible[number] for number in drawn)
    if choice == "cover":
        return sorted(eligible[number] for number in cover(embeddings[eligible], embeddings[in_order], count))

    vectors = embeddings[eligible]
    labels = cluster(vectors, count, seed=seed)
    if choice == "medoid":
        # The sum of cosines to the members of a cluster is one product with the sum of their vectors.
        sums = np.stack([vectors[labels == label].sum(axis=0) for label in range(count)])
        merits = (vectors * sums[labels]).sum(axis=1).tolist()
    else:
        merits = [items[row] for row in eligible]
    best: dict[int, int] = {}
    for number, label in enumerate(labels.tolist()):
        if label not in best or merits[number] > merits[best[label]]:
            best[label] = number
    return sorted(eligible[number] for number in best.values())


def cover(candidates: Float[ndarray, "candidates dim"], users: Float[ndarray, "users dim"], count: int) -> list[int]:
    """`count` candidates, in the order in which they are taken, such that users have a high cosine to their nearest.

    Each next one adds most to Σ over users of the largest cosine to one taken: facility location, at least 1 - 1/e of
    what is possible (Nemhauser, Wolsey & Fisher, 1978), with gains computed anew only where an old one could still be
    the largest (Minoux, 1978).
    """
    if not 1 <= count <= len(candidates):
        raise ValueError(f"{count} of {len(candidates)} candidates; ask for at least 1 and at most all")
    nearest = np.full(len(users), -1.0)  # the least cosine there is
    blocks = [slice(start, start + BLOCK_USERS) for start in range(0, len(users), BLOCK_USERS)]

    def gains(numbers: list[int]) -> ndarray:
        total = np.zeros(len(numbers))
        for block in blocks:
            cosines = users[block] @ candidates[numbers].T
            total += np.maximum(cosines - nearest[block, None], 0.0).sum(axis=0, dtype=np.float64)
        return total

    bounds = [(-gain, number) for number, gain in enumerate(gains(list(range(len(candidates)))).tolist())]
    heapq.heapify(bounds)
    taken: list[int] = []
    while len(taken) < count:
        _, number = heapq.heappop(bounds)
        gain = float(gains([number])[0])
        if bounds and (-gain, number) > bounds[0]:
            heapq.heappush(bounds, (-gain, number))
            continue
        taken.append(number)
        nearest = np.maximum(nearest, users @ candidates[number])
    return taken


def unit(vectors: Float[ndarray, "users dim"]) -> Float[ndarray, "users dim"]:
    """Rows of length one; a zero row stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
