"""A model of users' mean item vectors: encoded users in, any number alike out. User i is a function of (seed, i).

A smoothed bootstrap: each drawn user is one of those it was fitted on, moved. Main axes (PCA) of the vectors together
with the logarithm of the number of items are a mixture of Gaussians, which says in what directions people of that taste
differ; what the axes leave is noise, alike in all other directions, the less the more items a mean is of. A move by a
share of that spread, after the user was drawn in towards his Gaussian's centre, leaves mean and covariance as they were
(shrunk smoothing: M. P. Wand and M. C. Jones, Kernel Smoothing, 1995, section 2.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from mta_ray.files import replace_file

USERS_PER_STREAM = 256
"""Users who share a stream of random numbers: any range of users draws whole streams, so where parts begin is no
matter; one stream a user would cost more than its numbers."""
AXES = 48
SMOOTHING = 0.5
"""How far a user is moved, as a share of the spread of those of his taste; 1 would forget whom he was drawn from."""
MIXTURES = (4, 8, 12, 16, 24)
"""Numbers of Gaussians that are tried; BIC chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Some users of the model, in the order of their numbers."""

    means: Float[ndarray, "users dim"]
    """Mean item vectors, neither centred nor normalised."""
    items: Int[ndarray, " users"]
    """Length of each user's history."""
    donors: Int[ndarray, " users"]
    """Row of the fitted user each was drawn from, whose texts may stand for theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """What was fitted; plain arrays, so that it travels and is kept."""

    center: Float[ndarray, " dim"]
    axes: Float[ndarray, "axes dim"]
    """Orthonormal rows."""
    scale: Float[ndarray, " features"]
    """Of the axes and of the logarithm of items, as the mixture sees them."""
    shift: Float[ndarray, " features"]
    shares: Float[ndarray, " mixtures"]
    """Cumulative."""
    places: Float[ndarray, "mixtures features"]
    spreads: Float[ndarray, "mixtures features features"]
    """Lower Cholesky factors."""
    noise: Float[ndarray, " 2"]
    """Variance of what the axes leave, in each direction: noise[0] + noise[1] / encoded items."""
    items_range: Int[ndarray, " 2"]
    encoded_items: int
    """A mean is of this many items at most."""
    donor_features: Float[ndarray, "fitted features"]
    """Where the fitted users are, as the mixture sees them."""
    donor_left: Float[ndarray, "fitted dim"]
    """And what the axes leave of them."""
    donor_rows: Int[ndarray, " fitted"]
    """Rows of the fitted users, Gaussian by Gaussian."""
    donor_begins: Int[ndarray, " ends"]
    """Where each Gaussian's begin in `donor_rows`, and the end."""

    def draw(self, seed: int, first: int, users: int) -> Draw:
        """Users first … first + users - 1."""
        begin, end = first // USERS_PER_STREAM, -(-(first + users) // USERS_PER_STREAM)
        streams = [self._stream(seed, number) for number in range(begin, end)]
        kept = slice(first - begin * USERS_PER_STREAM, first - begin * USERS_PER_STREAM + users)
        means, items, donors = (np.concatenate(some)[kept] for some in zip(*streams, strict=True))
        return Draw(means=means, items=items, donors=donors)

    def _stream(self, seed: int, number: int) -> tuple[ndarray, ndarray, ndarray]:
        """A whole stream always: a matrix product of another height rounds otherwise."""
        rng = np.random.default_rng([seed, 2, number])
        uniform = rng.random((USERS_PER_STREAM, 2))
        normal = rng.standard_normal((USERS_PER_STREAM, len(self.scale)))
        noise = rng.standard_normal((USERS_PER_STREAM, len(self.center)), dtype=np.float32)

        # 1. which Gaussian, and whom of it
        mixture = np.minimum(np.searchsorted(self.shares, uniform[:, 0], side="right"), len(self.shares) - 1)
        begins, counts = self.donor_begins[mixture], np.diff(self.donor_begins)[mixture]
        donors = self.donor_rows[begins + np.minimum((uniform[:, 1] * counts).astype(np.int64), counts - 1)]

        # 2. moved along the axes
        kept = np.sqrt(1 - SMOOTHING**2)
        features = np.empty_like(normal)
        for one in np.unique(mixture):
            rows = mixture == one
            apart = self.donor_features[donors[rows]] - self.places[one]
            features[rows] = self.places[one] + kept * apart + SMOOTHING * (normal[rows] @ self.spreads[one].T)
        features = features * self.scale + self.shift
        items = np.clip(np.rint(np.exp(features[:, -1])), *self.items_range).astype(np.int64)

        # 3. and in the directions that they leave
        spread = np.sqrt(self.noise[0] + self.noise[1] / np.minimum(items, self.encoded_items))
        axes = self.axes.astype(np.float32)
        noise -= (noise @ axes.T) @ axes
        means = features[:, :-1].astype(np.float32) @ axes
        left = kept * self.donor_left[donors] + SMOOTHING * noise * spread[:, None]
        means += self.center.astype(np.float32) + left.astype(np.float32)
        return means, items, donors

    def save(self, path: Path) -> None:
        """Write the arrays, whole or not at all."""
        arrays = {name: getattr(self, name) for name in self.__slots__}

        def write(file: Path) -> None:
            with file.open("wb") as out:  # to a path of another ending numpy would add its own
                np.savez(out, **arrays)

        replace_file(path, write)


