"""Conditional score distillation on two tokens whose true joint distribution is known: the whole loop, end to end."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddops.config.dd2 import GuidanceConfig, TimesConfig, TrainedDD2Config
from ddops.config.models import HeadConfig, SamplingConfig
from ddops.config.training import TrainingConfig
from ddops.distill.dd2 import DD2Objectives
from ddops.models.ar_diffusion import new_ar_diffusion
from ddops.models.interface import BackboneTeacher, Student, StudentOutput
from ddops.models.layout import LevelLayout
from ddops.training.alternating import train_alternating
from ddops.training.checkpoint import CheckpointFile

CODES = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
V = len(CODES)
JOINT = torch.tensor(
    [[0.30, 0.02, 0.02, 0.01], [0.02, 0.02, 0.18, 0.02], [0.01, 0.19, 0.01, 0.01], [0.02, 0.01, 0.01, 0.15]]
)
"""p(first code, second code): far from the product of its marginals."""
SAMPLING = SamplingConfig(guidance=1.0, top_k=0, top_p=1.0, temperature=1.0)
LAYOUT = LevelLayout((1, 1))


class TableTeacher(BackboneTeacher):
    """The conditionals as a table: row 0 for the first token, row 1 + c for the second one after code c."""

    num_conditions = 1

    def __init__(self) -> None:
        super().__init__()
        self.layout = LAYOUT
        self.config = SimpleNamespace(width=V + 1, code_dim=2)
        self.tokenizer = nn.Module()
        self.tokenizer.codebook_VC = CODES
        self.table = nn.Embedding(V + 1, V)
        self.table.weight.data.copy_(torch.cat([JOINT.sum(1)[None], JOINT / JOINT.sum(1, keepdim=True)]).log())

    def guidance_scale(self, guidance, level):
        return 1.0

    def embed_prefix(self, ids_BL):
        return F.one_hot(ids_BL[:, :1] + 1, V + 1).float()

    def hidden(self, labels_B, prefix_BlD):
        first_B1D = F.one_hot(torch.zeros_like(labels_B), V + 1).float()[:, None]
        return torch.cat([first_B1D, prefix_BlD], dim=1)

    def classify(self, hidden_BLD):
        return hidden_BLD @ self.table.weight

    def prefix_inputs(self, q_BLC):
        return q_BLC[:, :1]

    def prefix_layer(self):
        return nn.Linear(2, V + 1)

    def open(self, labels_B, sampling):
        raise NotImplementedError("nothing here is sampled token by token")


class ToyStudent(Student):
    """The first token sees its own noise, the second one both."""

    num_conditions = 1

    def __init__(self) -> None:
        super().__init__()
        self.layout = LAYOUT
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, V + 2))
            for size in (2, 4)
        )

    def forward(self, x_BLC, labels_B, start_B):
        out_BLX = torch.stack([self.nets[0](x_BLC[:, 0]), self.nets[1](x_BLC.flatten(1))], dim=1)
        return StudentOutput(out_BLX[..., :V], out_BLX[..., V:])

    def init_from_teacher(self, teacher):
        raise NotImplementedError("the toy starts from random weights")


def settings(output, guidance, divergence, steps, updates, rate):
    optimisation = {"betas": (0.0, 0.99), "weight_decay": 0.0, "gradient_clip": 1.0, "optimizer": "adamw"}
    return TrainedDD2Config(
        source="train",
        start="teacher",
        output=output,
        guidance=GuidanceConfig(
            start=guidance,
            alignment_steps=50,
            updates=updates,
            draws=1,
            batch_size=256,
            learning_rate=rate,
            ema_decay=0.0,
            **optimisation,
        ),
        times=TimesConfig(min=0.0, max=0.95),
        draws=1,
        weighting="mean",
        normalization="none",
        divergence=divergence,
        anchor_weight=0.0,
        refine_start=0.5,
        min_recall=0.0,
        min_diversity=0.0,
        evaluate_every=steps,
        evaluate_count=1,
        training=TrainingConfig(
            steps=steps,
            batch_size=256,
            processes=1,
            learning_rate=5e-3,
            final_learning_rate=0.0,
            warmup_steps=10,
            ema_decay=0.95,
            log_every=steps,
            checkpoint_every=steps,
            **optimisation,
        ),
    )


def total_variation(generator, output):
    """Between the true joint distribution and that of 20,000 samples."""
    noise_BLC = torch.randn(20_000, 2, 2, generator=torch.Generator().manual_seed(99))
    labels_B = torch.zeros(20_000, dtype=torch.long)
    with torch.no_grad():
        out = generator(noise_BLC, labels_B, labels_B)
    ids_BL = out.logits_BLV.argmax(-1) if output == "codes" else torch.cdist(out.embeddings_BLC, CODES).argmin(-1)
    counts = torch.bincount(ids_BL[:, 0] * V + ids_BL[:, 1], minlength=V * V).view(V, V)
    return float((counts / counts.sum() - JOINT).abs().sum() / 2)


@pytest.mark.parametrize(
    ("output", "guidance", "divergence", "updates", "rate", "bound"),
    [
        ("codes", "teacher", "reverse", 3, 0.05, 0.1),
        pytest.param("codes", "teacher", "jensen_shannon", 3, 0.05, 0.12, marks=pytest.mark.slow),
        pytest.param("codes", "teacher", "forward", 3, 0.05, 0.1, marks=pytest.mark.slow),
        pytest.param("embeddings", "ar_diffusion", "reverse", 5, 0.01, 0.12, marks=pytest.mark.slow),
    ],
)
def test_a_few_hundred_steps_bring_the_joint_distribution_to_the_teachers(
    tmp_path, output, guidance, divergence, updates, rate, bound
):
    """From random weights, whose samples have little to do with the teacher's."""
    torch.manual_seed(0)
    teacher, generator = TableTeacher().requires_grad_(False), ToyStudent()
    network = new_ar_diffusion(
        teacher, HeadConfig(width=32, blocks=2, predicts="embedding") if guidance == "ar_diffusion" else None
    )
    config = settings(output, guidance, divergence, 400, updates, rate)
    before = total_variation(generator, output)
    state = train_alternating(
        generator,
        network,
        DD2Objectives(teacher, None, config, SAMPLING, (0,)),
        config=config.training,
        guidance_config=config.guidance,
        seed=0,
        dataset_size=1000,
        checkpoint=CheckpointFile(tmp_path / "state.pt", "toy"),
        curves_dir=tmp_path / "curves",
        description="toy",
    )
    generator.load_state_dict(state)
    after = total_variation(generator, output)
    assert before > 0.4
    assert after < bound
