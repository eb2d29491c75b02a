"""The share of flagged images, as a metric and as a step of a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lcmem_cli.engine.data.arrays import UNIT_RANGE, Images, ValueRange
from lcmem_cli.engine.evaluation.calibration import clopper_pearson
from lcmem_cli.engine.serving.guard import Guard


class FlaggedShare:
    """Share of images that a guard flags, in the way of torchmetrics: update, compute, reset.

    Args:
        guard: what flags.
        value_range: black and white of floating-point values, such as ``(-1, 1)``.

    Attributes:
        num_images: images so far.
        num_flagged: flagged ones.

    Example:
        >>> metric = FlaggedShare(guard)
        >>> for batch in loader:
        ...     metric.update(generator(batch))
        >>> print(metric.compute(), metric.interval())
    """

    def __init__(self, guard: Guard, *, value_range: ValueRange = UNIT_RANGE) -> None:
        self.guard, self.value_range = guard, value_range
        self.num_images = self.num_flagged = 0

    def update(self, images: Images) -> None:
        """Count the flagged ones of some images, see ``Guard.check``."""
        accepted = self.guard.accept(images, value_range=self.value_range)
        self.num_images += len(accepted)
        self.num_flagged += int((~accepted).sum())

    def compute(self) -> float:
        """Return the share of all images so far, in [0, 1]; NaN before the first."""
        return self.num_flagged / self.num_images if self.num_images else float("nan")

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Clopper-Pearson interval of the share.

        Raises:
            InputError: there was no image yet.
        """
        return clopper_pearson(self.num_flagged, self.num_images)

    def reset(self) -> None:
        """Forget all images."""
        self.num_images = self.num_flagged = 0

    def __repr__(self) -> str:
        """Return the counts."""
        return f"<FlaggedShare: {self.num_flagged:,} of {self.num_images:,} images>"


class Log(Protocol):
    """What takes values by name, such as ``Accelerator.log``."""

    def __call__(self, values: dict[str, float], *, step: int) -> object:
        """Log values of a step."""


def log_flagged_share(
    guard: Guard,
    sample: Callable[[], Images],
    log: Log,
    *,
    every: int,
    value_range: ValueRange = UNIT_RANGE,
) -> Callable[[int], None]:
    """Return a function to be called after each training step; every so many it samples and logs.

    It logs ``flagged_share`` beside ``flagged_share_by_chance``, which is the guard's rate.

    Args:
        guard: what flags.
        sample: makes images with the model as it is now.
        log: is told, as ``Accelerator.log`` or ``logger.log_metrics`` of Lightning.
        every: steps from one sample to the next.
        value_range: of the samples, see ``Guard.check``.

    Example:
        >>> on_step = log_flagged_share(guard, sample, accelerator.log, every=500)
        >>> for step, batch in enumerate(loader, start=1):
        ...     train(batch)
        ...     on_step(step)
    """
    metric = FlaggedShare(guard, value_range=value_range)

    def on_step(step: int) -> None:
        if step % every:
            return
        metric.reset()
        metric.update(sample())
        values = {
            "flagged_share": metric.compute(),
            "flagged_share_by_chance": guard.rule.rate,
        }
        log(values, step=step)

    return on_step
