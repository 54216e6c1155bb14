"""What a training step must not do: wait for the device, or change because of how it is run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddops.distill.dd1 import dd1_objective
from ddops.distill.dd2 import DD2Objectives
from ddops.losses.perceptual import classifier_distance
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.classifier import DigitsClassifier
from ddops.models.weights_dd2 import as_backbone
from ddops.training.loop import build_optimizers, compile_blocks, frozen_copy, update, update_ema
from ddops.training.replicas import Replicas
from helpers.tiny import RandomBatches, tiny, untrained

FAMILIES = ["llamagen", "var"]
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique")
"""Operators whose result the host needs before it can go on: on a GPU each empties the queue of work."""


class Waits(TorchDispatchMode):
    """Notes every operator that makes the host wait, and every call that brings a tensor to the host, which on a CPU
    is no operator."""

    def __init__(self):
        super().__init__()
        self.seen, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.__name__
        by_mask = name.startswith("index") and any(_is_mask(index) for index in tree_leaves(args[1:2]))
        by_counts = name.startswith("repeat_interleave.Tensor")  # as many as the counts add up to
        if by_mask or by_counts or any(name.startswith(waiting) for waiting in WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._patches = pytest.MonkeyPatch()
        for name in ("cpu", "tolist", "numpy"):
            self._patches.setattr(torch.Tensor, name, self._noted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.undo()
        return super().__exit__(*error)

    def _noted(self, name, method):
        def noted(tensor, *args, **kwargs):
            self.seen.append(name)
            return method(tensor, *args, **kwargs)

        return noted


def _is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


X, MASK = torch.arange(4.0), torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: float(X.sum()),
        lambda: bool(X.any()),
        lambda: X[MASK],
        lambda: X.clone().__setitem__(MASK, X[:3]),
        lambda: X.unique(),
        lambda: X.cpu(),
        lambda: X.tolist(),
        lambda: X.repeat_interleave(torch.tensor([1, 2, 1, 1])),
    ],
    ids=["float", "bool", "mask", "set by mask", "unique", "cpu", "tolist", "repeat_interleave"],
)
def test_the_watch_sees_what_waits(wait):
    with Waits() as waits:
        wait()
    assert waits.seen


def test_the_watch_lets_pass_what_does_not_wait():
    with Waits() as waits:
        X[torch.tensor([0, 1])] + torch.where(MASK, X, 0.0).softmax(0).argmax()
    assert waits.seen == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_dd1_waits_for_nothing(family):
    config = tiny(family).dd1
    teacher, student = untrained(family)
    student = frozen_copy(student).requires_grad_(True)
    distance = classifier_distance(DigitsClassifier(channels=32, feature_dim=8, dropout=0.0))
    objective = dd1_objective(teacher, RandomBatches(teacher), config, distance)
    optimizers, ema = build_optimizers(student, config.training), frozen_copy(student)
    with Waits() as waits:
        for step in range(2):
            values = objective(student, torch.arange(4), step)
            update(student, optimizers, values["loss"], 1e-3, 1.0, Replicas(0, 1))
            update_ema(ema, student, 0.9)
    assert waits.count > 100
    assert waits.seen == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_dd2_waits_for_nothing(family):
    config = tiny(family)
    teacher, generator = untrained(family)
    generator = frozen_copy(generator).requires_grad_(True)
    guidance = new_ar_diffusion(as_backbone(teacher), None)
    objectives = DD2Objectives(teacher, RandomBatches(teacher), config.dd2, config.sampling, config.dd1.start_positions)
    networks = {generator: config.dd2.training, guidance: config.dd2.guidance}
    optimizers = {network: build_optimizers(network, settings) for network, settings in networks.items()}
    with Waits() as waits:
        for step in range(2):
            values = objectives.guidance(generator, guidance, 4)
            update(guidance, optimizers[guidance], values["loss"], 1e-3, 1.0, Replicas(0, 1))
            values = objectives.generator(generator, guidance, torch.arange(4), step)
            update(generator, optimizers[generator], values["loss"], 1e-3, 1.0, Replicas(0, 1))
    assert waits.count > 100
    assert waits.seen == []


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_compute_the_same_and_keep_their_names(family):
    """With the backend that traces and does not generate code: what the option adds of ours, without the compiler."""
    teacher, student = untrained(family)
    plain, compiled = (frozen_copy(student).requires_grad_(True) for _ in range(2))
    compile_blocks(compiled, backend="aot_eager")
    x_BLC, labels_B = torch.randn(3, student.layout.length, teacher.codebook_VC.shape[1]), torch.arange(3)
    gradients = []
    for model in (plain, compiled):
        loss = model(x_BLC, labels_B, torch.zeros_like(labels_B)).logits_BLV.square().mean()
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters()], allow_unused=True))
    for expected, found in zip(*gradients, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert any(block._compiled_call_impl is not None for block in compiled.modules())
