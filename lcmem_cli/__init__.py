"""Find out whether a generative image model reproduces its training images.

The names below are imported on first use, so ``import lcmem_cli`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lcmem_cli.cli.render import show_progress as show_progress
    from lcmem_cli.engine.data.sources.in_memory import in_memory as in_memory
    from lcmem_cli.engine.detectors.base import Detector as Detector
    from lcmem_cli.engine.detectors.registry import load_detector as load_detector
    from lcmem_cli.engine.distributed import keep_freed_memory as keep_freed_memory
    from lcmem_cli.engine.evaluation.audit.run import audit as audit
    from lcmem_cli.engine.evaluation.features_audit import FeatureSet as FeatureSet
    from lcmem_cli.engine.evaluation.features_audit import audit_features as audit_features
    from lcmem_cli.engine.evaluation.indexing import build_index as build_index
    from lcmem_cli.engine.serving.guard import Guard as Guard
    from lcmem_cli.engine.serving.guard import Verdict as Verdict
    from lcmem_cli.engine.serving.metric import FlaggedShare as FlaggedShare
    from lcmem_cli.engine.serving.metric import log_flagged_share as log_flagged_share
    from lcmem_cli.engine.store.index import Index as Index

_EXPORTS = {
    "Detector": "lcmem_cli.engine.detectors.base",
    "FeatureSet": "lcmem_cli.engine.evaluation.features_audit",
    "FlaggedShare": "lcmem_cli.engine.serving.metric",
    "Guard": "lcmem_cli.engine.serving.guard",
    "Index": "lcmem_cli.engine.store.index",
    "Verdict": "lcmem_cli.engine.serving.guard",
    "build_index": "lcmem_cli.engine.evaluation.indexing",
    "in_memory": "lcmem_cli.engine.data.sources.in_memory",
    "audit_features": "lcmem_cli.engine.evaluation.features_audit",
    "audit": "lcmem_cli.engine.evaluation.audit.run",
    "keep_freed_memory": "lcmem_cli.engine.distributed",
    "load_detector": "lcmem_cli.engine.detectors.registry",
    "log_flagged_share": "lcmem_cli.engine.serving.metric",
    "show_progress": "lcmem_cli.cli.render",
}

__all__ = [
    "Detector",
    "FeatureSet",
    "FlaggedShare",
    "Guard",
    "Index",
    "Verdict",
    "__version__",
    "audit",
    "audit_features",
    "build_index",
    "in_memory",
    "keep_freed_memory",
    "load_detector",
    "log_flagged_share",
    "show_progress",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'lcmem_cli' has no attribute '{name}'")
