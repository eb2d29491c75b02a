"""The embedded model joined with the correlation of small grey pictures.

The network is sure about copies that were turned, cropped or mirrored, and where two images show
the same thing; correlation is sure about what was only blurred, dimmed or drawn a little
differently, as a generator does, and knows nothing of a change of geometry. A pair's score is the
larger of the two on one scale, so either is enough.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import (
    Adapted,
    Detector,
    FloatArray,
    resize_batch,
    score_listed,
)
from lcmem_cli.engine.detectors.head import HeadDetector
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.detectors.lcmem import adapt_as_asked, load_asked
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.models.checkpoint import load_checkpoint
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.search import TopK, approximate_products, with_recall
from lcmem_cli.engine.store.steps import (
    HIGHEST_COSINE,
    NUM_STEPS,
    cosine_matrix,
    cosine_pairs,
    cosine_top_k,
    from_steps,
    in_steps,
)

PICTURE_SIZE = 32
"""Side in pixels of the small picture."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of R, G and B (ITU-R BT.601), by which programs make the grey copy of a picture: so it
correlates fully with the picture in colour."""
RISE = 0.01
"""Slope of the plateau between both lines: the better of two matches stays the better one."""


class Scale(NamedTuple):
    """Brings Fisher's z (the inverse hyperbolic tangent of the correlation) to logits.

    Attributes:
        slope: logits for one unit of z.
        offset: logit of a pair without correlation. Slope and offset bring both parts to one scale:
            the line through the scores that 10, 3, 1, 0.3 and 0.1 % of the negative VAL pairs pass,
            mean over the data sets, for the embedded model; printed by
            ``tests/benchmarks/fit_joint.py``.
        hard_slope: the same for the data set whose negative pairs correlate most (faces in one pose
            under many lights).
        hard_offset: likewise.
        plateau: logit that 0.01 % of all these pairs pass by the network. From there on
            correlation counts by the second line, so that sets of such images do not raise the
            threshold beyond what the network reaches.
    """

    slope: float
    offset: float
    hard_slope: float
    hard_offset: float
    plateau: float


SCALE = Scale(slope=1.79, offset=-2.74, hard_slope=1.78, hard_offset=-3.27, plateau=-0.05)
ADAPTED_SCALE = Scale(slope=1.82, offset=-2.99, hard_slope=1.51, hard_offset=-3.23, plateau=-0.24)
"""For an adapted network: each data set's pairs scored with a last layer that was fitted without it
and adapted to its TRAIN images."""
_BLOCK_ROWS = 2048


class JointDetector(Detector):
    """Scores ``max(network, picture)``, both as probabilities.

    A feature row is the network's, then the grey picture of ``PICTURE_SIZE`` pixels a side less its
    mean, at length 1 (a picture of one colour: all 0, which correlates with nothing). Both are kept
    in 16 bits a number, see ``store.steps``: against single precision the network's logit moves by
    ``Σ|w| / NUM_STEPS`` at most, 0.0007, and the correlation by 0.001.

    Args:
        network: gives the first part.
        name: how the user named it.
        scale: of the picture's part.
    """

    feature_dtype = np.int16
    gives_probability = True
    measures_distance = False  # where correlation is the larger, its scale is Fisher's

    def __init__(self, network: HeadDetector, *, name: str = "joint", scale: Scale = SCALE) -> None:
        self.network = network
        self._exact: JointDetector | None = None  # of an approximate one: what it approximates
        self.scale = scale
        self.is_adaptable, self.adapted_to = network.is_adaptable, network.adapted_to
        self.name = name
        self.device = network.device
        self.input_size = network.input_size
        self.num_features = network.num_features + PICTURE_SIZE**2
        settings = f"joint/{network.fingerprint}/{(PICTURE_SIZE, *LUMINANCE, *scale, RISE)}"
        settings += f"/{NUM_STEPS}"
        self.fingerprint = sha256_bytes(settings.encode())

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed ``[n, 3, input_size, input_size]`` in [0, 1] to int16 ``[n, num_features]``."""
        small = resize_batch(batch.cpu(), PICTURE_SIZE).double()
        pictures = torch.einsum("nchw,c->nhw", small, small.new_tensor(LUMINANCE)).flatten(1)
        pictures = pictures - pictures.mean(dim=1, keepdim=True)
        length = pictures.norm(dim=1, keepdim=True)
        flat = length < 1e-6 * PICTURE_SIZE  # rounding of a single colour is no picture
        unit = torch.where(flat, torch.zeros_like(pictures), pictures / length.clamp_min(1e-12))
        return np.concatenate(
            [in_steps(self.network.embed_batch(batch)), in_steps(unit.numpy())], axis=1
        )

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return scores ``[n]`` of row i of ``a`` with row i of ``b``."""
        scores = np.empty(len(a))
        for start in range(0, len(a), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            network_a, picture_a = self._parts(a[rows])
            network_b, picture_b = self._parts(b[rows])
            scores[rows] = np.maximum(
                self.network.score_features(network_a, network_b),
                correlation_scores(cosine_pairs(picture_a, picture_b), self.scale),
            )
        return scores

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return scores ``[n, m]`` of every row of ``a`` with every row of ``b``."""
        (network_a, picture_a), (network_b, picture_b) = self._parts(a), self._parts(b)
        return np.maximum(
            self.network.score_matrix(network_a, network_b),
            self._correlations(picture_a, picture_b),
        )

    def top_k(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` best rows of the bank, in bounded memory.

        The best by the larger of two scores are among the best by the one or by the other. Exact,
        unless the detector is approximate; then recall is measured as for the network alone.

        Raises:
            MissingExtraError: the search is approximate and faiss is not installed.
        """
        (network_q, picture_q), (network_b, picture_b) = self._parts(queries), self._parts(bank)
        by_network = self.network.top_k(network_q, network_b, k)
        if self._exact is not None:
            by_picture = approximate_products(
                self._correlations, self._top_pictures, picture_q, picture_b, k
            )
            found = self._better(queries, bank, by_network, by_picture)
            return with_recall(found, self._exact.top_k, queries, bank)
        by_picture = self._top_pictures(picture_q, picture_b, k)
        return self._better(queries, bank, by_network, by_picture)

    def approximate(self) -> JointDetector:
        """Return a copy that finds candidates of each part with an inverted file."""
        other = copy.copy(self)
        other.network, other._exact = self.network.approximate(), self
        return other

    def _better(
        self, queries: FloatArray, bank: FloatArray, by_network: TopK, by_picture: TopK
    ) -> TopK:
        """Score what either part found by both, and return the best."""
        rows = np.concatenate([by_network.rows, by_picture.rows], axis=1)
        each = np.arange(len(rows))
        scores = np.empty(rows.shape)
        for column in range(rows.shape[1]):
            scores[:, column] = score_listed(self, queries, each, rows[:, column], bank)
        order = np.lexsort((rows, -scores), axis=1)
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        repeated = np.zeros(rows.shape, dtype=np.bool_)
        repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]  # both parts of one row stand side by side
        first = np.argsort(repeated, axis=1, kind="stable")[:, : by_network.rows.shape[1]]
        return TopK(np.take_along_axis(scores, first, 1), np.take_along_axis(rows, first, 1))

    def pictures(self, features: FloatArray) -> FloatArray:
        """Return the small grey pictures ``[n, s, s]`` that features hold."""
        pictures = from_steps(self._parts(features)[1]).astype(np.float32)
        return pictures.reshape(-1, PICTURE_SIZE, PICTURE_SIZE)

    def adapted(self, features: FloatArray, contents: Sequence[str]) -> Adapted:
        """Return this detector with an adapted network, see ``Detector.adapted``; pictures stay.

        Raises:
            NotAdaptableError: too few images.
        """
        exact = self._exact or self
        network, convert, num_images = exact.network.adapted(self._parts(features)[0], contents)
        assert isinstance(network, HeadDetector)

        def convert_parts(rows: FloatArray) -> FloatArray:
            first, second = self._parts(rows)
            return np.concatenate([in_steps(convert(first)), second], axis=1)

        detector = JointDetector(network, name=self.name, scale=ADAPTED_SCALE)
        if self._exact is not None:
            detector = detector.approximate()
        return Adapted(detector, convert_parts, num_images)

    def _top_pictures(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` most correlated rows of the bank."""
        found = device_search.top_k(
            lambda: device_search.cosine(bank.shape[1], centred=False),
            cosine_matrix,
            cosine_top_k,
            queries,
            bank,
            k,
            self.device,
        )
        return found._replace(scores=correlation_scores(found.scores, self.scale))

    def _correlations(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        return correlation_scores(cosine_matrix(a, b), self.scale)

    def _parts(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        width = self.network.num_features
        return features[:, :width], features[:, width:]


def build(request: Request) -> Detector:
    """Build the detector that a name asks for, adapted if it says so.

    Raises:
        InputError: a network that the scale of correlation was not fitted to.
    """
    network = _exported_network(request) if request.target else load_asked(request)
    return adapt_as_asked(JointDetector(network, name=request.name), request)


def _exported_network(request: Request) -> HeadDetector:
    if not request.target.lower().endswith(".onnx"):
        raise InputError(
            f"detector 'joint' takes nothing after a colon but an ONNX export of the embedded "
            f"model, not '{request.target}': to another model's scores it was not fitted"
        )
    if request.options.get("precision", "fp32") != "fp32":
        raise InputError(
            f"detector '{request.name}': precision has no effect on an ONNX export; leave it out"
        )
    from lcmem_cli.engine.detectors.onnx import load_export

    network = load_export(request)
    if network.exported_from != load_checkpoint(locate_checkpoint(None)).fingerprint:
        raise InputError(
            f"detector '{request.name}': an export of another model than the embedded one, to "
            "whose scores the correlation of pictures was fitted; make the file with: "
            f"lcmem export {request.target}"
        )
    return network


def correlation_scores(correlation: FloatArray, scale: Scale = SCALE) -> NDArray[np.float64]:
    """Bring correlations, of any shape, to the scale of the network's probabilities."""
    from scipy.special import expit

    fisher = np.arctanh(np.clip(correlation, -HIGHEST_COSINE, HIGHEST_COSINE))
    usual = scale.slope * fisher + scale.offset
    hard = scale.hard_slope * fisher + scale.hard_offset
    high = np.maximum(hard, scale.plateau + RISE * fisher)
    result: NDArray[np.float64] = expit(np.minimum(usual, high))
    return result
