"""TensorRT's nested phases as one line of progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ddops.export.tensorrt import Report


@contextmanager
def phase_bar(description: str) -> Iterator[Report]:
    """A bar over the outermost phase, which names the inner one that runs."""
    with tqdm(desc=description, unit="phase", leave=False, mininterval=1.0) as bar:
        outermost: list[str] = []

        def report(phase: str, done: int, total: int) -> None:
            outermost.extend([phase] * (not outermost))
            if phase != outermost[0]:
                bar.set_postfix_str(f"{phase} {done}/{total}", refresh=False)
                bar.update(0)
                return
            bar.total, bar.n = total, done
            bar.update(0)

        yield report
