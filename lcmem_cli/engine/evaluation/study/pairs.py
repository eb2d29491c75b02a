"""The images of a study, and the pairs that are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.data.pairs import PairSet, dataset_name, single_identity_datasets
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.study.request import StudyRequest
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.reporter import Reporter


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyImages:
    """Images of a study; its pairs hold rows of ``records``.

    Attributes:
        records: those of the judged split, then those that thresholds are fitted on, then others.
        num_judged: how many are of the judged split.
        num_paired: how many pairs are made of.
        basedir: folder that their paths start from.
        test: pairs of the judged split.
        fit: pairs that thresholds are fitted on; ``None``: on none.
    """

    records: tuple[Record, ...]
    num_judged: int
    num_paired: int
    basedir: Path
    test: PairSet
    fit: PairSet | None

    @property
    def pair_sets(self) -> list[PairSet]:
        """The pairs of both splits."""
        return [self.test] if self.fit is None else [self.test, self.fit]

    @property
    def rows_in_pairs(self) -> NDArray[np.int64]:
        """Rows that are part of any pair, ascending."""
        ends = [end for pairs in self.pair_sets for end in (pairs.first, pairs.second)]
        return np.unique(np.concatenate(ends))

    def paths(self) -> list[Path]:
        """Return the file of each record."""
        return [self.basedir / record.path for record in self.records]

    def digest(self, contents: Sequence[str | None]) -> str:
        """Return a SHA-256 over names, identities, data sets and file contents.

        Args:
            contents: SHA-256 of each file, ``None`` where it cannot be read.
        """
        lines = []
        for record, content in zip(self.records, contents, strict=True):
            cells = (record.path, record.id, record.split or "", record.ds_name or "")
            text = "\0".join((*cells, content or "unreadable"))
            lines.append(text.encode("utf-8", "surrogateescape"))
        return sha256_bytes(b"\0\0".join(lines))


def pair_images(manifest: Manifest, request: StudyRequest, reporter: Reporter) -> StudyImages:
    """Make the pairs of both splits.

    Args:
        manifest: the whole list of images.
        request: names the splits and data sets, and makes the pairs of one split.
        reporter: warned of data sets that no threshold can be fitted on.

    Raises:
        InputError: no image is to be judged, or the splits or data sets are unknown.
    """
    column = [record.id for record in manifest.records]
    judged = manifest.select(request.split, request.ds_names).records
    if not judged:
        raise InputError(f"{request.filelist}: no image has the split {request.split}")
    test = request.make_pairs(judged, column=column, fitting=False)
    fit: PairSet | None = None
    fit_from: tuple[Record, ...] = ()
    if request.fit_split is not None:
        fit_from = _with_negatives(manifest.select(request.fit_split, request.ds_names), reporter)
        fit = request.make_pairs(fit_from, column=column, fitting=True).shifted(len(judged))
    return StudyImages(
        records=(*judged, *fit_from),
        num_judged=len(judged),
        num_paired=len(judged) + len(fit_from),
        basedir=manifest.basedir,
        test=test,
        fit=fit,
    )


def _with_negatives(manifest: Manifest, reporter: Reporter) -> tuple[Record, ...]:
    """Return the records of data sets with two identities or more, and so with negative pairs."""
    left_out = single_identity_datasets(manifest.records)
    if left_out:
        reporter.warn(
            f"thresholds are fitted without {', '.join(map(repr, left_out))}: a single identity "
            "there, so no negative pair"
        )
    return tuple(r for r in manifest.records if dataset_name(r) not in left_out)
