"""How work is done, as one value: where, in how many pieces, and who is told."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lcmem_cli.engine.distributed import Ranks, current_ranks, resolve_workers
from lcmem_cli.engine.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from lcmem_cli.engine.precision import AskedPrecision
    from lcmem_cli.engine.store.features import FeatureCaches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a task is computed. Only the precision changes a result beyond rounding.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: what detectors compute in, see ``detectors.registry.at_precision``; another
            than single precision makes another detector.
        batch_size: images per network call, see ``data.batching.Batching``.
        workers: decoding threads; -1: from the CPUs, see ``num_workers``.
        ranks: processes that share the work.
        reporter: told progress and warnings; a silent one in all processes but the first.
        cache: features from earlier runs, filled as the work goes on; ``None``: none are kept.
    """

    device: str = "auto"
    precision: AskedPrecision | None = None
    batch_size: int = 32
    workers: int = -1
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    reporter: Reporter = SILENT
    cache: FeatureCaches | None = None

    @classmethod
    def start(
        cls,
        *,
        device: str = "auto",
        precision: AskedPrecision | None = None,
        batch_size: int = 32,
        workers: int = -1,
        reporter: Reporter = SILENT,
        cache: bool = False,
    ) -> Compute:
        """Join the group that this process was started in, if any, and let its first one speak.

        Args:
            device: see the class.
            precision: see the class.
            batch_size: see the class.
            workers: see the class.
            reporter: of the first process.
            cache: keep features in the user's cache.

        Raises:
            ProcessLostError: the processes that the launcher started do not form one group.
        """
        from lcmem_cli.engine.store.features import FeatureCaches  # which computes by this class

        ranks = current_ranks(device)
        return cls(
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            ranks=ranks,
            reporter=reporter if ranks.is_main else SILENT,
            cache=FeatureCaches.of_user() if cache else None,
        )

    @property
    def num_workers(self) -> int:
        """Decoding threads of this process, at least 0."""
        return resolve_workers(self.workers, self.ranks.local_size)


DEFAULT_COMPUTE = Compute()
"""One process, on the best device, keeping no features and telling nobody."""
