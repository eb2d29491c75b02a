"""What an audit found, as typed values, and the sentences that say it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from lcmem_cli.engine.evaluation.metrics import largest_count
from lcmem_cli.engine.evaluation.set_metrics import SetMetrics
from lcmem_cli.engine.files import jsonable
from lcmem_cli.engine.results import Result, Unreadable

AUDIT_SCHEMA = 1
AUDIT_FORMAT = "lcmem-audit"
_UNLIKELY = 0.025
"""Chance of so many flagged images up to which their number is more than chance."""

NullKind = Literal["held-out", "split", "leave-one-out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSummary:
    """One of the sets that went into an audit.

    Attributes:
        source: as the user named it.
        folder: absolute folder that the paths of its images are relative to.
        num_images: images listed.
        num_distinct: different contents among the readable ones.
        num_identities: different labels; ``None`` where a folder's images have none, each being
            its own identity.
        duplicates: groups of paths with the same content, in order of their first image.
        unreadable: images that could not be used.
        num_guessed: images of more than 8 bits whose range was guessed from their values; ``None``
            where that is not known (an index).
    """

    source: str
    folder: str
    num_images: int
    num_distinct: int
    num_identities: int | None
    duplicates: tuple[tuple[str, ...], ...]
    unreadable: tuple[Unreadable, ...]
    num_guessed: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPicture:
    """An image of the null that is also in the training set, so it was taken out of the null.

    Attributes:
        path: the held-out image.
        match: the training image.
        kind: ``exact``: equal content; ``resaved``: the same picture saved anew.
    """

    path: str
    match: str
    kind: Literal["exact", "resaved"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSummary:
    """The real images that say what a match looks like when nothing was copied.

    Attributes:
        kind: where they come from.
        num_scores: scores in the null.
        smallest_rate: the smallest false-positive rate per image that so many scores allow.
        num_not_searched: training images that were split off and so are not looked for.
        removed: images taken out because their picture is in the training set.
        shared_identities: labels that occur in both sets, where the labels can be compared.
        meaning: what the rate means with this null.
    """

    kind: NullKind
    num_scores: int
    smallest_rate: float
    num_not_searched: int
    removed: tuple[SharedPicture, ...]
    shared_identities: tuple[str, ...]
    meaning: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagRule:
    """How it was decided what to flag.

    Attributes:
        kind: ``fpr``: false positives per image; ``fdr``: false ones among the flagged
            (Benjamini-Hochberg).
        rate: the rate held.
        threshold: a match is flagged when its score EXCEEDS this; ``None`` where Benjamini-Hochberg
            flags nothing.
    """

    kind: Literal["fpr", "fdr"]
    rate: float
    threshold: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """One generated image and one of its best training images.

    Attributes:
        query: path of the generated image, relative to its set's folder.
        rank: from 1.
        match: path of the training image, relative to its set's folder.
        match_id: its identity.
        score: the detector's score of the pair.
        p_value: chance that the best match of an unseen real image scores at least as high.
        flagged: whether the score is over the threshold, or the contents are equal.
        exact: whether the contents are equal.
    """

    query: str
    rank: int
    match: str
    match_id: str
    score: float
    p_value: float
    flagged: bool
    exact: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiedImage:
    """A training image and how many flagged generated images have it as their best match."""

    path: str
    id: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """The only part of a result that differs between two runs."""

    started: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult(Result):
    """Whether a generated set reproduces its training set.

    Attributes:
        statement: the finding in one sentence.
        verdict: how it compares with what chance alone would flag.
        shows: what the finding supports.
        does_not_show: what it does not.
        warnings: what weakens it.
        detector: name of the detector.
        fingerprint: of the detector.
        adapted_to: training images that the detector was adapted to; ``None`` where it was not.
        rule: how images were flagged.
        null: the real images compared with.
        num_queries: readable generated images.
        num_flagged: flagged ones.
        share_flagged: their share.
        confidence_interval: 95 % Clopper-Pearson interval of the share.
        expected_by_chance: images that the rate lets through when nothing is copied; ``None``
            under Benjamini-Hochberg.
        num_exact_copies: generated images that are byte for byte a training image.
        num_resaved_copies: flagged images that show the picture of their best match saved anew, as
            an image of the null is told that is also in the training set; of an index only where
            both files still are what and where they were.
        num_exposed_images: training images that are the best match of a flagged image.
        num_exposed_identities: their identities; ``None`` where those are not known.
        fail_over: share of flagged images over which the gate fails, if one was asked for.
        generated: the generated set.
        training: the training set.
        held_out: the held-out set, if one was given.
        metrics: figures about the whole set.
        most_copied: training images by number of flagged images, most first.
        matches: every readable generated image with its best matches.
        times: when, and how long.
    """

    statement: str
    verdict: str
    shows: tuple[str, ...]
    does_not_show: tuple[str, ...]
    warnings: tuple[str, ...]
    detector: str
    fingerprint: str
    adapted_to: int | None
    rule: FlagRule
    null: NullSummary
    num_queries: int
    num_flagged: int
    share_flagged: float
    confidence_interval: tuple[float, float]
    expected_by_chance: float | None
    num_exact_copies: int
    num_resaved_copies: int
    num_exposed_images: int
    num_exposed_identities: int | None
    fail_over: float | None
    generated: SetSummary
    training: SetSummary
    held_out: SetSummary | None
    metrics: SetMetrics
    most_copied: tuple[CopiedImage, ...]
    matches: tuple[Match, ...]
    times: Times

    @property
    def gate_failed(self) -> bool:
        """Whether more images are flagged than ``fail_over`` allows."""
        return self.fail_over is not None and self.share_flagged > self.fail_over

    @property
    def is_undecided(self) -> bool:
        """Whether nothing is flagged because so small a null could hardly flag anything."""
        return _is_undecided(self.num_flagged, self.num_queries, self.rule, self.null.num_scores)

    @property
    def flagged(self) -> tuple[Match, ...]:
        """The flagged images with their best match, highest score first, exact copies before."""
        found = [match for match in self.matches if match.rank == 1 and match.flagged]
        return tuple(sorted(found, key=lambda match: (not match.exact, -match.score, match.query)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values.

        Of the matches only the flagged images with their best one; ``matches.csv`` has them all.
        """
        rest = dataclasses.replace(self, matches=())
        values: dict[str, Any] = jsonable(dataclasses.asdict(rest))
        times = values.pop("times")
        del values["matches"]
        return {
            "format": AUDIT_FORMAT,
            "schema": AUDIT_SCHEMA,
            **values,
            "gate_failed": self.gate_failed,
            "undecided": self.is_undecided,
            "flagged": [dataclasses.asdict(match) for match in self.flagged],
            "times": times,
        }


