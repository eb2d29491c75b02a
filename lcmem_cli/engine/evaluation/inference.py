"""Scoring pairs of image files: one pair, or a table of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.images import content_hash, load_pixels
from lcmem_cli.engine.data.loading import BLANK, Edit, iter_images, no_remarks, remarks_texts
from lcmem_cli.engine.data.looks import has_bars, is_grey, is_page, same_blank, without_bars
from lcmem_cli.engine.detectors.base import Detector, score_listed
from lcmem_cli.engine.detectors.embedding import allocate_features
from lcmem_cli.engine.distributed import resolve_workers
from lcmem_cli.engine.errors import InputError, nearest
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable

_PICTURE_SIDE, _GAP = 320, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScore:
    """One scored pair.

    Attributes:
        path_a: first image.
        path_b: second image.
        score: of the detector; ``None`` where an image could not be read.
        match: ``score >= threshold``; ``None`` without score or threshold.
        identical: whether both files are the same, byte for byte.
        form: how they were altered for the score, ``None``: not at all; see ``score_pairs``.
    """

    path_a: str
    path_b: str
    score: float | None
    match: bool | None
    identical: bool
    form: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceResult(Result):
    """Scored pairs.

    Attributes:
        detector: its name.
        fingerprint: its fingerprint.
        pairs: in the order given.
        threshold: what the verdicts were made with, and where it is from.
        num_images_embedded: distinct images.
        unreadable: images that could not be read.
        blank: images of one colour, which match only their equals.
    """

    detector: str
    fingerprint: str
    pairs: tuple[PairScore, ...]
    threshold: Threshold | None
    num_images_embedded: int
    unreadable: tuple[Unreadable, ...]
    blank: tuple[str, ...] = ()


def score_pairs(
    detector: Detector,
    pairs: Sequence[tuple[Path, Path]],
    *,
    threshold: str | None = None,
    batch_size: int = 32,
    workers: int = -1,
    max_unreadable: int = 0,
    reporter: Reporter = SILENT,
) -> InferenceResult:
    """Score pairs of files; each distinct file is decoded and embedded once.

    Two kinds of copies are compared in a second form as well, and the higher score counts: where
    one image is grey and the other is not, the other in grey; where an image stands in a frame of
    bars of one colour, what they surround. An image of one colour shows nothing: it matches only
    another of that colour.

    Args:
        detector: what scores.
        pairs: files; the order within a pair does not matter.
        threshold: name of one of the detector's thresholds (``fpr0.01``); by default its first.
        batch_size: images per network call, see ``Batching``; scores change by rounding at most.
        workers: decoding threads.
        max_unreadable: tolerated unreadable images.
        reporter: receives progress.

    Raises:
        InputError: unknown threshold.
        UnreadableLimitError: more unreadable images than tolerated.
    """
    chosen = choose_threshold(detector, threshold)
    if threshold is None and chosen is not None and chosen.kind != "fpr":
        reporter.warn(
            f"{detector.name} has no threshold for a false-positive rate; the verdict is by "
            f"{chosen.name}, at which unlike images pass as often as it says below"
        )
    batching = Batching(batch_size, detector.device, reporter=reporter)
    number: dict[Path, int] = {}
    for pair in pairs:
        for path in pair:
            number.setdefault(path, len(number))
    files = list(number)
    num_workers = min(len(files), resolve_workers(workers))
    embedded = _embed(detector, files, batching, num_workers, reporter)
    bad = embedded.bad
    told = [i for i in range(len(files)) if i not in bad]
    for text in remarks_texts([files[i] for i in told], embedded.remarks[told]):
        reporter.warn(text)
    unreadable = tuple(Unreadable(path=str(files[i]), reason=reason) for i, reason in bad.items())
    check_unreadable(unreadable, max_unreadable)
    rows = np.array([[number[a], number[b]] for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    rows[np.isin(rows, list(bad))] = -1
    scores = score_listed(detector, embedded.features, rows[:, 0], rows[:, 1])
    forms = _compare_other_forms(detector, files, rows, scores, embedded, batching, num_workers)
    blank = embedded.remarks[:, BLANK]

    size_of = functools.cache(lambda path: path.stat().st_size)  # a file may be in many pairs
    content_of = functools.cache(content_hash)

    def scored(index: int, a: Path, b: Path) -> PairScore:
        known = None if math.isnan(scores[index]) else float(scores[index])
        match = None
        if known is not None and chosen is not None:
            match = chosen.decide(known, detector.fingerprint)
            colours = [int(blank[row]) for row in rows[index]]
            if max(colours) >= 0:
                match = same_blank(*colours)
        identical = known is not None and (
            a == b or (size_of(a) == size_of(b) and content_of(a) == content_of(b))
        )
        return PairScore(
            path_a=str(a),
            path_b=str(b),
            score=known,
            match=match,
            identical=identical,
            form=forms.get(index),
        )

    results = tuple(scored(index, a, b) for index, (a, b) in enumerate(pairs))
    pages = sum(
        pair.match is True and not pair.identical and bool(embedded.pages[rows[index]].all())
        for index, pair in enumerate(results)
    )
    if pages and chosen is not None and chosen.num_positives:  # not by an audit
        reporter.warn(
            f"{pages:,} match(es) of pages of text or drawings on white: the threshold was not "
            "fitted on pictures of this kind, of which many unlike ones pass it; judge by an audit "
            "of such pictures (--audit), or by a detector adapted to them (lcmem calibrate --adapt)"
        )
    return InferenceResult(
        detector=detector.name,
        fingerprint=detector.fingerprint,
        pairs=results,
        threshold=chosen,
        num_images_embedded=len(files) - len(bad),
        unreadable=unreadable,
        blank=tuple(str(files[i]) for i in told if blank[i] >= 0),
    )


class _Form(NamedTuple):
    """An image as it is compared: perhaps without bars, perhaps in grey."""

    file: int
    cut: bool = False
    grey: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Embedded:
    """Features of files, and what they look like.

    Attributes:
        features: ``[n, d]``; zeros where an image is bad.
        remarks: ``[n, 4]``, see ``data.loading.Remarks``.
        bad: positions without features, and why.
        grey: ``[n]`` images without colour.
        bars: ``[n]`` images that may stand in a frame of bars.
        pages: ``[n]`` images that are mostly white ground.
    """

    features: NDArray[Any]
    remarks: NDArray[np.int32]
    bad: dict[int, str]
    grey: NDArray[np.bool_]
    bars: NDArray[np.bool_]
    pages: NDArray[np.bool_]


def _embed(
    detector: Detector,
    files: Sequence[Path],
    batching: Batching,
    num_workers: int,
    reporter: Reporter = SILENT,
    edit: Edit | None = None,
) -> _Embedded:
    features = np.zeros((len(files), 0), dtype=np.float32)
    remarks = no_remarks(len(files))
    looks = np.zeros((3, len(files)), dtype=np.bool_)
    bad: dict[int, str] = {}
    with reporter.task("embedding", len(files), unit="image") as task:
        for batch in iter_images(
            files, detector.input_size, workers=num_workers, batch_size=batching.loaded, edit=edit
        ):
            bad.update(batch.unreadable)
            remarks[batch.indices] = batch.remarks
            for index, image in zip(batch.indices, batch.images, strict=True):
                pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
                looks[:, index] = is_grey(pixels), has_bars(pixels), is_page(pixels)
            if batch.indices:
                indices, pieces, failed = batching.embed(detector.embed_batch, batch)
                bad.update(failed)
                if pieces:
                    made = np.concatenate(pieces)
                    if not features.shape[1]:
                        features = allocate_features((len(files), made.shape[1]), made.dtype.type)
                    features[indices] = made
            task.advance(len(batch.indices) + len(batch.unreadable))
    grey, bars, pages = looks
    return _Embedded(features=features, remarks=remarks, bad=bad, grey=grey, bars=bars, pages=pages)


def _compare_other_forms(
    detector: Detector,
    files: Sequence[Path],
    rows: NDArray[np.int64],
    scores: NDArray[np.float64],
    embedded: _Embedded,
    batching: Batching,
    num_workers: int,
) -> dict[int, str]:
    """Raise scores to those of second forms where these are higher.

    Args:
        detector: what scores.
        files: all images.
        rows: ``[n, 2]`` positions of each pair's images, -1 where one is bad.
        scores: ``[n]``, changed in place.
        embedded: of the files.
        batching: of the detector.
        num_workers: decoding threads.

    Returns:
        For the pairs with a higher score, which form it is of.
    """
    wanted: list[tuple[int, _Form, _Form]] = []
    for index, (a, b) in enumerate(rows.tolist()):
        if min(a, b) < 0 or a == b or (embedded.remarks[[a, b], BLANK] >= 0).any():
            continue
        grey_a, grey_b = bool(embedded.grey[a]), bool(embedded.grey[b])
        for cut_a, cut_b in itertools.product(
            {False, bool(embedded.bars[a])}, {False, bool(embedded.bars[b])}
        ):
            first = _Form(a, cut_a, grey_b and not grey_a)
            second = _Form(b, cut_b, grey_a and not grey_b)
            if any((*first[1:], *second[1:])):
                wanted.append((index, first, second))
    if not wanted:
        return {}
    forms = list(dict.fromkeys(form for _, *pair in wanted for form in pair))

    def edit(image: Image.Image, position: int) -> Image.Image:
        if forms[position].cut:
            image = without_bars(image) or image
        return image.convert("L").convert("RGB") if forms[position].grey else image

    others = _embed(detector, [files[f.file] for f in forms], batching, num_workers, edit=edit)
    place = {form: -1 if row in others.bad else row for row, form in enumerate(forms)}
    first_rows, second_rows = (
        np.array([place[pair[side]] for pair in wanted], dtype=np.int64) for side in (1, 2)
    )
    found: dict[int, str] = {}
    again = score_listed(detector, others.features, first_rows, second_rows)
    for (index, first, second), score in zip(wanted, again, strict=True):
        if score > scores[index]:
            scores[index] = score
            cut, grey = first.cut or second.cut, first.grey or second.grey
            found[index] = " and ".join(["without bars"] * cut + ["in grey"] * grey)
    return found


def choose_threshold(detector: Detector, name: str | None) -> Threshold | None:
    """Return a detector's threshold by name, by default its first, ``None`` if it has none.

    Raises:
        InputError: it has none of that name.
    """
    known = {threshold.name: threshold for threshold in detector.thresholds}
    if name is None:
        return next(iter(known.values()), None)
    if name not in known:
        hint = nearest(name, known) if known else "it has none"
        raise InputError(f"--threshold {name}: {detector.name} has no such threshold; {hint}")
    return known[name]


def save_picture(pair: PairScore, target: Path, *, threshold: Threshold | None) -> None:
    """Draw both images and their absolute difference side by side.

    Args:
        pair: a scored pair of readable images.
        target: ``.png`` file.
        threshold: for the line of text.

    Raises:
        InputError: another kind of file.
    """
    from PIL import ImageDraw

    if target.suffix.lower() != ".png":
        raise InputError(f"{target}: expected a file name that ends in .png")
    a, b = (load_pixels(Path(p), _PICTURE_SIDE) for p in (pair.path_a, pair.path_b))
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16)).astype(np.uint8)
    width = 3 * _PICTURE_SIDE + 4 * _GAP
    canvas = Image.new("RGB", (width, _PICTURE_SIDE + 64), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (pixels, title) in enumerate(
        ((a, Path(pair.path_a).name), (b, Path(pair.path_b).name), (difference, "difference"))
    ):
        left = _GAP + place * (_PICTURE_SIDE + _GAP)
        canvas.paste(Image.fromarray(pixels), (left, 28))
        draw.text((left, 8), _plain(title)[:48], fill="black", font_size=13)
    text = f"score {pair.score:.4f}" if pair.score is not None else "no score"
    if threshold is not None and pair.match is not None:
        text += f"   {verdict_text(pair)}   threshold {threshold.value:.4f} ({threshold.name})"
    draw.text((_GAP, _PICTURE_SIDE + 38), text, fill="black", font_size=15)
    with atomic_path(target) as temporary:
        canvas.save(temporary, format="PNG")


def verdict_text(pair: PairScore) -> str:
    """Return the verdict in words."""
    if pair.score is None or math.isnan(pair.score):
        return "unreadable"
    return {True: "MATCH", False: "no match", None: "no threshold"}[pair.match]


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).encode("ascii", "replace").decode()
