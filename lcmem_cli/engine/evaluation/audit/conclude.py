"""From best matches to what an audit says: which images are flagged, counted, put into words."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.evaluation.audit import sentences
from lcmem_cli.engine.evaluation.audit.conditions import Conditions
from lcmem_cli.engine.evaluation.audit.contamination import closest_real
from lcmem_cli.engine.evaluation.audit.exposed import exposed_identities, exposed_images
from lcmem_cli.engine.evaluation.audit.figures import measure_sets
from lcmem_cli.engine.evaluation.audit.gate import judge
from lcmem_cli.engine.evaluation.audit.null import (
    Null,
    allowed_of,
    same_pixels,
    smallest_rate,
    threshold_of,
)
from lcmem_cli.engine.evaluation.audit.repeats import count_pictures
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import (
    AuditResult,
    DifferentPictures,
    Finding,
    FlagRule,
    Match,
    NullSummary,
    Sensitivity,
    Tier,
    Times,
)
from lcmem_cli.engine.evaluation.audit.search import Found
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.evaluation.calibration import (
    benjamini_hochberg,
    clopper_pearson,
    conformal_p_values,
    conformal_threshold,
    excess_interval,
    realised_rates,
)
from lcmem_cli.engine.verification.evidence import SAME_PICTURE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Which of the generated contents and their matches are flagged.

    Attributes:
        rule: how that was decided.
        p_values: ``[d, k]`` of each match.
        matches: ``[d, k]`` whether the match is flagged.
        contents: ``[d]`` whether any match is.
        pixels: ``[d]`` whether it is, and has the pixels of its best match in another file.
    """

    rule: FlagRule
    p_values: NDArray[np.float64]
    matches: NDArray[np.bool_]
    contents: NDArray[np.bool_]
    pixels: NDArray[np.bool_]


def flag(
    embedded: Embedded, null: Null, found: Found, request: AuditRequest
) -> tuple[Found, Flags]:
    """Decide what is flagged; of the flagged matches those that evidence supports come first.

    Args:
        embedded: the sets.
        null: real images and their best matches.
        found: best matches of the generated images.
        request: its rate, and how it is held.
    """
    rule = fit_rule(found.best[embedded.sets.generated.rows], null, request)
    found, flags = apply_rule(found, rule, null.scores[:, 0])
    return found, dataclasses.replace(flags, pixels=_same_pixels(embedded, found, flags.contents))


def apply_rule(
    found: Found, rule: FlagRule, null_scores: NDArray[np.float64]
) -> tuple[Found, Flags]:
    """Flag by a rule; of the flagged matches those that evidence supports come first.

    Args:
        found: best matches of some images.
        rule: what is flagged.
        null_scores: ``[m]`` of the best matches of real images.

    Returns:
        The matches in order, and the flags, with no word on pixels.
    """
    found = found.evident_first(rule.threshold)
    matches = found.over(rule.threshold)
    contents = found.exact | matches.any(axis=1)
    matches[:, 0] = contents  # an identical image stands first and is flagged whatever its score
    p_values = conformal_p_values(found.scores.ravel(), null_scores)
    flags = Flags(
        rule=rule,
        p_values=p_values.reshape(found.scores.shape),
        matches=matches,
        contents=contents,
        pixels=np.zeros(len(contents), dtype=np.bool_),
    )
    return found, flags


def fit_rule(best: NDArray[np.float64], null: Null, request: AuditRequest) -> FlagRule:
    """Return what is flagged at the rate that is asked for.

    Args:
        best: ``[n]`` scores of the generated images, which Benjamini-Hochberg looks at.
        null: real images and their best matches.
        request: its rate, and how it is held.
    """
    null_scores, rate = null.scores[:, 0], request.fpr
    if not request.bh:
        threshold = threshold_of(null_scores, null.kind, request)
        return FlagRule(kind="fpr", rate=rate, threshold=threshold, confidence=request.confidence)
    p_values = conformal_p_values(best, null_scores)
    flagged = benjamini_hochberg(p_values, rate)
    if not flagged.any():
        return FlagRule(kind="fdr", rate=rate, threshold=None)
    # What Benjamini-Hochberg flags is what has a p-value up to the largest flagged one; so the
    # threshold of that p-value as a rate per image says the same of single matches.
    threshold = conformal_threshold(null_scores, float(p_values[flagged].max()))
    return FlagRule(kind="fdr", rate=rate, threshold=threshold)


