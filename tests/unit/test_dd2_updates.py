"""DD2's two objectives through the real update, for the pairings of start, output, guidance network and head."""

from typing import NamedTuple

import pytest
import torch

from ddops.distill.ar_diffusion import ar_diffusion_objective, draw_times
from ddops.distill.dd2 import DD2Objectives, log_density_ratio
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.models.weights_dd2 import as_backbone, save_ar_diffusion
from ddops.sampling.teacher import conditional_log_probs
from ddops.stages import paths
from ddops.stages.distill_dd2 import _generator, _guidance
from ddops.training.loop import build_optimizers, update
from ddops.training.replicas import Replicas
from helpers.tiny import RandomBatches, tiny, untrained

FAMILIES = ["llamagen", "var"]
B = 8
GUIDANCE_UPDATES = 25
ROUNDS = 3
RATE = 3e-3
FALLS_TO = {
    ("teacher", "codes"): 0.95,
    ("teacher", "embedding"): 0.95,
    ("ar_diffusion", "codes"): 0.97,
    ("ar_diffusion", "embedding"): 0.5,
}
"""Share of the guidance network's first loss: near the truth from the start where it keeps a classifier."""


class Pairing(NamedTuple):
    """What the generator starts from and puts out, what the guidance network is, what the AR-diffusion model's head
    predicts, and the anchor's weight."""

    start: str
    output: str
    guidance: str
    head: str
    anchor: float

    def __str__(self):
        return f"{self.start}-{self.output}-{self.guidance}-{self.head}-{self.anchor}"


PAIRINGS = [
    Pairing("dd1", "codes", "teacher", "codes", 0.05),
    Pairing("dd1", "codes", "ar_diffusion", "embedding", 0.05),
    Pairing("dd1", "embeddings", "ar_diffusion", "embedding", 0.05),
    Pairing("teacher", "codes", "teacher", "codes", 0.0),
    Pairing("teacher", "codes", "ar_diffusion", "codes", 0.05),
    Pairing("teacher", "embeddings", "ar_diffusion", "embedding", 0.0),
    Pairing("ar_diffusion", "codes", "teacher", "codes", 0.05),
    Pairing("ar_diffusion", "codes", "teacher", "embedding", 0.0),
    Pairing("ar_diffusion", "codes", "ar_diffusion", "codes", 0.0),
    Pairing("ar_diffusion", "codes", "ar_diffusion", "embedding", 0.0),
    Pairing("ar_diffusion", "embeddings", "ar_diffusion", "embedding", 0.0),  # the paper's
]
CLASSIFIER = ("head",)
"""Of either teacher's transformer. A head that predicts embeddings takes its place."""
TOKENS = {"llamagen": ("token_embedding",), "var": ("word_embedding",)}
"""What reads tokens: the generator's layer for noise takes its place."""
LOGITS = {"llamagen": ("norm", "head"), "var": ("transformer.head", "transformer.head_modulation")}
EMBEDDINGS = {"llamagen": ("embedding_head",), "var": ("regression_head",)}
"""The DD1 student's two outputs."""


def left_out(family, pairing, network):
    """The modules of a network that a pairing does not compute with, and so does not train."""
    replaced = CLASSIFIER if pairing.head == "embedding" else ()
    if network == "guidance":
        return [f"backbone.transformer.{name}" for name in replaced] if pairing.guidance == "ar_diffusion" else []
    if pairing.start == "ar_diffusion":
        return [f"model.backbone.transformer.{name}" for name in (*TOKENS[family], *replaced)]
    if pairing.output == "codes":
        return EMBEDDINGS[family]
    return () if pairing.anchor else LOGITS[family]


def trained(network, without):
    """Names of the parameters that are to learn."""
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and not name.startswith(tuple(f"{module}." for module in without))
    }


def reached(network):
    """Names of the parameters that the last gradient says something about."""
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name for name, grad in grads.items() if grad is not None and grad.any()}


