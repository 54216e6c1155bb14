"""DD2's two objectives through the real update, for the pairings of start, output, guidance network and head."""

from typing import NamedTuple

import pytest
import torch

from ddops.distill.dd2 import DD2Objectives
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.models.weights_dd2 import as_backbone, save_ar_diffusion
from ddops.stages import paths
from ddops.stages.distill_dd2 import _generator, _guidance
from ddops.training.loop import build_optimizers, update
from ddops.training.replicas import Replicas
from tiny import RandomBatches, tiny, untrained

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
