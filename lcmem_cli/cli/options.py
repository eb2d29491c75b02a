"""What commands are asked for: arguments and options, each declared once.

A command takes one ``Options`` object. The fields of its class are the command's arguments and
options: type, default, help text and panel stand there. Options that several commands share are
fields of a common base class or, where only one is shared, constants of this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from lcmem_cli.cli import render

if TYPE_CHECKING:
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.data.manifest import Reading
    from lcmem_cli.engine.data.tables import ListColumns

INPUT, LISTS, JUDGING, COMPUTE, OUTPUT = (
    "What", "Filelists", "How it is judged", "Compute", "Output",
)  # fmt: skip
PANELS = (INPUT, LISTS, JUDGING, COMPUTE, OUTPUT)
"""Panels of options in the order in which help shows them."""


class Options:
    """What one command is asked for."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def arguments(self) -> dict[str, Any]:
        """Return the values under the names of the engine's parameters."""
        return {name: value for name, value in vars(self).items() if name != "as_json"}


def argument(help: str, default: Any = ..., **more: Any) -> Any:
    """Declare an argument; one without a default is required."""
    return typer.Argument(default, help=help, **more)


def option(panel: str, help: str, default: Any = ..., *, flags: str = "", **more: Any) -> Any:
    """Declare an option; one without a default is required.

    Args:
        panel: one of ``PANELS``.
        help: what it does.
        default: its value where it is not given.
        flags: separated by spaces, if the field's name does not say them.
        **more: see ``typer.Option``.
    """
    return typer.Option(default, *flags.split(), help=help, rich_help_panel=panel, **more)


def complete_config(incomplete: str) -> list[str]:
    """Return the shipped configs for the shell's completion; a shell completes files itself."""
    from lcmem_cli.engine.config import shipped_configs

    return [name for name in shipped_configs() if name.startswith(incomplete)]


def batch_size(text: str) -> int:
    """Return a number of images, or 0 for ``auto``, by which the engine chooses."""
    if str(text) == "auto":
        return 0
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise typer.BadParameter(f"'{text}': expected a number from 1, or 'auto'")
    return number


def config_option(default: str | None) -> Any:
    """Declare ``--config``."""
    text = "Shipped config name (lcmem config ls) or a TOML file."
    flags = "--config -c"
    return option(INPUT, text, default, flags=flags, autocompletion=complete_config)


def training_config_option(default: str) -> Any:
    """Declare ``--config`` of a training, which a run that is continued has already."""
    text = f"Shipped config name or a TOML file (default: {default}; with --resume the run's own)."
    return option(INPUT, text, None, flags="--config -c", autocompletion=complete_config)


def seed_option(default: int = 0) -> Any:
    """Declare ``--seed``."""
    return option(JUDGING, "Seed of everything random.", default, min=0)


def batch_option(default: int = 32) -> Any:
    """Declare ``--batch-size``."""
    text = "Images per network call; auto: halved whenever a GPU's memory is exceeded."
    return option(COMPUTE, text, default, parser=batch_size, metavar="N|auto")


InputRange = Literal["symmetric", "unit"]
Frames = Literal["first", "all"]
FRAMES = option(
    INPUT, "Of a file of several images (pages, frames): the first, or each as file#3.", "first"
)
CODEC = option(INPUT, "Where the codec is, if the checkpoint does not hold it.", None)
OVERRIDES = option(
    INPUT,
    "Override one config value: section.key=value. Repeatable.",
    None,
    flags="--set",
    metavar="KEY=VALUE",
)
MAX_UNREADABLE = option(
    INPUT, "Unreadable images to tolerate; they are always listed. More: exit 1.", 0, min=0
)
ANY_UNREADABLE = option(
    INPUT,
    "Unreadable images to tolerate (default: any number); they are always listed. More: exit 1.",
    None,
    min=0,
)
APPROXIMATE = option(
    JUDGING,
    "Find candidates with faiss and score them exactly: faster on millions of images, but a match "
    "can be missed. Needs the extra search.",
    False,
)
VERIFY = option(
    JUDGING,
    "Align the best candidates, so that mirrored, turned, cropped copies are found and the edit is "
    "named (default: where it can be).",
    None,
    flags="--verify/--no-verify",
)
FAIL_ON = option(
    JUDGING,
    "Exit 3 on identical images, on any copy (altered), on more than chance explains, or on more "
    "than this share of flagged images.",
    None,
    metavar="identical|altered|more-than-chance|SHARE",
)
CACHE = option(COMPUTE, "Keep features for other runs.", True, flags="--cache/--no-cache")
FOLDER = option(OUTPUT, "Folder to write to.", flags="--output -o")
OVERWRITE = option(OUTPUT, "Replace other results in the folder.", False)


