"""Scoring pairs of image files: one pair, or a table of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.looks import same_blank
from lcmem_cli.engine.data.remarks import BLANK, PAGE, no_remarks
from lcmem_cli.engine.data.tables import read_pairs
from lcmem_cli.engine.detectors.base import Detector, score_listed
from lcmem_cli.engine.detectors.embedding import EmbeddedFiles, embed_files
from lcmem_cli.engine.detectors.options import join_name
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError, nearest
from lcmem_cli.engine.evaluation.audit.detector import AuditThreshold, detector_of
from lcmem_cli.engine.evaluation.forms import compare_other_forms
from lcmem_cli.engine.files import atomic_path, check_writable
from lcmem_cli.engine.report.panels import difference, laid_over, outlined
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable
from lcmem_cli.engine.verification.bank import FeatureBank, read_bank
from lcmem_cli.engine.verification.evidence import Evidence
from lcmem_cli.engine.verification.verify import fuse
from lcmem_cli.engine.verification.verify import verify as verify_candidates

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIX = ".png"
_PICTURE_SIDE, _GAP = 320, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScore:
    """One scored pair.

    Attributes:
        path_a: first image.
        path_b: second image.
        score: of the detector, by an audit that verified its candidates fused with the evidence;
            ``None`` where an image could not be read.
        match: whether ``score >= threshold``, or both show the same picture; ``None`` where neither
            is known. An image of one colour shows nothing: it matches only another of that colour.
        identical: whether both files are the same, byte for byte.
        form: how they were altered for the score, see ``forms``; ``None``: not at all.
        evidence: what aligning the first image with the second found; ``None`` where nothing was
            found or looked for.
    """

    path_a: str
    path_b: str
    score: float | None
    match: bool | None
    identical: bool
    form: str | None = None
    evidence: Evidence | None = None

    @property
    def same_picture(self) -> bool | None:
        """Whether both show one picture, altered or not; ``None`` where nothing says so."""
        if self.identical:
            return True
        return None if self.evidence is None else self.evidence.same_picture

    @property
    def edit(self) -> str:
        """What was done to the second image to give the first; empty where not known."""
        return self.evidence.text() if self.evidence is not None and self.same_picture else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceResult(Result):
    """Scored pairs.

    Attributes:
        detector: its name.
        fingerprint: its fingerprint.
        verified: whether the images of each pair were aligned.
        pairs: in the order given.
        threshold: what the verdicts were made with, and where it is from.
        num_images_embedded: distinct images.
        unreadable: images that could not be read.
        blank: images of one colour.
    """

    detector: str
    fingerprint: str
    verified: bool
    pairs: tuple[PairScore, ...]
    threshold: Threshold | None
    num_images_embedded: int
    unreadable: tuple[Unreadable, ...]
    blank: tuple[str, ...] = ()

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each pair."""
        return [
            {
                "path_a": pair.path_a,
                "path_b": pair.path_b,
                "score": pair.score,
                "match": pair.match,
                "identical": pair.identical,
                "same_picture": pair.same_picture,
                "edit": pair.edit,
            }
            for pair in self.pairs
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; each pair with its edit in words."""
        values = super().to_dict()
        for written, pair in zip(values["pairs"], self.pairs, strict=True):
            written |= {"same_picture": pair.same_picture, "edit": pair.edit}
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Which detector judges pairs: an audit's, a named one, or else a checkpoint's.

    Attributes:
        audit: output folder of ``audit``, which brings its threshold too.
        detector: name of any detector.
        checkpoint: an lcmem ``.safetensors`` file or hub id; ``None``: the embedded model.
        codec: where the checkpoint's codec is, if it does not hold it.
    """

    audit: Path | None = None
    detector: str | None = None
    checkpoint: str | None = None
    codec: str | None = None

    def load(self, compute: Compute) -> Detector:
        """Load the detector."""
        if self.audit is not None:
            return detector_of(self.audit, compute)
        codec = {"codec": self.codec} if self.codec else {}
        name = self.detector or join_name("lcmem", self.checkpoint or "", codec)
        return load_detector(name, device=compute.device, precision=compute.precision)


def infer(
    pairs: tuple[Path, Path] | Path,
    judge: Judge,
    *,
    threshold: str | None = None,
    verify: bool = True,
    save: Path | None = None,
    max_unreadable: int = 0,
    compute: Compute = DEFAULT_COMPUTE,
) -> InferenceResult:
    """Score two images, or the pairs of a file.

    Args:
        pairs: two images, or a CSV or Parquet file as ``read_pairs`` reads it.
        judge: what scores.
        threshold: see ``score_pairs``.
        verify: see ``score_pairs``.
        save: ``.png`` file for a picture of the first pair, drawn where both images are readable.
        max_unreadable: tolerated unreadable images.
        compute: how the images are embedded.

    Raises:
        InputError: a file cannot be used, or unknown detector or threshold.
        UnreadableLimitError: more unreadable images than tolerated.
    """
    if save is not None:
        check_writable(save, suffix=PICTURE_SUFFIX)
    listed = read_pairs(pairs) if isinstance(pairs, Path) else [pairs]
    result = _score(judge.load(compute), listed, threshold, verify, max_unreadable, compute)
    if save is not None and result.pairs[0].score is not None:
        save_picture(result.pairs[0], save, threshold=result.threshold)
    return result


def score_pairs(
    detector: Detector,
    pairs: Sequence[tuple[Path, Path]],
    *,
    threshold: str | None = None,
    verify: bool = True,
    batch_size: int = 32,
    workers: int = -1,
    max_unreadable: int = 0,
    reporter: Reporter = SILENT,
) -> InferenceResult:
    """Score pairs of files; each distinct file is decoded and embedded once.

    A grey copy of a picture in colour, and a copy in a frame of bars, are compared in a second form
    as well, see ``forms``.

    Args:
        detector: what scores.
        pairs: files; of each the first is taken for an altered copy of the second.
        threshold: name of one of the detector's thresholds (``fpr0.01``); by default its first.
        verify: align both images; a pair that shows the same picture is a match whatever its score.
            The detector of an audit verifies as the audit did, and fuses score and evidence.
        batch_size: images per network call, see ``Batching``; scores change by rounding at most.
        workers: decoding threads.
        max_unreadable: tolerated unreadable images.
        reporter: receives progress.

    Raises:
        InputError: unknown threshold.
        UnreadableLimitError: more unreadable images than tolerated.
    """
    compute = Compute(batch_size=batch_size, workers=workers, reporter=reporter)
    return _score(detector, pairs, threshold, verify, max_unreadable, compute)


def _score(
    detector: Detector,
    pairs: Sequence[tuple[Path, Path]],
    threshold: str | None,
    verified: bool,
    max_unreadable: int,
    compute: Compute,
) -> InferenceResult:
    chosen = choose_threshold(detector, threshold)
    if isinstance(chosen, AuditThreshold):
        verified = chosen.fused  # pairs are judged as the audit judged them
    if threshold is None:
        _warn_of_other_kind(detector, chosen, compute.reporter)
    paths = list(dict.fromkeys(path for pair in pairs for path in pair))
    number = {path: place for place, path in enumerate(paths)}
    embedded = embed_files(detector, paths, compute)
    check_unreadable(embedded.unreadable, max_unreadable)
    files = np.array([[number[a], number[b]] for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    rows = embedded.rows[files]
    scores = score_listed(detector, embedded.features, rows[:, 0], rows[:, 1])
    remarks = no_remarks(len(paths))
    remarks[embedded.rows >= 0] = embedded.remarks[embedded.rows[embedded.rows >= 0]]
    forms = compare_other_forms(
        detector, paths, embedded.content_hashes, files, scores, remarks, compute
    )
    aligned: list[Evidence | None] = [None] * len(pairs)
    if verified:
        aligned, values = _align(paths, embedded, files, compute)
        if isinstance(chosen, AuditThreshold):
            scores = fuse(scores, values)

    def judged(index: int) -> PairScore:
        path_a, path_b = map(str, pairs[index])
        if math.isnan(scores[index]):
            return PairScore(path_a=path_a, path_b=path_b, score=None, match=None, identical=False)
        score, evidence = float(scores[index]), aligned[index]
        colours = remarks[files[index], BLANK].tolist()
        return PairScore(
            path_a=path_a,
            path_b=path_b,
            score=score,
            match=_decide(score, evidence, colours, chosen, detector.fingerprint),
            identical=bool(rows[index, 0] == rows[index, 1]),
            form=forms.get(index),
            evidence=evidence,
        )

    scored = [judged(index) for index in range(len(pairs))]
    if chosen is not None and chosen.num_positives:  # not by an audit
        _warn_of_pages(scored, remarks[files, PAGE].all(axis=1).tolist(), compute.reporter)
    return InferenceResult(
        detector=detector.name,
        fingerprint=detector.fingerprint,
        verified=verified,
        pairs=tuple(scored),
        threshold=chosen,
        num_images_embedded=int((embedded.rows >= 0).sum()),
        unreadable=embedded.unreadable,
        blank=tuple(str(p) for p, b in zip(paths, remarks[:, BLANK], strict=True) if b >= 0),
    )


def _warn_of_other_kind(detector: Detector, chosen: Threshold | None, reporter: Reporter) -> None:
    if chosen is not None and chosen.kind != "fpr":
        reporter.warn(
            f"{detector.name} has no threshold for a false-positive rate; the verdict is by "
            f"{chosen.name}, at which unlike images pass as often as it says below"
        )


def _decide(
    score: float,
    evidence: Evidence | None,
    colours: Sequence[int],
    threshold: Threshold | None,
    fingerprint: str,
) -> bool | None:
    """Return whether a pair matches, ``None`` where nothing says so."""
    if threshold is not None and max(colours) >= 0:
        return same_blank(*colours)
    if evidence is not None and evidence.same_picture:
        return True
    return None if threshold is None else threshold.decide(score, fingerprint)


def _warn_of_pages(
    pairs: Sequence[PairScore], are_pages: Sequence[bool], reporter: Reporter
) -> None:
    """Tell of pages that match by a threshold which was not fitted on such pictures."""
    pages = sum(
        pair.match is True and not pair.same_picture and is_page
        for pair, is_page in zip(pairs, are_pages, strict=True)
    )
    if pages:
        reporter.warn(
            f"{pages:,} match(es) of pages of text or drawings on white: the threshold was not "
            "fitted on pictures of this kind, of which many unlike ones pass it; judge by an audit "
            "of such pictures (--audit), or by a detector adapted to them (lcmem calibrate --adapt)"
        )


def _align(
    files: Sequence[Path], embedded: EmbeddedFiles, pairs: NDArray[np.int64], compute: Compute
) -> tuple[list[Evidence | None], NDArray[np.float64]]:
    """Align the first image of each pair with the second; return evidence and its values."""
    bank = read_bank(files, [str(content) for content in embedded.content_hashes], compute)
    queries = FeatureBank(bank.rows, dict(enumerate(pairs[:, 0].tolist())))
    found = verify_candidates(queries, bank, pairs[:, 1:], compute)
    return [found.evidence(row, 0) for row in range(len(pairs))], found.values[:, 0]


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
    """Draw both images side by side and their difference.

    Where both show one picture, the first is laid over the second, the copied part is outlined, and
    the difference is that after alignment.

    Args:
        pair: a scored pair of readable images.
        target: file of the kind that ``PICTURE_SUFFIX`` says.
        threshold: for the line of text.
    """
    from PIL import Image, ImageDraw

    panels = _panels(pair)
    width = len(panels) * (_PICTURE_SIDE + _GAP) + _GAP
    canvas = Image.new("RGB", (width, _PICTURE_SIDE + 88), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (title, panel) in enumerate(panels):
        left = _GAP + place * (_PICTURE_SIDE + _GAP)
        room = _PICTURE_SIDE - panel.width, _PICTURE_SIDE - panel.height
        canvas.paste(panel, (left + room[0] // 2, 28 + room[1] // 2))
        draw.text((left, 8), _plain(title)[:48], fill="black", font_size=13)
    text = f"score {pair.score:.4f}" if pair.score is not None else "no score"
    if threshold is not None and pair.match is not None:
        text += f"   {verdict_text(pair)}   threshold {threshold.value:.4f} ({threshold.name})"
    draw.text((_GAP, _PICTURE_SIDE + 38), text, fill="black", font_size=15)
    draw.text((_GAP, _PICTURE_SIDE + 62), finding_text(pair), fill="black", font_size=15)
    with atomic_path(target) as temporary:
        canvas.save(temporary, format="PNG")


def _panels(pair: PairScore) -> list[tuple[str, Image.Image]]:
    """Return the pictures of a pair with their titles."""
    from PIL import ImageChops, ImageOps

    first, second = (
        ImageOps.contain(load_image(Path(name), size=_PICTURE_SIDE), (_PICTURE_SIDE, _PICTURE_SIDE))
        for name in (pair.path_a, pair.path_b)
    )
    titles = [Path(name).name for name in (pair.path_a, pair.path_b)]
    evidence = pair.evidence
    if evidence is None or not pair.same_picture:
        absolute = ImageChops.difference(first.resize(second.size), second)
        return [(titles[0], first), (titles[1], second), ("difference", absolute)]
    laid = laid_over(first, second.size, evidence.matrix)
    return [
        (titles[0], first),
        (titles[1], outlined(second, evidence.outline)),
        ("the first laid over the second", laid),
        ("difference after alignment", difference(laid, second, evidence.outline)),
    ]


def finding_text(pair: PairScore) -> str:
    """Return what alignment found, in words; empty where it was not looked for."""
    if pair.identical:
        return "both files are the same, byte for byte"
    if pair.same_picture:
        return f"the same picture: {pair.edit}"
    if pair.evidence is not None and pair.match:
        return "not the same picture: alike by the network alone"
    return "" if pair.evidence is None else "not the same picture"


def verdict_text(pair: PairScore) -> str:
    """Return the verdict in words."""
    if pair.score is None or math.isnan(pair.score):
        return "unreadable"
    return {True: "MATCH", False: "no match", None: "no threshold"}[pair.match]


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).encode("ascii", "replace").decode()
