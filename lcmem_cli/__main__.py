"""``python -m lcmem_cli`` and the ``lcmem`` executable."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line."""
    from lcmem_cli.cli import interrupts
    from lcmem_cli.engine.distributed import keep_freed_memory

    interrupts.install()
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # names of files need not fit a terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from lcmem_cli.cli.app import app

    app(prog_name="lcmem")


if __name__ == "__main__":
    main()
