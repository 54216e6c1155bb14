"""ddops: distil image autoregressive models into one-step generators, and ship them."""

__version__ = "0.1.0"
