"""A detector adapted to one kind of images, by unlabelled images of that kind.

What all images of one kind share (a chest, a face, one camera's light) tells nothing about which of
them two are, but a network that has not seen the kind takes it for likeness. Two steps on the
features of some images of the kind remove it: their mean is taken off, and the directions in which
they differ most are made smaller, as second-order domain adaptation does (Sun et al. 2016, arXiv
1511.05547). No identity is needed, and no other image changes what an image's features are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import FloatArray
from lcmem_cli.engine.errors import NotAdaptableError
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.store.steps import from_steps

SHARE = 0.1
"""Of many images' covariance in what is whitened, beside that which the network was made with."""
HALF_IMAGES = 200
"""From so many images on half of that share: of fewer, the covariance shows each single one."""
MIN_IMAGES = 10
"""Fewer say too little about their kind."""
ONE_PICTURE = 0.8
"""Cosine from which on two images count as one picture stored twice. Such pictures are what a
generator learns by heart; counted each time, they would become what their kind shares."""
MAX_IMAGES = 5_000
"""Of more images a seeded sample is used."""
ENOUGH_IMAGES = 2_000
"""More tell no more about their kind, so no more are embedded for this alone."""
_SAME_LENGTH = 0.01
_NEAR_END = 1e-6
_SHORTEST = 1e-3
"""What is left of an image that is no further from the centre is rounding, and is not drawn out."""


Item = TypeVar("Item")


def some_images(images: Sequence[Item]) -> Sequence[Item]:
    """Return images, or of many every second, third, ..., that are to be embedded to adapt to."""
    return images[:: -(-len(images) // ENOUGH_IMAGES) or 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Moves the features of an LCMem network, all of one length before the sigmoid.

    Attributes:
        centre: ``[d]`` mean of the images' features at length 1.
        matrix: ``[d, d]`` symmetric; makes their largest differences smaller.
        length: of all features before the sigmoid.
        contents: SHA-256 of the images' files.
        fingerprint: of the images and of how they are used.
    """

    centre: NDArray[np.float64]
    matrix: NDArray[np.float64]
    length: float
    contents: frozenset[str]
    fingerprint: str

    @classmethod
    def fit(cls, features: FloatArray, contents: Sequence[str], *, name: str) -> Adaptation:
        """Fit to images of one kind.

        Args:
            features: ``[n, d]`` in [0, 1], one row a distinct image.
            contents: SHA-256 of each image file.
            name: of the detector, for messages.

        Raises:
            NotAdaptableError: too few images, or features that are not of one length.
        """
        if len(features) > MAX_IMAGES:
            rng = np.random.default_rng(0)
            drawn = np.sort(rng.choice(len(features), MAX_IMAGES, replace=False))
            features, contents = features[drawn], [contents[row] for row in drawn]
        before = _before_sigmoid(features)
        lengths = np.linalg.norm(before, axis=1)
        length = float(np.median(lengths)) if len(lengths) else 0.0
        if len(lengths) and np.abs(lengths - length).max() > _SAME_LENGTH * length:
            raise NotAdaptableError(
                f"{name} cannot be adapted: its network's features differ in length "
                "(network.feature_rms is not set)"
            )
        units = before / lengths[:, None]
        weights = picture_weights(units)
        if round(weights.sum()) < MIN_IMAGES:
            raise NotAdaptableError(
                f"{name} cannot be adapted to {round(weights.sum())} different pictures; it needs "
                f"at least {MIN_IMAGES}"
            )
        centre, matrix = shrunk_whitening(units, weights)
        return cls(
            centre=centre,
            matrix=matrix,
            length=length,
            contents=frozenset(contents),
            fingerprint=sha256_bytes(
                f"{SHARE}/{HALF_IMAGES}/{ONE_PICTURE}/{''.join(sorted(contents))}".encode()
            ),
        )

    def __call__(self, features: FloatArray) -> NDArray[np.float32]:
        """Return features ``[n, d]`` of the network as the adapted one's, both in [0, 1]."""
        from scipy.special import expit

        moved = (_before_sigmoid(features) / self.length - self.centre) @ self.matrix
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        adapted: NDArray[np.float64] = expit(moved * (self.length / np.maximum(lengths, _SHORTEST)))
        return adapted.astype(np.float32)


def picture_weights(units: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a weight for each image, so that each picture counts once: ``[n, d] -> [n]``.

    Args:
        units: features of length 1, not adapted.
    """
    alike: NDArray[np.int64] = (units @ units.T > ONE_PICTURE).sum(axis=1)
    return 1 / np.maximum(alike, 1)


def shrunk_whitening(
    rows: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what centres features and makes their largest differences smaller.

    The network was made so that features of all kinds of images are white: their covariance is the
    identity. Of one kind it is another, ``C``. Whitening by ``C`` alone would blow up directions of
    which few images tell nothing, so only a share ``s`` of the identity is replaced by it, and the
    share grows with the number of images: ``(1 - s) I + s C``, whose inverse square root this is.
    ``C`` is scaled to the identity's trace, so that a narrow kind is not shrunk as a whole.

    Args:
        rows: ``[n, d]`` features of images of one kind, by a network whose features of many kinds
            are white.
        weights: ``[n]`` how much each counts, see ``picture_weights``.

    Returns:
        Their mean ``[d]``, and a symmetric matrix ``[d, d]``: the inverse square root of the
        identity, of which a share is replaced by their covariance at the same mean size.
    """
    count = float(weights.sum())
    centre = weights @ rows / count
    centred = rows - centre
    covariance = (centred * weights[:, None]).T @ centred / count
    width = len(centre)
    own = covariance * (width / max(float(np.trace(covariance)), _SHORTEST))
    share = SHARE * count / (count + HALF_IMAGES)
    values, axes = np.linalg.eigh((1 - share) * np.eye(width) + share * own)
    return centre, (axes / np.sqrt(values)) @ axes.T


def _before_sigmoid(features: FloatArray) -> NDArray[np.float64]:
    from scipy.special import logit

    result: NDArray[np.float64] = logit(np.clip(from_steps(features), _NEAR_END, 1 - _NEAR_END))
    return result
