"""Run folders: what produced a result stands beside it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    pass
else:
    pass

from lcmem_cli import __version__
from lcmem_cli.engine.distributed import available_cpus
from lcmem_cli.engine.files import write_json, write_text

ENVIRONMENT_NAME = "environment.json"
CONFIG_NAME = "config.toml"
_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    "accelerate",
    "numpy",
    "numba",
    "scipy",
    "pillow",
    "pyarrow",
)


def environment() -> dict[str, Any]:
    """Return versions, platform and CPUs, as written to ``environment.json``."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "lcmem": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": available_cpus(),
        "libraries": versions,
    }


def write_run_files(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.toml`` (resolved; unset keys left out) and ``environment.json``."""
    import tomli_w

    write_text(folder / CONFIG_NAME, tomli_w.dumps(_without_none(config)))
    write_json(folder / ENVIRONMENT_NAME, environment())


def as_written(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as it reads when it is found again."""
    written: dict[str, Any] = _without_none(config)
    return written


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(str(k)): _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value if v is not None]
    return _text(str(value)) if isinstance(value, (str, Path)) else value


def _text(name: str) -> str:
    """Escape what TOML cannot hold: bytes of a file name that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
