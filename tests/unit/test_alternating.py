"""The alternating loop: who is updated when, and a killed run that goes on to the same bytes."""

import dataclasses

import pytest
import torch
from safetensors.torch import load

from ddops.training.errors import TrainingDiverged
from helpers.toy_alternating import (
    ALIGNMENT,
    GUIDANCE,
    STEPS,
    UPDATES,
    Killed,
    Pursuit,
    run,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"))


def test_alignment_comes_first_and_several_guidance_updates_before_each_of_the_generator(tmp_path):
    objectives = Pursuit()
    run(tmp_path, objectives)
    assert "".join(objectives.events) == "g" * ALIGNMENT + ("g" * UPDATES + "G") * STEPS


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_the_generator_meets_the_average_of_the_guidance_networks_weights(tmp_path, decay):
    """One that the guidance network's every update moves, those of the alignment too; without decay, the weights."""

    class Recording(Pursuit):
        def __init__(self):
            super().__init__()
            self.weights, self.met = [], []

        def guidance(self, generator, guidance, count):
            self.weights.append(guidance.weight.item())
            return super().guidance(generator, guidance, count)

        def generator(self, generator, guidance, indices_B, step):
            self.met.append((len(self.weights), guidance.weight.item()))
            return super().generator(generator, guidance, indices_B, step)

    objectives = Recording()
    run(tmp_path, objectives, guidance_config=dataclasses.replace(GUIDANCE, ema_decay=decay))
    average, averages = objectives.weights[0], []
    for weight in objectives.weights[1:]:
        average = decay * average + (1 - decay) * weight
        averages.append(average)
    assert len(objectives.met) == STEPS
    for updates, weight in objectives.met[:-1]:
        assert weight == pytest.approx(averages[updates - 1], rel=1e-5)


def test_curves_count_the_generators_steps(uninterrupted):
    tables = {name.rpartition("/")[2]: text.decode().splitlines() for name, text in uninterrupted[1].items()}
    assert [line.split("\t")[0] for line in tables["guidance_loss.tsv"][1:]] == [*map(str, range(-6, 13, 2))]
    assert [line.split("\t")[0] for line in tables["size.tsv"][1:]] == [*map(str, range(2, 13, 2))]


@pytest.mark.parametrize("death", [0, 2, 3, 10], ids=lambda step: f"killed at step {step}")
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, death):
    """Both networks, both optimisers, the EMA, the random numbers and the curves; the first death is in alignment's
    wake, others fall on and between checkpoints."""
    with pytest.raises(Killed):
        run(tmp_path, Pursuit(die_at=death))
    assert run(tmp_path) == uninterrupted


def test_killed_while_aligning_it_goes_on(tmp_path, uninterrupted):
    class Mortal(Pursuit):
        def guidance(self, generator, guidance, count):
            if len(self.events) == ALIGNMENT - 1:
                raise Killed
            return super().guidance(generator, guidance, count)

    with pytest.raises(Killed):
        run(tmp_path, Mortal())
    objectives = Pursuit()
    assert run(tmp_path, objectives) == uninterrupted
    assert len(objectives.events) < ALIGNMENT + STEPS * (UPDATES + 1), "the alignment's checkpoint was used"


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    class Broken(Pursuit):
        def guidance(self, generator, guidance, count):
            return {"loss": super().guidance(generator, guidance, count)["loss"] * float("nan")}

    with pytest.raises(TrainingDiverged, match=r"toy: .* guidance\.learning_rate"):
        run(tmp_path, Broken())


def test_what_the_watch_raises_stops_the_run_and_leaves_the_checkpoint(tmp_path, uninterrupted):
    class Alarm(Exception):
        pass

    def watch(model, step, earlier):
        raise Alarm

    with pytest.raises(Alarm):
        run(tmp_path, evaluate=watch, evaluate_every=6)
    assert (tmp_path / "state.pt").exists()
    assert run(tmp_path) == uninterrupted


def test_an_evaluation_is_a_point_of_its_own_and_knows_those_before_it(tmp_path):
    seen = []

    def watch(model, step, earlier):
        seen.append((step, [row["mark"] for row in earlier if "mark" in row]))
        return {"mark": float(step)}

    run(tmp_path, evaluate=watch, evaluate_every=7)
    assert [step for step, _ in seen] == [*range(7, STEPS, 7), STEPS]
    assert seen[-1][1] == [float(step) for step, _ in seen[:-1]]


class Certain:
    """As Pursuit, without noise: what is learned does not depend on how a batch is shared."""

    def guidance(self, generator, guidance, count):
        with torch.no_grad():
            x = generator(torch.linspace(-1, 1, 8).view(4, 2))
        return {"loss": (guidance(x) - x).square().mean(), "samples": torch.tensor(float(count))}

    def generator(self, generator, guidance, indices_B, step):
        x = generator(torch.stack([indices_B / 13, indices_B.square() / 169], 1))
        return {"loss": (x - guidance(x).detach() - 1).square().mean(), "size": x.abs().mean()}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_a_batch_compute_what_one_does(tmp_path, processes):
    """To rounding: each index belongs to one process, and the guidance network's samples are divided among them."""
    one, curves = run(tmp_path / "one", Certain())
    several, shared = run(tmp_path / "several", Certain(), processes=processes)
    for name, value in load(one).items():
        torch.testing.assert_close(load(several)[name], value, atol=1e-5, rtol=1e-4)
    for table in ("size", "guidance_samples"):
        name = next(name for name in curves if name.endswith(f"/{table}.tsv"))
        points, expected = (
            [float(line.split(b"\t")[1]) for line in found[name].splitlines()[1:]] for found in (shared, curves)
        )
        divisor = processes if table == "guidance_samples" else 1
        assert points == pytest.approx([value / divisor for value in expected], rel=1e-4)


def test_processes_resume_to_the_same_bytes(tmp_path):
    whole = run(tmp_path / "whole", processes=2)
    with pytest.raises(Killed):
        run(tmp_path / "part", Pursuit(die_at=8), processes=2)
    assert run(tmp_path / "part", processes=2) == whole
