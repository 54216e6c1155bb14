"""The flow over a codebook: its solvers against closed forms, a fine float64 solve, and the distribution itself."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from ddops.flow import solvers
from ddops.flow.codebook import posterior_mean, score, velocity
from ddops.flow.solvers import flow_map, solve_flow

SOLVERS = ["adaptive", "multistep", "heun", "euler"]


def problem(n, v, c, *, unit=True, sharpness=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(v, c, generator=generator, dtype=dtype)
    if unit:
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    log_p = (sharpness * torch.randn(n, v, generator=generator, dtype=dtype)).log_softmax(-1)
    return torch.randn(n, c, generator=generator, dtype=dtype), log_p, codebook


def brute_posterior_mean(x, t, log_p, codebook):
    distance = (x[:, None] - t * codebook[None]).square().sum(-1)
    weights = (log_p - distance / (2 * (1 - t) ** 2)).softmax(-1)
    return (weights[..., None] * codebook[None]).sum(1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 0.99])
def test_posterior_mean_is_its_definition(t):
    x, log_p, codebook = problem(50, 20, 3)
    torch.testing.assert_close(
        posterior_mean(x, t, log_p, codebook), brute_posterior_mean(x, t, log_p, codebook), atol=1e-10, rtol=1e-10
    )


def test_a_time_for_each_token_equals_one_time_at_a_time():
    x, log_p, codebook = problem(4, 20, 3)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    together = velocity(x, t, log_p, codebook)
    for i in range(4):
        alone = velocity(x[i : i + 1], float(t[i]), log_p[i : i + 1], codebook)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_score_is_the_gradient_of_the_log_density():
    x, log_p, codebook = problem(10, 20, 3)
    t = 0.6
    x.requires_grad_()
    log_density = (log_p - (x[:, None] - t * codebook).square().sum(-1) / (2 * (1 - t) ** 2)).logsumexp(-1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(score(x.detach(), t, log_p, codebook), gradient)


def quantiles(noise, log_p):
    """F_p^{-1}(Phi(eps)), for codes in rising order."""
    u = torch.from_numpy(stats.norm.cdf(noise.numpy()))
    return (log_p.exp().cumsum(-1) < u).sum(-1)


@pytest.mark.parametrize(
    ("solver", "settings", "agreement"),
    [
        ("adaptive", {"tolerance": 1e-4}, 0.998),
        ("adaptive", {}, 0.99),
        ("multistep", {"evaluations": 64}, 0.99),
        ("heun", {"evaluations": 128}, 0.995),
        ("euler", {"evaluations": 256}, 0.98),
    ],
)
def test_one_dimensional_map_is_the_quantile_map(solver, settings, agreement):
    """In one dimension the flow is monotone, so it must be F_p^{-1}(Phi(eps)): an exact oracle."""
    codebook = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    noise, log_p, _ = problem(10_000, 8, 1)
    ids = flow_map(noise, log_p, codebook, solver=solver, **settings)
    assert (ids == quantiles(noise, log_p)).double().mean() > agreement


@pytest.mark.parametrize("solver", ["multistep", "heun", "euler"])
@pytest.mark.parametrize(("end", "open_at_the_end"), [(0.0, (0.9, 1.0)), (4.0, (0.0, 0.05))])
def test_where_the_grid_ends_does_not_matter(solver, end, open_at_the_end, monkeypatch):
    """At log-SNR 0 hardly a code is decided, at 4 nearly all are: the answer is the limit, not where the grid stops."""
    codebook = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    noise, log_p, _ = problem(5000, 8, 1)
    monkeypatch.setattr(solvers, "LOG_SNR_RANGE", (-3.0, end))
    found = solve_flow(noise, log_p, codebook, solver=solver, evaluations=401, tolerance=1e-4)
    assert (found.ids_N == quantiles(noise, log_p)).double().mean() > 0.99
    grid, test = 400 if solver == "heun" else 401, 1
    least, most = open_at_the_end
    assert least <= (found.evaluations_N > grid + test + 1).double().mean() <= most


def fine_solve(noise, log_p, codebook):
    """Runge and Kutta's fourth order in float64, on 150 steps from far before anything happens to far after: a solver
    that shares no line with those it judges."""
    noise, log_p, codebook = noise.double(), log_p.double(), codebook.double()
    half_norms = 0.5 * codebook.square().sum(-1)
    spread = (codebook - codebook.mean(0)).square().sum(-1).mean().sqrt()

    def logits(z, r):
        return log_p + r * z @ codebook.T - r**2 * half_norms

    def mean(z, r):
        return logits(z, r).softmax(-1) @ codebook

    grid = [0.0, *(torch.linspace(-5, 6, 150, dtype=torch.float64).exp() / spread).tolist()]
    z = noise
    for r, following in pairwise(grid):
        h = following - r
        first = mean(z, r)
        second = mean(z + h / 2 * first, r + h / 2)
        third = mean(z + h / 2 * second, r + h / 2)
        fourth = mean(z + h * third, following)
        z = z + h / 6 * (first + 2 * second + 2 * third + fourth)
    return logits(z, grid[-1]).argmax(-1)


def test_the_fine_solve_is_the_quantile_map():
    """The oracle of the tests below against the exact one, with codes far closer than theirs."""
    codebook = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]
    noise, log_p, _ = problem(5000, 64, 1)
    assert (fine_solve(noise, log_p, codebook) == quantiles(noise, log_p)).double().mean() > 0.999


@pytest.mark.parametrize(("v", "c", "unit"), [(64, 4, False), (64, 8, True), (256, 8, True), (128, 32, False)])
@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_default_solver_agrees_with_a_far_finer_solve(v, c, unit, sharpness):
    noise, log_p, codebook = problem(400, v, c, unit=unit, sharpness=sharpness)
    found = solve_flow(noise.float(), log_p.float(), codebook.float())
    fine = fine_solve(noise, log_p, codebook)
    assert (found.ids_N == fine).double().mean() > 0.99
    assert found.evaluations_N.double().mean() < 20


def test_a_smaller_tolerance_costs_more_and_agrees_better():
    noise, log_p, codebook = problem(1000, 256, 8)
    coarse = solve_flow(noise, log_p, codebook, tolerance=0.1)
    tight = solve_flow(noise, log_p, codebook, tolerance=3e-4)
    fine = fine_solve(noise, log_p, codebook)
    assert (coarse.ids_N == fine).double().mean() < (tight.ids_N == fine).double().mean() > 0.998
    assert coarse.evaluations_N.double().mean() < tight.evaluations_N.double().mean()


@pytest.mark.parametrize(("v", "c"), [(16, 4), (64, 2), (32, 16)])
def test_frequencies_follow_p(v, c):
    """Chi-square at significance 0.1 %, over 30,000 draws of one distribution; the seed is fixed."""
    noise, log_p, codebook = problem(30_000, v, c, sharpness=1.5)
    ids = flow_map(noise.float(), log_p[:1].float().expand(30_000, -1), codebook.float(), tolerance=1e-3)
    counts = np.bincount(ids.numpy(), minlength=v)
    assert stats.chisquare(counts, 30_000 * log_p[0].exp().numpy()).pvalue > 1e-3


def test_a_rare_code_is_found_where_it_should_be():
    """p = 0.999 for one code: the posterior starts all but certain, and yet one draw in a thousand is the other's.
    A solver that stops when one code has nearly all weight never returns it."""
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    noise, _, _ = problem(200_000, 2, 2)
    log_p = torch.tensor([0.999, 0.001], dtype=torch.float64).log().expand(200_000, -1)
    # Along the line between the two codes the flow is one-dimensional.
    direction = (codebook[0] - codebook[1]) / (codebook[0] - codebook[1]).norm()
    rare = torch.from_numpy(stats.norm.cdf((noise @ direction).numpy())) < 0.001
    ids = flow_map(noise.float(), log_p.float(), codebook.float())
    assert rare.sum() > 150
    assert ((ids == 1) == rare).sum() >= 200_000 - 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_code_of_probability_zero_is_never_produced(solver):
    noise, log_p, codebook = problem(5000, 32, 4)
    dropped = torch.rand(5000, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    dropped[:, 0] = False
    log_p = log_p.masked_fill(dropped, -torch.inf).log_softmax(-1)
    ids = flow_map(noise.float(), log_p.float(), codebook.float(), solver=solver, evaluations=16)
    assert not dropped[torch.arange(5000), ids].any()


def test_one_hot_distributions_are_certain_and_cost_next_to_nothing():
    noise, _, codebook = problem(500, 32, 4)
    wanted = torch.arange(500) % 32
    log_p = torch.full((500, 32), -torch.inf).scatter(1, wanted[:, None], 0.0)
    found = solve_flow(noise.float(), log_p, codebook.float())
    assert torch.equal(found.ids_N, wanted)
    assert (found.evaluations_N == 2).all()


def test_two_equal_codes_share_the_noise_along_the_plane_between_them():
    noise, _, _ = problem(5000, 2, 3)
    codebook = torch.tensor([[0.3, 0.1, 0.0], [-0.3, 0.2, 0.5]], dtype=torch.float64)
    log_p = torch.full((5000, 2), 0.5, dtype=torch.float64).log()
    nearer_first = noise @ (codebook[0] - codebook[1]) > 0
    assert (flow_map(noise.float(), log_p.float(), codebook.float()) == (~nearer_first).long()).double().mean() > 0.999


def test_noise_on_the_border_itself_ends():
    codebook = torch.tensor([[1.0], [-1.0]])
    found = solve_flow(torch.zeros(3, 1), torch.full((3, 2), 0.5).log(), codebook)
    assert (found.ids_N == 0).all()
    assert (found.evaluations_N <= solvers.MOST_EVALUATIONS).all()


def test_duplicate_codes_count_as_one_place():
    """Their place is reached as often as their probabilities' sum says, and the likelier one stands for it."""
    noise, log_p, codebook = problem(3000, 32, 4)
    doubled = torch.cat([codebook, codebook])
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    log_p_doubled = torch.cat([log_p + shares[0], log_p + shares[1]], 1)
    single = solve_flow(noise.float(), log_p.float(), codebook.float())
    double = solve_flow(noise.float(), log_p_doubled.float(), doubled.float())
    assert (double.ids_N == single.ids_N + 32).double().mean() > 0.998


