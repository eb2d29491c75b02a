"""What an audit would have found: it plants altered copies of training images and looks for them.

The copies go the way of generated images: embedded, adapted, searched, verified, compared with the
threshold. They come after everything else is decided, so they change neither threshold nor verdict.
Their sources stay in the training set.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.images import load_image, pixels_to_tensor
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, Setting, perturb
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.errors import LcmemError
from lcmem_cli.engine.evaluation.audit.null import Null
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import EditFound, FlagRule, Sensitivity
from lcmem_cli.engine.evaluation.audit.search import Found, best_matches
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet, Listing, embed_set
from lcmem_cli.engine.evaluation.audit.verify import ByPicture, verify_found
from lcmem_cli.engine.evaluation.calibration import (
    benjamini_hochberg,
    conformal_p_values,
)
from lcmem_cli.engine.reporter import SILENT
from lcmem_cli.engine.verification.bank import unchanged_files
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES

WORKING_SIDE = 256
"""Longer side in pixels of an image that is edited; smaller ones are edited as they are."""
IMAGES_PER_COPY = 3
"""Generated and real images for each copy, so that the copies take a third of the time at most."""
MOST_COPIES = 12 * len(EXTENDED_SUITE)


class Copy(NamedTuple):
    """An altered copy of a training image: which row of the set, which edit, and its PNG file."""

    source: int
    setting: Setting
    png: bytes


def measure_sensitivity(
    request: AuditRequest,
    detector: Detector,
    embedded: Embedded,
    null: Null,
    found: Found,
    rule: FlagRule,
    by_picture: ByPicture | None,
) -> Sensitivity:
    """Plant altered copies and count which the audit finds.

    Args:
        request: its number of copies and its seed.
        detector: the one that makes features, before it was adapted.
        embedded: the sets, as the adapted detector sees them.
        null: real images and their best matches.
        found: best matches of the generated images.
        rule: how images are flagged.
        by_picture: finds candidates besides; ``None``: candidates are not verified.

    Returns:
        The counts, or the reason why there are none.
    """
    count = num_copies(request, len(found.rows) + len(null.rows))
    if not count:
        why = "no copies were planted" if request.sensitivity == 0 else "the sets are too small"
        return Sensitivity.unknown(why)
    compute = dataclasses.replace(embedded.compute, reporter=SILENT)
    copies = make_copies(embedded.sets.training, null.bank, count, request.seed, compute)
    if not copies:
        return Sensitivity.unknown("the files of the training images cannot be read")
    threshold = threshold_of_one_more(request, embedded, null, found, rule)
    with tempfile.TemporaryDirectory(prefix="lcmem-copies-") as folder:
        planted = _embedded_copies(copies, Path(folder), detector, embedded, compute)
        seen = dataclasses.replace(
            embedded, sets=dataclasses.replace(embedded.sets, generated=planted), compute=compute
        )
        matches = best_matches(seen, null.bank, NUM_CANDIDATES if by_picture else 2)
        if by_picture is not None:
            matches = verify_found(seen, by_picture, matches)
    matches = matches.evident_first(threshold)
    return _counted(copies, planted, matches, matches.exact | matches.over(threshold).any(axis=1))


def num_copies(request: AuditRequest, num_images: int) -> int:
    """Return how many copies are planted in an audit of so many generated and real images."""
    if request.sensitivity is not None:
        return request.sensitivity
    return min(MOST_COPIES, num_images // IMAGES_PER_COPY)


def make_copies(
    training: ImageSet, bank: NDArray[np.int64], count: int, seed: int, compute: Compute
) -> list[Copy]:
    """Alter images of a training set, one of each identity before any has a second copy.

    Args:
        training: the training set.
        bank: ``[b]`` rows of it that are searched.
        count: copies to make.
        seed: of sources, edits and what is random in them.
        compute: threads and processes; none of it changes the copies.

    Returns:
        At most ``count`` copies: images whose file cannot be read, or has changed, have none.
    """
    sources, settings = _drawn(training, bank, count, seed)
    files: Sequence[Path | None] = [training.files[training.first_image[s]] for s in sources]
    # Sources and edits take turns; where both begin anew at once, a source gets another edit.
    period = math.lcm(len(set(sources)), len(settings))
    numbers = compute.ranks.share(range(count))
    if training.is_index:  # its files may be on the first process's machine alone
        files = unchanged_files(
            [file for file in files if file], [training.hashes[row] for row in sources], compute
        )
        numbers = range(count) if compute.ranks.is_main else range(0)

    def make(number: int) -> tuple[int, Copy] | None:
        file, source = files[number], sources[number]
        made = None if file is None else _altered(file, settings, number + number // period, seed)
        return None if made is None else (number, Copy(source, *made))

    with ThreadPoolExecutor(max(1, compute.num_workers)) as pool:
        mine = [made for made in pool.map(make, numbers) if made is not None]
    every = dict(item for part in compute.ranks.gather(mine) for item in part)
    return [every[number] for number in sorted(every)]


def _drawn(
    training: ImageSet, bank: NDArray[np.int64], count: int, seed: int
) -> tuple[list[int], list[Setting]]:
    """Return the source of each copy, and the settings in the order in which they take turns."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(bank)
    _, first = np.unique(training.groups[order], return_index=True)
    one_each = rng.permutation(order[first])
    settings = [EXTENDED_SUITE[place] for place in rng.permutation(len(EXTENDED_SUITE))]
    return [int(one_each[number % len(one_each)]) for number in range(count)], settings


