"""Runs ``lcmem`` commands in processes of their own, and does things to them at a chosen moment.

One server process imports everything once and forks for each command, so that a command starts in
a tenth of a second. A fork has run no torch computation before, as a fresh process has not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

PRELOAD = (
    "torch", "timm", "diffusers.models.autoencoders.autoencoder_kl", "matplotlib.pyplot",
    "lcmem_cli.cli.app", "lcmem_cli.engine.training.stages", "lcmem_cli.engine.store.latents",
    "lcmem_cli.engine.evaluation.audit.run", "lcmem_cli.engine.evaluation.study.benchmark",
    "lcmem_cli.engine.evaluation.study.robustness", "lcmem_cli.engine.evaluation.indexing",
    "accelerate", "numba", "scipy.sparse.csgraph", "imagehash",
)  # fmt: skip
SECONDS = 100


@dataclasses.dataclass
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Running:
    """A command under way."""

    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder

    def wait_until_held(self) -> None:
        """Wait until it has come to where it was to be held."""
        deadline = time.monotonic() + SECONDS
        while not (self.folder / "held").exists():
            assert time.monotonic() < deadline, self._text("stderr")
            assert not (self.folder / "ended").exists(), self._text("stderr")
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Done:
        """Wait until it ends."""
        code = self.server.ask({"wait": self.pid})
        return Done(code, self._text("stdout"), self._text("stderr"))

    def _text(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")


class Server:
    """Starts commands.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def ask(self, request: dict) -> int:
        """Send a request and return the number that answers it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self, *arguments: object, at: tuple[str, int, str] | None = None, **options
    ) -> Running:
        """Start a command.

        Args:
            *arguments: as on the command line.
            at: ``(module:function, n, what)``: in the n-th call of that function ``hold`` (sleep
                for ever; ``hold-rank-1``: in one process), ``block`` (the same, in C code), or
                ``remove PATH``.
            **options: ``limit`` is the largest file in bytes; ``patches`` sets module attributes;
                ``environment`` adds variables.
        """
        folder = self.folder / f"{self.count:04d}"
        folder.mkdir()
        for name in ("stdout", "stderr"):  # a process may be killed before it makes them
            (folder / name).touch()
        self.count += 1
        request = {"folder": str(folder), "arguments": [str(part) for part in arguments], "at": at}
        kept = {k: v for k, v in os.environ.items() if k.startswith(("LCMEM_", "HF_"))}
        environment = {**kept, **options.pop("environment", {})}
        pid = self.ask({**request, "environment": environment, **options})
        return Running(self, pid, folder)

    def start_ranks(self, count: int, *arguments: object, **options) -> list[Running]:
        """Start a command in several processes that work together, as torchrun does."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        running = []
        for rank in range(count):
            group = {**common, **sizes, "RANK": rank, "LOCAL_RANK": rank}
            environment = {key: str(value) for key, value in group.items()}
            running.append(self.start(*arguments, environment=environment, **options))
        return running

    def run_ranks(self, count: int, *arguments: object, **options) -> Done:
        """Run a command in several processes; returns how the first one ended."""
        done = [running.wait() for running in self.start_ranks(count, *arguments, **options)]
        said = [other.stdout for other in done[1:]]
        assert not any(said), f"only the first one prints results: {said}"
        assert len({other.code for other in done}) == 1, [other.stderr for other in done]
        return done[0]

    def run(self, *arguments: object, **options) -> Done:
        """Run a command to its end."""
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(SECONDS)
        self.process.stdout.close()


def draw_nothing(figure: object, path: Path, **options: object) -> None:
    """Stand in for ``Figure.savefig``."""
    path.write_bytes(b"a plot")


def _serve() -> None:
    import importlib

    for name in PRELOAD:
        importlib.import_module(name)
    sys.modules["matplotlib.figure"].Figure.savefig = draw_nothing  # most of the time, otherwise
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(request)
        print(answer, flush=True)


def _child(request: dict) -> None:
    import faulthandler
    import importlib
    import resource
    import traceback

    from lcmem_cli.__main__ import main

    folder = Path(request["folder"])
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY), number)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # says where it hangs
        os.environ.update(request["environment"])
        if request.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
        for place, value in (request.get("patches") or {}).items():
            module, _, name = place.partition(":")
            setattr(importlib.import_module(module), name, value)
        if request["at"]:
            _act(folder, *request["at"])
        sys.argv = ["lcmem", *request["arguments"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "ended").touch()
        os._exit(code)


def _act(folder: Path, place: str, count: int, what: str) -> None:
    import ctypes
    import importlib

    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *way, name = name.split(".")
    for part in way:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def acting(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            if what.startswith("remove "):
                os.unlink(what.removeprefix("remove "))
            (folder / "held").touch()
            if what == "block":
                ctypes.CDLL(None).system(f"sleep {SECONDS}".encode())
            held = what == "hold" or what == f"hold-rank-{os.environ.get('RANK')}"
            while held:
                time.sleep(0.01)
        return original(*arguments, **options)

    setattr(owner, name, acting)


if __name__ == "__main__":
    _serve()