def test_codes_closer_than_single_precision_can_tell_are_told_apart():
    """Two codes at a distance of 1e-4 with a third far off: Gaussian noise must part them half and half."""
    noise, _, _ = problem(4000, 3, 2)
    codebook = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0]])
    log_p = torch.tensor([0.25, 0.25, 0.5]).log().expand(4000, -1)
    counts = flow_map(noise.float(), log_p, codebook).bincount(minlength=3)
    assert stats.chisquare(counts, [1000, 1000, 2000]).pvalue > 1e-3


def test_extreme_guidance_keeps_the_map_exact():
    """Logits in the hundreds, as a guidance of 50 makes them."""
    noise, log_p, codebook = problem(1000, 64, 8, sharpness=150.0)
    ids = flow_map(noise.float(), log_p.float(), codebook.float())
    assert (ids == fine_solve(noise, log_p, codebook)).double().mean() > 0.998


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_is_computed_in_single(dtype):
    noise, log_p, codebook = (part.to(dtype) for part in problem(500, 64, 8))
    ids = flow_map(noise, log_p, codebook)
    assert torch.equal(ids, flow_map(noise.float(), log_p.float(), codebook.float()))


def test_the_map_does_not_mind_where_the_codebook_lies_nor_its_scale():
    """The flow commutes with a shift of all codes; a scale changes it, and the solver keeps up."""
    noise, log_p, codebook = problem(1000, 64, 8)
    at_home = flow_map(noise, log_p, codebook)
    assert (flow_map(noise, log_p, codebook + 50.0) == at_home).double().mean() > 0.998
    small = flow_map(noise.float(), log_p.float(), 0.01 * codebook.float())
    assert (small == fine_solve(noise, log_p, 0.01 * codebook)).double().mean() > 0.99


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A view holds nothing of its own.
        for out in result if isinstance(result, tuple) else (result,):
            if isinstance(out, torch.Tensor) and out._base is None:
                self.elements = max(self.elements, out.numel())
        return result


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_is_bounded_whatever_the_batch(solver, monkeypatch):
    """No array holds more than twice the chunk's (token, code) pairs, and none has a third axis of C."""
    noise, log_p, codebook = problem(4000, 32, 4, dtype=torch.float32)
    monkeypatch.setitem(solvers.CHUNK_ELEMENTS, "cpu", 32 * 500)
    with LargestTensor() as largest:
        flow_map(noise, log_p, codebook, solver=solver, evaluations=8)
    assert 32 * 400 < largest.elements <= 2 * 32 * 500


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[COMPILER, pytest.mark.rare])], ids=["plain", "compiled"]
)
def test_peak_memory_is_far_from_tokens_times_codes_times_width(compiled):
    """What the process needed at most while it solved, against the 512 MiB that (N, V, C) numbers would take."""
    noise, log_p, codebook = problem(1024, 4096, 32, dtype=torch.float32, sharpness=2.0)
    flow_map(noise[:200], log_p[:200], codebook, compiled=compiled)  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    flow_map(noise, log_p, codebook, compiled=compiled)
    assert resident("VmHWM") - before < 64 * 2**20


