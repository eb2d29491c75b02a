"""Find out whether a generative image model reproduces its training images.

The names below are imported on first use, so ``import lcmem_cli`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lcmem_cli.engine.detectors.base import Detector as Detector
    from lcmem_cli.engine.detectors.registry import load_detector as load_detector
    from lcmem_cli.engine.evaluation.audit.run import audit as audit
    from lcmem_cli.engine.store.index import Index as Index

_EXPORTS = {
    "Detector": "lcmem_cli.engine.detectors.base",
    "load_detector": "lcmem_cli.engine.detectors.registry",
    "audit": "lcmem_cli.engine.evaluation.audit.run",
    "Index": "lcmem_cli.engine.store.index",
}

__all__ = ["Detector", "Index", "__version__", "audit", "load_detector"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'lcmem_cli' has no attribute '{name}'")
