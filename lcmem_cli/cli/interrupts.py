"""Ending on Ctrl-C and on SIGTERM: at once, with one line, and leaving nothing half-written.

A signal becomes an exception in the main thread, so locks and temporary files are cleared away.
Where that thread is held up in a library, as in a long computation or while it waits for other
processes, a thread that waits for signals ends the process after a grace period. That loses
nothing: every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

GRACE_SECONDS = 5.0
_CONTINUES = "the same command continues where it stopped, a training with --resume"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


def install() -> None:
    """Take over the two signals; one that is ignored, as under ``nohup``, stays so."""
    waiting, waking = socket.socketpair()
    waking.setblocking(False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    arguments = (waiting, waking)  # both must live as long as the process
    threading.Thread(target=_watch, args=arguments, daemon=True, name="lcmem-signals").start()


def exit_code(error: BaseException) -> int | None:
    """Return the exit code where an interruption caused an error, otherwise ``None``.

    A library that is interrupted may turn the exception into one of its own.
    """
    if _received:
        return 128 + _received[0]
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def message() -> str:
    """Return what to tell the user, who may not have stopped this process himself."""
    is_one_of_many = os.environ.get("WORLD_SIZE", "1") != "1"
    if is_one_of_many and _received and _received[0] == signal.SIGTERM:
        return (
            "stopped by SIGTERM, which a launcher sends where another process has failed or was "
            f"killed (see its error, or the launcher's report); {_CONTINUES}"
        )
    return f"interrupted; {_CONTINUES}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    for each in _SIGNALS:
        signal.signal(each, _end)  # a second one does not wait
    raise Interrupted


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _watch(waiting: socket.socket, waking: socket.socket) -> None:
    while True:
        number = waiting.recv(1)[0]
        if number in _SIGNALS:
            break
    time.sleep(GRACE_SECONDS)
    sys.stderr.write(f"error: {message()}\n")
    sys.stderr.flush()
    os._exit(128 + number)
