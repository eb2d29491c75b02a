"""Working with several processes under ``torchrun`` or ``accelerate launch``.

One process is the special case of a group of size one, so callers need no branch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lcmem_cli.engine.errors import InputError, ProcessLostError, first_line

Item = TypeVar("Item")
RENDEZVOUS_SECONDS = 300.0
"""Within which all processes have to come together: they start at once and load the same code."""
_PATIENCE = datetime.timedelta(days=1)

_STDOUT, _STDERR = 1, 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class Ranks:
    """The group of processes that work on one command.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def local_size(self) -> int:
        """How many of them share this machine, as the launcher says."""
        told = os.environ.get("LOCAL_WORLD_SIZE", "")
        return min(self.size, int(told)) if told.isdigit() and int(told) > 0 else self.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part: every ``size``-th item, without overlap or padding."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            with collective():
                dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return every process's (picklable) value, in rank order, in every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with collective():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's (picklable) value in every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with collective():
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Turn the failure of a collective operation into an error of ours.

    Raises:
        ProcessLostError: another process ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "another process of this job ended or cannot be reached, and its own message says "
            f"why; start the job again ({str(error).splitlines()[0][:200]})"
        ) from error


def current_ranks(device: str = "auto") -> Ranks:
    """Return the group that this process was started in, joining it if need be.

    Args:
        device: ``"cpu"`` forces gloo; otherwise nccl is used where there is CUDA.

    Raises:
        ProcessLostError: the processes that the launcher started do not form one group.
    """
    rank, expected = launched()
    if expected <= 1:
        return Ranks()
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if dist.is_initialized():
        return Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    # Without CUDA it has to be told, or each process is a group of its own.
    cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        with _output_to_stderr():
            state = PartialState(cpu=cpu, timeout=datetime.timedelta(seconds=RENDEZVOUS_SECONDS))
            if dist.is_initialized():
                dist.barrier()  # a first exchange, because some backends connect only then
                _set_timeout(_PATIENCE)
    except RuntimeError as error:
        raise ProcessLostError(
            f"process {rank} of {expected} has waited {RENDEZVOUS_SECONDS:.0f} s for the others to "
            "start; one of them has ended, and its own message says why, or MASTER_ADDR and "
            f"MASTER_PORT do not reach it; start the job again ({first_line(error)})"
        ) from error
    if state.num_processes != expected:
        raise ProcessLostError(
            f"the launcher started {expected} processes, of which {state.num_processes} formed a "
            "group; start the job again, with --device cpu if there are no graphics cards"
        )
    atexit.register(_leave)
    return Ranks(rank=state.process_index, size=state.num_processes)


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Send to stderr what libraries print: gloo of torch 2.8 tells stdout that it has connected."""
    sys.stdout.flush()
    try:
        stdout = os.dup(_STDOUT)
    except OSError:  # it is closed
        yield
        return
    try:
        os.dup2(_STDERR, _STDOUT)
        yield
    finally:
        os.dup2(stdout, _STDOUT)
        os.close(stdout)


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Set how long a collective operation waits for the slowest process.

    A process that ends closes its connections, which ends the others at once, so that nothing is
    gained by giving up on one that is slow.
    """
    try:
        from torch.distributed import set_timeout
    except ImportError:  # called so before it became public
        from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout
    set_timeout(timeout)


def launched() -> tuple[int, int]:
    """Return the rank of this process and how many the launcher started.

    Raises:
        InputError: the launcher's variables are no numbers.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(size)
    except ValueError:
        raise InputError(f"RANK and WORLD_SIZE must be numbers, not {rank} and {size}") from None


def _leave() -> None:
    """Leave the group at exit: gloo's threads may otherwise abort a process that has finished."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def available_cpus() -> int:
    """Return how many CPUs this process may really use (affinity and cgroup quota), at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no quota: no such file, or "max" in it
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        count = min(count, int(quota) // int(period))
    return max(1, count)


def resolve_workers(num_workers: int, processes: int = 1) -> int:
    """Return the number of decoding workers for a process.

    Args:
        num_workers: what the user said; -1 means from the CPUs.
        processes: processes that share this machine's CPUs.
    """
    if num_workers >= 0:
        return num_workers
    return max(1, min(16, available_cpus() // max(1, processes)))


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone, here and in threads that are started inside.

    For work that has threads of its own; those of torch would fight with them for the cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the system.

    By default every large tensor is mapped anew, and the system clears each of its pages when it is
    first written: about half of the time of embedding on a CPU. With another C library nothing
    changes, nor where the user has set one of glibc's variables. It changes the whole process, so
    only a program that owns its process calls it, not the library.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _MALLOC_VARIABLES):
        return
    library = ctypes.CDLL(None)
    # Older versions refuse more than 32 MiB and answer 0.
    _ = library.mallopt(_M_MMAP_THRESHOLD, 2**30) or library.mallopt(_M_MMAP_THRESHOLD, 2**25)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resolve_device(device: str) -> str:
    """Return a torch device string for ``auto|cpu|cuda|mps``.

    Raises:
        InputError: the device asked for is not on this machine.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this machine has no usable CUDA device; try cpu")
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    if device == "mps" and not has_mps:
        raise InputError("--device mps: this machine has no Apple GPU; try cpu")
    return device
