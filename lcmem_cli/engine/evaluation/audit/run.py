"""Does a generated set reproduce its training set?

Each generated image gets the score of its best match over the whole training set. Real images
that cannot have been copied give the scores that such a best match has by itself (the null), and a
conformal threshold on them flags at most a stated share of images that copy nothing. A
false-positive rate per pair would say nothing: over N training images it multiplies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.arrays import UNIT_RANGE, ValueRange
from lcmem_cli.engine.data.folders import FoldersAre
from lcmem_cli.engine.data.manifest import Reading, is_list
from lcmem_cli.engine.data.sources.opened import has_metadata
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.options import absolute_name
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.conclude import conclude, flag
from lcmem_cli.engine.evaluation.audit.detector import choose_detector
from lcmem_cli.engine.evaluation.audit.figures import scores_to_draw
from lcmem_cli.engine.evaluation.audit.files import refuse_other_audit, write_audit
from lcmem_cli.engine.evaluation.audit.gate import gate_rule
from lcmem_cli.engine.evaluation.audit.groups import group, group_names
from lcmem_cli.engine.evaluation.audit.matching import match_sets
from lcmem_cli.engine.evaluation.audit.null import (
    Null,
    check_size,
)
from lcmem_cli.engine.evaluation.audit.request import AuditRequest, AuditSettings
from lcmem_cli.engine.evaluation.audit.result import WORDS, AuditResult, Task
from lcmem_cli.engine.evaluation.audit.search import Found
from lcmem_cli.engine.evaluation.audit.sensitivity import measure_sensitivity
from lcmem_cli.engine.evaluation.audit.sets import (
    Embedded,
    Given,
    Listing,
    Sets,
    as_source,
    embed_set,
    list_set,
)
from lcmem_cli.engine.evaluation.audit.verify import is_to_verify
from lcmem_cli.engine.evaluation.audit.wording import counted
from lcmem_cli.engine.evaluation.calibration import fewest_flagged
from lcmem_cli.engine.files import folder_lock
from lcmem_cli.engine.precision import AskedPrecision
from lcmem_cli.engine.reporter import SILENT, Reporter, Together
from lcmem_cli.engine.results import check_unreadable


# Long by its arguments and what is said of each: the public signature stays flat.
def audit(
    generated: Given,
    against: Given,
    *,
    held_out: Given | None = None,
    basedir: str | Path | None = None,
    columns: ListColumns = STANDARD,
    frames: Literal["first", "all"] = "first",
    folders_are: FoldersAre = "auto",
    null: Literal["split", "leave-one-out"] | None = None,
    fpr: float = 0.01,
    bh: bool = False,
    detector: str | Detector | None = None,
    input_size: int | None = None,
    approximate: bool = False,
    adapt: bool | None = None,
    verify: bool | None = None,
    top_k: int = 5,
    confidence: float | None = None,
    sensitivity: int | None = None,
    group_by: str | None = None,
    fail_on: str | float | None = None,
    max_unreadable: int | None = None,
    seed: int = 0,
    value_range: ValueRange = UNIT_RANGE,
    task: Task = "audit",
    device: str = "auto",
    precision: AskedPrecision | None = None,
    batch_size: int = 32,
    workers: int = -1,
    cache: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    absolute_paths: bool = False,
    reporter: Reporter = SILENT,
) -> AuditResult:
    """Find generated images that match a training image more closely than real images do.

    Unless ``cache`` is off, features go to the user's cache as they are computed
    (``LCMEM_CACHE``), so a killed audit continues, and the next audit against the same training
    set embeds only what is new.

    Args:
        generated: folder, filelist, index or source (``data.sources``) of generated images; or
            images in memory, such as a DataLoader, see ``Detector.embed``. These are named by their
            numbers (``in_memory`` names them otherwise), and held as long as the result.
        against: the generator's training set.
        held_out: real images like the training set's that the generator never saw.
        basedir: folder that the paths of filelists are relative to (default: each filelist's).
        columns: what the filelists call their columns.
        frames: ``all`` takes each image of a file of several, such as the pages of a TIFF, by
            itself, as ``scan.tif#3``.
        folders_are: what subfolders of a folder stand for: ``classes`` makes each image an identity
            of its own, ``auto`` takes them for identities only where they are plainly so.
        null: what takes their place where there are none: ``"leave-one-out"`` (the default;
            searches the whole training set, rate approximate) or ``"split"`` (rate exact, but
            some training images are not searched). See ``audit.null``.
        fpr: chance of flagging an image that copies nothing, in (0, 1); with ``bh`` the share of
            false ones among the flagged.
        bh: control the false-discovery rate (Benjamini-Hochberg) instead of the rate per image.
        detector: name, or a loaded detector; ``None``: that of an index among the sets, else
            ``joint``.
        input_size: side in pixels for the pixel measures (default: 512); the others bring their
            own, and refuse another.
        approximate: find candidates with faiss's inverted file and score them exactly: faster on
            millions of training images, but a match can be missed; the recall is measured on a
            sample and stated. LCMem detectors and ``joint`` only.
        adapt: fit the detector to the kind of the training images first, without their identities
            (``detectors.adapted``), so that what they all share does not count as likeness;
            ``None``: where the detector can be and there are enough images, but not with the
            leave-one-out null, whose rate would not hold.
        verify: align the best candidates of each image, real ones alike, and fuse what that shows
            with the score, so that mirrored, turned, cropped and combined copies are found and the
            edit is named; ``None``: where scores are probabilities and the files can be read.
        top_k: matches to list per generated image.
        confidence: that the rate holds, over draws of the real images, such as 0.95: a higher
            threshold, which takes more of them. ``None``: the rate holds on average.
        sensitivity: altered copies of training images to plant, to see how many of them the audit
            finds; they change nothing else. 0: none; ``None``: as many as take a third of the time
            at most.
        group_by: figures by group of generated images in ``result.grouping``: ``"folder"``, a
            column of the filelist, or a regular expression with a group for their names. See
            ``audit.groups``.
        fail_on: gate, whose end is ``result.gate``: ``"identical"``, ``"altered"``,
            ``"more-than-chance"``, or a share of flagged images in [0, 1) that is too many if it is
            exceeded. See ``audit.gate``.
        max_unreadable: unreadable images, over all sets, to tolerate; ``None``: any number.
        seed: of the split, the leave-one-out sample and the cells of ``C_T``.
        value_range: black and white of floating-point images in memory, such as ``(-1, 1)``.
        task: ``"leaks"`` speaks of a test set in place of generated images, and tells identities
            that stand in both lists.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: what a named detector computes in: ``fp32`` by default; ``auto`` is half
            precision on CUDA. Another than ``fp32`` makes another detector.
        batch_size: images per network call.
        workers: decoding workers; -1: from the CPUs.
        cache: keep features in the user's cache.
        output: folder for ``audit.json``, ``matches.csv``, ``matches.parquet`` and
            ``report.html``.
        overwrite: replace another audit in ``output``.
        absolute_paths: name the sets in its files by absolute paths, not as seen from ``output``.
        reporter: told progress and warnings.

    Raises:
        InputError: an argument is wrong, a set is empty, the null is too small for the rate or the
            gate, or ``output`` holds another audit.
        NotAdaptableError: ``adapt`` is asked for and not possible.
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        FolderBusyError: another process writes to ``output``.

    Example:
        >>> result = audit("generated/", "training/", held_out="held-out/", output="audit/")
        >>> print(result.statement)
    """
    given = Sets(generated=generated, training=against, held_out=held_out)
    with contextlib.ExitStack() as stack:
        sources = given.map(
            lambda what, part: as_source(part, what=what, value_range=value_range, stack=stack)
        )
        request = AuditRequest(
            sources=sources,
            reading=Reading(
                basedir=None if basedir is None else Path(basedir),
                columns=columns,
                frames=frames,
                max_unreadable=max_unreadable,
            ),
            folders_are=folders_are,
            null=null,
            fpr=fpr,
            bh=bh,
            detector=detector,
            input_size=input_size,
            approximate=approximate,
            adapt=adapt,
            verify=verify,
            top_k=top_k,
            confidence=confidence,
            sensitivity=sensitivity,
            fail_on=gate_rule(fail_on),
            seed=seed,
            output=None if output is None else Path(output),
            overwrite=overwrite,
            absolute_paths=absolute_paths,
            group_by=group_by,
            task=task,
        )
        compute = Compute.start(
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            reporter=reporter,
            cache=cache,
        )
        result = carry_out(request, compute)
        weakref.finalize(result, stack.pop_all().close)  # it shows them in notebooks
    return result


def carry_out(request: AuditRequest, compute: Compute) -> AuditResult:
    """Run an audit; see ``audit``.

    Args:
        request: what is asked; its making checked the arguments.
        compute: how it is done.
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    listings = list_sets(request, compute.reporter)
    group_of = None
    if request.group_by is not None:
        group_of = group_names(request.group_by, listings.generated, request.reading.columns)
    detector = choose_detector(request, listings, compute)
    verified = is_to_verify(request, listings, detector, compute)
    if request.fail_on == "altered" and not verified:
        raise InputError(
            "--fail-on altered needs verified candidates, which is not possible here; choose "
            "another gate, or --verify to see why"
        )
    settings = _settings(request, listings, detector, compute, verified)
    with _output_folder(request, settings, compute):
        plain = embed_sets(request, listings, detector, compute)
        matched = match_sets(plain, request, verified=verified)
        conditions, embedded, null, found, by_picture = matched
        _check_gate(request, embedded, null, found)
        found, flags = flag(embedded, null, found, request)
        sensitivity = measure_sensitivity(
            request, plain.detector, embedded, null, found, flags.rule, by_picture
        )
        result = conclude(request, embedded, null, found, flags, conditions, sensitivity, started)
        if request.group_by is not None and group_of is not None:
            grouping = group(request.group_by, group_of, result, null, request)
            result = dataclasses.replace(result, grouping=grouping)
        for warning in result.warnings:
            compute.reporter.warn(warning)
        if request.output is not None and compute.ranks.is_main:
            write_audit(
                request.output,
                result,
                settings.of(result),
                embedded=embedded,
                distribution=scores_to_draw(embedded, null, found, result.rule.threshold),
                absolute_paths=request.absolute_paths,
            )
        compute.ranks.barrier()  # none goes on before the files are there
    return result


def list_sets(request: AuditRequest, reporter: Reporter) -> Sets[Listing]:
    """List the sets, and see whether there are real images enough before one is opened.

    Raises:
        InputError: a set is empty, ``basedir`` or ``columns`` has no effect, or the null is too
            small.
    """
    reading, kind = request.reading, request.null_kind
    listings = request.sources.map(
        lambda what, source: list_set(
            source,
            what=WORDS[request.task] if what == "generated" else what,
            reading=reading,
            folders_are=request.folders_are,
            reporter=reporter,
        )
    )
    sources = [Path(part.source) for _, part in listings.named()]
    if not any(map(is_list, sources)):
        told = any(map(has_metadata, sources))
        for option, is_given in (
            ("--basedir", reading.basedir is not None),
            ("--path-column and the like", reading.columns != STANDARD and not told),
        ):
            if is_given:
                raise InputError(
                    f"{option} has no effect: none of the sets is a filelist; leave it out"
                )
    real = listings.held_out or listings.training
    sizes = sorted(Counter(record.identity for record in real.records).values())
    most = len(sizes)
    if kind == "split":  # at most half of the images are split off, whole identities of them
        most = sum(total <= sum(sizes) // 2 for total in itertools.accumulate(sizes))
    check_size(most, request, source=real.source)
    return listings


def embed_sets(
    request: AuditRequest, listings: Sets[Listing], detector: Detector, compute: Compute
) -> Embedded:
    """Embed the sets.

    Raises:
        InputError: not one image of a set can be read.
        UnreadableLimitError: more images than allowed cannot be.
    """
    share = compute.ranks.share
    listed = [listing.files for _, listing in listings.named() if listing.index is None]
    count = sum(len(share(range(len(files)))) for files in listed)
    with compute.reporter.task(f"embedding ({detector.name})", count, unit="image") as whole:
        told = Together(compute.reporter, whole)
        at_once = dataclasses.replace(compute, reporter=told)
        sets = listings.map(lambda _, listing: embed_set(listing, detector, at_once))
    unreadable = [item for _, images in sets.named() for item in images.summary.unreadable]
    check_unreadable(unreadable, request.reading.max_unreadable)
    return Embedded(detector=detector, sets=sets, compute=compute)


@contextlib.contextmanager
def _output_folder(
    request: AuditRequest, settings: AuditSettings, compute: Compute
) -> Iterator[None]:
    """Hold the output folder, if there is one, after a look at what it holds."""
    if request.output is None or not compute.ranks.is_main:
        yield
        return
    with folder_lock(request.output):
        if not request.overwrite:
            refuse_other_audit(request.output, settings)
        yield


def _settings(
    request: AuditRequest,
    listings: Sets[Listing],
    detector: Detector,
    compute: Compute,
    verified: bool,
) -> AuditSettings:
    paths = listings.map(lambda _, listing: str(Path(listing.source).resolve()))
    basedir = request.reading.basedir
    resolved = {
        **vars(request.reading),
        **vars(paths),
        "basedir": None if basedir is None else str(basedir.resolve()),
        "null": request.null_kind,
        "detector": absolute_name(detector.name),
        "input_size": detector.input_size,
        "verify": verified,
        "cache": compute.cache is not None,
        "fingerprint": detector.fingerprint,
    }
    return AuditSettings.model_validate(vars(request) | resolved)


def _check_gate(request: AuditRequest, embedded: Embedded, null: Null, found: Found) -> None:
    """Refuse a gate that Benjamini-Hochberg cannot fail where the rate per image could.

    Raises:
        InputError: so few flagged images as would fail the gate cannot be flagged.
    """
    if not request.bh or request.fail_on in (None, "identical"):
        return
    rows, num_null = embedded.sets.generated.rows, len(null.rows)
    allowed = request.fail_on if isinstance(request.fail_on, float) else 0.0
    fails_at = math.floor(allowed * len(rows) + 1e-9) + 1
    fewest = fewest_flagged(request.fpr, len(rows), num_null)
    if found.exact[rows].sum() < fails_at < fewest:  # identical files are flagged whatever the null
        needed = math.ceil(len(rows) / (request.fpr * fails_at) - 1e-9) - 1
        raise InputError(
            f"--fail-on {request.fail_on} is to fail at {counted(fails_at, 'flagged image')},"
            f" but with {counted(num_null, 'real image')} --bh can only flag {fewest:,} or more at "
            f"once beside identical files; give {needed:,} held-out images, or leave --bh out"
        )
