"""Who starts the processes that share a training: the training itself, by forking, or torchrun.

A stage whose trainings share their batches starts itself anew under torchrun, with as many processes as its trainings'
``processes``, where there is a GPU for each; elsewhere it forks them, and they compute on the CPU. ``DDOPS_LAUNCHER``
(``fork`` or ``torchrun``) decides otherwise. Not a parameter of the pipeline: on a CPU the bytes do not depend on it. A
stage that torchrun started, by hand and on several machines perhaps, takes its place among the others from torchrun's
environment.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from ddops.config.training import TrainingConfig
from ddops.training.errors import LaunchError

LAUNCHER = "DDOPS_LAUNCHER"
LAUNCHERS = ("auto", "fork", "torchrun")
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
"""torchrun sets it in the processes that it starts."""
EXIT_LOST = 75
"""As ``EXIT_TRY_AGAIN``: what a stage exits with when one of its processes is gone."""


def processes_wanted(section: Any) -> int:
    """Processes to start with torchrun for the trainings of a section of ``params.yaml``; 0 where none are.

    Raises:
        LaunchError: an unknown launcher; trainings of one stage that want different numbers; a stage that trains
            nothing, started by torchrun.
    """
    launcher = os.environ.get(LAUNCHER, "auto")
    if launcher not in LAUNCHERS:
        raise LaunchError(f"{LAUNCHER}={launcher}: valid: {', '.join(LAUNCHERS)}")
    trainings = _trainings(section)
    if TORCHRUN_ID in os.environ:
        if not trainings and int(os.environ["WORLD_SIZE"]) > 1:
            raise LaunchError(
                "this stage trains nothing that torchrun's processes could share; run it without torchrun"
            )
        return 0
    most = max(trainings.values(), default=1)
    if launcher == "fork" or most == 1 or (launcher == "auto" and _gpus() < most):
        return 0
    if len(set(trainings.values())) > 1:
        found = ", ".join(f"{name}.processes {count}" for name, count in trainings.items())
        raise LaunchError(f"{found}: torchrun starts as many for all trainings of a stage; let them agree")
    return most


def torchrun(module: str, processes: int) -> int:
    """Run a stage's module in ``processes`` processes of this machine; gives the exit code of the first that failed."""
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from ddops.training.replicas import use_loopback

    use_loopback()
    # torchrun's own choice is one, and rounding may depend on it.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    options = ["--standalone", f"--nproc-per-node={processes}", "--local-addr=127.0.0.1", "--max-restarts=0"]
    try:
        run(parse_args([*options, "-m", module]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        what = f"process {rank} of {processes} was ended by signal {-failure.exitcode}"
        print(f"\n{module}: {what}; run the same command again", file=sys.stderr)
        return EXIT_LOST
    return 0


def _gpus() -> int:
    # Here, because stages that share no training start without torch.
    import torch

    return torch.cuda.device_count()


def _trainings(section: Any) -> dict[str, int]:
    """Processes of each training in a section, by name."""
    if section is None:
        return {}
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {name: value.processes for name, value in values.items() if isinstance(value, TrainingConfig)}
