"""ddops: distil image autoregressive models into one-step generators, and ship them."""

import os

__version__ = "0.1.0"

# Before torch is loaded: OpenMP threads that wait asleep instead of spinning. A spinning pool that shares its cores
# with any other process was seen to run a training step ten to twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
