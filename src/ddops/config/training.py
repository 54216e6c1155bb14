"""What every stage that trains is told about its optimisation. Imports no torch."""

from __future__ import annotations

from typing import Literal

from ddops.config.base import DecayRate, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config


@config
class TrainingConfig:
    """One optimisation: linear warm-up then cosine decay, gradient clipping, EMA weights as the result."""

    steps: PositiveInt
    batch_size: PositiveInt
    processes: PositiveInt
    """Processes that share each batch on a CPU, a thread each; 1 leaves the threads to torch. See ``replicas``."""
    optimizer: Literal["adamw", "muon"]
    """``muon`` (arXiv 2502.16982) trains the matrices of the transformer blocks, AdamW the rest; about a third fewer
    steps on the digits."""
    learning_rate: PositiveFloat
    final_learning_rate: NonNegativeFloat
    """Where the cosine ends."""
    warmup_steps: NonNegativeInt
    betas: tuple[DecayRate, DecayRate]
    weight_decay: NonNegativeFloat
    gradient_clip: PositiveFloat
    """Largest norm of the gradient."""
    ema_decay: DecayRate
    log_every: PositiveInt
    """Steps between points of the curves."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints: what a killed run loses at most."""
    compile_blocks: bool = False
    """Compile the transformer's blocks (torch.compile): minutes at the start, other rounding, less traffic."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' products; weights, optimiser, EMA, losses and closed forms are in float32 either way."""

    def __post_init__(self) -> None:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError("final_learning_rate must not exceed learning_rate")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceed steps {self.steps}")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of the {self.processes} processes")


def require_samples_for_all(evaluate_count: int, processes: int) -> None:
    """Each process of a training draws a part of the samples behind its curves.

    Raises:
        ValueError: there are fewer samples than processes.
    """
    if evaluate_count < processes:
        raise ValueError(f"evaluate_count {evaluate_count} is less than the {processes} processes that share it")