def percent(share: float) -> str:
    """Write a share as a percentage: ``0.0123`` is ``1.23 %``."""
    return f"{100 * share:.3g} %"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: ``1 image``, ``2,000 images``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def statement(
    num_flagged: int,
    num_queries: int,
    rule: FlagRule,
    null: NullKind,
    interval: tuple[float, float],
    num_null: int,
) -> str:
    """Return the finding in one sentence."""
    if _is_undecided(num_flagged, num_queries, rule, num_null):
        return (
            f"Undecided: none of {counted(num_queries, 'generated image')} is flagged at a "
            f"false-discovery rate of {percent(rule.rate)}, but single ones could not be with "
            f"{counted(num_null, 'real image')} to compare with."
        )
    verb = "matches" if num_flagged == 1 else "match"
    compared = {
        "held-out": "held-out real images do",
        "split": "real images split off from the training set do",
        "leave-one-out": "real training images match those of other identities",
    }[null]
    rate = (
        f"at a false-positive rate of {percent(rule.rate)} per image"
        if rule.kind == "fpr"
        else f"at a false-discovery rate of {percent(rule.rate)} among the flagged"
    )
    share = percent(num_flagged / num_queries)
    low, high = (percent(bound) for bound in interval)
    return (
        f"{num_flagged:,} of {counted(num_queries, 'generated image')} ({share}; 95 % CI {low} to "
        f"{high}) {verb} a training image more closely than {compared}, {rate}."
    )


def chance_of(count: int, num_queries: int, rate: float, num_null: int) -> float:
    """Return the chance that an audit flags so many images of which none copies anything.

    The threshold is itself an order statistic of the null, so the number flagged is beta-binomial
    (Wilks 1942, doi 10.1214/aoms/1177731537): wider than binomial where the null is small.

    Args:
        count: flagged images or more.
        num_queries: generated images.
        rate: false positives per image.
        num_null: scores of the null.
    """
    from scipy.stats import betabinom

    above = largest_count(rate, num_null + 1)
    return float(betabinom.sf(count - 1, num_queries, above, num_null + 1 - above))


def fewest_flagged(rate: float, num_queries: int, num_null: int) -> int:
    """Return how many images Benjamini-Hochberg flags at least, if any: no p-value is smaller.

    Args:
        rate: false-discovery rate.
        num_queries: generated images.
        num_null: scores of the null.
    """
    return math.ceil(num_queries / (rate * (num_null + 1)) - 1e-9)


