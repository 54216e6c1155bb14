"""The stages ``ar_diffusion`` and ``distill_dd2`` on tiny models: killed and run again they end with the same bytes,
and with the paper's settings they write a generator that is sampled as it was trained."""

import contextlib
import logging
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ddops.config.load import compose, load_config, write_params
from ddops.evaluation.drawing import sample_noise
from ddops.evaluation.images import to_uint8
from ddops.evaluation.judge import new_classifier, save_classifier
from ddops.evaluation.samples import open_samples
from ddops.models.ar_diffusion import ARDiffusionGenerator, new_ar_diffusion
from ddops.models.quantization import nearest_code
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, load_weights, save_weights
from ddops.models.weights_dd2 import AR_GENERATOR, as_backbone, load_ar_diffusion, load_generator
from ddops.stages import paths
from ddops.stages.ar_diffusion import ar_diffusion
from ddops.stages.common import sections
from ddops.stages.distill_dd2 import distill_dd2
from ddops.stages.sample import sample
from ddops.stages.trajectories import trajectories
from helpers.tiny import FAMILIES, PARAMS, contents, kill_stage_in, stage_environment, tiny, untrained, write_recipes

pytestmark = pytest.mark.xdist_group("dd2")  # which shares the stages' runs

STAGES = {"ar_diffusion": ar_diffusion, "distill_dd2": distill_dd2, "sample": sample, "trajectories": trajectories}
SHORT = ["steps=8", "batch_size=16", "processes=1", "warmup_steps=2", "log_every=2", "checkpoint_every=3"]
TINY = [
    *("features.channels=4", "trajectories.count=64", "trajectories.shard_size=64", "trajectories.batch_size=64"),
    *(f"{section}.training.{setting}" for section in ("ar_diffusion", "dd2") for setting in SHORT),
    *(f"{section}.evaluate_every=4" for section in ("ar_diffusion", "dd2")),
    *(f"{section}.evaluate_count=64" for section in ("ar_diffusion", "dd2")),
    *("ar_diffusion.evaluations=4", "ar_diffusion.head.width=16", "ar_diffusion.head.blocks=1"),
    *("dd2.guidance.alignment_steps=8", "dd2.guidance.updates=2", "dd2.guidance.batch_size=16"),
    *("dd2.min_diversity=0.0", "dd2.min_recall=0.0", "export.student=dd2", "export.steps=1"),
    *("evaluate.rows=[dd2_1step,dd2_refine_1]", "evaluate.samples_per_image=1", "evaluate.seeds=[1]"),
]
RUNS = {
    "the paper's": (
        "llamagen",
        *("ar_diffusion.head.predicts=embedding", "dd2.start=ar_diffusion", "dd2.output=embeddings"),
        *("dd2.guidance.start=ar_diffusion", "dd2.anchor_weight=0.0"),
    ),
    "from the teacher": (
        "var",
        *("ar_diffusion.head.predicts=codes", "dd2.start=teacher", "dd2.output=codes"),
        *("dd2.guidance.start=ar_diffusion", "dd2.anchor_weight=0.05"),
    ),
    "from DD1": (
        "llamagen",
        *("ar_diffusion.head.predicts=codes", "dd2.start=dd1", "dd2.output=codes", "dd2.guidance.start=teacher"),
        *("dd2.guidance.ema_decay=0.8", "dd2.divergence=forward", "dd2.anchor_weight=0.05"),
    ),
}
"""A family and its settings."""


