"""Second forms of a pair: a grey copy of a picture in colour, and a copy in a frame of bars.

Where one image is grey and the other is not, the other is compared in grey too; where an image
stands in a frame of bars of one colour, what the bars surround is compared too. The highest score
counts: nothing else than taking the colour away, or adding the bars, explains it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.looks import without_bars
from lcmem_cli.engine.data.remarks import BARS, BLANK, GREY, Remarks
from lcmem_cli.engine.detectors.base import Detector, FloatArray, score_listed
from lcmem_cli.engine.detectors.embedding import allocate_features


class _Form(NamedTuple):
    """An image as it is compared: perhaps without bars, perhaps in grey."""

    file: int
    cut: bool = False
    grey: bool = False


def compare_other_forms(
    detector: Detector,
    files: Sequence[Path],
    contents: Sequence[str | None],
    pairs: NDArray[np.int64],
    scores: NDArray[np.float64],
    remarks: Remarks,
    compute: Compute,
) -> dict[int, str]:
    """Raise scores to those of second forms where these are higher.

    Args:
        detector: what scores.
        files: all images.
        contents: SHA-256 of each; one that has changed by now is not compared in another form.
        pairs: ``[n, 2]`` positions of each pair's images among the files.
        scores: ``[n]``, changed in place; NaN where an image is unreadable.
        remarks: ``[files, c]``, see ``data.remarks``.
        compute: how it is done.

    Returns:
        For the pairs with a higher score, by position, which form it is of, in words.
    """
    wanted = [
        (index, *pair)
        for index, (a, b) in enumerate(pairs.tolist())
        if a != b and np.isfinite(scores[index])
        for pair in _forms_of(a, b, remarks)
    ]
    forms = list(dict.fromkeys(form for _, a, b in wanted for form in (a, b)))
    features, rows = _embed(detector, files, contents, forms, compute)
    place = dict(zip(forms, rows.tolist(), strict=True))
    first = np.array([place[form] for _, form, _ in wanted], dtype=np.int64)
    second = np.array([place[form] for _, _, form in wanted], dtype=np.int64)
    again = score_listed(detector, features, first, second)
    found: dict[int, str] = {}
    for (index, a, b), score in zip(wanted, again, strict=True):
        if score > scores[index]:
            scores[index] = score
            words = {"without bars": a.cut or b.cut, "in grey": a.grey or b.grey}
            found[index] = " and ".join(word for word, is_so in words.items() if is_so)
    return found


def _forms_of(a: int, b: int, remarks: Remarks) -> list[tuple[_Form, _Form]]:
    """Return the forms of a pair to compare besides the images as they are."""
    first, second = remarks[a], remarks[b]
    if first[BLANK] >= 0 or second[BLANK] >= 0:
        return []
    in_grey = bool(second[GREY] and not first[GREY]), bool(first[GREY] and not second[GREY])
    cuts = itertools.product({False, bool(first[BARS])}, {False, bool(second[BARS])})
    return [
        (_Form(a, cut_a, in_grey[0]), _Form(b, cut_b, in_grey[1]))
        for cut_a, cut_b in cuts
        if cut_a or cut_b or any(in_grey)
    ]


def _embed(
    detector: Detector,
    files: Sequence[Path],
    contents: Sequence[str | None],
    forms: Sequence[_Form],
    compute: Compute,
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return features of forms, and the row of each, -1 where it cannot be had."""
    batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)

    def edit(image: Image.Image, position: int) -> Image.Image:
        if forms[position].cut:
            image = without_bars(image) or image
        return image.convert("L").convert("RGB") if forms[position].grey else image

    features = allocate_features((len(forms), detector.num_features), detector.feature_dtype)
    rows = np.full(len(forms), -1, dtype=np.int64)
    for batch in iter_images(
        [files[form.file] for form in forms],
        detector.input_size,
        workers=min(len(forms), compute.num_workers),
        batch_size=batching.loaded,
        edit=edit,
    ):
        if batch.indices:
            indices, pieces, _ = batching.embed(detector.embed_batch, batch)
            if pieces:
                features[indices] = np.concatenate(pieces)
            for index in indices:
                if batch.hashes[index] == contents[forms[index].file]:
                    rows[index] = index
    return features, rows
