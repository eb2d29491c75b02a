"""``lcmem leaks``: does a test set show what its training set shows?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcmem_cli.cli.audit import JudgedOptions, show
from lcmem_cli.cli.options import INPUT, argument, option


class LeaksOptions(JudgedOptions):
    """What a search for leaks is asked for."""

    test: Path = argument("Test images: a folder, filelist, archive, array or saved index.")
    against: Path = option(INPUT, "The training set, likewise.")
    held_out: Path | None = option(INPUT, "Real images that surely are in neither, likewise.", None)

    def arguments(self) -> dict[str, Any]:
        """Return the values under the names that an audit has for them."""
        values = super().arguments()
        test = values.pop("test")
        return {**values, "generated": test, "task": "leaks"}


def leaks_command(options: LeaksOptions) -> None:
    """Find test images that are in the training set too, altered or not, and shared identities.

    An audit of the test set: the same files, rates and gates. Identities that stand in both lists
    are told where both are filelists with ids.

    Examples:
        lcmem leaks test.csv --against train.csv -o leaks
        lcmem leaks test --against train -o leaks --fail-on altered
    """
    from lcmem_cli.engine.evaluation.audit.run import audit

    show(audit(**options.arguments()), options.output, as_json=options.as_json)
