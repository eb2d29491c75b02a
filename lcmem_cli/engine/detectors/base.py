"""The interface that everything scoring a pair of images implements."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.arrays import UNIT_RANGE, Images, ValueRange, iter_pictures
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.detectors.options import join_name
from lcmem_cli.engine.errors import InputError, NotAdaptableError, NotFiniteError
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.store.search import TopK, top_k_blocked

FloatArray = NDArray[np.floating[Any]]

_BLOCK_BYTES = 32 << 20


class Detector(abc.ABC):
    """Turns images into features once and compares features as often as needed.

    A subclass implements ``embed_batch`` and ``score_features`` and sets the attributes without a
    default. Scores are larger for more alike images and symmetric in their two arguments.

    Attributes:
        name: how the user named it, for example ``"lcmem"`` or ``"timm:resnet50"``.
        fingerprint: SHA-256 over everything that changes a score (weights, preprocessing, head).
        input_size: side in pixels of the square that images are resized to.
        num_features: columns of a feature row.
        feature_dtype: of a feature row that ``embed_batch`` returns.
        gives_probability: whether its scores lie in [0, 1] and crowd at both ends, so that they are
            drawn and compared as logits.
        measures_distance: whether what a score is below that of an image with itself (as logit, for
            probabilities) is a distance, so that ratios of two of them mean something.
        device: where its network computes.
        is_adaptable: whether ``adapted`` may succeed.
        adapted_to: SHA-256 of the image files that it was adapted to.
        thresholds: decision thresholds that come with the detector, perhaps none.
    """

    name: str
    fingerprint: str
    input_size: int
    num_features: int
    feature_dtype: type[np.generic] = np.float32
    device: torch.device = torch.device("cpu")
    gives_probability: bool = False
    measures_distance: bool = True
    is_adaptable: bool = False
    adapted_to: frozenset[str] = frozenset()
    thresholds: tuple[Threshold, ...] = ()

    @abc.abstractmethod
    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed images that already have the detector's input size.

        Args:
            batch: ``[n, 3, input_size, input_size]``, float32 in [0, 1], RGB.

        Returns:
            ``[n, num_features]`` of ``feature_dtype``; float32 unless the detector says otherwise.
        """

    @abc.abstractmethod
    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``: ``[n, d], [n, d] -> [n]``."""

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, d], [m, d] -> [n, m]``.

        By default row by row, by ``score_features``; where all pairs can be computed at once, a
        subclass does so.
        """
        scores = np.empty((len(a), len(b)))
        for number, row in enumerate(a):
            scores[number] = self.score_features(np.broadcast_to(row, b.shape), b)
        return scores

    def top_k(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` best rows of the bank, exactly and in bounded memory.

        Args:
            queries: ``[n, d]``.
            bank: ``[m, d]``, perhaps a memory map.
            k: at least 1; cut to ``m``.

        Returns:
            Scores ``[n, k]``, best first, and bank rows ``[n, k]``; equal scores are ordered by
            bank row.
        """
        return top_k_blocked(self.score_matrix, queries, bank, k)

    def pictures(self, features: FloatArray) -> FloatArray | None:
        """Return the small grey pictures ``[n, s, s]`` that features hold, if they hold any."""
        return None

    def approximate(self) -> Detector:
        """Return a copy whose ``top_k`` may miss matches and is faster on millions of images.

        Raises:
            InputError: this detector has no such search.
        """
        raise InputError(
            f"--approximate has no effect with {self.name}: only LCMem detectors, and joint, have "
            "an approximate search; leave it out"
        )

    def adapted(self, features: FloatArray, contents: Sequence[str]) -> Adapted:
        """Return this detector adapted to one kind of images, see ``detectors.adapted``.

        Args:
            features: ``[n, d]``, one row of ``embed`` for each of some images of the kind.
            contents: SHA-256 of each image file.

        Raises:
            NotAdaptableError: this detector cannot be adapted, or not to so few images.
        """
        raise NotAdaptableError(
            f"{self.name} cannot be adapted: only LCMem networks, and joint, can be"
        )

    def embed(
        self, images: Images, *, batch_size: int = 32, value_range: ValueRange = UNIT_RANGE
    ) -> FloatArray:
        """Embed images, each as if it had been saved as PNG and read, see ``data.arrays``.

        Args:
            images: PIL images of any mode, paths, arrays ``[n, H, W, C]``, tensors
                ``[n, C, H, W]``; one of them, or an iterable of them, such as a DataLoader.
            batch_size: images per network call; the result changes by rounding at most.
            value_range: black and white of floating-point values, such as ``(-1, 1)``.

        Returns:
            ``[n, num_features]``.

        Raises:
            InputError: something is no image, or has another shape, type or range.
            UnreadableImageError: a path cannot be decoded.
        """
        pictures = iter_pictures(images, value_range=value_range)
        rows = []
        while part := list(itertools.islice(pictures, batch_size)):
            rows.append(self.embed_batch(torch.stack([self._tensor(image) for image in part])))
        if not rows:
            return np.zeros((0, self.num_features), dtype=self.feature_dtype)
        return np.concatenate(rows)

    @staticmethod
    def load(
        checkpoint: str | Path | None = None, *, codec: str | None = None, device: str = "auto"
    ) -> Detector:
        """Load an LCMem detector; ``lcmem_cli.load_detector`` loads any kind by its name.

        Args:
            checkpoint: an lcmem ``.safetensors`` file; the embedded model by default.
            codec: folder or hub id of the codec where the checkpoint does not hold it. It is
                loaded only when images are embedded, so latents can be scored without one.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

        Example:
            >>> detector = Detector.load()
            >>> detector.score("a.png", "b.png")
        """
        from lcmem_cli import load_detector  # what knows all kinds is built on this file

        name = join_name("lcmem", str(checkpoint or ""), {"codec": codec} if codec else {})
        return load_detector(name, device=device)

    def score(self, image_a: Image.Image | str | Path, image_b: Image.Image | str | Path) -> float:
        """Score two images; the order does not matter."""
        features = self.embed([image_a, image_b])
        return float(self.score_features(features[:1], features[1:])[0])

    def _tensor(self, image: Path | Image.Image) -> torch.Tensor:
        if isinstance(image, Path):
            image = load_image(image, size=self.input_size)
        return to_tensor(image, self.input_size)


class Adapted(NamedTuple):
    """An adapted detector, and what makes its features of the former one's.

    Attributes:
        detector: scores features that were converted, and embeds images to such.
        convert: ``[n, d]`` of the detector that was adapted to ``[n, d]`` of this one.
        num_images: that it was adapted to.
    """

    detector: Detector
    convert: Callable[[FloatArray], FloatArray]
    num_images: int


def check_features(
    output: Any, num_images: int, num_features: int | None, *, source: str
) -> NDArray[np.float32]:
    """Bring a network's output to float32 ``[n, d]``.

    Args:
        output: tensor or array ``[n, d]``, perhaps with further axes of length 1.
        num_images: expected rows.
        num_features: expected columns, if known.
        source: for messages.

    Raises:
        InputError: the shape is another.
        NotFiniteError: values that are not finite.
    """
    if isinstance(output, torch.Tensor):
        output = output.detach().to("cpu", torch.float32).numpy()
    if not isinstance(output, np.ndarray):
        raise InputError(
            f"{source}: its output is a {type(output).__name__}, not a tensor; name the one to use "
            "with ?output="
        )
    features = np.ascontiguousarray(output, dtype=np.float32)
    while features.ndim > 2 and features.shape[-1] == 1:
        features = features[..., 0]
    wanted = (num_images, features.shape[-1] if num_features is None else num_features)
    if features.ndim != 2 or features.shape != wanted:
        raise InputError(
            f"{source}: its output has the shape {list(output.shape)}; expected one row of "
            f"features for each of {num_images} images"
        )
    if not np.isfinite(features).all():
        raise NotFiniteError(f"{source}: its output holds values that are not finite")
    return features


def resize_batch(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Resize a batch of images to a square.

    Args:
        batch: ``[n, 3, H, W]``, floating point in [0, 1].
        size: side of the result in pixels; the aspect ratio is not kept (arXiv 2512.14421).

    Returns:
        ``[n, 3, size, size]`` float32 in [0, 1].
    """
    batch = batch.to(torch.float32)
    if batch.shape[-2:] != (size, size):
        batch = torch.nn.functional.interpolate(
            batch, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return batch.clamp(0, 1)


def score_listed(
    detector: Detector,
    features: NDArray[Any],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    others: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Score pairs of feature rows, some megabytes at a time.

    Args:
        detector: what scores.
        features: ``[d, k]``, perhaps a memory map.
        first: ``[n]`` feature row of each first image, or -1 where it is unreadable.
        second: ``[n]`` the same for the second image.
        others: ``[e, k]`` features of the second images, where they are not the same.

    Returns:
        ``[n]``; NaN where an image is unreadable.
    """
    others = features if others is None else others
    scores = np.full(len(first), np.nan)
    usable = np.flatnonzero((first >= 0) & (second >= 0))
    block = _rows_per_block(features)
    for start in range(0, len(usable), block):
        part = usable[start : start + block]
        scores[part] = detector.score_features(features[first[part]], others[second[part]])
    return scores


def _rows_per_block(features: NDArray[Any]) -> int:
    row_bytes = max(1, features.shape[1] * features.itemsize)
    return int(np.clip(_BLOCK_BYTES // row_bytes, 16, 2048))
