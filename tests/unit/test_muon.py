"""Muon against PyTorch's own and against the singular value decomposition."""

import pytest
import torch

from ddops.training.muon import Muon, orthogonalise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 8), (8, 24), (8, 8), (24, 8)]


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24), (1, 8, 8)])
def test_orthogonalisation_is_the_quintic_in_the_singular_values(shape):
    """Closed form: the iteration keeps the singular vectors and takes each singular value through a polynomial."""
    matrices_NAB = random(shape, 0)
    u, values, vh = torch.linalg.svd(matrices_NAB.double(), full_matrices=False)
    values = values / torch.linalg.vector_norm(values, dim=1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert (values > 0.3).all()
    assert (values < 1.3).all()
    expected = u @ torch.diag_embed(values) @ vh
    torch.testing.assert_close(orthogonalise(matrices_NAB, COEFFICIENTS).double(), expected, atol=2e-5, rtol=0)


def test_a_zero_gradient_is_no_direction():
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 3), COEFFICIENTS), torch.zeros(1, 4, 3))


def trained(build):
    """Parameters after three steps of the same gradients; the last has none in the second."""
    parameters = [torch.nn.Parameter(random(shape, seed)) for seed, shape in enumerate(SHAPES)]
    optimizer = build(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    for step in range(3):
        for seed, parameter in enumerate(parameters):
            missing = step == 1 and parameter is parameters[-1]
            parameter.grad = None if missing else random(parameter.shape, 100 * step + seed)
        optimizer.step()
    return parameters, optimizer


def test_steps_are_pytorchs_but_for_its_rounding():
    """Momentum, weight decay, the step's size and parameters without a gradient; bfloat16 is two or three digits."""
    ours, optimizer = trained(lambda parameters: Muon(parameters, weight_decay=0.1))
    theirs, reference = trained(
        lambda parameters: torch.optim.Muon(parameters, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    )
    for seed, (a, b, shape) in enumerate(zip(ours, theirs, SHAPES, strict=True)):
        moved = (b.detach() - random(shape, seed)).norm()
        assert (a - b).norm() < 0.03 * moved
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
