"""A guard: an audit of images one by one, as they are sampled.

It holds what an audit compares with: the detector, the features of the training set, the scores of
real images and the threshold. Each image goes the way of an audit's generated images, so its
verdict is the one that the audit would give. Blank images show nothing: they are never flagged.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.arrays import UNIT_RANGE, Images, ValueRange, iter_pictures
from lcmem_cli.engine.data.frames import has_file
from lcmem_cli.engine.data.images import load_image, pixels_to_tensor, resized_pixels
from lcmem_cli.engine.data.loading import load_once
from lcmem_cli.engine.data.looks import look_at
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.conclude import Flags, apply_rule, fit_rule, tier_of
from lcmem_cli.engine.evaluation.audit.detector import choose_detector, reopen
from lcmem_cli.engine.evaluation.audit.matching import match_sets
from lcmem_cli.engine.evaluation.audit.null import split_rows
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import FlagRule, Match, SetSummary
from lcmem_cli.engine.evaluation.audit.search import Found, best_matches
from lcmem_cli.engine.evaluation.audit.sets import (
    Embedded,
    Given,
    ImageSet,
    Sets,
    as_source,
    embed_set,
    list_set,
)
from lcmem_cli.engine.evaluation.audit.verify import (
    ByPicture,
    features_of,
    is_to_verify,
    with_evidence,
)
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.verification.bank import FeatureBank, IndexKeypoints
from lcmem_cli.engine.verification.features import local_features, single_threaded
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES, verify

MAX_KEPT = 2048
"""Training images whose keypoints are kept in memory, of 70 KB each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Match, Result):
    """What a guard says of one image: an audit's best match of it.

    ``flagged``, ``p_value``, ``match``, ``tier``, ``evidence`` and ``edit`` are those of ``Match``.
    ``query`` is the path of the image, or its position among those that were given.

    Attributes:
        file: the training image, to be opened.
        is_blank: whether the image shows nothing but one colour. It is not judged then: it matches
            nothing, with score 0 and p-value 1.
    """

    file: str
    is_blank: bool = False


