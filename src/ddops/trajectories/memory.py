"""How many samples a batch may hold, from the memory at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from ddops.config.models import ModelConfig
from ddops.config.stages import Precision
from ddops.trajectories.errors import DatasetError

FLOAT: Final = 4
KEY_OR_VALUE: Final = {"float32": 4, "bfloat16": 2}
LOGIT_COPIES: Final = 8
"""Arrays of the size of a level's logits at a time: both halves of guidance, their mixture, its filters' sort (whose
indices count twice), its normalisation."""
ACTIVATION_COPIES: Final = 12
"""Arrays of a level's tokens by the transformer's width at a time, in a block's feed-forward layer."""
SHARE: Final = 0.8
"""Of the free memory: the rest is for the allocator, and for what is not counted."""
LARGEST: Final = 512
"""From here on a larger batch is no faster on the largest cards, and a killed run loses more."""
MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/sys/fs/cgroup")


def sample_bytes(model: ModelConfig, precision: Precision) -> int:
    """Bytes that a sample of a batch needs while a teacher is sampled with guidance: keys and values in the given
    precision, and the largest level's activations and logits, of which float32 has the residual stream and all logits.
    The flow map works in chunks, whose size does not depend on the batch.
    """
    length, largest = sum(model.level_sizes), max(model.level_sizes)
    # A caption passes through the transformer at once, before the first level.
    caption = getattr(model, "condition_tokens", 1)
    cache = 2 * model.depth * model.width * (length + caption - 1)
    activations = ACTIVATION_COPIES * model.width * max(largest, caption)
    logits = LOGIT_COPIES * model.codebook_size * largest
    return 2 * KEY_OR_VALUE[precision] * cache + FLOAT * (2 * activations + logits)


def fitting_batch(model: ModelConfig, weight_bytes: int, free: int, precision: Precision) -> int:
    """The largest power of two of samples, up to ``LARGEST``, that fits beside the weights into ``free`` bytes; at
    least one."""
    room = (SHARE * free - weight_bytes) / sample_bytes(model, precision)
    return min(LARGEST, 1 << (max(1, int(room)).bit_length() - 1))


def free_bytes(workers: int) -> int:
    """Memory free for each of ``workers`` processes: on the fullest GPU, or in this machine or container.

    Raises:
        DatasetError: there is neither a GPU nor Linux to ask.
    """
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        free = min(int(torch.cuda.mem_get_info(device)[0]) for device in range(devices))
        return free // -(-workers // devices)
    if not MEMINFO.exists():
        raise DatasetError("trajectories.batch_size: auto asks Linux for the free memory; give a number here")
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()).isdecimal():
        available = min(available, int(most) - int(used.read_text()))
    return max(0, available) // workers