def resident(key):
    """A figure of this process's memory, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.rare
@COMPILER
def test_the_compiled_map_is_the_plain_one():
    """Tokens at whose end rounding decides may differ; of 2,000 at most two."""
    noise, log_p, codebook = problem(2000, 64, 4, dtype=torch.float32)
    plain, compiled = (solve_flow(noise, log_p, codebook, compiled=compiled) for compiled in (False, True))
    assert (plain.ids_N == compiled.ids_N).sum() >= 1998
    assert (plain.evaluations_N - compiled.evaluations_N).abs().double().mean() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_chunks_do_not_change_the_answer(solver, monkeypatch):
    noise, log_p, codebook = problem(300, 32, 4)
    whole = flow_map(noise, log_p, codebook, solver=solver, evaluations=32)
    monkeypatch.setitem(solvers.CHUNK_ELEMENTS, "cpu", 32 * 7)
    assert torch.equal(flow_map(noise, log_p, codebook, solver=solver, evaluations=32), whole)


@pytest.mark.parametrize("evaluations", [2, 7])
def test_no_token_takes_more_evaluations_than_allowed(evaluations):
    noise, log_p, codebook = problem(200, 32, 4)
    found = solve_flow(noise, log_p, codebook, evaluations=evaluations)
    assert (found.evaluations_N <= evaluations).all()


@pytest.mark.parametrize("solver", ["multistep", "heun", "euler"])
def test_a_grid_costs_what_it_says_and_decided_codes_one_test_more(solver):
    noise, _, codebook = problem(200, 32, 4)
    wanted = torch.arange(200) % 32
    log_p = torch.full((200, 32), -torch.inf, dtype=torch.float64).scatter(1, wanted[:, None], 0.0)
    found = solve_flow(noise, log_p, codebook, solver=solver, evaluations=17)
    assert (found.evaluations_N == 17 + 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_distribution_is_refused(bad):
    noise, log_p, codebook = problem(3, 32, 4)
    log_p[1] = bad
    with pytest.raises(ValueError, match="NaN, infinite or zero for every code"):
        flow_map(noise, log_p, codebook)


def test_too_few_evaluations_are_refused():
    noise, log_p, codebook = problem(3, 32, 4)
    with pytest.raises(ValueError, match="at least 2 evaluations"):
        flow_map(noise, log_p, codebook, evaluations=1)
