"""Runs the suite with the lowest versions that pyproject.toml allows, or on the newest Python.

    python tests/lower_bounds.py                     # lowest direct versions, this Python
    python tests/lower_bounds.py --newest            # newest Python that torch has wheels for
    python tests/lower_bounds.py tests/test_cli.py   # some tests, or any other words for pytest

The virtual environment needs 6 GB. It is removed at the end unless --folder names one to keep.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = ["-e", ".[dev]"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--newest", action="store_true", help="highest versions, newest Python")
    parser.add_argument("--folder", type=Path, help="of the virtual environments, kept")
    arguments, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        uv = find_uv(folder)
        python = newest_python(uv) if arguments.newest else sys.executable
        resolution = "highest" if arguments.newest else "lowest-direct"
        made = folder / resolution
        run([uv, "venv", "--clear", "--python", python, str(made)])
        chosen = ["--resolution", resolution, "--python", str(made)]
        run([uv, "pip", "install", *chosen, *PROJECT])
        run([uv, "pip", "list", "--python", str(made)])
        # The commands that tests start are those of the environment.
        path = os.pathsep.join([str(made / "bin"), os.environ["PATH"]])
        command = [str(made / "bin" / "python"), "-m", "pytest", *words]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode


def find_uv(folder: Path) -> str:
    """Return uv: the one on the path, or one that pip installs in a place of its own."""
    found = shutil.which("uv")
    if found:
        return found
    place = folder / "uv"
    run([sys.executable, "-m", "venv", str(place)])
    run([str(place / "bin" / "pip"), "install", "--quiet", "uv"])
    return str(place / "bin" / "uv")


def newest_python(uv: str) -> str:
    """Return the newest Python of this machine that all dependencies have wheels or code for."""
    for minor in range(40, 9, -1):
        python = shutil.which(f"python3.{minor}")
        if python is None:
            continue
        words = ["pip", "compile", "--quiet", "--only-binary", "torch", "--extra", "dev"]
        resolving = subprocess.run(
            [uv, *words, "--python", python, "pyproject.toml"], cwd=ROOT, capture_output=True
        )
        if resolving.returncode == 0:
            print(f"Python 3.{minor} is the newest here that the dependencies support", flush=True)
            return python
        print(f"Python 3.{minor}: {resolving.stderr.decode().strip()}", flush=True)
    raise SystemExit("no Python of this machine can install the dependencies")


def run(command: list[str]) -> None:
    """Run a step; stop where it fails."""
    print("+", *command, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    raise SystemExit(main())
