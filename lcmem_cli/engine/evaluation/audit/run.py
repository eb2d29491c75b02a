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
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.embedding import allocate_features
from lcmem_cli.engine.detectors.head import approximate_search
from lcmem_cli.engine.detectors.options import absolute_name
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.distributed import Ranks, available_cpus
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.audit.detector import adapt_detector
from lcmem_cli.engine.evaluation.audit.files import refuse_other_audit, write_audit
from lcmem_cli.engine.evaluation.audit.null import (
    Null,
    check_gate,
    check_size,
    held_out_null,
    leave_one_out_null,
    same_picture,
    search,
    smallest_rate,
    split_null,
)
from lcmem_cli.engine.evaluation.audit.result import (
    AuditResult,
    CopiedImage,
    FlagRule,
    Match,
    NullKind,
    NullSummary,
    Times,
    counted,
    fewest_flagged,
    meaning_of_rate,
    statement,
    verdict,
    what_it_shows,
)
from lcmem_cli.engine.evaluation.audit.sets import ImageSet, embed_set, list_set
from lcmem_cli.engine.evaluation.calibration import (
    benjamini_hochberg,
    clopper_pearson,
    conformal_p_values,
    conformal_threshold,
)
from lcmem_cli.engine.evaluation.set_metrics import (
    SMALL_RATIO,
    Scores,
    SetMetrics,
    Spread,
    authentic_percentage,
    copying_statistic,
    linear_scale,
    neighbour_ratios,
    num_cells,
    score_distances,
)
from lcmem_cli.engine.files import folder_lock
from lcmem_cli.engine.report.html import Distribution
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import check_unreadable
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.index import Index
from lcmem_cli.engine.store.search import TopK

MOST_COPIED = 12
_NEARER = 3.0
"""``C_T`` above which the real images are nearer to the training set by more than chance."""
_MOSTLY = 0.5
"""Share of generated images below all real ones from which the two are of different kinds."""
DEFAULT_DETECTOR = "joint"
_CONVERTED_ROWS = 4096

Source = str | Path | Index


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """Best matches of every distinct generated content.

    Attributes:
        rows: ``[d, k]`` rows of the training set; an identical image comes first.
        scores: ``[d, k]``.
        best: ``[d]`` highest score.
        exact: ``[d]`` whether the first match is an identical image.
        recall: of the search, see ``TopK``.
    """

    rows: NDArray[np.int64]
    scores: Scores
    best: Scores
    exact: NDArray[np.bool_]
    recall: float


