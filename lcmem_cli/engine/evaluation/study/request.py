"""What every study is asked for."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.data.manifest import Reading, Record
from lcmem_cli.engine.data.pairs import PairSet
from lcmem_cli.engine.detectors.options import take_label
from lcmem_cli.engine.detectors.registry import check_name
from lcmem_cli.engine.errors import InputError, WeightsFileNeededError

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
    reading: Reading
    detectors: Sequence[str]
    ds_names: Sequence[str] | None
    split: str
    fit_split: str | None
    seed: int
    input_size: int
    strict: bool
    overwrite: bool

    def __post_init__(self) -> None:
        """Refuse what can be refused before any work."""
        if not self.detectors:
            raise InputError(f"no detector named; for example {','.join(DEFAULT_DETECTORS)}")
        labels = [take_label(name)[0] for name in self.detectors]
        for label, name in zip(labels, self.named.values(), strict=False):
            if labels.count(label) > 1:
                raise InputError(f"detector '{label}' is named twice; name each one once")
            with contextlib.suppress(WeightsFileNeededError):  # it is left out, with this reason
                check_name(name)
        if self.split == self.fit_split:
            raise InputError(
                f"--fit-split: thresholds must not be fitted on the split that is judged "
                f"({self.split})"
            )

    @property
    def named(self) -> dict[str, str]:
        """Names to load the detectors by, by what they are shown as."""
        return dict(take_label(name) for name in self.detectors)

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
