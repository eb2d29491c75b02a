"""What every study is asked for."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.data.pairs import PairSet
from lcmem_cli.engine.data.tables import ListColumns
from lcmem_cli.engine.detectors.registry import check_name
from lcmem_cli.engine.errors import InputError

DEFAULT_DETECTORS = ("lcmem", "mse", "ssim", "ncc", "phash", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRequest(abc.ABC):
    """The arguments that ``benchmark`` and ``robustness`` share; they are explained there.

    Raises:
        InputError: a detector's name is unknown, missing or given twice, or thresholds would be
            fitted on the split that is judged.
    """

    filelist: Path
    output: Path
    basedir: Path | None
    columns: ListColumns
    detectors: Sequence[str]
    ds_names: Sequence[str] | None
    split: str
    fit_split: str | None
    seed: int
    input_size: int
    strict: bool
    overwrite: bool
    max_unreadable: int | None

    def __post_init__(self) -> None:
        """Refuse what can be refused before any work."""
        if not self.detectors:
            raise InputError(f"no detector named; for example {','.join(DEFAULT_DETECTORS)}")
        for name in self.detectors:
            check_name(name)
            if self.detectors.count(name) > 1:
                raise InputError(f"detector '{name}' is named twice; name each one once")
        if self.split == self.fit_split:
            raise InputError(
                f"--fit-split: thresholds must not be fitted on the split that is judged "
                f"({self.split})"
            )

    @abc.abstractmethod
    def make_pairs(
        self, records: Sequence[Record], *, column: Sequence[str], fitting: bool
    ) -> PairSet:
        """Return the pairs of one split.

        Args:
            records: images of the split.
            column: ids of the whole filelist, see ``data.pairs.reference_pairs``.
            fitting: whether thresholds are fitted on the pairs; else they are judged.
        """