def audit(
    generated: Source,
    against: Source,
    *,
    held_out: Source | None = None,
    basedir: str | Path | None = None,
    null: Literal["split", "leave-one-out"] | None = None,
    fpr: float = 0.01,
    bh: bool = False,
    detector: str | Detector | None = None,
    input_size: int | None = None,
    approximate: bool = False,
    adapt: bool | None = None,
    top_k: int = 5,
    fail_over: float | None = None,
    max_unreadable: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = -1,
    cache: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> AuditResult:
    """Find generated images that match a training image more closely than real images do.

    Unless ``cache`` is off, features go to the user's cache as they are computed
    (``LCMEM_CACHE``), so a killed audit continues, and the next audit against the same training
    set embeds only what is new.

    Args:
        generated: folder, filelist or index of generated images.
        against: the generator's training set.
        held_out: real images like the training set's that the generator never saw.
        basedir: folder that the paths of filelists are relative to (default: each filelist's).
        null: what takes their place where there are none: ``"leave-one-out"`` (the default;
            searches the whole training set, rate approximate) or ``"split"`` (rate exact, but
            some training images are not searched). See ``audit_null``.
        fpr: chance of flagging an image that copies nothing, in (0, 1); with ``bh`` the share of
            false ones among the flagged.
        bh: control the false-discovery rate (Benjamini-Hochberg) instead of the rate per image.
        detector: name, or a loaded detector; ``None``: that of an index among the sets, else
            ``lcmem`` where the search is approximate, else ``joint``.
        input_size: side in pixels for the pixel measures (default: 512); the others bring their
            own, and refuse another.
        approximate: find candidates with faiss's inverted file and score them exactly: faster on
            millions of training images, but a match can be missed; the recall is measured on a
            sample and stated. LCMem detectors only.
        adapt: fit the detector to the kind of the training images first, without their identities
            (``detectors.adapted``), so that what they all share does not count as likeness;
            ``None``: where the detector can be and there are enough images, but not with the
            leave-one-out null, whose rate would not hold.
        top_k: matches to list per generated image.
        fail_over: share of flagged images over which ``result.gate_failed`` is true.
        max_unreadable: unreadable images, over all sets, to tolerate; ``None``: any number.
        seed: of the split, the leave-one-out sample and the cells of ``C_T``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        batch_size: images per network call.
        workers: decoding workers; -1: from the CPUs.
        cache: keep features in the user's cache.
        output: folder for ``audit.json``, ``matches.csv``, ``matches.parquet`` and
            ``report.html``.
        overwrite: replace another audit in ``output``.
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
    _check_arguments(fpr, null, held_out, top_k, fail_over, adapt)
    clock, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    sources = {"generated": generated, "training": against, "held-out": held_out}
    base = None if basedir is None else Path(basedir)
    listings = {
        what: list_set(source, what=what, basedir=base, max_missing=max_unreadable)
        for what, source in sources.items()
        if source is not None
    }
    if base is not None and not any(Path(part.source).is_file() for part in listings.values()):
        raise InputError("--basedir has no effect: none of the sets is a filelist; leave it out")
    kind: NullKind = "held-out" if held_out is not None else null or "leave-one-out"
    real = listings["held-out" if kind == "held-out" else "training"]
    most = len(real.records) // 2 if kind == "split" else len(real.records)
    check_size(most, fpr, kind=kind, source=real.source)
    compute = Compute.start(
        device=device,
        batch_size=batch_size,
        workers=workers,
        reporter=reporter,
        cache=FeatureCaches.of_user() if cache else None,
    )
    ranks, reporter = compute.ranks, compute.reporter
    if detector is None:
        indexes = [part.index for part in listings.values() if part.index is not None]
        usual = "lcmem" if approximate else DEFAULT_DETECTOR
        detector = indexes[0].detector if indexes else usual
    if isinstance(detector, str):
        detector = load_detector(detector, device=device, input_size=input_size or 512)
    if input_size is not None and detector.input_size != input_size:
        raise InputError(
            f"--input-size {input_size} has no effect: detector {detector.name} takes images of "
            f"{detector.input_size} px; leave it out"
        )
    if adapt and not detector.is_adaptable:
        detector.adapted(np.zeros((0, detector.num_features)), [])  # says why
    if approximate:
        detector = approximate_search(detector)
    for listing in listings.values():
        if listing.index is not None:
            listing.index.check(detector.fingerprint)
    folder = None if output is None else Path(output)
    asked = {
        **{what: str(Path(listing.source).absolute()) for what, listing in listings.items()},
        "basedir": None if base is None else str(base.absolute()),
        "null": kind,
        "fpr": fpr,
        "bh": bh,
        "detector": absolute_name(detector.name),
        "input_size": detector.input_size,
        "adapt": adapt,
        "approximate": approximate,
        "seed": seed,
    }
    with contextlib.ExitStack() as stack:
        if folder is not None and ranks.is_main:
            stack.enter_context(folder_lock(folder))
            if not overwrite:
                refuse_other_audit(folder, asked)
        sets = {what: embed_set(listing, detector, compute) for what, listing in listings.items()}
        check_unreadable(
            [item for part in sets.values() for item in part.summary.unreadable], max_unreadable
        )
        study = _Study(
            detector=detector,
            queries=sets["generated"],
            training=sets["training"],
            held_out=sets.get("held-out"),
            ranks=ranks,
            rate=fpr,
            seed=seed,
            approximate=approximate,
        )
        if adapt or (adapt is None and kind != "leave-one-out" and detector.is_adaptable):
            try:
                study = study.adapted(kind)
            except NotAdaptableError:
                if adapt:
                    raise
        real_images = study.null(kind)
        study.check_adaptation(real_images)
        check_size(
            len(real_images.rows),
            fpr,
            kind=kind,
            source=real.source,
            num_removed=len(real_images.removed),
        )
        found = study.best_matches(real_images.bank, max(2, top_k))
        if bh and fail_over is not None:
            check_gate(
                fail_over,
                fpr,
                num_queries=len(study.queries.rows),
                num_exact=int(found.exact[study.queries.rows].sum()),
                num_null=len(real_images.rows),
            )
        result = study.conclude(
            real_images, found, bh=bh, top_k=top_k, fail_over=fail_over, started=started
        )
        for warning in result.warnings:
            reporter.warn(warning)
        seconds = round(time.monotonic() - clock, 3)
        result = dataclasses.replace(
            result, times=Times(started=started.isoformat(timespec="seconds"), seconds=seconds)
        )
        if folder is not None and ranks.is_main:
            write_audit(
                folder,
                result,
                generated_files=study.queries.file_of,
                training_files=study.training.file_of,
                distribution=study.distribution(real_images, found, result.rule),
                settings={
                    **asked,
                    "top_k": top_k,
                    "fail_over": fail_over,
                    "cache": cache,
                    "fingerprint": study.detector.fingerprint,
                    "adapted_to": study.adapted_to,
                },
                workers=workers,
                reporter=reporter,
            )
        ranks.barrier()
    return result


def _check_arguments(
    rate: float,
    null: str | None,
    held_out: Source | None,
    top_k: int,
    fail_over: float | None,
    adapt: bool | None,
) -> None:
    if not 0 < rate < 1:
        raise InputError(f"--fpr must lie in (0, 1), not {rate:g}; for example 0.01")
    if null is not None and null not in ("split", "leave-one-out"):
        raise InputError(f"--null must be split or leave-one-out, not '{null}'")
    if null is not None and held_out is not None:
        raise InputError("--null has no effect with --held-out: leave one of the two out")
    if adapt and held_out is None and null != "split":
        raise NotAdaptableError(
            "--adapt does not go with the leave-one-out null, whose images would be adapted to and "
            "those of the generated set not; give --held-out, or --null split"
        )
    if top_k < 1:
        raise InputError(f"--top-k must be at least 1, not {top_k}")
    if fail_over is not None and not 0 <= fail_over < 1:
        raise InputError(f"--fail-over is a share of the images, in [0, 1), not {fail_over:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study:
    """What one audit works with."""

    detector: Detector
    queries: ImageSet
    training: ImageSet
    held_out: ImageSet | None
    ranks: Ranks
    rate: float
    seed: int
    approximate: bool
    adapted_to: int | None = None

    def adapted(self, kind: NullKind) -> _Study:
        """Return the study with its detector adapted to the images that will be searched.

        Raises:
            NotAdaptableError: the detector cannot be adapted to them.
        """
        detector, convert, num_images = adapt_detector(
            self.detector, self.training, null=kind, rate=self.rate, seed=self.seed
        )

        def converted(images: ImageSet) -> ImageSet:
            features = allocate_features(images.features.shape, np.float32)
            for start in range(0, len(features), _CONVERTED_ROWS):
                part = slice(start, start + _CONVERTED_ROWS)
                features[part] = convert(images.features[part])
            return dataclasses.replace(images, features=features)

        return dataclasses.replace(
            self,
            detector=detector,
            queries=converted(self.queries),
            training=converted(self.training),
            held_out=None if self.held_out is None else converted(self.held_out),
            adapted_to=num_images,
        )

    def check_adaptation(self, null: Null) -> None:
        """Refuse a null of images that the detector was adapted to, for which no rate holds.

        Raises:
            InputError: there are such images.
        """
        used = [row for row in null.rows if null.images.hashes[row] in self.detector.adapted_to]
        if used:
            raise InputError(
                f"{self.detector.name} was adapted to {len(used):,} of the {len(null.rows):,} real "
                "images that the generated ones are compared with, "
                f"{null.images.name_of(used[0])!r} first, so that no rate holds; give other images "
                "with --held-out, or a detector that is not adapted"
            )

    def null(self, kind: NullKind) -> Null:
        """Return the real images that generated ones are compared with."""
        if kind == "held-out":
            assert self.held_out is not None
            return held_out_null(
                self.detector, self.training, self.held_out, self.queries, self.ranks
            )
        if kind == "split":
            return split_null(
                self.detector, self.training, rate=self.rate, seed=self.seed, ranks=self.ranks
            )
        return leave_one_out_null(self.detector, self.training, seed=self.seed, ranks=self.ranks)

    def best_matches(self, bank: NDArray[np.int64], k: int) -> _Found:
        """Search every distinct generated content; an identical training image is put first."""
        top = self._search(self.queries.features, bank, k)
        rows, scores = bank[top.rows], top.scores.copy()
        best = scores[:, 0].copy()
        known = {digest: row for row, digest in enumerate(self.training.hashes)}
        exact = np.zeros(len(rows), dtype=np.bool_)
        for query, digest in enumerate(self.queries.hashes):
            row = known.get(digest)
            if row is None:
                continue
            exact[query] = True
            place = np.flatnonzero(rows[query] == row)
            last = int(place[0]) if len(place) else rows.shape[1] - 1
            score = self.detector.score_features(
                self.queries.features[query : query + 1], self.training.features[row : row + 1]
            )
            rows[query] = np.concatenate([[row], np.delete(rows[query], last)])
            scores[query] = np.concatenate([score, np.delete(scores[query], last)])
        return _Found(rows=rows, scores=scores, best=best, exact=exact, recall=top.recall)

    def distribution(self, null: Null, found: _Found, rule: FlagRule) -> Distribution:
        """Return the scores to draw."""
        threshold = None
        if rule.threshold is not None:
            threshold = float(self._linear(np.array([rule.threshold]))[0])
        return Distribution(
            generated=self._linear(found.best[self.queries.rows]),
            null=self._linear(null.scores[:, 0]),
            threshold=threshold,
            as_logit=self.detector.gives_probability,
        )

    def conclude(
        self,
        null: Null,
        found: _Found,
        *,
        bh: bool,
        top_k: int,
        fail_over: float | None,
        started: datetime.datetime,
    ) -> AuditResult:
        """Flag, count, and put the finding into words."""
        queries, training = self.queries, self.training
        null_scores = null.scores[:, 0]
        rule = self._rule(found.best[queries.rows], null_scores, bh)
        over = np.zeros(found.scores.shape, dtype=np.bool_)
        if rule.threshold is not None:
            over = found.scores > rule.threshold
        flagged = found.exact | over.any(axis=1)
        over[:, 0] = flagged  # an identical image stands first and is flagged whatever its score
        resaved = self._resaved(found, flagged)
        image_flags = flagged[queries.rows]
        num_flagged, num_queries = int(image_flags.sum()), len(image_flags)
        num_exact = int(found.exact[queries.rows].sum())
        num_resaved = int(resaved[queries.rows].sum())
        exposed = Counter(int(found.rows[row, 0]) for row in queries.rows[image_flags])
        interval = clopper_pearson(num_flagged, num_queries)
        summary = self._null_summary(null, rule)
        metrics = self._set_metrics(null, found)
        copying = None if metrics.copying is None else metrics.copying.value
        lowest = found.scores[flagged, 0].min(initial=np.inf)
        shows, does_not_show = what_it_shows(
            summary,
            approximate=self.approximate,
            adapted_to=self.adapted_to,
            num_below=int((null_scores < lowest).sum()) if num_flagged else None,
            may_share_identities=self.held_out is not None and not self._knows_both_identities(),
        )
        return AuditResult(
            statement=statement(
                num_flagged, num_queries, rule, null.kind, interval, len(null.rows)
            ),
            verdict=verdict(
                num_flagged,
                rule,
                num_exact=num_exact,
                num_resaved=num_resaved,
                num_queries=num_queries,
                num_null=len(null.rows),
            ),
            shows=shows,
            does_not_show=does_not_show,
            warnings=tuple(self._warnings(null, summary, rule, found, copying)),
            detector=self.detector.name,
            fingerprint=self.detector.fingerprint,
            adapted_to=self.adapted_to,
            rule=rule,
            null=summary,
            num_queries=num_queries,
            num_flagged=num_flagged,
            share_flagged=num_flagged / num_queries,
            confidence_interval=interval,
            expected_by_chance=None if bh else self.rate * num_queries,
            num_exact_copies=num_exact,
            num_resaved_copies=num_resaved,
            num_exposed_images=len(exposed),
            num_exposed_identities=(
                None
                if training.summary.num_identities is None
                else len({training.identity_of(row) for row in exposed})
            ),
            fail_over=fail_over,
            generated=queries.summary,
            training=training.summary,
            held_out=None if self.held_out is None else self.held_out.summary,
            metrics=metrics,
            most_copied=tuple(
                CopiedImage(path=training.name_of(row), id=training.id_of(row), count=count)
                for row, count in sorted(
                    exposed.items(), key=lambda item: (-item[1], training.first_image[item[0]])
                )[:MOST_COPIED]
            ),
            matches=self._matches(found, over, null_scores, top_k),
            times=Times(started=started.isoformat(timespec="seconds"), seconds=0.0),
        )

    def _resaved(self, found: _Found, flagged: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which flagged images show the picture of their best match, saved anew."""
        resaved = np.zeros(len(flagged), dtype=np.bool_)
        if self.ranks.is_main:
            rows = np.flatnonzero(flagged & ~found.exact)
            matches = found.rows[rows, 0]
            with ThreadPoolExecutor(available_cpus()) as pool:
                resaved[rows] = list(
                    pool.map(
                        same_picture,
                        [self.queries.files[i] for i in self.queries.first_image[rows]],
                        [self.training.files[i] for i in self.training.first_image[matches]],
                    )
                )
        result: NDArray[np.bool_] = self.ranks.broadcast(resaved)
        return result

    def _matches(
        self, found: _Found, over: NDArray[np.bool_], null_scores: Scores, top_k: int
    ) -> tuple[Match, ...]:
        shape = found.scores.shape
        p_values = conformal_p_values(found.scores.ravel(), null_scores).reshape(shape)
        return tuple(
            Match(
                query=self.queries.names[image],
                rank=rank + 1,
                match=self.training.name_of(found.rows[row, rank]),
                match_id=self.training.id_of(found.rows[row, rank]),
                score=float(found.scores[row, rank]),
                p_value=float(p_values[row, rank]),
                flagged=bool(over[row, rank]),
                exact=bool(found.exact[row]) and rank == 0,
            )
            for image, row in enumerate(self.queries.rows)
            for rank in range(min(top_k, shape[1]))
        )

    def _rule(self, best: Scores, null_scores: Scores, bh: bool) -> FlagRule:
        if not bh:
            threshold = conformal_threshold(null_scores, self.rate)
            return FlagRule(kind="fpr", rate=self.rate, threshold=threshold)
        p_values = conformal_p_values(best, null_scores)
        flagged = benjamini_hochberg(p_values, self.rate)
        if not flagged.any():
            return FlagRule(kind="fdr", rate=self.rate, threshold=None)
        threshold = conformal_threshold(null_scores, float(p_values[flagged].max()))
        return FlagRule(kind="fdr", rate=self.rate, threshold=threshold)

    def _set_metrics(self, null: Null, found: _Found) -> SetMetrics:
        rows = self.queries.rows
        best, null_best = found.best[rows], null.scores[:, 0]
        null_features = null.images.features_of(null.rows)
        auth = null_auth = copying = None
        if len(null.bank) >= 2:
            auth = authentic_percentage(best, self._neighbours(null.bank, found.rows[rows, 0]))
        if null.kind != "leave-one-out":
            if len(null.bank) >= 2:
                neighbours = self._neighbours(null.bank, null.matches)
                null_auth = authentic_percentage(null_best, neighbours)
            landmarks = self._landmarks(null.bank, num_cells(len(best), len(null_best)))
            cells = self._search(self.queries.features, landmarks, 1).rows[rows, 0]
            null_cells = self._search(null_features, landmarks, 1).rows[:, 0]
            copying = copying_statistic(best, null_best, cells, null_cells)
        ordered = np.sort(found.scores, axis=1)[:, ::-1]
        ratios = self._ratios(self.queries.features, ordered)
        null_ratios = self._ratios(null_features, null.scores)
        per_image = ratios[rows] if len(ratios) else ratios
        return SetMetrics(
            generated_scores=Spread.of(best),
            null_scores=Spread.of(null_best),
            auth_pct=auth,
            null_auth_pct=null_auth,
            copying=copying,
            generated_ratio=Spread.of(per_image),
            null_ratio=Spread.of(null_ratios),
            share_small_ratio=float(np.mean(per_image < SMALL_RATIO)) if len(per_image) else None,
        )

    def _search(self, queries: FloatArray, bank: NDArray[np.int64], k: int) -> TopK:
        """Search rows of the training set; result rows count within ``bank``."""
        return search(self.detector, queries, self.training.features_of(bank), k, self.ranks)

    def _landmarks(self, bank: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Draw training images; the most alike of them is an image's cell for ``C_T``."""
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(bank, min(count, len(bank)), replace=False))

    def _neighbours(self, bank: NDArray[np.int64], rows: NDArray[np.int64]) -> Scores:
        """Return the score of training rows with their nearest other row of the bank."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        top = self._search(self.training.features_of(distinct), bank, 2)
        itself = bank[top.rows[:, 0]] == distinct
        scores: Scores = np.where(itself, top.scores[:, 1], top.scores[:, 0])
        return scores[inverse]

    def _ratios(self, features: FloatArray, scores: Scores) -> Scores:
        """Return first-to-second-neighbour ratios ``[n]``; none without two distances."""
        unknown = scores.shape[1] < 2 or np.isnan(scores[:, 1]).any()
        if unknown or not self.detector.measures_distance:
            return np.zeros(0)
        identical = self._linear(self.detector.score_features(features, features))
        distances = score_distances(self._linear(scores[:, :2]), identical[:, None])
        return neighbour_ratios(distances[:, 0], distances[:, 1])

    def _linear(self, scores: Scores) -> Scores:
        return linear_scale(scores) if self.detector.gives_probability else scores

    def _knows_both_identities(self) -> bool:
        return self.held_out is not None and self.held_out.labelled and self.training.labelled

    def _null_summary(self, null: Null, rule: FlagRule) -> NullSummary:
        not_searched = self.training.num_distinct - len(null.bank)
        shared: set[str] = set()
        if self._knows_both_identities():
            assert self.held_out is not None
            both = set(self.held_out.identities) & set(self.training.identities)
            shared = {" ".join(filter(None, key)) for key in both}
        return NullSummary(
            kind=null.kind,
            num_scores=len(null.rows),
            smallest_rate=smallest_rate(len(null.rows)),
            num_not_searched=not_searched,
            removed=null.removed,
            shared_identities=tuple(sorted(shared)),
            meaning=meaning_of_rate(null.kind, rule, not_searched),
        )

    def _warnings(
        self,
        null: Null,
        summary: NullSummary,
        rule: FlagRule,
        found: _Found,
        copying: float | None,
    ) -> list[str]:
        """Return what weakens the finding, one sentence each."""
        best = found.best[self.queries.rows]
        return [
            *self._about_the_sets(),
            *self._about_the_search(found.recall),
            *self._about_mixed_up_sets(null, best, copying),
            *self._about_the_null(null, summary, rule),
        ]

    def _about_the_sets(self) -> Iterator[str]:
        for name, images in (
            ("generated", self.queries),
            ("training", self.training),
            ("held-out", self.held_out),
        ):
            if images is None:
                continue
            if images.summary.unreadable:
                number = counted(len(images.summary.unreadable), f"{name} image")
                yield f"{number} could not be read and stood aside."
            if images.summary.num_guessed:
                number = counted(images.summary.num_guessed, f"{name} image")
                yield (
                    f"Of more than 8 bits without a stated range, so its brightness was guessed "
                    f"from its values: {number}."
                )
        repeated = len(self.queries.rows) - self.queries.num_distinct
        if repeated:
            yield (
                f"{repeated:,} of the generated images repeat others; the interval treats them as "
                "independent."
            )

    def _about_the_search(self, recall: float) -> Iterator[str]:
        if self.approximate:
            yield (
                "The search was approximate: on a sample it found the best match of "
                f"{recall:.1%} of the images. A copy whose match was "
                "missed is not flagged."
            )

    def _about_mixed_up_sets(
        self, null: Null, best: Scores, copying: float | None
    ) -> Iterator[str]:
        if self.queries.summary.folder == self.training.summary.folder and set(
            self.queries.names
        ) == set(self.training.names):
            yield "Generated and training set are the same images, so each is found identical."
        if null.num_mixed_up:
            yield (
                f"Among the generated images too, and so taken out of the null: "
                f"{counted(null.num_mixed_up, 'held-out image')}. Were sets mixed up?"
            )
        if null.removed:
            yield (
                f"Also in the training set, and so taken out of the null: "
                f"{counted(len(null.removed), 'real image')}."
            )
        if copying is not None and copying > _NEARER:
            yield (
                "The real images lie nearer to the training set than the generated ones do "
                f"(C_T {copying:+.1f}), so copies may be missed. Were sets mixed up, or do "
                "held-out images show what training images show?"
            )
        below = float(np.mean(best < null.scores[:, 0].min()))
        if below > _MOSTLY:
            yield (
                f"{below:.0%} of the generated images match the training set less closely than any "
                "real image does: they are of another kind than the real images, and then the "
                "rate says little."
            )

    def _about_the_null(self, null: Null, summary: NullSummary, rule: FlagRule) -> Iterator[str]:
        num_queries, num_null = len(self.queries.rows), len(null.rows)
        alone = len(np.unique(self.training.groups)) == self.training.num_distinct
        if null.kind == "leave-one-out" and alone:
            yield (
                "Every training image counts as an identity of its own. Where several show the "
                "same, they match each other closely and copies may be missed: put the images of "
                "each identity into a folder of its own, or give --held-out."
            )
        if summary.shared_identities:
            yield (
                f"{counted(len(summary.shared_identities), 'identity', 'identities')} in both "
                "training and held-out set: images of one match closely without being copied, so "
                "copies may be missed."
            )
        if null.num_identities * 2 <= num_null:
            yield (
                f"The {num_null:,} real images of the null show only {null.num_identities:,} "
                "identities: the rate is less certain than their number suggests."
            )
        needed = fewest_flagged(rule.rate, num_queries, num_null)
        if rule.kind == "fdr" and needed > 1:
            yield (
                f"With {num_null:,} real images Benjamini-Hochberg can only flag {needed:,} or "
                "more images at once, beside identical files; fewer copies go unnoticed. More "
                "held-out images help."
            )
