"""ddops: distil image autoregressive models into one-step generators, and ship them."""

import os

__version__ = "0.1.0"

# Before torch is loaded: OpenMP threads that spin only briefly while they wait. A pool that spins without end beside
# any other busy process on its cores was seen to run a training step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
