"""The preset ``digits_t2i`` from prompts to an exported graph, stage by stage in one process, hardly trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddops import OneStepPipeline
from ddops.captions.conditions import open_conditions
from ddops.captions.digits import NUMERALS
from ddops.cli import main
from ddops.config.load import compose, validate, write_params
from ddops.data import digits
from ddops.evaluation.gate import Decision
from ddops.evaluation.samples import open_samples
from ddops.files import sha256_file, sha256_json, write_json
from ddops.models.weights import load_student
from ddops.stages import (
    ar_diffusion,
    captions,
    distill_dd1,
    distill_dd2,
    evaluate,
    export_onnx,
    features,
    paths,
    sample,
    teacher,
    trajectories,
)
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.verify import problems
from helpers.tiny import PARAMS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("t2i")]  # which shares one run of all stages

BRIEF = {"warmup_steps": 1, "batch_size": 32, "processes": 1}
STEPS = {
    "features.training": 30,
    "teacher.tokenizer_training": 10,
    "teacher.training": 30,
    "dd1.training": 20,
    "dd2.training": 4,
}
SIZES = {
    "teacher.model": {"depth": 1, "width": 32, "heads": 2, "ffn_hidden": 48},
    "trajectories": {"count": 400, "shard_size": 400, "batch_size": 200, "tolerance": 0.01},
    "dd1": {"evaluate_every": 20, "evaluate_count": 200, "perceptual.batch_size": 4},
    "dd2": {"evaluate_every": 4, "evaluate_count": 200, "min_diversity": 0.0, "min_recall": 0.0},
    "dd2.guidance": {"alignment_steps": 2, "updates": 1, "batch_size": 32},
    "evaluate": {"samples_per_image": 1, "seeds": "[1]"},
    "export": {"parity_count": 8, "max_fid_loss": 0.5},
    **{name: BRIEF | dict.fromkeys(("steps", "checkpoint_every", "log_every"), steps) for name, steps in STEPS.items()},
}
OVERRIDES = [
    "preset=digits_t2i",
    "gate=smoke",
    "evaluate.rows=[teacher_flow,teacher_involved_3_8,dd1_1step,dd1_2step,dd2_1step,onestep_class]",
    *(f"{section}.{key}={value}" for section, values in SIZES.items() for key, value in values.items()),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workspace in which every stage ran."""
    config = validate(compose(PARAMS, OVERRIDES), "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("digits_t2i"))
        captions.captions(config.captions)
        features.features(config.seed, config.features)
        teacher.teacher(config.seed, config.teacher)
        trajectories.trajectories(config.seed, config.sampling, config.trajectories)
        distill_dd1.distill_dd1(config.seed, config.features, config.dd1)
        ar_diffusion.ar_diffusion(config.seed, config.features, config.sampling, config.ar_diffusion)
        distill_dd2.distill_dd2(config.seed, config.features, config.sampling, config.dd1, config.dd2)
        sample.sample(
            config.sampling, config.trajectories, config.dd1, config.ar_diffusion, config.dd2, config.evaluate
        )
        evaluate.evaluate(config.evaluate)
        decision = Decision((), (), sha256_file(paths.STUDENTS[config.export.student]), None)
        write_json(paths.GATE_DECISION, decision.plain())
        export_onnx.export(config.preset, config.dd1, config.dd2, config.evaluate, config.export)
        yield config


def test_trajectories_are_of_captions(run):
    dataset = TrajectoryDataset(paths.TRAJECTORIES, 4)
    conditions = open_conditions(paths.TRAIN_CAPTIONS, load_student(paths.DD1_STUDENT))
    assert conditions.count > 60
    assert int(dataset.labels_N.max()) == conditions.count - 1
    assert list(problems(paths.TRAJECTORIES, conditions.count, 64)) == []
    manifest = json.loads((paths.TRAJECTORIES / "manifest.json").read_text())
    files = [paths.TOKENIZER, paths.TRANSFORMER]
    assert manifest["settings"]["teacher_sha256"] != sha256_json([str(path) for path in files])


def test_every_row_is_judged_by_the_numeral_of_its_caption(run):
    metrics = json.loads(paths.METRICS.read_text())
    for row in run.evaluate.rows:
        assert metrics[row]["fid"] > 0
        assert 0 <= metrics[row]["accuracy"] <= 1
        samples = open_samples(paths.SAMPLES / row / "seed1.npz")
        assert torch.equal(samples.labels_N, digits.load().labels_N)


def test_grids_have_a_column_a_numeral(run):
    assert {"data.png", "teacher_flow.png", "dd2_1step.png", "interpolation_dd1_1step.png"} <= {
        path.name for path in paths.GRIDS.iterdir()
    }


def test_prompts_of_ones_own_are_drawn(run, capsys):
    """Also such as no prompt set holds, with a word that the encoder does not know."""
    write_params(compose(PARAMS, OVERRIDES), paths.PARAMS)
    ours = ["--prompt", "a handwritten seven", "--prompt", "a purple three"]
    for row in ("teacher", "dd1", "dd2"):
        assert main(["sample", ".", "--row", row, *ours, "--grid", f"{row}.png"]) == 0
        assert Image.open(f"{row}.png").width > 2 * 48
    assert "2 images for a handwritten seven, a purple three" in capsys.readouterr().out
    assert main(["sample", ".", "--classes", "7", "--grid", "none.png"]) == 1
    assert "--prompt: this model draws for captions" in capsys.readouterr().err
    assert main(["sample", ".", "--prompt", " ", "--grid", "none.png"]) == 1
    assert "--prompt: empty" in capsys.readouterr().err


def test_the_exported_graph_draws_prompts(run):
    report = json.loads(paths.EXPORT_METRICS.read_text())
    assert report["parity"]["largest"] < 1e-3
    assert report["exported"]["fid"] == pytest.approx(report["pytorch"]["fid"], rel=0.01)
    prompts = [f"a handwritten {NUMERALS[number]}" for number in (7, 3)]
    drawn, expected = (
        [
            np.asarray(image, dtype=int)
            for image in OneStepPipeline(paths.ONNX_BUNDLE, backend=backend)(prompt=prompts).images
        ]
        for backend in ("onnx", "torch")
    )
    assert np.shape(drawn) == (2, 8, 8)
    assert np.abs(np.subtract(drawn, expected)).max() <= 1
