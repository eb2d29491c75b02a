"""What makes short commands start sooner."""

from __future__ import annotations

import importlib.metadata


def lighten_diffusers() -> None:
    """Let diffusers load its autoencoders without ``scipy.stats`` and a list of all packages.

    Its samplers, which come along unused, take ``scipy.stats`` in: more than a tenth of the time
    from the start of ``lcmem infer`` to its answer. It also lists the files of every package that
    is installed, to learn from which ones modules come that the autoencoders do not use. Only for a
    process that is the command's own, because samplers with beta schedules do not work in it
    afterwards. Where diffusers has no such switch, nothing changes but the time.
    """
    list_packages = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = dict
    try:
        from diffusers.utils import import_utils
    finally:
        importlib.metadata.packages_distributions = list_packages

    if hasattr(import_utils, "_scipy_available"):
        import_utils._scipy_available = False