class Guard:
    """Says of each image whether it is closer to the training set than real images ever are.

    Make one with ``Guard.from_audit`` or ``Guard.fit``.

    Args:
        embedded: detector and training set; no generated images.
        bank: ``[b]`` rows of the training set that are searched.
        rule: what is flagged.
        null_scores: ``[m]`` of the best matches of real images.
        verified: align each image with its best candidates.
        comparable: see ``AuditResult.comparable``.

    Example:
        >>> guard = Guard.from_audit("audit/")
        >>> kept = [image for image, ok in zip(images, guard.accept(images)) if ok]
    """

    def __init__(
        self,
        embedded: Embedded,
        *,
        bank: NDArray[np.int64],
        rule: FlagRule,
        null_scores: NDArray[np.float64],
        verified: bool,
        comparable: bool | None,
    ) -> None:
        self.rule, self.verified, self.comparable = rule, verified, comparable
        self._bank, self._null_scores = bank, null_scores
        # Keypoints are kept in memory: each query would add a file to a cache.
        quiet = dataclasses.replace(embedded.compute, cache=None, reporter=SILENT)
        sets = dataclasses.replace(embedded.sets, held_out=None)
        self._embedded = dataclasses.replace(embedded, compute=quiet, sets=sets, before=None)
        self._kept: collections.OrderedDict[int, NDArray[Any]] = collections.OrderedDict()

    @classmethod
    def from_audit(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        batch_size: int = 32,
        workers: int = -1,
        reporter: Reporter = SILENT,
    ) -> Guard:
        """Take detector, training set and threshold of a finished audit.

        Features of the training set come from the user's cache, or from the audit's index.

        Args:
            folder: output of ``audit``.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            batch_size: images per network call.
            workers: threads; -1: from the CPUs.
            reporter: told progress and warnings.

        Raises:
            InputError: no finished audit of a rate per image there, or detector, training set or
                its files have changed since.
            CorruptFileError: its files were damaged, or written by another version.
        """
        compute = Compute(device=device, batch_size=batch_size, workers=workers, reporter=reporter)
        audit = reopen(Path(folder), compute)
        training, document = audit.training, audit.document
        assert training is not None
        if training.summary.digest != document.training.digest:
            raise InputError(
                f"{folder}: the images of {document.training.source} are others than the audit's; "
                "run the audit again"
            )
        if document.verified:
            _check_files(training)
        bank = np.arange(training.num_distinct)
        if document.null.kind == "split":
            bank = split_rows(training, rate=document.rule.rate, seed=audit.settings.seed)[1]
        return cls(
            _without_generated(audit.detector, training, None, compute),
            bank=bank,
            rule=document.rule,
            null_scores=np.array(document.null.scores),
            verified=document.verified,
            comparable=document.comparable,
        )

    @classmethod
    def fit(
        cls,
        training: Given,
        held_out: Given,
        *,
        fpr: float = 0.01,
        detector: str | Detector | None = None,
        value_range: ValueRange = UNIT_RANGE,
        device: str = "auto",
        batch_size: int = 32,
        workers: int = -1,
        reporter: Reporter = SILENT,
    ) -> Guard:
        """Fit a threshold as ``audit`` does, without generated images.

        Args:
            training: the generator's training set: index, folder, filelist, archive, or images in
                memory.
            held_out: real images like these that the generator never saw.
            fpr: chance of flagging an image that copies nothing, in (0, 1).
            detector: name, or a loaded detector; ``None``: that of an index, else ``joint``.
            value_range: black and white of floating-point images in memory, such as ``(-1, 1)``.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            batch_size: images per network call.
            workers: threads; -1: from the CPUs.
            reporter: told progress and warnings.

        Raises:
            InputError: a set is empty, or there are too few held-out images for the rate.
        """
        compute = Compute(
            device=device,
            batch_size=batch_size,
            workers=workers,
            reporter=reporter,
            cache=FeatureCaches.of_user(),
        )
        with contextlib.ExitStack() as stack:
            known, unseen = (
                as_source(given, what=what, value_range=value_range, stack=stack)
                for what, given in (("training", training), ("held-out", held_out))
            )
            request = AuditRequest(
                sources=Sets(generated=unseen, training=known, held_out=unseen),
                fpr=fpr,
                detector=detector,
            )
            guard = cls._fitted(request, compute)
            weakref.finalize(guard, stack.pop_all().close)
        return guard

    @classmethod
    def _fitted(cls, request: AuditRequest, compute: Compute) -> Guard:
        reporter = compute.reporter
        listings = request.sources.map(
            lambda what, source: list_set(source, what=what, reporter=reporter)
        )
        chosen = choose_detector(request, listings, compute)
        verified = is_to_verify(request, listings, chosen, compute)
        known, unseen = (
            embed_set(listing, chosen, compute)
            for what, listing in listings.named()
            if what != "generated"
        )
        for images in (known, unseen):
            if images.summary.unreadable:
                reporter.warn(
                    f"{images.summary.source}: {len(images.summary.unreadable):,} images cannot be "
                    f"read, {images.summary.unreadable[0].path} first; they are left out"
                )
        plain = _without_generated(chosen, known, unseen, compute)
        conditions, embedded, null, _, _ = match_sets(plain, request, verified=verified)
        assert conditions.held_out is not None
        if conditions.held_out.comparable is False:
            reporter.warn(
                f"{unseen.summary.source}: held-out images can be told from the training images, "
                "so no rate holds; give real images of the same source"
            )
        return cls(
            embedded,
            bank=null.bank,
            rule=fit_rule(np.zeros(0), null, request),
            null_scores=null.scores[:, 0],
            verified=verified,
            comparable=conditions.held_out.comparable,
        )

    @property
    def detector(self) -> Detector:
        """What embeds and scores."""
        return self._embedded.detector

    @functools.cached_property
    def _by_picture(self) -> ByPicture:
        return ByPicture.of(self._embedded, self._bank)

    def __repr__(self) -> str:
        """Return what it compares with, in short."""
        return (
            f"<Guard: {self.detector.name}, threshold {self.rule.threshold:.4g} for "
            f"{100 * self.rule.rate:g} % per image, {len(self._bank):,} training images, "
            f"{len(self._null_scores):,} real ones, comparable: {self.comparable}>"
        )

    def accept(self, images: Images, *, value_range: ValueRange = UNIT_RANGE) -> NDArray[np.bool_]:
        """Return which images may be kept, ``[n]``: a mask, so that the others can be sampled anew.

        Args:
            images: see ``check``.
            value_range: see ``check``.
        """
        verdicts = self.check(images, value_range=value_range)
        return np.array([not verdict.flagged for verdict in verdicts], dtype=np.bool_)

    def check(self, images: Images, *, value_range: ValueRange = UNIT_RANGE) -> list[Verdict]:
        """Compare images with the training set.

        Args:
            images: any that ``Detector.embed`` takes.
            value_range: black and white of floating-point values, such as ``(-1, 1)``.

        Returns:
            A verdict for each image.

        Raises:
            InputError: something is no image, or has another shape, type or range.
            UnreadableImageError: a path cannot be decoded.
        """
        pictures = iter_pictures(images, value_range=value_range)
        verdicts: list[Verdict] = []
        while part := list(itertools.islice(pictures, self._embedded.compute.batch_size)):
            queries = [
                _Query.of(picture, position, self.detector.input_size)
                for position, picture in enumerate(part, start=len(verdicts))
            ]
            verdicts += self._judge(queries)
        return verdicts

    def _judge(self, queries: Sequence[_Query]) -> list[Verdict]:
        shown = [query for query in queries if not query.is_blank]
        if not shown:
            return [query.blank_verdict for query in queries]
        with ThreadPoolExecutor(1) as beside:  # keypoints need neither features nor candidates
            keypoints = beside.submit(_bank_of, shown) if self.verified else None
            batch = pixels_to_tensor(np.stack([query.pixels for query in shown]))
            generated = _image_set(shown, self.detector.embed_batch(batch))
            sets = dataclasses.replace(self._embedded.sets, generated=generated)
            embedded = dataclasses.replace(self._embedded, sets=sets)
            found = best_matches(embedded, self._bank, NUM_CANDIDATES if self.verified else 2)
        if keypoints is not None:
            searched, found = found, self._by_picture.with_found(found, generated.features)
            candidates = found.rows[:, :NUM_CANDIDATES]
            bank = self._training_bank(np.unique(candidates))
            verification = verify(keypoints.result(), bank, candidates, embedded.compute)
            found = with_evidence(found, verification, searched)
        found, flags = apply_rule(found, self.rule, self._null_scores)
        flags = dataclasses.replace(flags, pixels=self._same_pixels(shown, found, flags))
        rows = iter(range(len(shown)))
        return [
            query.blank_verdict
            if query.is_blank
            else self._verdict(query, found, flags, next(rows))
            for query in queries
        ]

    def _verdict(self, query: _Query, found: Found, flags: Flags, row: int) -> Verdict:
        training, place = self._embedded.sets.training, int(found.rows[row, 0])
        record = training.record_of(place)
        return Verdict(
            query=query.name,
            rank=1,
            match=record.path,
            match_id=record.id,
            score=float(found.scores[row, 0]),
            p_value=float(flags.p_values[row, 0]),
            flagged=bool(flags.matches[row, 0]),
            exact=bool(found.exact[row]),
            tier=tier_of(found, flags, row, 0),
            evidence=found.evidence(row, 0),
            file=str(training.files[training.first_image[place]]),
        )

    def _same_pixels(
        self, queries: Sequence[_Query], found: Found, flags: Flags
    ) -> NDArray[np.bool_]:
        """Return which flagged images have the decoded pixels of their match."""
        training = self._embedded.sets.training

        def is_same(row: int) -> bool:
            if not flags.contents[row] or found.exact[row]:
                return False
            file = training.files[training.first_image[found.rows[row, 0]]]
            try:
                other = load_image(file)
            except (LcmemError, OSError):
                return False
            image = queries[row].image
            return other.size == image.size and other.tobytes() == image.tobytes()

        return np.array([is_same(row) for row in range(len(queries))], dtype=np.bool_)

    def _training_bank(self, rows: NDArray[np.int64]) -> FeatureBank:
        """Return keypoints of training images; those seen lately are kept."""
        training, compute = self._embedded.sets.training, self._embedded.compute
        new = [row for row in rows.tolist() if row not in self._kept]
        if new:
            read = features_of(training, np.array(new, dtype=np.int64), compute)
            self._kept.update(zip(new, read.rows, strict=True))
        for row in rows.tolist():
            self._kept.move_to_end(row)
        bank = FeatureBank(np.stack([self._kept[row] for row in rows.tolist()])).numbered(rows)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return bank


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Query:
    """An image to judge.

    Attributes:
        name: its path, or its position.
        image: decoded.
        content: of its file; of an image in memory, something that no file has.
        pixels: ``[S, S, 3]`` as the detector takes them.
        colour: ``0xRRGGBB`` where it shows nothing else, otherwise -1.
    """

    name: str
    image: Image.Image
    content: str
    pixels: NDArray[np.uint8]
    colour: int

    @classmethod
    def of(cls, picture: Path | Image.Image, position: int, size: int) -> _Query:
        name, content = str(position), f"in memory {position}"
        if isinstance(picture, Path):
            name = str(picture)
            picture, content = load_once(picture, size=size)
        pixels = resized_pixels(picture, size)
        return cls(
            name=name,
            image=picture,
            content=content,
            pixels=pixels,
            colour=look_at(pixels).blank,
        )

    @property
    def is_blank(self) -> bool:
        return self.colour >= 0

    @property
    def blank_verdict(self) -> Verdict:
        return Verdict(
            query=self.name,
            rank=1,
            match="",
            match_id="",
            score=0.0,
            p_value=1.0,
            flagged=False,
            exact=False,
            file="",
            is_blank=True,
        )


