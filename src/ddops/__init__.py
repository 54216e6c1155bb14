"""ddops: distil image autoregressive models into one-step generators, and ship them.

from ddops import OneStepPipeline

pipe = OneStepPipeline.from_pretrained("artifacts/bundle")
pipe(class_labels=[3, 7], seed=0).images[0].save("three.png")
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddops.inference.pipeline import OneStepPipeline, PipelineOutput

__all__ = ["OneStepPipeline", "PipelineOutput", "__version__"]
__version__ = "0.1.0"

# Before torch is loaded: OpenMP threads that spin only briefly while they wait. A pool that spins without end beside
# any other busy process on its cores was seen to run a training step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    """What is exported here is loaded when it is asked for: the command line and the stages do without it."""
    if name not in ("OneStepPipeline", "PipelineOutput"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddops.extras import explained

    try:
        from ddops.inference import pipeline
    except ImportError as error:
        raise explained(error, name) from None
    return getattr(pipeline, name)