def load_model(path: Path) -> EmbeddingModel:
    """The model that `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    return EmbeddingModel(**values | {"encoded_items": int(values["encoded_items"])})


def fit_model(
    means: Float[ndarray, "users dim"], items: Int[ndarray, " users"], *, encoded_items: int, seed: int = 0
) -> EmbeddingModel:
    """The model of these encoded users; `encoded_items` is how many items a mean is of at most."""
    if len(means) < 20:
        raise ValueError(f"a model of embeddings is fitted on 20 users or more, got {len(means)}; raise fitted_on")
    # 1. axes; a fifth of the users at most, or they would say all about few users
    pca = PCA(n_components=min(AXES, len(means) // 5, means.shape[1]), random_state=seed)
    coordinates = pca.fit_transform(means.astype(np.float64))

    # 2. mixture: one scale for all axes, so that the main ones decide
    features = np.column_stack([coordinates, np.log(items)])
    shift = np.append(np.zeros(coordinates.shape[1]), features[:, -1].mean())
    scale = np.append(np.full(coordinates.shape[1], coordinates[:, 0].std()), features[:, -1].std())
    scale = np.maximum(scale, 1e-9)
    scaled = (features - shift) / scale
    mixture = min(
        (
            GaussianMixture(count, reg_covar=1e-5, random_state=seed).fit(scaled)
            for count in MIXTURES
            if count == MIXTURES[0] or len(means) >= 20 * count
        ),
        key=lambda fitted: fitted.bic(scaled),
    )
    labels = mixture.predict(scaled)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=mixture.n_components)
    shares = np.where(counts > 0, mixture.weights_, 0.0)  # no texts could be given to those of an empty one

    # 3. what the axes leave
    left = means - pca.inverse_transform(coordinates)
    per_direction = (left**2).sum(axis=1) / max(means.shape[1] - coordinates.shape[1], 1)
    inverse = 1 / np.minimum(items, encoded_items)
    slope = max(0.0, float(np.polyfit(inverse, per_direction, 1)[0])) if np.ptp(inverse) > 0 else 0.0
    slope = min(slope, float(per_direction.mean() / inverse.mean()))  # neither part is negative
    return EmbeddingModel(
        center=pca.mean_,
        axes=pca.components_,
        scale=scale,
        shift=shift,
        shares=np.cumsum(shares / shares.sum()),
        places=mixture.means_,
        spreads=np.linalg.cholesky(mixture.covariances_),
        noise=np.array([float(per_direction.mean()) - slope * float(inverse.mean()), slope]).clip(0),
        items_range=np.array([items.min(), items.max()]),
        encoded_items=encoded_items,
        donor_features=scaled,
        donor_left=left.astype(np.float32),
        donor_rows=order,
        donor_begins=np.concatenate([[0], np.cumsum(counts)]),
    )
