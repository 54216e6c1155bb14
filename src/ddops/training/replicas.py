"""Data-parallel training: one process for each share of the batch, on a core of this machine or a GPU of its own.

Small models spend their steps in many short operations, which several threads of one process hardly speed up; several
processes do. The replicas are forked when the training starts, so they share data set, teacher and objective, and end
with it. They hold the same weights at every step: each computes the gradient of its share of the batch, and the
gradients are averaged. An evaluation's samples are shared too. Rank 0 is the process that called; it alone writes and
shows progress.

Where torchrun started the stage (:mod:`ddops.stages.launch`), its processes are the replicas and nothing is forked:
each runs the stage up to its last training, and rank 0 goes on from there. On a CPU the bytes are the same; see
:mod:`ddops.training.device` for who has a GPU.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ddops.training.errors import LaunchError, ReplicaLost

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Replicas:
    """This process's place among the replicas."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor, in place, by its mean over the replicas. All of them must call it.

        Raises:
            ReplicaLost: another replica has ended.
        """
        if self.size == 1:
            return
        flat_N = torch.cat([tensor.flatten() for tensor in tensors])
        with _meeting():
            dist.all_reduce(flat_N)
        flat_N /= self.size
        for tensor, mean_N in zip(tensors, flat_N.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean_N.view_as(tensor))


def own_share(indices_B: Tensor) -> Tensor:
    """Those of a batch's samples that this process trains on: every ``size``-th, as the loops deal them out."""
    return indices_B[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else indices_B


def own_part(count: int) -> slice:
    """This process's part of ``count`` samples in a row, which :func:`gathered` puts together again."""
    if not dist.is_initialized():
        return slice(0, count)
    return _part(count, dist.get_rank())


def gathered(part: Tensor, count: int) -> Tensor:
    """All ``count`` rows of a tensor on the CPU of which each process has computed those of its :func:`own_part`. All
    processes must call it, and each has all rows then.

    Raises:
        ReplicaLost: another process has ended.
    """
    if not dist.is_initialized():
        return part
    size = dist.get_world_size()
    padded = part.new_zeros(-(-count // size), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size)]
    with _meeting():
        dist.all_gather(parts, padded)
    lengths = [(own := _part(count, rank)).stop - own.start for rank in range(size)]
    return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])


def _part(count: int, rank: int) -> slice:
    size = dist.get_world_size()
    return slice(count * rank // size, count * (rank + 1) // size)


@contextmanager
def _meeting() -> Iterator[None]:
    """Around what all processes do together: it fails where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ReplicaLost(f"a replica of this training ended; run the same command again ({error})") from error


@contextmanager
def replicas(size: int, *, work: bool = True, stay: bool = False) -> Iterator[Replicas]:
    """Run the body in ``size`` processes. Only rank 0 comes out of it; the others end with the body, or with rank 0.

    Args:
        work: whether the body has anything to share; where it has not, nothing is forked.
        stay: torchrun's processes all come out of the body, since the stage has another training for them.

    Raises:
        ReplicaLost: see :meth:`Replicas.average`.
        LaunchError: torchrun started another number of processes.
    """
    if dist.is_torchelastic_launched():
        with _launched(size, stay) as group:
            yield group
        return
    if size == 1 or not work:
        yield Replicas(0, 1)
        return
    threads = torch.get_num_threads()
    # Before the fork: a child has none of the threads its parent had, and must not look for them.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as rendezvous:
        rank, children = _fork(size)
        try:
            _join(rank, size, Path(rendezvous))
            yield Replicas(rank, size)
        except BaseException as error:
            if rank:
                _end_replica(error)
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise
        else:
            if rank:
                _end_replica(None)
        finally:
            for child in children:
                os.waitpid(child, 0)
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


@contextmanager
def _launched(size: int, stay: bool) -> Iterator[Replicas]:
    """In one of torchrun's processes: join the others, which hold the same state by now."""
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if started != size:
        raise LaunchError(f"torchrun started {started} processes, the training's `processes` is {size}; let them agree")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    # Rank 0 must not remove or replace a checkpoint that another has yet to read.
    dist.barrier()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Replicas(rank, size)
    except BaseException as error:
        if rank:
            _end_replica(error)
        raise
    finally:
        torch.set_num_threads(threads)
    if rank and not stay:
        _end_replica(None)


def _fork(size: int) -> tuple[int, list[int]]:
    """This process's rank, and, for rank 0, the process ids of the others."""
    children: list[int] = []
    parent = os.getpid()
    for rank in range(1, size):
        if (child := os.fork()) == 0:
            _end_with(parent)
            return rank, []
        children.append(child)
    return 0, children


def _end_with(parent: int) -> None:
    """Have Linux kill this process when its parent ends; elsewhere it ends where the two next meet."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which ended before that was said
        os._exit(1)


def _join(rank: int, size: int, rendezvous: Path) -> None:
    use_loopback()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=size)


def use_loopback() -> None:
    """Have gloo's processes talk on this machine only, unless told otherwise."""
    # By name: what the host's own name resolves to may be no interface of it.
    if name := LOOPBACK.get(sys.platform):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _end_replica(error: BaseException | None) -> NoReturn:
    """Leave without the clean-up that belongs to rank 0. What ended rank 0 too is for rank 0 to say."""
    if error is not None and not isinstance(error, ReplicaLost | KeyboardInterrupt):
        traceback.print_exception(error)
    os._exit(0 if error is None else 1)