def run(workspace, *stages):
    """Run stages in this process."""
    config = load_config(workspace / paths.PARAMS)
    with contextlib.chdir(workspace):
        for name in stages:
            STAGES[name](**{section: getattr(config, section) for section in sections(STAGES[name])})


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A workspace of one of the runs whose stage is yet to run; to be copied."""

    @cache
    def workspace(settings, stage):
        directory = tmp_path_factory.mktemp("before")
        if stage == "distill_dd2":
            shutil.copytree(after(settings, "ar_diffusion"), directory, dirs_exist_ok=True)
            return directory
        family, *overrides = RUNS[settings]
        write_params(compose(PARAMS, [*FAMILIES[family], *TINY, *overrides]), directory / paths.PARAMS)
        write_recipes(directory)
        write_weights(directory, family)
        run(directory, "trajectories")
        return directory

    @cache
    def after(settings, stage):
        directory = tmp_path_factory.mktemp("after")
        shutil.copytree(workspace(settings, stage), directory, dirs_exist_ok=True)
        run(directory, stage)
        return directory

    workspace.after = after
    return workspace


@pytest.fixture(scope="module")
def after(before):
    """The workspace when the stage has run, undisturbed. Not to be changed."""
    return before.after


def write_weights(directory, family):
    """Random ones, so large that each matters."""
    teacher, student = untrained(family)
    for path in (paths.CLASSIFIER, paths.TOKENIZER, paths.DD1_STUDENT):
        (directory / path).parent.mkdir(parents=True)
    save_weights(directory / paths.TOKENIZER, teacher.tokenizer.state_dict(), teacher.config, TOKENIZER)
    save_weights(directory / paths.TRANSFORMER, teacher.transformer.state_dict(), teacher.config, TRANSFORMER)
    save_weights(directory / paths.DD1_STUDENT, student.state_dict(), teacher.config, STUDENT)
    features = tiny(family, "features.channels=4").features
    torch.manual_seed(0)
    save_classifier(directory / paths.CLASSIFIER, new_classifier(features), features)


KILLS = {
    "ar_diffusion": ("the paper's", "ar_diffusion", ".pt", 2, "ar-diffusion: resuming at step 3 of 8"),
    "distill_dd2, aligning": ("the paper's", "distill_dd2", ".pt", 2, "dd2 generator: resuming at step -6 of 8"),
    "distill_dd2, alternating": ("from the teacher", "distill_dd2", ".pt", 5, "dd2 generator: resuming at step 3 of 8"),
    "distill_dd2, with an average of the guidance network": (
        *("from DD1", "distill_dd2", ".pt", 5),
        "dd2 generator: resuming at step 3 of 8",
    ),
    "distill_dd2, trained": (
        *("the paper's", "distill_dd2", "generator.safetensors", 1),
        "dd2 generator: resuming at step 8 of 8",
    ),
}
"""Which run, the stage, the file that was about to take its place as the stage died, and what resuming says."""
RESULTS = {"ar_diffusion": paths.AR_DIFFUSION, "distill_dd2": paths.DD2_GENERATOR}
CURVES = {"ar_diffusion": paths.CURVES / "ar_diffusion", "distill_dd2": paths.CURVES / "dd2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill", [pytest.param(name, marks=[pytest.mark.rare] * name.endswith("alternating")) for name in KILLS]
)
def test_a_dd2_stage_killed_with_sigkill_ends_with_the_same_bytes(kill, before, after, tmp_path, caplog):
    """Weights, curves and pictures, also when all but the weights was done; and nothing is left of the state."""
    settings, stage, suffix, number, message = KILLS[kill]
    whole, killed = after(settings, stage), tmp_path / "killed"
    shutil.copytree(before(settings, stage), killed)
    kill_stage_in(killed, stage, suffix=suffix, number=number)
    assert not (killed / RESULTS[stage]).exists()
    for output in (RESULTS[stage].parent, CURVES[stage]):  # as DVC does before it runs a stage
        shutil.rmtree(killed / output, ignore_errors=True)
    with caplog.at_level(logging.INFO):
        run(killed, stage)
    assert message in caplog.text
    assert contents(killed / "artifacts") == contents(whole / "artifacts")
    assert contents(killed / "reports") == contents(whole / "reports")
    assert not contents(killed / paths.STATE)


@pytest.mark.rare
def test_torchrun_trains_dd2_to_the_bytes_that_forking_does(before, tmp_path):
    """Both networks, their averages and the curves, of two processes that share every batch."""
    made = {}
    for launcher in ("fork", "torchrun"):
        workspace = shutil.copytree(before("from DD1", "distill_dd2"), tmp_path / launcher)
        family, *overrides = RUNS["from DD1"]
        processes = ["ar_diffusion.training.processes=2", "dd2.training.processes=2"]
        values = compose(PARAMS, [*FAMILIES[family], *TINY, *overrides, *processes])
        write_params(values, workspace / paths.PARAMS)
        result = subprocess.run(
            [sys.executable, "-m", "ddops.stages.distill_dd2"],
            cwd=workspace,
            env=stage_environment(DDOPS_LAUNCHER=launcher),
            check=False,
        )
        assert result.returncode == 0
        made[launcher] = contents(workspace / "artifacts" / "dd2") | contents(workspace / "reports")
    assert any(name.endswith("generator.safetensors") for name in made["fork"])
    assert made["torchrun"] == made["fork"]


@pytest.mark.parametrize(
    "settings", [pytest.param(name, marks=[pytest.mark.slow] * (name != "the paper's")) for name in RUNS]
)
def test_a_run_of_dd2_leaves_curves_of_the_whole_run_and_a_picture_an_evaluation(settings, after):
    """What the comparison of a killed run with this one is worth."""
    curves = after(settings, "distill_dd2") / paths.CURVES / "dd2"
    assert sorted(file.name for file in curves.glob("*.png")) == ["samples_000004.png", "samples_000008.png"]
    lines = (curves / "plots" / "metrics" / "guidance_loss.tsv").read_text().splitlines()[1:]
    assert [int(line.split("\t")[0]) for line in lines] == [*range(-6, 9, 2)]
    assert (curves / "plots" / "metrics" / "fid_1step.tsv").exists()


def test_with_the_papers_settings_both_networks_are_trained(after):
    """The AR-diffusion model moved from the teacher, the generator from the AR-diffusion model; the files say what
    they hold."""
    workspace = after("the paper's", "distill_dd2")
    tuned = load_ar_diffusion(workspace / paths.TOKENIZER, workspace / paths.AR_DIFFUSION)
    teacher = as_backbone(untrained("llamagen")[0])
    fresh, began = new_ar_diffusion(teacher, tuned.head_config), ARDiffusionGenerator(tuned)
    _, _, extra = load_weights(workspace / paths.DD2_GENERATOR, AR_GENERATOR)
    assert '"predicts":"embedding"' in extra["head"]
    generator = load_generator(workspace / paths.TOKENIZER, workspace / paths.DD2_GENERATOR)
    for part in ("backbone.transformer.trunk", "head.input", "head.output"):
        assert differs(tuned.get_submodule(part), fresh.get_submodule(part)), part
        assert differs(generator.get_submodule(f"model.{part}"), began.get_submodule(f"model.{part}")), part
    assert differs(generator.prefix_layer, began.prefix_layer)


def differs(module, other):
    return all(not torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_the_papers_generator_is_sampled_with_its_continuous_output(after, tmp_path):
    """The stage ``sample`` draws from the file what the generator itself gives, between the codes and not on them."""
    workspace = shutil.copytree(after("the paper's", "distill_dd2"), tmp_path / "workspace")
    run(workspace, "sample")
    samples = open_samples(workspace / paths.SAMPLES / "dd2_1step" / "seed1.npz")
    drawn_NIHW = next(samples.batches(40))
    labels_B = samples.labels_N[:40]
    generator = load_generator(workspace / paths.TOKENIZER, workspace / paths.DD2_GENERATOR)
    teacher = untrained("llamagen")[0]
    with torch.inference_mode():
        noise_BLC = sample_noise(1, torch.arange(40).numpy(), generator, teacher.codebook_VC.shape[1])
        q_BLC = generator(noise_BLC, labels_B, torch.zeros_like(labels_B)).embeddings_BLC
        codes_BLC = F.embedding(nearest_code(q_BLC, teacher.codebook_VC), teacher.codebook_VC)
        continuous, coded = (to_uint8(teacher.decode(sequence_BLC)) for sequence_BLC in (q_BLC, codes_BLC))
    off = (drawn_NIHW.int() - continuous.int()).abs()
    assert off.max() <= 1, "one level of 255, for rounding"
    assert (drawn_NIHW.int() - coded.int()).abs().float().mean() > 1
    assert drawn_NIHW.float().std(0).mean() > 1, "noise and class make a difference"
    refined = open_samples(workspace / paths.SAMPLES / "dd2_refine_1" / "seed1.npz")
    assert not torch.equal(next(refined.batches(40)), drawn_NIHW)
