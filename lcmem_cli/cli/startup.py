"""What makes short commands start sooner."""

from __future__ import annotations


def leave_out_samplers() -> None:
    """Let diffusers load its autoencoders without ``scipy.stats``.

    Its samplers, which come along unused, take that in: more than a tenth of the time from the
    start of ``lcmem infer`` to its answer. Only for a process that is the command's own, because
    samplers with beta schedules do not work in it afterwards. Where diffusers has no such switch,
    nothing changes but the time.
    """
    from diffusers.utils import import_utils

    if hasattr(import_utils, "_scipy_available"):
        import_utils._scipy_available = False
