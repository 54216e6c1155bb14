"""What a computation costs, operator by operator: arithmetic, bytes moved, and what is kept for the backward pass.

The real code runs on torch's fake tensors, which have shapes and no values: nothing is computed or allocated, and what
is counted is what would run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATTENTION = "_scaled_dot_product"
STREAMED_BYTES = 4e6
FEW_ROWS = 64
Module = TypeVar("Module", bound=nn.Module)


class Operator(NamedTuple):
    """One operator of a run."""

    flops: float
    """Multiplications and additions of products and convolutions."""
    bytes: float
    """Of its inputs and outputs."""
    half: bool = False
    """Whether it computes in bfloat16."""
    streamed: bool = False
    """Whether it is a product of a few rows by a matrix that no cache holds: reading that is what it takes."""


class Ledger(TorchDispatchMode):
    """Notes every operator while it is entered. Views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    @property
    def flops(self) -> float:
        return sum(operator.flops for operator in self.operators)

    @property
    def bytes(self) -> float:
        return sum(operator.bytes for operator in self.operators)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # a linear layer, say, arrives whole there: its parts are what is known
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            half = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
            flops = _flops(func, args, kwargs, out)
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            streamed = flops > 0 and _is_streamed(flops, given)
            self.operators.append(Operator(flops, sum(map(_bytes, tensors)), half, streamed))
        return out


def _bytes(tensor: Tensor) -> float:
    """What is read of a tensor; an expanded one is read once."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _is_streamed(flops: float, inputs: list[Tensor]) -> bool:
    largest = max(inputs, key=_bytes)
    return _bytes(largest) > STREAMED_BYTES and flops < 2 * FEW_ROWS * largest.numel()


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = func.overloadpacket
    if packet.__name__.startswith(ATTENTION):
        return _attention_flops(packet.__name__, args, kwargs)
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def _attention_flops(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Two products of (queries, keys) pairs forward, five backward; a causal one has half of the pairs."""
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    *batch, queries, width = query.shape
    keys = key.shape[-2]
    flags = [value for value in (*args, kwargs.get("is_causal")) if isinstance(value, bool)]
    pairs = queries * (queries + 1) / 2 if any(flags) and queries == keys else queries * keys
    rows = torch.Size(batch).numel()
    return float((5 if backward else 2) * 2.0 * rows * pairs * width)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside have no values."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        # Copying a module asks its parameters for their address, which torch says it will refuse one day.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def without_values(build: Callable[[], Module]) -> Module:
    """A model of shapes alone; to be called under :func:`shapes_only`. Initialisations may look at values, so it is
    built on the meta device first."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu")


def kept_bytes(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What ``run`` returns, and the bytes that its graph keeps for the backward pass, each storage once."""
    # Storages, not their sizes: the address of one that is let go may be given to another.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = run()
    return value, float(sum(storage.nbytes() for storage in kept.values()))
