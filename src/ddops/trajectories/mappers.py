"""Where shards are made: in this process, in several, or on a Dask cluster of machines. The bytes are the same."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch

from ddops.extras import explained
from ddops.trajectories.errors import DatasetError
from ddops.trajectories.shards import ShardPlan

Made = TypeVar("Made")
Mapper = Callable[[Callable[[ShardPlan], Any], Sequence[ShardPlan]], Iterator[Any]]
"""Applies a function to every plan and yields the results in any order. The function may travel to other processes."""


WORKERS = "DDOPS_WORKERS"
DASK = "DDOPS_DASK"


def workers_from_environment() -> int:
    """``DDOPS_WORKERS``: processes a machine.

    Raises:
        DatasetError: it is no number.
    """
    given = os.environ.get(WORKERS, "1")
    if not given.isdecimal() or int(given) < 1:
        raise DatasetError(f"{WORKERS}={given}: expected a number of processes, 1 or more")
    return int(given)


def from_environment() -> Mapper:
    """What the stage uses: a Dask cluster where ``DDOPS_DASK`` is its scheduler's address or ``local``, or
    ``DDOPS_WORKERS`` processes. Not parameters of the pipeline, because the bytes do not depend on them.

    Raises:
        DatasetError: the number is none.
    """
    workers = workers_from_environment()
    if address := os.environ.get(DASK):
        return dask(None if address == "local" else address, max(2, workers))
    return processes(workers) if workers > 1 else in_this_process


def in_this_process(make: Callable[[ShardPlan], Made], plans: Sequence[ShardPlan]) -> Iterator[Made]:
    """One after the other."""
    return map(make, plans)


def _with_threads(threads: int, make: Callable[[ShardPlan], Made], plan: ShardPlan) -> Made:
    """As many threads as the process that asked, because rounding depends on it."""
    torch.set_num_threads(threads)
    return make(plan)


def _take_a_device(started: Any) -> None:
    """The n-th process of a pool computes on the n-th GPU, where there are any."""
    with started.get_lock():
        number = started.value
        started.value += 1
    _use_device(number)


def _use_device(number: int) -> None:
    """Compute on this GPU, counted round, where there are any: what is put on "cuda" goes there from here on."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _on_a_dask_worker(threads: int, make: Callable[[ShardPlan], Made], plan: ShardPlan) -> Made:
    """As :func:`_with_threads`, on the GPU of the worker's place among those of its machine."""
    from distributed import get_client, get_worker

    worker = get_worker()
    # A worker that was started with one GPU visible to it (as dask-cuda does) has no other to choose.
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        host = worker.address.rpartition(":")[0]
        peers = sorted(address for address in get_client().nthreads() if address.rpartition(":")[0] == host)
        _use_device(peers.index(worker.address))
    return _with_threads(threads, make, plan)


def processes(count: int) -> Mapper:
    """``count`` processes of this machine, spread over its GPUs where it has any."""

    def mapper(make: Callable[[ShardPlan], Made], plans: Sequence[ShardPlan]) -> Iterator[Made]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, context, _take_a_device, (context.Value("i", 0),)) as pool:
            yield from pool.map(partial(_with_threads, torch.get_num_threads(), make), plans)

    return mapper


def dask(address: str | None = None, workers: int = 2) -> Mapper:
    """A Dask cluster: the one whose scheduler is at ``address``, else a local one of worker processes.

    A shard whose worker dies is made by another. The workers of a cluster must see the same paths.

    Raises:
        MissingExtra: ``distributed`` is not installed.
    """
    try:
        from distributed import Client, LocalCluster, as_completed
    except ModuleNotFoundError as error:
        raise explained(error, "a Dask cluster") from None

    def mapper(make: Callable[[ShardPlan], Made], plans: Sequence[ShardPlan]) -> Iterator[Made]:
        with ExitStack() as stack:
            cluster: Any = address or stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
            )
            client = stack.enter_context(Client(cluster))
            make_alike = partial(_on_a_dask_worker, torch.get_num_threads(), make)
            # Not pure: a shard that was deleted meanwhile must be made, not taken from the scheduler's memory.
            for future in as_completed(client.map(make_alike, plans, pure=False)):
                yield future.result()

    return mapper
