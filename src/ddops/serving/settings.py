"""How a server behaves. Imports nothing heavy, so that a mistake shows at once."""

from __future__ import annotations

from typing import Literal

from ddops.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config


@config
class ServeSettings:
    """Defaults suit a small model on a CPU."""

    backend: Literal["torch", "onnx", "tensorrt"] = "onnx"
    device: str | None = None
    threads: NonNegativeInt = 0
    """Of ONNX Runtime for one batch; 0: its own choice."""
    max_batch: PositiveInt = 16
    max_delay_ms: NonNegativeFloat = 5.0
    """How long the first image of a batch waits for others; 0 with ``max_batch`` 1 is no batching."""
    queue_limit: PositiveInt = 256
    """Images waiting; a request that would exceed it is turned away with 429."""
    deadline_s: PositiveFloat = 30.0
    """The longest that a request may take, and what it takes at most where it says nothing."""
    max_count: PositiveInt = 16
    """Images a request."""
    max_body_bytes: PositiveInt = 16_384
    max_prompt: PositiveInt = 1000
    """Characters of a prompt."""
    text_encoder: str | None = None
    """Directory of the text encoder's files, where the bundle does not hold them and the hub is not to be asked."""
    drain_delay_s: NonNegativeFloat = 0.0
    """Between SIGTERM and no longer accepting connections: time for a balancer to see that /readyz says no."""
    drain_timeout_s: PositiveFloat = 60.0
    """What accepted requests are given to finish after that."""
    reload_every_s: PositiveFloat = 1.0
    """How often the bundle's place is looked at for a newer one."""

    def __post_init__(self) -> None:
        if self.max_count > self.queue_limit:
            raise ValueError(f"queue_limit {self.queue_limit} is less than max_count {self.max_count}")
