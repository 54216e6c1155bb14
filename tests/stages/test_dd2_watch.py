"""What is watched while DD2 trains, and the stop on collapse; which combinations of choices are refused."""

import math
import time

import pytest
import torch
from PIL import Image

from ddops.captions.conditions import Conditions
from ddops.config.load import ConfigError
from ddops.distill.dd2 import check_diversity, token_divergence, within_class_spread
from ddops.stages import dd2_watch, paths
from ddops.stages.dd2_watch import DD2Watch
from ddops.training.errors import Collapsed
from ddops.training.replicas import replicas
from ddops.trajectories.dataset import TrajectoryBatch as Batch
from helpers.tiny import tiny, untrained


def test_divergence_by_hand():
    """KL of (1/2, 1/2, 0) from (1/4, 1/4, 1/2) is log 2; a code that the teacher rules out stays finite."""
    log_q = torch.tensor([[[0.5, 0.5, 0.0]]]).clamp_min(1e-30).log()
    log_p = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    assert float(token_divergence(log_q, log_p)) == pytest.approx(math.log(2), abs=1e-6)
    ruled_out = torch.tensor([[[-math.inf, 0.0, -math.inf]]])
    assert float(token_divergence(log_q, ruled_out)) == pytest.approx(0.5 * 20 - math.log(2), abs=1e-5)


def test_spread_is_around_the_mean_of_each_class():
    """Classes far apart, each with samples one to either side of its mean: the classes' distance does not count."""
    labels_N = torch.tensor([0, 0, 1, 1])
    q_NLC = torch.tensor([[[9.0]], [[11.0]], [[-1.0]], [[1.0]]])
    assert within_class_spread(q_NLC, labels_N) == pytest.approx(1.0)
    assert within_class_spread(q_NLC.where(labels_N[:, None, None] == 0, 5.0), labels_N) == pytest.approx(0.5)


def test_a_generator_without_variety_stops_the_stage():
    config = tiny("llamagen", "dd2.min_diversity=0.7", "dd2.min_recall=0.5").dd2
    begun = [{"diversity": 0.9, "recall": 0.8}]
    check_diversity({"diversity": 0.71, "recall": 0.51}, begun, config)
    check_diversity({"diversity": 0.71}, begun, config)
    with pytest.raises(Collapsed, match=r"69% .*dd2\.min_diversity: 70%"):
        check_diversity({"diversity": 0.69, "recall": 0.51}, begun, config)
    with pytest.raises(Collapsed, match=r"49% .*dd2\.min_recall: 50%"):
        check_diversity({"diversity": 0.71, "recall": 0.49}, begun, config)


