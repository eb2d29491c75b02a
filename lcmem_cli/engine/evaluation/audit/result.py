"""What an audit found, as typed values; ``sentences`` puts them into words."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.evaluation.audit.shares import Shares
from lcmem_cli.engine.evaluation.calibration import chance_of, fewest_flagged
from lcmem_cli.engine.evaluation.comparability import Comparability
from lcmem_cli.engine.evaluation.set_metrics import SetMetrics, linear_scale
from lcmem_cli.engine.files import jsonable
from lcmem_cli.engine.report.html import Distribution
from lcmem_cli.engine.results import MAX_REPR, Result, Unreadable, shortened
from lcmem_cli.engine.verification.evidence import Evidence

AUDIT_SCHEMA: Literal[3] = 3
NullKind = Literal["held-out", "split", "leave-one-out"]
Tier = Literal["identical file", "same pixels", "same picture, altered", "alike"]
"""What is known of a flagged image and its match, strongest first.

The same bytes; the same decoded pixels in another file; the same picture, altered, as alignment
shows; or over the threshold and no more: perhaps the same identity in another picture.
"""
TIERS: tuple[Tier, ...] = get_args(Tier)
Task = Literal["audit", "leaks"]
"""What the images are that are looked for: generated ones, or those of a test set."""
WORDS: dict[Task, str] = {"audit": "generated", "leaks": "test"}
"""The same as an adjective."""
GateRule = Literal["identical", "altered", "more-than-chance"] | float
"""What a gate fails on: a tier of copies, more than chance explains, or a share of the images."""
_UNLIKELY = 0.025
"""Chance of so many flagged images up to which their number is more than chance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankImage:
    """An image that shows nothing but one colour, as ``#rrggbb``."""

    path: str
    colour: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSummary:
    """One of the sets that went into an audit.

    Attributes:
        source: as the user named it; an absolute path is written as ``folder`` is.
        folder: absolute folder that the paths of its images are relative to; in ``audit.json`` as
            seen from the folder of the result.
        num_images: images listed.
        num_distinct: different contents among the readable ones.
        num_identities: different labels; ``None`` where a folder's images have none, each being
            its own identity.
        duplicates: groups of paths with the same content, in order of their first image.
        unreadable: images that could not be used.
        num_guessed: images of more than 8 bits whose range was guessed from their values; ``None``
            where that is not known (an index).
        digest: SHA-256 over the contents of the readable images, in any order.
        blank: images that show nothing but one colour; they are counted here and not judged.
        folders_are: what the subfolders of a folder were taken for; ``None`` of others.
    """

    source: FileName
    folder: FileName
    num_images: int
    num_distinct: int
    num_identities: int | None
    duplicates: tuple[tuple[FileName, ...], ...]
    unreadable: tuple[Unreadable, ...]
    num_guessed: int | None
    digest: str
    blank: tuple[BlankImage, ...] = ()
    folders_are: Literal["identities", "classes"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPicture:
    """An image of the null that is also in the training set, so it was taken out of the null.

    Attributes:
        path: the held-out image.
        match: the training image.
        kind: ``exact``: equal content; ``pixels``: equal decoded pixels; ``altered``: the same
            picture, by evidence that different pictures do not reach.
    """

    path: FileName
    match: FileName
    kind: Literal["exact", "pixels", "altered"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealMatch:
    """A real image of the null and its best match.

    Attributes:
        path: the real image.
        match: the training image.
        score: of both.
        may_be_copy: whether evidence takes both for one picture, but not beyond doubt; ``None``
            where candidates were not verified.
        threshold_without: the threshold if the image were not in the null; ``None`` where too few
            would be left, and under Benjamini-Hochberg.
    """

    path: FileName
    match: FileName
    score: FiniteFloat
    may_be_copy: bool | None
    threshold_without: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSummary:
    """The real images that say what a match looks like when nothing was copied.

    Attributes:
        kind: where they come from.
        num_scores: scores in the null.
        scores: of the best match of each of its images, highest first.
        allowed: rank of the threshold among the scores, from the highest.
        num_independent: scores that count as independent of each other. In a leave-one-out null
            two images may be each other's best match, so it is half of them.
        rates: 95 % interval of the rate that such a threshold really reaches.
        smallest_rate: the smallest false-positive rate per image that so many scores allow.
        num_not_searched: training images that were split off and so are not looked for.
        removed: images taken out because their picture is in the training set.
        closest: the ten images that match the training set best, the closest first.
        shared_identities: labels that occur in both sets, where the labels can be compared.
        meaning: what the rate means with this null.
    """

    kind: NullKind
    num_scores: int
    scores: tuple[FiniteFloat, ...]
    allowed: int
    num_independent: float
    rates: tuple[float, float]
    smallest_rate: float
    num_not_searched: int
    removed: tuple[SharedPicture, ...]
    closest: tuple[RealMatch, ...]
    shared_identities: tuple[FileName, ...]
    meaning: str

    @property
    def independent_allowed(self) -> float:
        """The rank of the threshold among the independent scores."""
        return self.allowed * self.num_independent / self.num_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagRule:
    """How it was decided what to flag.

    Attributes:
        kind: ``fpr``: false positives per image; ``fdr``: false ones among the flagged
            (Benjamini-Hochberg).
        rate: the rate held.
        confidence: that it holds, over draws of the null; ``None``: it holds on average.
        threshold: a match is flagged when its score EXCEEDS this; ``None`` where Benjamini-Hochberg
            flags nothing.
    """

    kind: Literal["fpr", "fdr"]
    rate: float
    threshold: float | None
    confidence: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """One generated image and one of its best training images.

    Attributes:
        query: path of the generated image, relative to its set's folder.
        rank: from 1.
        match: path of the training image, relative to its set's folder.
        match_id: its identity.
        score: the detector's score of the pair; where candidates are verified, the larger of it and
            what their evidence is worth, see ``verification.fuse``.
        p_value: chance that the best match of an unseen real image scores at least as high.
        flagged: whether the score is over the threshold, or the contents are equal.
        exact: whether the contents are equal.
        tier: what is known of a flagged pair; ``None`` of others.
        evidence: what aligning both images found; ``None`` where nothing was found or looked for.
    """

    query: FileName
    rank: int
    match: FileName
    match_id: FileName
    score: FiniteFloat
    p_value: FiniteFloat
    flagged: bool
    exact: bool
    tier: Tier | None = None
    evidence: Evidence | None = None

    @property
    def same_picture(self) -> bool | None:
        """Whether both show one picture, altered or not; ``None`` where nothing says so."""
        if self.tier in ("identical file", "same pixels"):
            return True
        return None if self.evidence is None else self.evidence.same_picture

    @property
    def edit(self) -> str:
        """What was done to the training image, in words; empty where that is not known."""
        return self.evidence.text() if self.evidence is not None and self.same_picture else ""

    @property
    def outline(self) -> tuple[tuple[float, float], ...]:
        """Corners of the copied part of the training image; none where that is not known."""
        return self.evidence.outline if self.evidence is not None and self.same_picture else ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "same_picture": self.same_picture, "edit": self.edit}


def certainty(match: Match) -> tuple[int, float, str]:
    """Return the key that sorts flagged images: what is known of them first, then the score."""
    return (
        len(TIERS) if match.tier is None else TIERS.index(match.tier),
        -match.score,
        match.query,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditFound:
    """How many copies altered by one edit the audit finds; see ``Sensitivity``.

    Attributes:
        transform: kind of edit, a key of ``data.perturb.TRANSFORMS``.
        strengths: in its unit, ascending; one or all of them together.
        num_planted: see ``Sensitivity``.
        num_found: see ``Sensitivity``.
        num_traced: see ``Sensitivity``.
        interval: see ``Sensitivity``.
    """

    transform: str
    strengths: tuple[float, ...]
    num_planted: int
    num_found: int
    num_traced: int
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How many altered copies of its own training images an audit finds.

    Attributes:
        num_planted: copies planted.
        num_found: copies that are flagged.
        num_traced: flagged copies whose best match is the image that they were made of.
        interval: 95 % Clopper-Pearson interval of the share found; ``None`` without copies.
        transforms: the same of each kind of edit, what is found least first.
        edits: the same of each kind at each strength.
        reason: why no copies were planted, in words.
    """

    num_planted: int
    num_found: int
    num_traced: int
    interval: tuple[float, float] | None
    transforms: tuple[EditFound, ...]
    edits: tuple[EditFound, ...]
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Sensitivity:
        """Return the value of an audit in which no copies were planted."""
        return cls(
            num_planted=0,
            num_found=0,
            num_traced=0,
            interval=None,
            transforms=(),
            edits=(),
            reason=reason,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exposed:
    """A training image, or an identity, that flagged images match best.

    Attributes:
        kind: which of both.
        name: path of the image, or the identity's id.
        id: the identity.
        ds_name: its data set, if the list names one.
        tier: what is known of its surest match.
        score: of that match.
        p_value: of that match.
        image: training image of that match.
        matches: names of the flagged images, surest first.
    """

    kind: Literal["image", "identity"]
    name: FileName
    id: FileName
    ds_name: str | None
    tier: Tier
    score: FiniteFloat
    p_value: FiniteFloat
    image: FileName
    matches: tuple[FileName, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """How a gate ended.

    Attributes:
        fails_on: what it fails on.
        ended: ``undecided`` where the rate that it counts on does not hold.
        line: the same in one line, for logs.
    """

    fails_on: GateRule
    ended: Literal["passed", "failed", "undecided"]
    line: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnThreshold:
    """A kind of images at the threshold that its own real images give.

    Attributes:
        threshold: at the rate of the audit.
        num_flagged: generated images of the kind over it.
        num_real: real images of the kind in the null.
        num_real_flagged: of these, over the threshold of the whole audit.
    """

    threshold: float
    num_flagged: int
    num_real: int
    num_real_flagged: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Shares):
    """The figures of the generated images of one group.

    Attributes:
        own: of a kind with enough real images of its own.
    """

    own: OwnThreshold | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """The generated images by group.

    Attributes:
        by: what was asked for.
        ordered: whether the names are numbers, such as training steps.
        groups: by number, or else those with most copies first.
        finding: what they say, in one sentence.
    """

    by: str
    ordered: bool
    groups: tuple[Group, ...]
    finding: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """The only part of a result that differs between two runs."""

    started: str
    seconds: float

    @classmethod
    def since(cls, started: datetime.datetime) -> Times:
        """Return the time from a start to now."""
        seconds = (datetime.datetime.now(started.tzinfo) - started).total_seconds()
        return cls(started=started.isoformat(timespec="seconds"), seconds=round(seconds, 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentPictures:
    """Generated images as different pictures.

    Attributes:
        num_pictures: all of them.
        num_flagged: those of which an image is flagged.
        num_alike: those of which an image is flagged for its likeness, and none is a copy.
    """

    num_pictures: int
    num_flagged: int
    num_alike: int

    @property
    def num_not_copied(self) -> int:
        """Pictures of which no image is a copy."""
        return self.num_pictures - self.num_flagged + self.num_alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Everything that an audit found, in numbers and names.

    Attributes:
        detector: name of the detector.
        fingerprint: of the detector.
        adapted_to: training images that the detector was adapted to; ``None`` where it was not.
        verified: whether the best candidates were aligned with their images, see ``verification``.
        rule: how images were flagged.
        null: the real images compared with.
        num_queries: readable generated images.
        num_flagged: flagged ones.
        share_flagged: their share.
        confidence_interval: 95 % Clopper-Pearson interval of the share, given the threshold.
        excess_interval: 95 % interval of the share of ``pictures`` that is flagged beyond chance,
            the threshold's own uncertainty included; ``None`` under Benjamini-Hochberg and where
            the sets are not comparable.
        expected_by_chance: images that the rate lets through when nothing is copied; ``None``
            under Benjamini-Hochberg.
        num_exact_copies: generated images that are byte for byte a training image.
        num_same_pixels: other flagged images that have the decoded pixels of a training image.
        num_altered: other flagged images that show the same picture as a training image, altered;
            ``None`` where candidates were not verified.
        num_alike: flagged images of which no more is known.
        pictures: the generated images as different pictures, each counted once.
        num_exposed_images: training images that are the best match of a flagged image.
        num_exposed_identities: their identities; ``None`` where those are not known.
        leaked_identities: those that stand in both lists, of a test set; ``None`` where ids cannot
            be compared, and of generated images, which have none.
        task: what the images are that are looked for.
        fail_on: what the gate fails on, if one was asked for.
        generated: the generated set.
        training: the training set.
        held_out: the held-out set, if one was given.
        comparability: whether a classifier tells held-out from training images; ``None`` without
            held-out images.
        generated_comparability: the same of generated and held-out images.
        sensitivity: how many altered copies of training images such an audit finds.
        metrics: figures about the whole set.
        exposed_images: training images that are the best match of a flagged image, surest first.
        exposed_identities: their identities, likewise; none where those are not known.
        matches: every readable generated image with its best matches.
        times: when, and how long.
    """

    detector: str
    fingerprint: str
    adapted_to: int | None
    verified: bool
    rule: FlagRule
    null: NullSummary
    num_queries: int
    num_flagged: int
    share_flagged: float
    confidence_interval: tuple[float, float]
    excess_interval: tuple[float, float] | None
    expected_by_chance: float | None
    num_exact_copies: int
    num_same_pixels: int
    num_altered: int | None
    num_alike: int
    pictures: DifferentPictures
    num_exposed_images: int
    num_exposed_identities: int | None
    leaked_identities: tuple[FileName, ...] | None
    task: Task
    fail_on: GateRule | None
    generated: SetSummary
    training: SetSummary
    held_out: SetSummary | None
    comparability: Comparability | None
    generated_comparability: Comparability | None
    sensitivity: Sensitivity
    metrics: SetMetrics
    exposed_images: tuple[Exposed, ...]
    exposed_identities: tuple[Exposed, ...]
    matches: tuple[Match, ...]
    times: Times

    @property
    def comparable(self) -> bool | None:
        """Whether held-out and training images are of one source; ``None`` if not known."""
        return None if self.comparability is None else self.comparability.comparable

    @property
    def word(self) -> str:
        """The images that are looked for, as an adjective."""
        return WORDS[self.task]

    @property
    def noun(self) -> str:
        """One of the images that are looked for."""
        return f"{self.word} image"

    @property
    def repeats(self) -> bool:
        """Whether there are fewer different pictures than images."""
        return self.pictures.num_pictures < self.num_queries

    @property
    def more_than_chance(self) -> bool | None:
        """Whether more pictures are merely alike than chance explains; ``None``: no rate holds."""
        if self.comparable is False:
            return None
        if self.rule.kind == "fdr":
            return self.num_alike > 0
        null, pictures = self.null, self.pictures
        chance = chance_of(
            pictures.num_alike,
            pictures.num_not_copied,
            num_null=null.num_independent,
            allowed=null.independent_allowed,
        )
        return chance <= _UNLIKELY

    @property
    def is_undecided(self) -> bool:
        """Whether nothing is flagged because so small a null could hardly flag anything."""
        fewest = fewest_flagged(self.rule.rate, self.num_queries, self.null.num_scores)
        return self.rule.kind == "fdr" and not self.num_flagged and fewest > 1

    @property
    def flagged(self) -> tuple[Match, ...]:
        """The flagged images with their best match, surest first."""
        found = [match for match in self.matches if match.rank == 1 and match.flagged]
        return tuple(sorted(found, key=certainty))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult(Finding, Result):
    """Whether a generated set reproduces its training set: a finding, and what is said of it.

    Attributes:
        statement: the finding in one sentence.
        verdict: how it compares with what chance alone would flag.
        shows: what the finding supports.
        does_not_show: what it does not.
        warnings: what weakens it.
        gate: how the gate ended, if one was asked for.
        grouping: the figures of groups, if they were asked for.
    """

    statement: str
    verdict: str
    shows: tuple[str, ...]
    does_not_show: tuple[str, ...]
    warnings: tuple[str, ...]
    gate: Gate | None
    grouping: Grouping | None = None

    def __repr__(self) -> str:
        """Return the finding in one sentence."""
        return shortened(f"<AuditResult: {self.statement}>", MAX_REPR)

    def _repr_html_(self) -> str:
        """Return the finding for a notebook: sentences, plot, and the surest pairs."""
        from lcmem_cli.engine.report.notebook import render_audit

        best = np.array([match.score for match in self.matches if match.rank == 1])
        null, threshold = np.array(self.null.scores), self.rule.threshold
        # Scores of the detectors that give probabilities crowd at both ends.
        as_logit = bool(min(best.min(), null.min()) >= 0 and max(best.max(), null.max()) <= 1)

        def scaled(scores: NDArray[np.float64]) -> NDArray[np.float64]:
            return linear_scale(scores) if as_logit else scores

        limit = None if threshold is None else float(scaled(np.array([threshold]))[0])
        scores = Distribution(
            generated=scaled(best), null=scaled(null), threshold=limit, as_logit=as_logit
        )
        return render_audit(self, scores)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each match of each generated image."""
        return [
            {
                "query": match.query,
                "rank": match.rank,
                "match": match.match,
                "match_id": match.match_id,
                "score": match.score,
                "p_value": match.p_value,
                "flagged": match.flagged,
                "tier": match.tier,
                "same_picture": match.same_picture,
                "edit": match.edit,
            }
            for match in self.matches
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, sentences first.

        Of the matches only the flagged images with their best one; ``matches.csv`` has them all.
        """
        values = jsonable(dataclasses.asdict(dataclasses.replace(self, matches=())))
        del values["matches"]
        times = values.pop("times")
        return {
            "format": "lcmem-audit",
            "schema": AUDIT_SCHEMA,
            **{name: values.pop(name) for name in AuditResult.__annotations__},
            **values,
            "comparable": self.comparable,
            "more_than_chance": self.more_than_chance,
            "undecided": self.is_undecided,
            "flagged": [jsonable(match.to_dict()) for match in self.flagged],
            "times": times,
        }
