"""What an audit found, in sentences: the finding, what it is worth, and what weakens it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lcmem_cli.engine.data.tables import some
from lcmem_cli.engine.evaluation.audit.result import Finding, FlagRule, NullKind, SetSummary
from lcmem_cli.engine.evaluation.audit.wording import counted, percent
from lcmem_cli.engine.evaluation.calibration import fewest_flagged
from lcmem_cli.engine.evaluation.comparability import MIN_IDENTITIES, Comparability

_NEARER = 3.0
"""z of ``C_T`` above which the real images are nearer to the training set by more than chance."""
_MOSTLY = 0.5
"""Share of generated images below all real ones from which the two are of different kinds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the sentences need beside the finding.

    Attributes:
        search_recall: of an approximate search; ``None`` where it was exact.
        num_below: real images that score less than every flagged one; ``None`` if none is flagged.
        share_below: share of generated images that score less than every real one.
        may_share_identities: whether held-out images may show whom training images show.
        are_same_sets: whether generated and training set are the same files.
        each_is_an_identity: whether a leave-one-out null has no two images of one identity.
        num_mixed_up: held-out images that are among the generated ones.
        num_evident: images of the null that evidence takes for altered copies of training images.
        gives_probability: whether scores are on the scale that evidence is on.
    """

    search_recall: float | None
    num_below: int | None
    share_below: float
    may_share_identities: bool
    are_same_sets: bool
    each_is_an_identity: bool
    num_mixed_up: int
    num_evident: int
    gives_probability: bool


def statement(finding: Finding) -> str:
    """Return the finding in one sentence.

    One before it says where no rate holds, and one after it how many copies the audit finds.
    """
    return " ".join([*_not_comparable(finding), _finding(finding), *_sensitivity(finding)])


def _sensitivity(finding: Finding) -> Iterator[str]:
    """Yield how many altered copies are found, which an audit without findings needs most."""
    found = finding.sensitivity
    if found.interval is None:
        return
    low, high = (percent(bound) for bound in found.interval)
    verb = "finds" if finding.num_flagged else "would have found"
    yield (
        f"Of {counted(found.num_planted, 'copy', 'copies')} of training images altered in "
        f"{counted(len(found.edits), 'way')}, this audit {verb} {found.num_found:,} "
        f"({percent(found.num_found / found.num_planted)}; 95 % interval {low} to {high})."
    )


def _not_comparable(finding: Finding) -> Iterator[str]:
    found = finding.comparability
    if found is None or found.comparable is not False:
        return
    yield (
        "Held-out and training images are not comparable, so the stated rate does not hold: a "
        f"classifier tells them apart (AUC {found.auc:.2f}, p {found.p_value:.3f}"
        f"{_in_what(found)})."
    )


def _in_what(found: Comparability) -> str:
    return f"; they differ in {', '.join(found.differences)}" if found.differences else ""


def _finding(finding: Finding) -> str:
    rule = finding.rule
    if finding.is_undecided:
        return (
            f"Undecided: none of {counted(finding.num_queries, finding.noun)} is flagged at a "
            f"false-discovery rate of {percent(rule.rate)}, but single ones could not be with "
            f"{counted(finding.null.num_scores, 'real image')} to compare with."
        )
    verb = "matches" if finding.num_flagged == 1 else "match"
    compared = {
        "held-out": "held-out real images do",
        "split": "real images split off from the training set do",
        "leave-one-out": "real training images match those of other identities",
    }[finding.null.kind]
    rate = (
        f"at a false-positive rate of {percent(rule.rate)} per image"
        if rule.kind == "fpr"
        else f"at a false-discovery rate of {percent(rule.rate)} among the flagged"
    )
    beyond = ""
    if finding.excess_interval is not None:
        low, high = (percent(bound) for bound in finding.excess_interval)
        counts = "pictures" if finding.repeats else "images"
        beyond = f"; beyond chance {low} to {high} of the {counts} (95 % interval)"
    return (
        f"{finding.num_flagged:,} of {counted(finding.num_queries, finding.noun)} "
        f"({percent(finding.share_flagged)}) {verb} a training image more closely than {compared}, "
        f"{rate}{beyond}."
    )


def verdict(finding: Finding) -> str:
    """Return what is known of the flagged images, and how many chance alone would flag."""
    rule, num_queries, num_null = finding.rule, finding.num_queries, finding.null.num_scores
    sentences = [*_leaked(finding), *_known(finding)]
    num_known, others = finding.num_flagged - finding.num_alike, finding.num_alike
    pictures = finding.pictures
    chance = f"chance alone would flag about {rule.rate * pictures.num_pictures:.3g}"
    by_chance = f"{chance[0].upper()}{chance[1:]}: "
    if num_known:
        known = "of 1 other" if others == 1 else f"of {others:,} others"
        once = f" ({counted(pictures.num_alike, 'different picture')})" if finding.repeats else ""
        by_chance = f"No more than likeness is known {known}{once}; {chance}: "
    elif finding.repeats:
        by_chance = (
            f"Of {counted(pictures.num_pictures, 'different picture')} "
            f"{pictures.num_alike:,} are flagged, and {chance}: "
        )
    if finding.is_undecided:
        fewest = fewest_flagged(rule.rate, num_queries, num_null)
        sentences.append(
            f"Nothing is flagged; but with {counted(num_null, 'real image')} Benjamini-Hochberg "
            f"could not have flagged fewer than {fewest:,}."
        )
    elif not finding.num_flagged:
        sentences.append("Nothing is flagged.")
    elif not others + (finding.num_altered or 0):
        pass  # chance makes no identical images
    elif finding.comparable is False:
        sentences.append(
            "How many images chance alone would flag is not known, because the sets are not "
            "comparable; look at the pairs."
        )
    elif rule.kind == "fdr":
        sentences.append(
            f"Of the flagged images, {percent(rule.rate)} at most are expected to be false."
        )
    elif not others:
        pass  # alignment shows what was copied
    elif finding.more_than_chance:
        sentences.append(by_chance + "this is more.")
    else:
        sentences.append(by_chance + "their number is no evidence of copying; look at the pairs.")
    return " ".join(sentences)


def _leaked(finding: Finding) -> Iterator[str]:
    """Yield which identities stand in test and training list alike."""
    names = finding.leaked_identities
    if names:
        stand = counted(len(names), "identity stands", "identities stand")
        yield f"{stand} in both test and training list: {some(names)}."


def _known(finding: Finding) -> Iterator[str]:
    """Yield how many flagged images are known to show the picture of a training image."""
    if finding.num_exact_copies:
        copies = counted(finding.num_exact_copies, f"{finding.noun} is", f"{finding.noun}s are")
        yield f"{copies} byte for byte a training image."
    if finding.num_same_pixels:
        copies = counted(finding.num_same_pixels, f"{finding.noun} has", f"{finding.noun}s have")
        yield f"{copies} the pixels of a training image in another file."
    if finding.num_altered:
        copies = counted(finding.num_altered, f"{finding.noun} shows", f"{finding.noun}s show")
        yield f"{copies} the same picture as a training image, altered."


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
    weaker = {
        "held-out": "",
        "split": f" Weaker than with held-out images: {num_not_searched:,} training images were "
        "split off, and copies of them are found only where the file is identical.",
        "leave-one-out": " Weaker than with held-out images: each training image was compared with "
        "those of other identities, so the rate is approximate, and copies are missed where one "
        "identity has several labels.",
    }[kind]
    return meaning + weaker


def shows(finding: Finding, circumstances: Circumstances) -> Iterator[str]:
    """Yield what the finding supports."""
    yield finding.null.meaning
    num_real, num_below = finding.null.num_scores, circumstances.num_below
    low, high = (percent(rate) for rate in finding.null.rates)
    if finding.rule.kind == "fpr":
        yield (
            f"With {counted(num_real, 'real image')} the rate really reached lies between {low} "
            f"and {high} (95 %)."
        )
    lowest = 1 / (num_real + 1)
    if any(match.p_value <= lowest for match in finding.flagged if not match.exact):
        yield f"No p-value can be below {lowest:.2g} with {counted(num_real, 'real image')}."
    if num_below is not None:
        others = (
            f"any of {num_real:,} real images is"
            if num_below == num_real
            else f"at least {num_below:,} of {num_real:,} real images are"
        )
        yield (
            "A flagged image is closer to its training image, as this detector sees them, than "
            f"{others} to any training image."
        )
    compared = (
        "every training image searched, without approximation."
        if circumstances.search_recall is None
        else "the training images that an approximate search proposed."
    )
    yield f"Every {finding.noun} was compared with {compared}"
    if finding.verified:
        yield (
            "The best candidates of each image were aligned with it, those of real images alike. "
            "A match called the same picture agrees with its training image patch by patch."
        )
    if finding.adapted_to is not None:
        yield (
            f"The detector was adapted to {finding.adapted_to:,} of the training images, so what "
            "all images of this kind share does not count as likeness. No other image had a part "
            "in that."
        )


def does_not_show(finding: Finding, circumstances: Circumstances) -> Iterator[str]:
    """Yield what the finding does not support."""
    if finding.num_alike or not finding.num_flagged:
        yield (
            "That an image which is merely alike was copied: two pictures may be alike for other "
            "reasons. Look at the pairs."
        )
    yield (
        "That an image which is not flagged is free of copied content: the detector compares "
        "whole pictures and misses what it was not made to see."
    )
    if finding.sensitivity.reason is not None:
        yield f"How many altered copies it finds: {finding.sensitivity.reason}."
    if not finding.verified:
        why = ""
        if not circumstances.gives_probability:
            why = f", as scores of {finding.detector} are no probabilities, which evidence is"
        yield (
            "Whether a flagged image is the same picture as its training image, or the same "
            f"person, patient or object in another picture: candidates were not aligned{why}. So "
            "turned, mirrored and cropped copies are missed more often."
        )
    if finding.task == "audit":
        yield (
            "Anything about images that this generator has not made yet, or about other generators."
        )
    elif finding.leaked_identities is None:
        yield (
            "Whether test and training images show the same people, patients or objects in other "
            "pictures: only ids of both lists say."
        )
    if circumstances.may_share_identities:
        yield (
            "That training and held-out images show different people, patients or objects: only "
            "filelists with ids say. Held-out images of those in the training set match it closely "
            "without being copied, and then copies are missed."
        )


def warnings(finding: Finding, circumstances: Circumstances) -> list[str]:
    """Return what weakens the finding, one sentence each."""
    return [
        *_about_the_conditions(finding),
        *_about_the_sets(finding),
        *_about_the_search(circumstances),
        *_about_mixed_up_sets(finding, circumstances),
        *_about_the_null(finding, circumstances),
    ]


def _about_the_conditions(finding: Finding) -> Iterator[str]:
    known, generated = finding.comparability, finding.generated_comparability
    if known is not None and known.comparable is None:
        counts = " and ".join(f"{count:,}" for count in known.num_identities)
        yield (
            "Whether held-out and training images are of one source could not be told: that takes "
            f"{MIN_IDENTITIES} identities of each, there are {counts}."
        )
    if generated is not None and generated.comparable is False:
        yield (
            f"{finding.noun.capitalize()}s can be told from held-out ones (AUC "
            f"{generated.auc:.2f}{_in_what(generated)}). The rate is that of images like the "
            "held-out ones."
        )


def _equals(images: SetSummary, finding: Finding) -> str:
    """Say how many of the audited blank images have the colour of a blank training image."""
    training = {image.colour for image in finding.training.blank}
    alike = [image for image in images.blank if image.colour in training]
    if images is not finding.generated or not alike:
        return ""
    return (
        f" {alike[0].path} has its equal among the training images"
        if len(alike) == 1
        else f" {len(alike):,} have their equals among the training images, {alike[0].path} first"
    ) + "."


def _about_the_sets(finding: Finding) -> Iterator[str]:
    for name, images in (
        (finding.word, finding.generated),
        ("training", finding.training),
        ("held-out", finding.held_out),
    ):
        if images is not None and images.unreadable:
            number = counted(len(images.unreadable), f"{name} image")
            yield f"{number} could not be read and stood aside."
        if images is not None and images.blank:
            yield (
                f"{counted(len(images.blank), f'{name} image')} showing nothing but one colour "
                f"stood aside: it would match only its equal.{_equals(images, finding)}"
            )
        if images is not None and images.num_guessed:
            number = counted(images.num_guessed, f"{name} image")
            yield (
                "Of more than 8 bits without a stated range, so its brightness was guessed "
                f"from its values: {number}."
            )
    if finding.repeats:
        yield (
            f"The {finding.num_queries:,} {finding.noun}s are {finding.pictures.num_pictures:,} "
            "different pictures: equal files, images that match each other and images of one "
            "identity are one. What is beyond chance counts each picture once."
        )


def _about_the_search(circumstances: Circumstances) -> Iterator[str]:
    if circumstances.search_recall is not None:
        yield (
            "The search was approximate: on a sample it found the best match of "
            f"{circumstances.search_recall:.1%} of the images. A copy whose match was "
            "missed is not flagged."
        )


def _about_mixed_up_sets(finding: Finding, circumstances: Circumstances) -> Iterator[str]:
    if circumstances.are_same_sets:
        yield (
            f"{finding.word.capitalize()} and training set are the same images, so each is found "
            "identical."
        )
    if circumstances.num_mixed_up:
        yield (
            f"Among the {finding.noun}s too, and so left out of the comparison: "
            f"{counted(circumstances.num_mixed_up, 'held-out image')}. Were sets mixed up?"
        )
    if finding.null.removed:
        yield (
            "Also in the training set, and so left out of the comparison: "
            f"{counted(len(finding.null.removed), 'real image')}."
        )
    if circumstances.num_evident:
        yield (
            "Perhaps altered copies of training images too, but compared with: "
            f"{counted(circumstances.num_evident, 'real image')}. If they are copies, take them "
            "out; they hide others."
        )
    copying = finding.metrics.copying
    if copying is not None and copying.z is not None and copying.z > _NEARER:
        yield (
            f"The real images lie nearer to the training set than the {finding.word} ones do "
            f"(C_T {copying.value:+.1f}, z {copying.z:+.1f}), so copies may be missed. Were sets "
            "mixed up, or do held-out images show what training images show?"
        )
    if circumstances.share_below > _MOSTLY:
        yield (
            f"{circumstances.share_below:.0%} of the {finding.noun}s match the training set less "
            "closely than any real image does: they are of another kind than the real images, and "
            "then the rate says little."
        )


def _about_the_null(finding: Finding, circumstances: Circumstances) -> Iterator[str]:
    null = finding.null
    if circumstances.each_is_an_identity:
        yield (
            "Every training image counts as an identity of its own. Where several show the "
            "same, they match each other closely and copies may be missed: put the images of "
            "each identity into a folder of its own, or give --held-out."
        )
    if null.shared_identities:
        yield (
            f"{counted(len(null.shared_identities), 'identity', 'identities')} in both "
            "training and held-out set: images of one match closely without being copied, so "
            "copies may be missed."
        )
    needed = fewest_flagged(finding.rule.rate, finding.num_queries, null.num_scores)
    if finding.rule.kind == "fdr" and needed > 1:
        yield (
            f"With {null.num_scores:,} real images Benjamini-Hochberg can only flag {needed:,} or "
            "more images at once, beside identical files; fewer copies go unnoticed. More "
            "held-out images help."
        )
