"""``python -m lcmem_cli`` and the ``lcmem`` executable."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command line."""
    _open_closed_streams()
    from lcmem_cli.cli import interrupts
    from lcmem_cli.engine.distributed import keep_freed_memory

    interrupts.install()
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # names of files need not fit a terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from lcmem_cli.cli.app import app

    try:
        app(prog_name="lcmem")
    except SystemExit as end:
        _flush(failed=bool(end.code))
        raise


def _open_closed_streams() -> None:
    """Send to nowhere what belongs to a stream that the caller closed, as ``>&-`` does.

    Otherwise the next file that is opened would take its number, and what a library writes to
    standard error would land in that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _flush(*, failed: bool) -> None:
    """Write what is still to be written; a reader that has gone, as ``head`` does, is no error.

    Args:
        failed: the command did, and has said why.

    Raises:
        SystemExit: it cannot be written.
    """
    from lcmem_cli.cli import render

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # Python flushes once more at its end and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not failed and not isinstance(error, BrokenPipeError):
                render.error(f"the output cannot be written: {error.strerror}")
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