def _bank_of(queries: Sequence[_Query]) -> FeatureBank:
    """Find the keypoints of images in memory."""
    with single_threaded(), ThreadPoolExecutor(min(len(queries), 16)) as pool:
        rows = list(pool.map(lambda query: local_features(query.image).packed(), queries))
    return FeatureBank(np.stack(rows))


def _without_generated(
    detector: Detector, training: ImageSet, held_out: ImageSet | None, compute: Compute
) -> Embedded:
    nothing = np.zeros((0, training.features.shape[1]), training.features.dtype)
    sets = Sets(generated=_image_set((), nothing), training=training, held_out=held_out)
    return Embedded(detector=detector, sets=sets, compute=compute)


def _image_set(queries: Sequence[_Query], features: FloatArray) -> ImageSet:
    count = len(queries)
    return ImageSet(
        summary=SetSummary(
            source="images in memory",
            folder="",
            num_images=count,
            num_distinct=count,
            digest="",
            num_identities=None,
            duplicates=(),
            unreadable=(),
            num_guessed=0,
        ),
        records=tuple(Record(path=query.name, id=query.name) for query in queries),
        files=tuple(Path(query.name) for query in queries),
        rows=np.arange(count),
        features=features,
        hashes=tuple(query.content for query in queries),
    )


def _check_files(training: ImageSet) -> None:
    if training.is_index and IndexKeypoints(Path(training.summary.source)).are_kept:
        return
    missing = sum(not has_file(file) for file in training.files)
    if missing:
        raise InputError(
            f"{training.summary.source}: {missing:,} files are gone, so that candidates cannot be "
            "verified as the audit did; run the audit again"
        )