def _same_pixels(embedded: Embedded, found: Found, flagged: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which flagged images have the pixels of their best match in another file."""
    sets, ranks = embedded.sets, embedded.compute.ranks
    same = np.zeros(len(flagged), dtype=np.bool_)
    if ranks.is_main:  # files of an index may be on its machine alone, so all take its word
        rows = np.flatnonzero(flagged & ~found.exact)
        same[rows] = same_pixels(sets.generated, rows, sets.training, found.rows[rows, 0])
    result: NDArray[np.bool_] = ranks.broadcast(same)
    return result


def tier_of(found: Found, flags: Flags, row: int, rank: int) -> Tier | None:
    """Return what is known of one match, if it is flagged."""
    if not flags.matches[row, rank]:
        return None
    if rank == 0 and found.exact[row]:
        return "identical file"
    if rank == 0 and flags.pixels[row]:
        return "same pixels"
    return "same picture, altered" if found.values[row, rank] >= SAME_PICTURE else "alike"


# Long by the fields of the result, of which each has a line.
def conclude(
    request: AuditRequest,
    embedded: Embedded,
    null: Null,
    found: Found,
    flags: Flags,
    conditions: Conditions,
    sensitivity: Sensitivity,
    started: datetime.datetime,
) -> AuditResult:
    """Count, and put the finding into words."""
    sets = embedded.sets
    rows = sets.generated.rows
    image_flags = flags.contents[rows]
    num_flagged, num_queries = int(image_flags.sum()), len(rows)
    matches = _matches(embedded, found, flags, request.top_k)
    flagged = [match for match in matches if match.rank == 1 and match.flagged]
    record_of = {match.match: sets.training.record_named(match.match) for match in flagged}
    flagged_rows = rows[image_flags].tolist()
    tier_by_row = {row: tier_of(found, flags, row, 0) for row in set(flagged_rows)}
    tiers = Counter(tier_by_row[row] for row in flagged_rows)
    verified = found.verification is not None
    copied = np.array([row for row, tier in tier_by_row.items() if tier != "alike"], np.int64)
    pictures = count_pictures(embedded, null, flags.contents, copied)
    images = exposed_images(flagged, record_of)
    are_known = sets.training.summary.num_identities is not None
    identities = exposed_identities(flagged, record_of) if are_known else ()
    null_summary = _null_summary(request, embedded, null, flags.rule)
    finding = Finding(
        detector=embedded.detector.name,
        fingerprint=embedded.detector.fingerprint,
        adapted_to=embedded.adapted_to,
        verified=verified,
        rule=flags.rule,
        null=null_summary,
        num_queries=num_queries,
        num_flagged=num_flagged,
        share_flagged=num_flagged / num_queries,
        confidence_interval=clopper_pearson(num_flagged, num_queries),
        excess_interval=_excess(request, conditions, null_summary, pictures),
        expected_by_chance=None if request.bh else request.fpr * num_queries,
        num_exact_copies=int(found.exact[rows].sum()),
        num_same_pixels=tiers["same pixels"],
        num_altered=tiers["same picture, altered"] if verified else None,
        num_alike=tiers["alike"],
        pictures=pictures,
        num_exposed_images=len(images),
        num_exposed_identities=len(identities) if are_known else None,
        leaked_identities=_names(embedded.shared_with_queries) if request.task == "leaks" else None,
        task=request.task,
        fail_on=request.fail_on,
        generated=sets.generated.summary,
        training=sets.training.summary,
        held_out=None if sets.held_out is None else sets.held_out.summary,
        comparability=conditions.held_out,
        generated_comparability=conditions.generated,
        sensitivity=sensitivity,
        metrics=measure_sets(embedded, null, found, seed=request.seed),
        exposed_images=images,
        exposed_identities=identities,
        matches=matches,
        times=Times.since(started),
    )
    circumstances = _circumstances(request, embedded, null, found, flags)
    return AuditResult(
        **vars(finding),
        statement=sentences.statement(finding),
        verdict=sentences.verdict(finding),
        shows=tuple(sentences.shows(finding, circumstances)),
        does_not_show=tuple(sentences.does_not_show(finding, circumstances)),
        warnings=tuple(sentences.warnings(finding, circumstances)),
        gate=judge(finding),
    )


def _excess(
    request: AuditRequest, conditions: Conditions, null: NullSummary, pictures: DifferentPictures
) -> tuple[float, float] | None:
    """Return the interval of what is flagged beyond chance, where a rate per image holds."""
    if request.bh or (conditions.held_out is not None and conditions.held_out.comparable is False):
        return None
    return excess_interval(
        pictures.num_flagged,
        pictures.num_pictures,
        num_null=null.num_independent,
        allowed=null.independent_allowed,
    )


def _null_summary(
    request: AuditRequest, embedded: Embedded, null: Null, rule: FlagRule
) -> NullSummary:
    training, held_out = embedded.sets.training, embedded.sets.held_out
    not_searched = training.num_distinct - len(null.bank)
    shared: frozenset[tuple[str, str]] = frozenset()
    if held_out is not None and embedded.knows_both_identities:
        shared = held_out.identities & training.identities
    count, in_pairs = len(null.rows), null.kind == "leave-one-out"
    allowed, share = allowed_of(count, null.kind, request), 2 if in_pairs else 1
    return NullSummary(
        kind=null.kind,
        num_scores=count,
        scores=tuple(np.sort(null.scores[:, 0])[::-1].tolist()),
        allowed=allowed,
        num_independent=count / share,
        rates=realised_rates(count / share, allowed / share),
        smallest_rate=smallest_rate(count, in_pairs=in_pairs, confidence=request.confidence),
        num_not_searched=not_searched,
        removed=null.removed,
        closest=closest_real(null, training, request),
        shared_identities=_names(shared) or (),
        meaning=sentences.meaning_of_rate(null.kind, rule, not_searched),
    )


def _names(identities: frozenset[tuple[str, str]] | None) -> tuple[str, ...] | None:
    if identities is None:
        return None
    return tuple(sorted({" ".join(filter(None, key)) for key in identities}))


def _matches(embedded: Embedded, found: Found, flags: Flags, top_k: int) -> tuple[Match, ...]:
    generated, training = embedded.sets.generated, embedded.sets.training
    matches = []
    for record, row in zip(generated.records, generated.rows, strict=True):
        for rank in range(min(top_k, found.rows.shape[1])):
            match = training.record_of(found.rows[row, rank])
            matches.append(
                Match(
                    query=record.path,
                    rank=rank + 1,
                    match=match.path,
                    match_id=match.id,
                    score=float(found.scores[row, rank]),
                    p_value=float(flags.p_values[row, rank]),
                    flagged=bool(flags.matches[row, rank]),
                    exact=bool(found.exact[row]) and rank == 0,
                    tier=tier_of(found, flags, row, rank),
                    evidence=found.evidence(row, rank),
                )
            )
    return tuple(matches)


def _circumstances(
    request: AuditRequest, embedded: Embedded, null: Null, found: Found, flags: Flags
) -> sentences.Circumstances:
    generated, training = embedded.sets.generated, embedded.sets.training
    null_scores = null.scores[:, 0]
    num_below = None
    if flags.contents.any():
        num_below = int((null_scores < found.scores[flags.contents, 0].min()).sum())
    return sentences.Circumstances(
        gives_probability=embedded.detector.gives_probability,
        search_recall=found.recall if request.approximate else None,
        num_below=num_below,
        share_below=float(np.mean(found.best[generated.rows] < null_scores.min())),
        may_share_identities=(
            embedded.sets.held_out is not None and not embedded.knows_both_identities
        ),
        are_same_sets=generated.summary.folder == training.summary.folder
        and generated.file_of.keys() == training.file_of.keys(),
        each_is_an_identity=(
            null.kind == "leave-one-out"
            and len(np.unique(training.groups)) == training.num_distinct
        ),
        num_mixed_up=null.num_mixed_up,
        num_evident=null.num_evident,
    )
