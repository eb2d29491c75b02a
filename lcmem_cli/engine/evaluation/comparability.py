"""Can two sets of images be told apart? The condition of every rate that an audit states.

A rate from held-out images holds for generated images only if the held-out ones are like the
training images in all but one point: the generator did not see them. Where they come from another
hospital, camera or preparation, their best matches are lower and fresh images are flagged.

So a linear classifier is trained to tell the two sets, and judged on identities that it has not
seen. If it succeeds by more than chance, and by more than a little, the sets are not comparable
(classifier two-sample test: Lopez-Paz and Oquab, arXiv 1610.06545).

Where identities are not known, several pictures of one person may stand in a set without a word.
The classifier would know such a person again, not the source. So pictures that are alike are
clustered, and clusters take the place of identities: they are left out together, and shuffled
together.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.formats import HEAD_BYTES, format_of
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.reading import read_bytes
from lcmem_cli.engine.errors import LcmemError

MIN_IDENTITIES = 20
"""Of each set; with fewer the classifier sees too little to tell anything."""
MAX_IMAGES = 800
MAX_COLUMNS = 4096
MAX_TRAITS = 120
TELLING_AUC = 0.6
"""Sets that are told apart less well than this differ too little to move a threshold."""
SIGNIFICANCE = 0.01
NAMED_AUC = 0.75
_FOLDS = 5
_CLUSTER_SIZE = 20
_MIN_CLUSTERS, _MAX_CLUSTERS = 10, 40
_PERMUTATIONS = 199
_RIDGE = 0.1
_LAPLACE_SIDE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparability:
    """Whether a classifier tells two sets of images apart.

    Attributes:
        comparable: false where it does; ``None`` where there are too few identities to tell.
        auc: of the classifier on identities that it has not seen; 0.5 is chance.
        p_value: share of shuffled labels with an AUC at least as high.
        num_identities: of each set, ``(first, second)``, as used; where they are not known, images.
        differences: traits of the files that tell the sets apart, in words.
    """

    comparable: bool | None
    auc: float | None
    p_value: float | None
    num_identities: tuple[int, int]
    differences: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Images of one set.

    Attributes:
        features: ``[d, k]`` of a detector that was not adapted, perhaps a memory map.
        rows: ``[n]`` feature row of each image.
        groups: ``[n]`` number of the identity of each; ``None`` where they are not known.
        files: of each, to name what differs.
    """

    features: NDArray[Any]
    rows: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    files: Sequence[Path]


def compare_sets(first: Sample, second: Sample, *, seed: int = 0) -> Comparability:
    """Tell whether two sets can be told apart by a linear classifier.

    One image of each known identity counts, so that an identity with many pictures weighs no more
    than another. Larger sets are sampled.

    Args:
        first: one set.
        second: the other; no identity is in both.
        seed: of the sample, the folds and the permutations.

    Returns:
        The verdict with its figures. With fewer than ``MIN_IDENTITIES`` in a set nothing is told.
    """
    rng = np.random.default_rng(seed)
    chosen = [_chosen(sample, rng) for sample in (first, second)]
    counts = (len(chosen[0]), len(chosen[1]))
    if min(counts) < MIN_IDENTITIES:
        return Comparability(comparable=None, auc=None, p_value=None, num_identities=counts)
    features = [
        _some_columns(sample.features[sample.rows[positions]])
        for sample, positions in zip((first, second), chosen, strict=True)
    ]
    units = [
        np.arange(len(part)) if sample.groups is not None else _clusters(part)
        for sample, part in zip((first, second), features, strict=True)
    ]
    together = np.concatenate([units[0], units[0].max() + 1 + units[1]])
    labels = np.repeat([1.0, 0.0], [part.max() + 1 for part in units])  # of the units
    aucs = _cross_validated_aucs(
        np.concatenate(features), _shuffled(labels, rng)[together], _folds(labels, rng)[together]
    )
    p_value = float(np.mean(aucs >= aucs[0] - 1e-12))  # the first is of the true labels
    auc = float(aucs[0])
    differs = auc >= TELLING_AUC and p_value <= SIGNIFICANCE
    return Comparability(
        comparable=not differs,
        auc=auc,
        p_value=p_value,
        num_identities=counts,
        differences=_differences(
            [first.files[row] for row in chosen[0][:MAX_TRAITS]],
            [second.files[row] for row in chosen[1][:MAX_TRAITS]],
        )
        if differs
        else (),
    )


