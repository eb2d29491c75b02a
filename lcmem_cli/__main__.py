"""``python -m lcmem_cli`` and the ``lcmem`` executable."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from lcmem_cli.cli import interrupts

    interrupts.install()
    from lcmem_cli.cli.app import app

    app(prog_name="lcmem")


if __name__ == "__main__":
    main()