def test_a_bound_counts_from_when_it_was_first_met():
    """A generator that starts from the AR-diffusion model, noise in place of clean tokens, starts far below."""
    config = tiny("llamagen", "dd2.min_diversity=0.7", "dd2.min_recall=0.5").dd2
    curve = [{"diversity": 0.2, "recall": 0.1}, {"loss": 1.0}]
    check_diversity({"diversity": 0.4, "recall": 0.3}, curve, config)
    curve.append({"diversity": 0.8, "recall": 0.3})
    with pytest.raises(Collapsed, match="min_diversity") as error:
        check_diversity({"diversity": 0.6, "recall": 0.3}, curve, config)
    assert "min_recall" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dd2.output=embeddings"], "dd2.guidance.start teacher knows codes only"),
        (["dd2.start=ar_diffusion", "ar_diffusion.head.predicts=embedding"], "dd2.anchor_weight: needs trained logits"),
        (
            ["dd2.output=embeddings", "dd2.guidance.start=ar_diffusion", "ar_diffusion.head.predicts=codes"],
            "dd2.output: embeddings lie between codes",
        ),
        (["dd2.divergence=forward", "dd2.guidance.start=ar_diffusion"], "dd2.divergence forward needs the generator's"),
        (["dd2.times.min=0.99"], "dd2.times.min 0.99 must be less than max"),
        (["ar_diffusion=none", "dd2.guidance.start=ar_diffusion"], "ar_diffusion.source: none, but dd2 starts from"),
        (["ar_diffusion=none", "evaluate.rows=[dd2_1step,dd2_refine_1]"], "dd2_refine_1 needs DD2's generator and AR"),
        (["ar_diffusion=none", "evaluate.rows=[dd2_1step,ar_diffusion]"], "ar_diffusion needs an AR-diffusion model"),
        (["dd2=none", "export.student=dd2"], "export.student: dd2, but dd2.source is none"),
        (["dd2.training.processes=3", "dd2.training.batch_size=3"], "dd2.guidance.batch_size .* of the 3 processes"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny("llamagen", *overrides)


class Drawn:
    """Trajectories that the generator itself would draw: its diversity is the teacher's."""

    def __init__(self, teacher, student, spread=1.0):
        noise_BLC = torch.randn(60, teacher.layout.length, teacher.codebook_VC.shape[1])
        labels_B = torch.arange(60) % teacher.num_conditions
        with torch.no_grad():
            ids_BL = student(noise_BLC, labels_B, torch.zeros_like(labels_B)).logits_BLV.argmax(-1)
        self.whole = Batch(labels_B, noise_BLC * spread, ids_BL)

    def __len__(self):
        return len(self.whole.labels_B)

    def batch(self, indices_B):
        return Batch(*(values[indices_B] for values in self.whole))


def watch(fingerprint, **changes):
    config = tiny("llamagen", "dd2.evaluate_count=60", "dd2.min_diversity=0.9", "dd2.training.batch_size=32")
    teacher, student = untrained("llamagen")
    torch.manual_seed(0)
    dataset = Drawn(teacher, student, **changes)
    return DD2Watch(teacher, dataset, config.dd1, config.dd2, Conditions(10), judged=False, fingerprint=fingerprint)


def test_pictures_of_the_same_noise_wait_for_the_end_of_the_training(tmp_path, monkeypatch):
    """A run that goes on finds those of the run that was killed; a run with other settings does not."""
    monkeypatch.chdir(tmp_path)
    student = untrained("llamagen")[1]
    assert watch("one")(student, 20)["diversity"] == pytest.approx(1.0)
    again = watch("one")
    again(student, 40)
    (tmp_path / "curves").mkdir()
    again.keep_pictures(tmp_path / "curves")
    files = sorted((tmp_path / "curves").iterdir())
    assert [file.name for file in files] == ["samples_000020.png", "samples_000040.png"]
    assert files[0].read_bytes() == files[1].read_bytes(), "one generator, one noise"
    assert Image.open(files[0]).size == (10 * 27 + 3, 3 * 27 + 3)
    assert len(list(paths.STATE.rglob("*.png"))) == 2, "a run killed before its weights are written needs them again"
    again.forget_pictures()
    assert not list(paths.STATE.iterdir())
    watch("one")(student, 20)
    watch("two")
    assert not list(paths.STATE.rglob("*.png"))


def test_the_watch_stops_a_generator_that_collapses_and_leaves_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, seen = untrained("llamagen")[1], watch("one")
    seen.begin(student)
    assert seen(student, 20)["diversity"] == pytest.approx(1.0)
    seen.batch = seen.batch._replace(noise_BLC=torch.zeros_like(seen.batch.noise_BLC))
    with pytest.raises(Collapsed, match="min_diversity"):
        seen(student, 40)
    assert "samples_000040.png" in [file.name for file in paths.STATE.rglob("*.png")]


@pytest.fixture
def sizes(monkeypatch):
    """Of the batches that the watch draws, as it draws them."""
    noted, sample = [], dd2_watch.sample_student

    def sample_noted(student, codebook_VC, noise_BLC, *rest):
        noted.append(len(noise_BLC))
        return sample(student, codebook_VC, noise_BLC, *rest)

    monkeypatch.setattr(dd2_watch, "sample_student", sample_noted)
    return noted


def test_variety_is_measured_in_batches_that_training_fits_into(tmp_path, monkeypatch, sizes):
    """All samples at once would hold as many logits: tens of gigabytes where the codebook is large."""
    monkeypatch.chdir(tmp_path)
    student = untrained("llamagen")[1]
    watch("one").begin(student)
    assert sizes == [16, 16, 16, 12], "of 32 samples a step, shared by two processes"


def test_the_processes_of_a_training_share_the_samples_and_one_draws_and_judges(tmp_path, monkeypatch, sizes):
    """What they read is what one reads; the picture, and the alarm, are the first one's."""
    monkeypatch.chdir(tmp_path)
    student, seen = untrained("llamagen")[1], watch("one")
    alone = seen(student, 20)
    seen.begin(student)
    seen.batch = seen.batch._replace(noise_BLC=torch.zeros_like(seen.batch.noise_BLC))
    sizes.clear()

    def watched():
        with replicas(2) as group:
            fallen = seen(student, 30, None)
            if not group.is_first:
                (tmp_path / "other").write_text(f"{sum(sizes)} {fallen['diversity']}")
                seen(student, 40, None)
                time.sleep(60)  # The first ends it.
            (tmp_path / "first").write_text(str(fallen["diversity"]))
            seen(student, 40, [])

    with pytest.raises(Collapsed, match="min_diversity"):
        watched()
    drawn_there, diversity = (tmp_path / "other").read_text().split()
    assert int(drawn_there) == 30, "half of them"
    assert diversity == (tmp_path / "first").read_text()
    assert float(diversity) < alone["diversity"]
    assert [file.name for file in sorted(paths.STATE.rglob("*.png"))] == ["samples_000020.png", "samples_000040.png"]


def test_captions_of_one_sample_each_have_no_spread_to_watch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny("llamagen", "dd2.evaluate_count=10", "dd2.min_diversity=0.9")
    teacher, student = untrained("llamagen")
    seen = DD2Watch(
        teacher, Drawn(teacher, student), config.dd1, config.dd2, Conditions(10), judged=False, fingerprint="x"
    )
    assert "diversity" not in seen(student, 20)