class Run:
    """Both networks as the stage builds them from files, whose every weight matters, and the objectives."""

    def __init__(self, family, pairing):
        config = tiny(
            family,
            f"dd2.start={pairing.start}",
            f"dd2.output={pairing.output}",
            f"dd2.guidance.start={pairing.guidance}",
            f"dd2.anchor_weight={pairing.anchor}",
            f"ar_diffusion.head.predicts={pairing.head}",
            *("ar_diffusion.head.width=16", "ar_diffusion.head.blocks=1"),
        )
        teacher, student = untrained(family)
        self.teacher = as_backbone(teacher)
        torch.manual_seed(0)
        model = new_ar_diffusion(self.teacher, config.ar_diffusion.head)
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for path in (paths.TOKENIZER, paths.DD1_STUDENT, paths.AR_DIFFUSION):
            path.parent.mkdir(parents=True)
        save_weights(paths.TOKENIZER, teacher.tokenizer.state_dict(), teacher.config, TOKENIZER)
        save_weights(paths.DD1_STUDENT, student.state_dict(), teacher.config, STUDENT)
        save_ar_diffusion(paths.AR_DIFFUSION, model.state_dict(), teacher.config, config.ar_diffusion.head)
        self.generator = _generator(config.dd2, self.teacher).train()
        self.guidance = _guidance(config.dd2, self.teacher).train()
        self.networks = {"generator": self.generator, "guidance": self.guidance}
        settings = {"generator": config.dd2.training, "guidance": config.dd2.guidance}
        self.optimizers = {name: build_optimizers(self.networks[name], settings[name]) for name in settings}
        self.objectives = DD2Objectives(
            self.teacher, RandomBatches(teacher), config.dd2, config.sampling, config.dd1.start_positions
        )

    def step(self, name):
        """Update a network; what its objective gave and the gradient's norm."""
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)
        if name == "guidance":
            values = self.objectives.guidance(self.generator, self.guidance, B)
        else:
            values = self.objectives.generator(self.generator, self.guidance, torch.arange(B), 0)
        norm = update(self.networks[name], self.optimizers[name], values["loss"], RATE, 1.0, Replicas(0, 1))
        return {**values, "gradient_norm": norm}

    def guidance_loss(self):
        """Of one and the same batch: its noise, classes and times."""
        torch.manual_seed(99)
        with torch.no_grad():
            return float(self.objectives.guidance(self.generator, self.guidance, 64)["loss"])


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(network, before):
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("pairing", PAIRINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_objective_trains_all_of_its_own_network_and_nothing_of_the_other(family, pairing, tmp_path, monkeypatch):
    """And the guidance network learns what the generator makes: its loss on one batch falls while that stays put."""
    monkeypatch.chdir(tmp_path)
    run = Run(family, pairing)
    assert isinstance(run.generator, ARDiffusionGenerator) == (pairing.start == "ar_diffusion")
    assert (run.guidance.head is None) == (pairing.guidance == "teacher")
    seen, losses = {"guidance": set(), "generator": set()}, [run.guidance_loss()]
    for name in ["guidance"] * GUIDANCE_UPDATES + ["generator", "guidance"] * ROUNDS:
        if name == "generator" and len(losses) == 1:
            losses.append(run.guidance_loss())
        other = run.networks["generator" if name == "guidance" else "guidance"]
        others = weights(other)
        values = run.step(name)
        assert all(value.isfinite().all() for value in values.values()), values
        seen[name] |= reached(run.networks[name])
        assert not reached(other)
        assert not moved(other, others)
        if name == "generator":
            assert ("kl" in values) == (pairing.guidance == "teacher")
            assert ("anchor" in values) == (pairing.anchor > 0)
            assert values["csd_gradient_level0"] > 0
    assert 0 < losses[1] < FALLS_TO[pairing.guidance, pairing.head] * losses[0]
    for name, network in run.networks.items():
        assert seen[name] == trained(network, left_out(family, pairing, name)), name


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_anchor_is_the_cross_entropy_of_the_tokens_that_are_not_given(family, start):
    """The given levels are shown as data, the others as the trajectory's noise."""
    config = tiny(family)
    teacher, student = untrained(family)
    batch = RandomBatches(teacher).batch(torch.arange(B), 0)

    class OneBatch:
        def batch(self, indices_B, step):
            return batch

    objectives = DD2Objectives(as_backbone(teacher), OneBatch(), config.dd2, config.sampling, (start,))
    given = sum(teacher.layout.sizes[:start])
    x_BLC = batch.noise_BLC.clone()
    x_BLC[:, :given] = teacher.codebook_VC[batch.ids_BL[:, :given]]
    with torch.no_grad():
        logits_BLV = student(x_BLC, batch.labels_B, torch.full((B,), start)).logits_BLV.double()
        expected = -logits_BLV.log_softmax(-1).gather(-1, batch.ids_BL[..., None])[:, given:].mean()
        assert float(objectives.anchor(student, torch.arange(B), 0)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_teachers_score_is_of_the_distribution_that_it_is_sampled_from(guidance):
    """Guided, LlamaGen's logits are ``u + g (c - u)``: against the unguided teacher as the guidance network, the
    divergence is that of the two softmaxes, and without guidance there is nothing to move."""
    config = tiny("llamagen", f"sampling.guidance={guidance}")
    teacher, student = untrained("llamagen")
    objectives = DD2Objectives(
        as_backbone(teacher), RandomBatches(teacher), config.dd2, config.sampling, config.dd1.start_positions
    )
    batch = objectives.generate(student, B)
    move = objectives.direction(batch, new_ar_diffusion(as_backbone(teacher), None))
    with torch.no_grad():
        c_BLV = teacher.logits(batch.labels_B, batch.ids_BL).double()
        u_BLV = teacher.logits(teacher.unconditional(batch.labels_B), batch.ids_BL).double()
    q_BLV, p_BLV = (x.log_softmax(-1) for x in (c_BLV, u_BLV + (guidance or 1.0) * (c_BLV - u_BLV)))
    expected = (q_BLV.exp() * (q_BLV - p_BLV)).sum(-1).mean()
    assert float(move.kl) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert (move.direction_BLC.abs().max() > 1e-3) == bool(guidance)


def test_the_divergence_weighs_each_token_by_the_ratio_of_its_densities():
    """Of the noisy token that it moves."""
    teacher, student = untrained("llamagen")
    moves = {}
    for divergence in ("reverse", "forward", "jensen_shannon"):
        config = tiny("llamagen", "sampling.guidance=2.0", f"dd2.divergence={divergence}", "dd2.draws=1")
        objectives = DD2Objectives(as_backbone(teacher), None, config.dd2, config.sampling, (0,))
        torch.manual_seed(1)
        batch = objectives.generate(student, B)
        noise = torch.random.get_rng_state()
        moves[divergence] = objectives.direction(batch, new_ar_diffusion(as_backbone(teacher), None)).direction_BLC
    torch.random.set_rng_state(noise)
    t_BL = draw_times(batch.q_BLC, config.dd2.times)
    x_BLC = torch.lerp(torch.randn_like(batch.q_BLC), batch.q_BLC, t_BL[..., None]).detach()
    with torch.no_grad():
        log_p_BLV = conditional_log_probs(teacher, batch.labels_B, batch.ids_BL, config.sampling)
        log_q_BLV = teacher.logits(batch.labels_B, batch.ids_BL).log_softmax(-1)
    ratio_BL = log_density_ratio(x_BLC, t_BL, log_p_BLV, log_q_BLV, teacher.codebook_VC).exp()
    assert 0.01 < ratio_BL.std() < 1
    torch.testing.assert_close(moves["forward"], ratio_BL[..., None] * moves["reverse"])
    torch.testing.assert_close(moves["jensen_shannon"], (2 * ratio_BL / (1 + ratio_BL))[..., None] * moves["reverse"])


@pytest.mark.parametrize("target", ["ground_truth_score", "flow_matching"])
def test_the_ar_diffusion_models_target(target):
    """With the teacher itself as the model, the closed form leaves no error, and the token what noise leaves open,
    summed over the codebook in float64."""
    config = tiny("llamagen", f"ar_diffusion.target={target}", "ar_diffusion.weighting=mean", "sampling.guidance=0.0")
    teacher, _ = untrained("llamagen")
    labels_B, _, ids_BL = RandomBatches(teacher).batch(torch.arange(B), 0)

    class Sequences:
        def sequences(self, indices_B):
            return labels_B, ids_BL

    with torch.no_grad():
        p_BLV = teacher.logits(labels_B, ids_BL).double().softmax(-1)
    model = new_ar_diffusion(as_backbone(teacher), config.ar_diffusion.head)
    objective = ar_diffusion_objective(as_backbone(teacher), Sequences(), config.ar_diffusion, config.sampling)
    torch.manual_seed(3)
    values = objective(model, torch.arange(B), 0)
    assert float(values["excess"].detach()) == pytest.approx(0, abs=1e-9)
    if target == "ground_truth_score":
        assert float(values["loss"].detach()) == pytest.approx(0, abs=1e-9)
        return
    torch.manual_seed(3)
    codebook_VC = teacher.codebook_VC.double()
    errors = []
    for _ in range(config.ar_diffusion.draws):
        q_BLC = teacher.codebook_VC[ids_BL]
        t_BL = draw_times(q_BLC, config.ar_diffusion.times)
        x_BLC = torch.lerp(torch.randn_like(q_BLC), q_BLC, t_BL[..., None]).double()
        t_BL1 = t_BL.double()[..., None]
        far_BLV = (x_BLC[:, :, None] - t_BL1[..., None] * codebook_VC).square().sum(-1)
        posterior_BLV = (p_BLV.log() - far_BLV / (2 * (1 - t_BL1).square())).softmax(-1)
        errors.append((posterior_BLV @ codebook_VC - q_BLC).square().sum(-1).mean())
    assert float(values["loss"].detach()) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
