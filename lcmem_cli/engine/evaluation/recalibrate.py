"""Fitting a checkpoint anew to the user's own data: its thresholds, size and last layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.manifest import Manifest, load_manifest
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.adapted import some_images
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import required_negatives
from lcmem_cli.engine.evaluation.judge import (
    FITTED_RATES,
    ScoredSplit,
    embed_split,
    fit_thresholds,
    judge,
)
from lcmem_cli.engine.files import check_writable
from lcmem_cli.engine.models.checkpoint import SUFFIX, halve, load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.reporter import Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable
from lcmem_cli.engine.training.last_layer import FEWEST_IMAGES, Whitening, adapt


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult(Result):
    """A checkpoint with new thresholds.

    Attributes:
        checkpoint: file that was written.
        fingerprint: its fingerprint.
        num_bytes: its size.
        thresholds: fitted on VAL.
        adapted_thresholds: the same for the network adapted to each data set, see ``recalibrate``.
        test_auc: AUC per data set and overall on TEST, where there is one.
        unreadable: images left out.
    """

    checkpoint: str
    fingerprint: str
    num_bytes: int
    thresholds: tuple[Threshold, ...]
    adapted_thresholds: tuple[Threshold, ...]
    test_auc: dict[str, dict[str, Any]]
    unreadable: tuple[Unreadable, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What a checkpoint is to be fitted to, and how.

    Attributes:
        checkpoint: what to start from, see ``locate_checkpoint``; left as it is.
        filelist: images with identities and splits (one is made where there is none).
        output: file to write.
        basedir: folder that paths start from.
        columns: what the filelist calls its columns.
        half: round the network's weights to float16 first, which halves the file.
        size: side in pixels that images are brought to from now on; ``None`` keeps the trained one.
            Objects look larger in random crops than in whole images, so somewhat more than the
            size of training is often better (Touvron et al. 2019, arXiv 1906.06423).
        adapted: adapt the last layer to the list's TRAIN images first, see ``adapt``. Then a list
            with too few VAL pairs gives a checkpoint without thresholds.
        whitened: fit the last layer to the list's TRAIN images first, see ``Whitening``. Where
            these are of several data sets, the thresholds are for images of yet another kind: each
            data set's pairs are scored with a last layer that was fitted without it. So are further
            thresholds, for which that layer is adapted to the data set's TRAIN images.
        inner_bands: for ``Whitening``.
        seed: for ``Whitening``.
        max_unreadable: unreadable VAL and TEST images to tolerate; ``None``: any number.
    """

    checkpoint: str | Path
    filelist: Path
    output: Path
    basedir: Path | None = None
    columns: ListColumns = STANDARD
    half: bool = False
    size: int | None = None
    adapted: bool = False
    whitened: bool = False
    inner_bands: int | None = None
    seed: int = 0
    max_unreadable: int | None = None

    def check(self) -> None:
        """Refuse, before any work, what cannot be asked for together or written.

        Raises:
            InputError: the same layer is to be fitted in two ways, an option has no effect, or
                ``output`` is no ``.safetensors`` file.
        """
        if self.adapted and self.whitened:
            raise InputError("whitening fits the same layer; leave --adapt out")
        if self.inner_bands is not None and not self.whitened:
            raise InputError("--bands has no effect without --whiten")
        check_writable(self.output, suffix=SUFFIX)


def recalibrate(
    request: CalibrationRequest, compute: Compute = DEFAULT_COMPUTE
) -> CalibrationResult:
    """Fit thresholds for per-pair rates on VAL and write the checkpoint with them.

    Args:
        request: what is fitted to what.
        compute: how the images are embedded.

    Raises:
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        InputError: VAL holds too few pairs for any threshold, or the codec cannot take the size;
            see ``CalibrationRequest.check`` too.
        CheckpointError: the network's weights do not fit another size.
    """
    request.check()
    loaded = load_checkpoint(locate_checkpoint(request.checkpoint))
    if request.size is not None:
        loaded = loaded.at_size(request.size)
    limit = request.max_unreadable
    manifest = load_manifest(
        request.filelist, basedir=request.basedir, columns=request.columns, max_missing=limit
    )
    train = manifest.select("TRAIN")
    if request.adapted:
        loaded = adapt(loaded, train, compute)
    whitening = None
    if request.whitened:
        _check_remainder(manifest)
        whitening = Whitening.of(
            loaded, train, compute, inner_bands=request.inner_bands, seed=request.seed
        )
        loaded = whitening.fitted()
    if request.half:
        loaded = halve(loaded)
    judged = judge(loaded, manifest, compute)
    check_unreadable(judged.unreadable, limit)
    _check_thresholds(
        judged.thresholds, request.filelist, needed=not request.adapted, reporter=compute.reporter
    )
    loaded = dataclasses.replace(loaded, thresholds=judged.thresholds)
    if whitening is not None and len({record.ds_name for record in train.records}) > 1:
        plain, adapted = _strangers_thresholds(whitening, manifest, loaded.fingerprint, compute)
        loaded = dataclasses.replace(loaded, thresholds=plain, adapted_thresholds=adapted)
    saved = save_checkpoint(request.output, loaded)
    return CalibrationResult(
        checkpoint=str(request.output),
        fingerprint=saved.fingerprint,
        num_bytes=request.output.stat().st_size,
        thresholds=saved.thresholds,
        adapted_thresholds=saved.adapted_thresholds,
        test_auc=judged.auc,
        unreadable=judged.unreadable,
    )