def _altered(
    file: Path, settings: Sequence[Setting], turn: int, seed: int
) -> tuple[Setting, bytes] | None:
    """Return the next edit that changes the image, and the altered image as PNG.

    Grey images have no hue, for instance, and a blur of a tenth of a pixel changes nothing.
    """
    try:
        image = load_image(file, size=WORKING_SIDE)
    except (LcmemError, OSError):
        return None
    image.thumbnail((WORKING_SIDE, WORKING_SIDE))
    pixels = np.asarray(image)
    tensor = pixels_to_tensor(pixels)
    for step in range(len(settings)):
        setting = settings[(turn + step) % len(settings)]
        changed = perturb(tensor, setting.transform, setting.strength, seed=seed)
        edited = (changed * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        if not np.array_equal(edited, pixels):
            buffer = io.BytesIO()
            Image.fromarray(edited).save(buffer, "PNG", compress_level=1)
            return setting, buffer.getvalue()
    return None


def _embedded_copies(
    copies: Sequence[Copy], folder: Path, detector: Detector, embedded: Embedded, compute: Compute
) -> ImageSet:
    """Embed copies as the generated images were; the names of the records are their numbers."""
    files = [folder / f"{number}.png" for number in range(len(copies))]
    for file, copy in zip(files, copies, strict=True):
        file.write_bytes(copy.png)
    listing = Listing(
        what="planted",
        source=str(folder),
        folder=folder,
        records=[Record(path=str(number), id=str(number)) for number in range(len(copies))],
        files=files,
    )
    planted = embed_set(listing, detector, compute)
    return planted if embedded.convert is None else planted.converted(embedded.convert)


def threshold_of_one_more(
    request: AuditRequest, embedded: Embedded, null: Null, found: Found, rule: FlagRule
) -> float | None:
    """Return the score that one more generated image must exceed to be flagged.

    At a rate per image that is the threshold. Benjamini-Hochberg judges an image by what else is
    in its set, so there each copy counts as one more image of the generated set.
    """
    if rule.kind == "fpr":
        return rule.threshold
    null_scores = null.scores[:, 0]
    others = conformal_p_values(found.best[embedded.sets.generated.rows], null_scores)

    def is_flagged(rank: int) -> bool:
        p_values = np.append(others, rank / (len(null_scores) + 1))
        return bool(benjamini_hochberg(p_values, request.fpr)[-1])

    ranks = range(1, len(null_scores) + 2)  # of p-values: the smaller one is, the rather flagged
    allowed = bisect.bisect_left(ranks, True, key=lambda rank: not is_flagged(rank))
    return float(np.sort(null_scores)[-allowed]) if allowed else None


def _counted(
    copies: Sequence[Copy], planted: ImageSet, matches: Found, flagged: NDArray[np.bool_]
) -> Sensitivity:
    """Count the copies that could be embedded: an edit may leave nothing but one colour."""
    places = [int(record.path) for record in planted.records]
    sources = np.array([copies[place].source for place in places])
    settings = [copies[place].setting for place in places]
    is_found = flagged[planted.rows]
    is_traced = is_found & (matches.rows[planted.rows, 0] == sources)

    def alike(transform: str, strengths: Sequence[float]) -> EditFound:
        mine = np.array([s.transform == transform and s.strength in strengths for s in settings])
        counts = _counts(is_found[mine], is_traced[mine], sources[mine])
        return EditFound(transform=transform, strengths=tuple(strengths), **counts)

    strengths: dict[str, list[float]] = {}
    for setting in sorted(set(settings)):
        strengths.setdefault(setting.transform, []).append(setting.strength)
    transforms = [alike(name, values) for name, values in strengths.items()]
    return Sensitivity(
        **_counts(is_found, is_traced, sources),
        transforms=tuple(sorted(transforms, key=lambda edit: edit.num_found / edit.num_planted)),
        edits=tuple(alike(name, [v]) for name, values in strengths.items() for v in values),
    )


def _counts(
    is_found: NDArray[np.bool_], is_traced: NDArray[np.bool_], sources: NDArray[np.int64]
) -> dict[str, Any]:
    found, planted = int(is_found.sum()), len(is_found)
    return {
        "num_planted": planted,
        "num_found": found,
        "num_traced": int(is_traced.sum()),
        "interval": _interval(found, planted, len(np.unique(sources))),
    }


def _interval(found: int, planted: int, num_sources: int) -> tuple[float, float]:
    """Return the 95 % interval of Clopper and Pearson; each source counts as one trial.

    Copies of one image are found or missed together. So where sources have several, the counts are
    brought to the number of sources first.
    """
    from scipy.stats import beta

    trials = float(min(planted, num_sources))
    hits = found * trials / planted
    low = float(beta.ppf(0.025, hits, trials - hits + 1)) if found else 0.0
    high = float(beta.ppf(0.975, hits + 1, trials - hits)) if found < planted else 1.0
    return low, high
