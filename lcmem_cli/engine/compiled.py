"""Compiling loops over numbers with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Return a decorator that compiles on first use and keeps the code on disk, where it can.

    Args:
        **options: of ``numba.njit``.
    """
    import numba

    def decorate(function: Function) -> Function:
        try:
            made: Function = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for compiled code
            made = numba.njit(**options)(function)
        return made

    return decorate