class JsonOptions(Options):
    """What every command with a result is asked for."""

    as_json: bool = option(OUTPUT, "Print one JSON document to stdout.", False, flags="--json")


class TableOptions(JsonOptions):
    """How filelists are read."""

    basedir: Path | None = option(
        INPUT, "Folder that paths start from (default: the filelist's).", None
    )
    path_column: str | None = option(LISTS, "Column of the image files (default: path).", None)
    id_column: str | None = option(LISTS, "Column of the identities (default: id).", None)
    split_column: str | None = option(LISTS, "Column of the split (default: Split).", None)
    dataset_column: str | None = option(LISTS, "Column of the data set (default: ds_name).", None)
    sep: str | None = option(LISTS, "What separates cells: a character, or tab.", None)

    def list_columns(self) -> ListColumns:
        """Return what the filelists call their columns."""
        from lcmem_cli.engine.data.tables import ListColumns

        return ListColumns(
            path=self.path_column,
            id=self.id_column,
            split=self.split_column,
            dataset=self.dataset_column,
            sep=self.sep,
        )

    def reading(self, max_unreadable: int | None, frames: Frames = "first") -> Reading:
        """Return how lists are read.

        Args:
            max_unreadable: the command's option.
            frames: the command's option, where it has one.
        """
        from lcmem_cli.engine.data.manifest import Reading

        return Reading(
            basedir=self.basedir,
            columns=self.list_columns(),
            frames=frames,
            max_unreadable=max_unreadable,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the values, those about columns as one."""
        values = super().arguments()
        for name in ("path_column", "id_column", "split_column", "dataset_column", "sep"):
            values.pop(name, None)
        return {**values, "columns": self.list_columns()}


class ListOptions(TableOptions):
    """A set of images with identities."""

    filelist: Path = option(
        INPUT,
        "CSV or Parquet with path,id[,Split][,ds_name], or a folder or archive (a subfolder = an "
        "id).",
    )


class DeviceOptions(JsonOptions):
    """Where to compute, and who is told of the progress."""

    device: Literal["auto", "cpu", "cuda", "mps"] = option(COMPUTE, "Where to compute.", "auto")

    def arguments(self) -> dict[str, Any]:
        """Return the values, and the reporter that the global options call for."""
        return {**super().arguments(), "reporter": render.reporter()}


class DecodeOptions(DeviceOptions):
    """How to compute, where the number of images per network call is not chosen."""

    workers: int = option(COMPUTE, "Decoding threads (-1: from the CPUs one may use).", -1, min=-1)


class ComputeOptions(DecodeOptions):
    """How to compute."""

    batch_size: int = batch_option()
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        COMPUTE,
        "What networks compute in; auto: half precision on CUDA. Another than fp32 (the default) "
        "makes another detector, with its own features and thresholds.",
        None,
    )

    def compute(self, *, cache: bool = False) -> Compute:
        """Return how the engine is to compute, as one value.

        Args:
            cache: keep features in the user's cache.
        """
        from lcmem_cli.engine.compute import Compute

        return Compute.start(
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self.workers,
            reporter=render.reporter(),
            cache=cache,
        )


class StudyOptions(ListOptions, ComputeOptions):
    """What the studies of detectors share: their pairs, their splits and their folder."""

    detectors: str = option(
        INPUT,
        "Names separated by commas (lcmem detectors lists them).",
        "lcmem,mse,ssim,ncc,phash,random",
    )
    ds_name: str | None = option(
        INPUT, "Data sets to use, separated by commas (default: all).", None
    )
    split: str = option(JUDGING, "Split to judge.", "TEST")
    seed: int = seed_option(42)
    input_size: int = option(
        JUDGING, "Side in pixels that images are resized to.", 512, min=8, max=4096
    )
    strict: bool = option(INPUT, "Fail where a detector's weights cannot be had.", False)
    max_unreadable: int | None = ANY_UNREADABLE
    cache: bool = CACHE
    output: Path = FOLDER
    overwrite: bool = OVERWRITE

    def arguments(self) -> dict[str, Any]:
        """Return the values with their lists split."""
        from lcmem_cli.engine.detectors.options import split_names

        values = super().arguments()
        chosen = values.pop("ds_name")
        values["ds_names"] = split_commas(chosen) if chosen else None
        return {**values, "detectors": split_names(self.detectors)}


def split_commas(text: str) -> list[str]:
    """Return the parts of a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
