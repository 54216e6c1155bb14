"""Shared by all tests."""

import torch

# Two threads on tiny tensors cost more than they give, and far more when the machine is busy.
torch.set_num_threads(1)