def _check_thresholds(
    thresholds: tuple[Threshold, ...], filelist: Path, *, needed: bool, reporter: Reporter
) -> None:
    """Say which thresholds VAL has too few pairs for.

    Raises:
        InputError: there is none, and one is needed.
    """
    if not thresholds:
        lacking = (
            f"{filelist}: VAL has too few pairs for a threshold: it needs identities with two or "
            "more images, and at least 100 pairs of different identities within a data set"
        )
        if needed:
            raise InputError(lacking)
        reporter.warn(lacking)
        return
    fitted = {(threshold.kind, threshold.rate) for threshold in thresholds}
    for kind, rate in FITTED_RATES:
        if kind == "fpr" and (kind, rate) not in fitted:
            reporter.warn(
                f"no threshold fpr{rate:g}: it needs {required_negatives(rate):,} negative VAL "
                f"pairs within data sets, there are {thresholds[0].num_negatives:,}"
            )


def _check_remainder(manifest: Manifest) -> None:
    """Refuse, before any work, a list of which too little is left without one of its data sets."""
    names = [record.ds_name for record in manifest.select("TRAIN").records]
    for name in dict.fromkeys(record.ds_name for record in manifest.select("VAL").records):
        rest = len(names) - names.count(name)
        if 0 < rest < FEWEST_IMAGES:
            raise InputError(
                f"without data set {name} only {rest} TRAIN images are left, too few for a last "
                "layer that its thresholds could be fitted with; list that data set alone, or more "
                "images of the others"
            )


def _own_part(manifest: Manifest, name: str | None) -> Manifest:
    """Return the images of a data set; of those of TRAIN only as many as are adapted to."""
    own = [record for record in manifest.records if record.ds_name == name]
    train = some_images([record for record in own if record.split == "TRAIN"])
    rest = [record for record in own if record.split != "TRAIN"]
    return dataclasses.replace(manifest, records=(*train, *rest))


def _strangers_thresholds(
    whitening: Whitening, manifest: Manifest, fingerprint: str, compute: Compute
) -> tuple[tuple[Threshold, ...], tuple[Threshold, ...]]:
    """Fit thresholds on VAL, each data set scored with a last layer that was fitted without it.

    Among images of a kind that a last layer was not fitted to, all pairs are alike to it: at the
    threshold that 1 % of the negative pairs of known kinds pass, half of theirs may.

    Returns:
        Thresholds for the last layer as it is, and for one that is adapted to the kind of images,
        as it is here to each data set's TRAIN images, where there are enough of them.
    """
    scored, adapted = [], []
    names = dict.fromkeys(record.ds_name for record in manifest.select("VAL").records)
    for name in names:
        detector = LCMemDetector(
            whitening.fitted(without=name),
            name="checkpoint",
            device=resolve_device(compute.device),
        )
        own = _own_part(manifest, name)
        records, features, _ = embed_split(detector, own, "VAL", compute)
        if not records:
            continue
        scored.append(ScoredSplit.of(detector, features, records))
        bank, bank_features, _ = embed_split(detector, own, "TRAIN", compute)
        try:
            kind = detector.adapted(bank_features, [record.path for record in bank])
        except NotAdaptableError as error:
            compute.reporter.event("not_adapted", data_set=name, reason=str(error))
            continue
        adapted.append(ScoredSplit.of(kind.detector, kind.convert(features), records))
    by = ", each scored by a last layer that was fitted without it"
    return (
        fit_thresholds(scored, fingerprint, by=by),
        fit_thresholds(adapted, fingerprint, by=f"{by} and adapted to its TRAIN images"),
    )
