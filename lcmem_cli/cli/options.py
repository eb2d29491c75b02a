"""Options that several commands share, each defined once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer


class Device(str, enum.Enum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class InputRange(str, enum.Enum):
    """What a codec is fed."""

    SYMMETRIC = "symmetric"
    UNIT = "unit"


class Frames(str, enum.Enum):
    """Which images of a file of several."""

    FIRST = "first"
    ALL = "all"


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


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
FilelistOption = Annotated[
    Path,
    typer.Option(
        "--filelist",
        help="CSV or Parquet with path,id[,Split][,ds_name], or a folder (a subfolder = an id).",
    ),
]
BasedirOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--basedir", help="Folder that paths are relative to (default: the filelist's)."),
]
FramesOption = Annotated[
    Frames,
    typer.Option(
        "--frames",
        help="Of a file of several images (pages, frames): the first, or each as file#3.",
    ),
]
BatchSizeOption = Annotated[
    int,
    typer.Option(
        "--batch-size",
        parser=batch_size,
        metavar="N|auto",
        help="Images per network call; auto: halved whenever a GPU's memory is exceeded.",
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=-1, help="Decoding threads (-1: from the CPUs one may use)."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
ApproximateOption = Annotated[
    bool,
    typer.Option(
        "--approximate",
        help="Find candidates with faiss and score them exactly: faster on millions of images, "
        "but a match can be missed. Needs the extra search.",
    ),
]
MaxUnreadableOption = Annotated[
    int,
    typer.Option(
        "--max-unreadable",
        min=0,
        help="Unreadable images to tolerate; they are always listed. More: exit 1.",
    ),
]
CheckpointOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--checkpoint",
        help="An lcmem .safetensors file or hf:REPO_ID@REVISION (default: the embedded model).",
    ),
]
CodecOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--codec", help="Where the codec is, if the checkpoint does not hold it."),
]
_CONFIG = typer.Option(
    "--config",
    "-c",
    help="Shipped config name (lcmem config ls) or a TOML file.",
    autocompletion=complete_config,
)
ConfigOption = Annotated[str, _CONFIG]
OptionalConfigOption = Annotated[Optional[str], _CONFIG]  # noqa: UP045
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="Override one config value: section.key=value. Repeatable."),
]
AnyUnreadableOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--max-unreadable",
        min=0,
        help="Unreadable images to tolerate (default: any number); they are always listed. "
        "More: exit 1.",
    ),
]
DetectorsOption = Annotated[
    str, typer.Option("--detectors", help="Names separated by commas (lcmem detectors lists them).")
]
DatasetsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--ds-name", help="Data sets to use, separated by commas (default: all)."),
]
SplitOption = Annotated[str, typer.Option("--split", help="Split to judge.")]
FitSplitOption = Annotated[
    str, typer.Option("--fit-split", help="Split that thresholds are fitted on.")
]
InputSizeOption = Annotated[
    int,
    typer.Option(
        "--input-size", min=8, max=4096, help="Side in pixels that images are resized to."
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail where a detector's weights cannot be had.")
]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep features for other runs.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace other results in the folder.")
]


def split_commas(text: str) -> list[str]:
    """Return the parts of a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
