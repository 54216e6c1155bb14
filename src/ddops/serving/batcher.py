"""Dynamic batching: images of many requests drawn together, in a bounded queue, each with a deadline."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ddops.inference.seeds import Draw, Pixels

Render = Callable[[Sequence[Draw]], Pixels]
"""Pixels (B, H, W, I) of some draws. Called from one thread, one batch at a time."""


class QueueFull(Exception):
    """No room for a request now."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many images are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Job:
    draw: Draw
    arrived: float
    done: asyncio.Future[Pixels]


class Batcher:
    """Belongs to one event loop. Drawing happens in a thread of its own, so that the loop stays responsive."""

    def __init__(self, render: Render, *, max_batch: int, max_delay_s: float, queue_limit: int) -> None:
        self._render = render
        self._max_batch, self._max_delay_s, self._queue_limit = max_batch, max_delay_s, queue_limit
        self._waiting: deque[_Job] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._seconds_an_image = 0.05  # a first guess; then a moving average
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._worker = asyncio.create_task(self._work())

    @property
    def waiting(self) -> int:
        """Images in the queue, without those being drawn."""
        return len(self._waiting)

    async def draw(self, draws: Sequence[Draw], timeout_s: float) -> list[Pixels]:
        """Pixels (H, W, I) of each; all of them or none.

        Raises:
            QueueFull: they do not fit into the queue. TimeoutError: they were not drawn in time; what of them still
                waits is dropped.
        """
        if self._closing:
            raise RuntimeError("this batcher is closed")
        if len(self._waiting) + len(draws) > self._queue_limit:
            raise QueueFull(max(1, math.ceil(len(self._waiting) * self._seconds_an_image)))
        loop = asyncio.get_running_loop()
        jobs = [_Job(draw, loop.time(), loop.create_future()) for draw in draws]
        self._waiting.extend(jobs)
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*(job.done for job in jobs))
        finally:
            for job in jobs:
                job.done.cancel()

    async def close(self) -> None:
        """Take in nothing more, draw what waits, and end."""
        self._closing = True
        self._changed.set()
        await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._drop_finished()
            if not self._waiting:
                if self._closing:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._fill(self._waiting[0].arrived + self._max_delay_s)
            self._drop_finished()
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            if not batch:
                continue
            started = loop.time()
            try:
                pixels = await loop.run_in_executor(self._thread, self._render, [job.draw for job in batch])
            except Exception as error:  # whatever the backend raises belongs to the requests of this batch
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(error)
                continue
            self._seconds_an_image += 0.2 * ((loop.time() - started) / len(batch) - self._seconds_an_image)
            for job, one in zip(batch, pixels, strict=True):
                if not job.done.done():
                    job.done.set_result(one)

    async def _fill(self, until: float) -> None:
        """Wait for a full batch, but not past ``until``."""
        loop = asyncio.get_running_loop()
        while len(self._waiting) < self._max_batch and not self._closing and (left := until - loop.time()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _drop_finished(self) -> None:
        """Forget images whose request gave up."""
        self._waiting = deque(job for job in self._waiting if not job.done.done())
