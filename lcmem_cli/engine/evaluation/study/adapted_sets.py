"""Scoring the pairs of each data set with a detector that is adapted to its TRAIN images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.pairs import PairSet
from lcmem_cli.engine.detectors.base import Adapted, Detector
from lcmem_cli.engine.errors import NotAdaptableError
from lcmem_cli.engine.reporter import SILENT, Reporter

Score = Callable[[Detector, NDArray[Any], NDArray[np.int64], PairSet], NDArray[np.float64]]
"""Scores pairs ``[n]``, given features, the row of them that each record has, and the pairs."""


class AdaptedToSets:
    """A detector for each data set, adapted to some images of it; no identity is used.

    Args:
        detector: made the features.
        features: ``[d, n]`` of all images.
        rows: ``[records]`` row of each image, or -1 where it is unreadable.
        contents: SHA-256 of each record's file, ``None`` where only its latents are there.
        train: records to adapt to, by data set.
        reporter: told of each data set that it is not adapted to.

    Attributes:
        num_images: by data set, how many images its detector was adapted to; 0: it scores as it is.
    """

    def __init__(
        self,
        detector: Detector,
        features: NDArray[Any],
        rows: NDArray[np.int64],
        contents: Sequence[str | None],
        train: Mapping[str, Sequence[int]],
        *,
        reporter: Reporter = SILENT,
    ) -> None:
        self._features, self._rows = features, rows
        self._kinds: dict[str, Adapted] = {}
        for name, records in train.items():
            content_of = {
                int(rows[r]): contents[r] or f"record {r}" for r in records if rows[r] >= 0
            }
            order = sorted(content_of)
            try:
                kind = detector.adapted(features[order], [content_of[row] for row in order])
            except NotAdaptableError as error:
                reporter.warn(f"data set {name} is scored as it is: {error}")
                kind = Adapted(detector, lambda part: part, 0)
            self._kinds[name] = kind
        self.num_images = {name: kind.num_images for name, kind in self._kinds.items()}

    def scores(self, pairs: PairSet, score: Score) -> NDArray[np.float64]:
        """Score pairs within data sets: ``[n]``; NaN where an image is unreadable."""
        scores = np.full(len(pairs), np.nan)
        for number, name in enumerate(pairs.names):
            own = pairs.dataset == number
            part = pairs.select(own)
            records = np.unique([part.first, part.second])
            records = records[self._rows[records] >= 0]
            used, place = np.unique(self._rows[records], return_inverse=True)
            rows = np.full(len(self._rows), -1, dtype=np.int64)
            rows[records] = place
            kind = self._kinds[name]
            scores[own] = score(kind.detector, kind.convert(self._features[used]), rows, part)
        return scores