def _some_columns(features: NDArray[Any]) -> NDArray[np.float64]:
    """Return evenly spaced columns; the pixel measures have as many as an image has pixels."""
    step = -(-features.shape[1] // MAX_COLUMNS)
    return features[:, ::step].astype(np.float64)


def _chosen(sample: Sample, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return positions in random order, one of each known identity, at most ``MAX_IMAGES``."""
    order = rng.permutation(len(sample.rows))
    if sample.groups is not None:
        _, first = np.unique(sample.groups[order], return_index=True)
        order = rng.permutation(order[first])
    return order[:MAX_IMAGES]


def _clusters(features: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return a cluster number for each image: pictures of one identity are mostly in one.

    Few clusters, so that an identity is rarely divided; enough of them to leave some out.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    count = int(np.clip(len(features) // _CLUSTER_SIZE, _MIN_CLUSTERS, _MAX_CLUSTERS))
    clusters = fcluster(linkage(_standard(features), "ward"), count, criterion="maxclust")
    return np.unique(clusters, return_inverse=True)[1]


def _standard(features: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = features - features.mean(axis=0)
    scale = centred.std(axis=0)
    standard: NDArray[np.float64] = centred / np.where(scale > 1e-9, scale, 1.0)
    return standard


def _shuffled(labels: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the labels and permutations of them, one a column: ``[n, 1 + permutations]``."""
    return np.column_stack([labels, *(rng.permutation(labels) for _ in range(_PERMUTATIONS))])


def _folds(labels: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a fold for each unit, each with its share of both sets."""
    folds = np.empty(len(labels), dtype=np.int64)
    for label in (0.0, 1.0):
        rows = np.flatnonzero(labels == label)
        folds[rng.permutation(rows)] = np.arange(len(rows)) % _FOLDS
    return folds


def _cross_validated_aucs(
    features: NDArray[np.float64], labels: NDArray[np.float64], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the AUC of ridge regression on each column of labels.

    What a fold is scored with is one linear map of the other folds' labels. So all permutations
    together cost one solution of the normal equations (in their dual form) a fold.

    Args:
        features: ``[n, d]``.
        labels: ``[n, p]`` of 0 and 1.
        folds: ``[n]``.
    """
    standard = _standard(features)
    kernel = standard @ standard.T / standard.shape[1]
    ridge = _RIDGE * np.trace(kernel) / len(kernel)
    aucs = np.zeros(labels.shape[1])
    for fold in range(_FOLDS):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        means = labels[train].mean(axis=0)
        inner = kernel[np.ix_(train, train)] + ridge * np.eye(len(train))
        scores = kernel[np.ix_(test, train)] @ np.linalg.solve(inner, labels[train] - means)
        aucs += _aucs(scores, labels[test]) / _FOLDS
    return aucs


def _aucs(scores: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the AUC of each column; 0.5 where it holds one class only."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=0)
    positives = labels.sum(axis=0)
    pairs = positives * (len(labels) - positives)
    wins = (ranks * labels).sum(axis=0) - positives * (positives + 1) / 2
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)


def _differences(first: Sequence[Path], second: Sequence[Path]) -> tuple[str, ...]:
    """Name the traits of files by which two sets differ, the clearest first."""
    tables = [_traits(files) for files in (first, second)]
    if not all(len(next(iter(table.values()))) for table in tables):
        return ()
    found = []
    for name in tables[0]:
        values = [table[name][np.isfinite(table[name])] for table in tables]
        if not all(map(len, values)):
            continue
        both = np.concatenate(values)[:, None]
        labels = np.repeat([1.0, 0.0], [len(part) for part in values])[:, None]
        auc = float(_aucs(both, labels)[0])
        if max(auc, 1 - auc) >= NAMED_AUC:
            medians = [float(np.median(part)) for part in values]
            found.append((max(auc, 1 - auc), f"{name} {medians[0]:.4g} against {medians[1]:.4g}"))
    return tuple(text for _, text in sorted(found, key=lambda item: -item[0]))


def _traits(files: Sequence[Path]) -> dict[str, NDArray[np.float64]]:
    """Measure files: size, sharpness, colour and JPEG quality; unreadable ones are left out."""
    rows = []
    for file in files:
        try:
            rows.append(_traits_of(file))
        except (LcmemError, OSError):
            continue
    return {
        name: np.array([row[number] for row in rows], dtype=np.float64)
        for number, name in enumerate(
            ("width", "height", "sharpness", "colourfulness", "brightness", "JPEG quality")
        )
    }


def _traits_of(file: Path) -> tuple[float, ...]:
    data, _ = read_bytes(file)
    image = load_image(file, data=data)
    width, height = image.size
    pixels = np.asarray(image, dtype=np.float64)
    grey = pixels.mean(axis=2)
    small = np.asarray(image.convert("L").resize((_LAPLACE_SIDE, _LAPLACE_SIDE)), dtype=np.float64)
    # How much of the contrast sits in the finest detail: low where an image is blurred.
    fine = np.diff(small, axis=0)[:, 1:] + np.diff(small, axis=1)[1:, :]
    sharpness = float(fine.std() / max(small.std(), 1e-9))
    colour = float(np.abs(pixels - grey[:, :, None]).mean())
    return float(width), float(height), sharpness, colour, float(grey.mean()), _jpeg_quality(data)


def _jpeg_quality(data: bytes | None) -> float:
    """Return the quality that a JPEG's luminance table stands for; NaN for other or huge files.

    The standard's table at quality 50 sums to 3,688; libjpeg scales it (ITU-T T.81, annex K).
    """
    from PIL import Image

    if data is None or format_of(data[:HEAD_BYTES]) != "JPEG":
        return float("nan")
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        tables = getattr(image, "quantization", None)
    if not tables:
        return float("nan")
    scale = 100 * float(sum(tables[0])) / 3688
    return (200 - scale) / 2 if scale <= 100 else 5000 / scale
