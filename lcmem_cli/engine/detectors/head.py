"""The head: scores from two rows of features."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.adapted import Adaptation
from lcmem_cli.engine.detectors.base import Adapted, Detector, FloatArray
from lcmem_cli.engine.errors import NotAdaptableError
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.search import (
    TopK,
    approximate_top_k,
    weighted_l1_matrix,
    weighted_l1_pairs,
    weighted_l1_top_k,
)
from lcmem_cli.engine.store.steps import in_unit_of


class HeadDetector(Detector):
    """Scores ``sigmoid(w · |f1 - f2| + b)``.

    Because the logit is a signed weighted L1 distance, any number of pairs costs one network call
    per distinct image (method: arXiv 2512.14421). Features may be kept in steps, see
    ``store.steps``.

    Attributes:
        weight: ``w``, one number per feature.
        bias: ``b``.
        is_approximate: whether ``top_k`` may miss matches, see ``approximate_top_k``.
        adapted_thresholds: for the detector adapted to a kind of images that it does not know.
    """

    weight: NDArray[np.float32]
    bias: float
    is_approximate: bool = False
    adapted_thresholds: tuple[Threshold, ...] = ()
    gives_probability = True
    is_adaptable = True

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return probabilities ``[n]`` of row i of ``a`` with row i of ``b``."""
        return self._probability(weighted_l1_pairs(a, b, in_unit_of(self.weight, a)))

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return probabilities ``[n, m]`` of every row of ``a`` with every row of ``b``."""
        return self._probability(weighted_l1_matrix(a, b, in_unit_of(self.weight, a)))

    def top_k(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` best rows of the bank.

        Raises:
            MissingExtraError: the search is approximate and faiss is not installed.
        """
        weight = in_unit_of(self.weight, bank)
        if self.is_approximate:
            found = approximate_top_k(queries, bank, weight, k)
        else:
            found = device_search.top_k(
                lambda: device_search.weighted_l1(weight, self.device),
                partial(weighted_l1_matrix, weight=weight),
                partial(weighted_l1_top_k, weight=weight),
                queries,
                bank,
                k,
                self.device,
            )
        return found._replace(scores=self._probability(found.scores))

    def adapted(self, features: FloatArray, contents: Sequence[str]) -> Adapted:
        """Return this detector adapted to one kind of images, see ``Detector.adapted``.

        Raises:
            NotAdaptableError: too few images, or the network's features differ in length.
        """
        adaptation = Adaptation.fit(features, contents, name=self.name)
        detector = AdaptedHead(self, adaptation)
        return Adapted(detector, adaptation, len(adaptation.contents))

    def approximate(self) -> HeadDetector:
        """Return a copy that finds matches with an inverted file and scores them."""
        other = copy.copy(self)
        other.is_approximate = True
        return other

    def _probability(self, distance: NDArray[Any]) -> NDArray[np.float64]:
        """Turn ``w · |f1 - f2|`` into a probability, in float64 so that high scores differ."""
        from scipy.special import expit

        result: NDArray[np.float64] = expit(distance.astype(np.float64) + self.bias)
        return result


class AdaptedHead(HeadDetector):
    """An LCMem network whose features are adapted.

    Its scores belong to other thresholds than the network's: its ``adapted_thresholds``.

    Args:
        network: whose head scores.
        adaptation: of its features.
    """

    is_adaptable = False

    def __init__(self, network: HeadDetector, adaptation: Adaptation) -> None:
        self.network = network
        self.adaptation = adaptation
        self.name = network.name
        self.device = network.device
        self.fingerprint = sha256_bytes(
            f"adapted/{network.fingerprint}/{adaptation.fingerprint}".encode()
        )
        self.input_size = network.input_size
        self.num_features = network.num_features
        self.weight, self.bias = network.weight, network.bias
        self.thresholds = tuple(
            dataclasses.replace(threshold, fingerprint=self.fingerprint)
            for threshold in network.adapted_thresholds
            if threshold.fingerprint == network.fingerprint
        )
        self.adapted_to = network.adapted_to | adaptation.contents
        self.is_approximate = network.is_approximate

    def adapted(self, features: FloatArray, contents: Sequence[str]) -> Adapted:
        """Refuse; see ``Detector.adapted``.

        Raises:
            NotAdaptableError: always.
        """
        raise NotAdaptableError(f"{self.name} is adapted already")

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed ``[n, 3, input_size, input_size]`` in [0, 1] to float32 ``[n, num_features]``."""
        return self.adaptation(self.network.embed_batch(batch))
