"""A bound on the bytes of the images that are decoded at one time, however many threads there are.

Threads that decode ordinary images never wait. Two very large ones are decoded one after the other,
and an image that is larger than the bound is decoded alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

MAX_BYTES = 1 << 30
LARGE_PIXELS = 1 << 25
"""From here on an image of which a small copy is wanted is shrunk while it is decoded."""
_TURN = threading.Condition()
_in_use = 0


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Wait until an image of this size fits under the bound beside those in work."""
    global _in_use
    with _TURN:
        _TURN.wait_for(lambda: _in_use == 0 or _in_use + num_bytes <= MAX_BYTES)
        _in_use += num_bytes
    try:
        yield
    finally:
        with _TURN:
            _in_use -= num_bytes
            _TURN.notify_all()