def _is_undecided(num_flagged: int, num_queries: int, rule: FlagRule, num_null: int) -> bool:
    fewest = fewest_flagged(rule.rate, num_queries, num_null)
    return rule.kind == "fdr" and not num_flagged and fewest > 1


def verdict(
    num_flagged: int,
    rule: FlagRule,
    *,
    num_exact: int,
    num_resaved: int,
    num_queries: int,
    num_null: int,
) -> str:
    """Return how the finding compares with chance."""
    sentences = []
    num_certain = num_exact + num_resaved
    others = num_flagged - num_certain
    if num_exact:
        copies = counted(num_exact, "generated image is", "generated images are")
        sentences.append(f"{copies} byte for byte a training image.")
    if num_resaved:
        copies = counted(num_resaved, "generated image shows", "generated images show")
        sentences.append(f"{copies} the picture of a training image saved anew.")
    expected = rule.rate * num_queries
    if _is_undecided(num_flagged, num_queries, rule, num_null):
        fewest = fewest_flagged(rule.rate, num_queries, num_null)
        sentences.append(
            f"Nothing is flagged; but with {counted(num_null, 'real image')} Benjamini-Hochberg "
            f"could not have flagged fewer than {fewest:,}."
        )
    elif not num_flagged:
        sentences.append("Nothing is flagged.")
    elif not others:
        pass  # chance makes no identical images
    elif rule.kind == "fdr":
        sentences.append(
            f"Of the flagged images, {percent(rule.rate)} at most are expected to be false."
        )
    elif chance_of(others, num_queries - num_certain, rule.rate, num_null) <= _UNLIKELY:
        sentences.append(f"Chance alone would flag about {expected:.3g}: this is more.")
    else:
        sentences.append(
            f"Chance alone would flag about {expected:.3g}: the number is no evidence of copying; "
            "look at the pairs."
        )
    return " ".join(sentences)


def meaning_of_rate(kind: NullKind, rule: FlagRule, num_not_searched: int) -> str:
    """Return what the stated rate means with a null."""
    real = {
        "held-out": "the held-out ones",
        "split": "the training images split off",
        "leave-one-out": "the training images",
    }[kind]
    rate = percent(rule.rate)
    if rule.kind == "fdr":
        meaning = (
            f"Of the flagged images {rate} at most copy nothing, on average, if images that copy "
            f"nothing are like {real}."
        )
    elif kind == "leave-one-out":
        meaning = f"About {rate} of images that copy nothing are flagged."
    else:
        meaning = (
            f"Of images that are like {real} and copy nothing, {rate} at most are flagged on "
            "average."
        )
    if kind == "split":
        meaning += (
            f" Weaker than with held-out images: {num_not_searched:,} training images were split "
            "off, and copies of them are found only where the file is identical."
        )
    if kind == "leave-one-out":
        meaning += (
            " Weaker than with held-out images: each training image was compared with those of "
            "other identities, so the rate is approximate, and copies are missed where one "
            "identity has several labels."
        )
    return meaning


def what_it_shows(
    null: NullSummary,
    *,
    approximate: bool,
    adapted_to: int | None,
    num_below: int | None,
    may_share_identities: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the finding supports and what it does not, in sentences.

    Args:
        null: the real images.
        approximate: whether the search was.
        adapted_to: training images that the detector was adapted to, if it was.
        num_below: real images that score less than every flagged one; ``None`` if none is flagged.
        may_share_identities: whether held-out images may show whom training images show.
    """
    compared = (
        "with the training images that an approximate search proposed."
        if approximate
        else "with every training image searched, without approximation."
    )
    shows: tuple[str, ...] = (null.meaning,)
    if num_below is not None:
        real = f"{null.num_scores:,} real images"
        others = (
            f"any of {real} is"
            if num_below == null.num_scores
            else f"at least {num_below:,} of {real} are"
        )
        shows += (
            "A flagged image is closer to its training image, as this detector sees them, than "
            f"{others} to any training image.",
        )
    shows += (f"Every generated image was compared {compared}",)
    if adapted_to is not None:
        shows += (
            f"The detector was adapted to {adapted_to:,} of the training images, so what all "
            "images of this kind share does not count as likeness. No other image had a part in "
            "that.",
        )
    does_not: tuple[str, ...] = (
        "That a flagged image was copied: two pictures may be alike for other reasons. Look at "
        "the pairs.",
        "That an image which is not flagged is free of copied content: the detector compares "
        "whole pictures and misses what it was not made to see.",
        "Anything about images that this generator has not made yet, or about other generators.",
    )
    if may_share_identities:
        does_not += (
            "That training and held-out images show different people, patients or objects: only "
            "filelists with ids say. Held-out images of those in the training set match it closely "
            "without being copied, and then copies are missed.",
        )
    return shows, does_not
