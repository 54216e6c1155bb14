"""Devices, and how long a list of operators takes on one: a roofline for each operator, and the time to launch it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from ddops.costs.ledger import Operator

ASSUMED_SHARE: Final = 0.7
"""Of a vendor's peak that large products reach in PyTorch; where a rate was measured, it is that one."""
EAGER_LAUNCH: Final = 6e-6
"""Seconds between two operators that Python launches on a GPU."""


IN_A_MODEL: Final = 0.75
"""Speed of operators in a model, which find their arrays in farther caches, over that in a probe's loop: fitted on the
steps of the preset digits (benchmarks/plan_check.py), and checked on full-size models."""


class UnknownDevice(ValueError):
    """No device of that name."""


@dataclass(frozen=True)
class Device:
    """What a device computes, moves and holds."""

    flops: float
    """Float32 operations a second of large products, as PyTorch computes them unless told otherwise (no TF32)."""
    half_flops: float
    """The same in bfloat16, accumulated in float32."""
    bandwidth: float
    """Bytes a second, read and written together."""
    launch: float
    """Seconds an operator takes however small it is."""
    memory: float
    """Bytes."""
    source: str
    overlaps: bool = True
    """Whether arithmetic, memory and launching go on at once, as on a GPU; a CPU's thread does one after the other."""
    streaming: float | None = None
    """Bytes a second of products of a few rows by a matrix that no cache holds; None: as ``bandwidth``."""

    @property
    def kind(self) -> str:
        """As torch names it."""
        return "cuda" if self.overlaps else "cpu"

    def seconds(self, operators: Iterable[Operator]) -> float:
        """Each operator takes what its arithmetic, its bytes or its launch takes, whichever is most; or all of it."""
        together = max if self.overlaps else _sum

        def rate(operator: Operator) -> float:
            return self.half_flops if operator.half else self.flops

        def bandwidth(operator: Operator) -> float:
            return self.streaming if operator.streamed and self.streaming else self.bandwidth

        return sum(together(each.flops / rate(each), each.bytes / bandwidth(each), self.launch) for each in operators)


def _sum(*parts: float) -> float:
    return sum(parts)


def _card(flops: float, half_flops: float, bandwidth: float, memory: float) -> Device:
    share = ASSUMED_SHARE
    source = f"the vendor's peaks times {share:g}, which is an assumption"
    return Device(share * flops, share * half_flops, share * bandwidth, EAGER_LAUNCH, memory, source)


DEVICES: Final = {
    # Measured on such a card: bfloat16 and bandwidth. Float32 is the vendor's peak times the assumed share.
    "h200": Device(
        ASSUMED_SHARE * 67e12,
        788e12,
        4.3e12,
        EAGER_LAUNCH,
        139 * 2**30,
        "bfloat16 rate and bandwidth measured on such a card, float32 assumed",
    ),
    "h100": _card(67e12, 989e12, 3.35e12, 80e9),
    "a100": _card(19.5e12, 312e12, 2.04e12, 80e9),
    "4090": _card(82.6e12, 165e12, 1.01e12, 24e9),
    # The machine of benchmarks/: CPU time of one thread, see benchmarks/results/plan_check_amx.json.
    "cpu2": Device(
        145e9, 300e9, 13e9, 1e-5, 24e9, "one thread of a core with AVX-512 and AMX, measured", overlaps=False
    ),
}
THIS: Final = "this"


def find_device(name: str) -> Device:
    """A device of the table, or ``this`` machine, probed.

    Raises:
        UnknownDevice: neither.
    """
    if name.lower() == THIS:
        return probe()
    if name.lower() not in DEVICES:
        raise UnknownDevice(f"no device {name!r} in the table; valid: {', '.join(DEVICES)}, {THIS}")
    return DEVICES[name.lower()]


def probe(clock: Callable[[], float] = time.perf_counter) -> Device:
    """This machine's CPU as it is now, with torch's number of threads; takes a second or two.

    The rate is a product's of 768 x 768; the bandwidth that of the operators that transformers are made of (addition,
    SiLU, normalisation) on arrays of 3 MB; that of streamed products of two rows by matrices of 100 MB together; a
    launch that of a linear layer of 64 numbers.
    """
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    x, y, small, layer = torch.randn(1024, 768), torch.randn(1024, 768), torch.randn(1, 64), nn.Linear(64, 64)
    size = 4.0 * x.numel()
    passes = [
        (3 * size, lambda: x + y),
        (2 * size, lambda: F.silu(x)),
        (2 * size, lambda: F.rms_norm(x, (768,))),
        (3 * size, lambda: x * y),
    ]
    moved = sum(moved for moved, _ in passes)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    rows, matrices = torch.randn(2, 1024), torch.randn(6, 4096, 1024).unbind()
    return Device(
        flops=IN_A_MODEL * 2 * 768.0**3 / _seconds(clock, lambda: a @ b),
        half_flops=IN_A_MODEL * 2 * 768.0**3 / _seconds(clock, lambda: half_a @ half_b),
        bandwidth=IN_A_MODEL * moved / sum(_seconds(clock, run) for _, run in passes),
        launch=_seconds(clock, lambda: layer(small), repeats=200) / IN_A_MODEL,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        source=f"this machine's CPU, probed now with {torch.get_num_threads()} threads",
        overlaps=False,
        streaming=4.0 * 6 * 4096 * 1024 / _seconds(clock, lambda: [F.linear(rows, matrix) for matrix in matrices], 1),
    )


def _seconds(clock: Callable[[], float], run: Callable[[], object], repeats: int = 5) -> float:
    """Of one call: the median over three rounds."""
    run()
    rounds = []
    for _ in range(3):
        begun = clock()
        for _ in range(repeats):
            run()
        rounds.append((clock() - begun) / repeats)
    return sorted(rounds)[1]
