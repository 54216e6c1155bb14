"""The training loop: a run that was killed and resumed ends with the bytes of one that was not, and its schedules."""

import errno
import itertools
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddops.config.load import load_config
from ddops.stages import paths
from ddops.stages.checkpoints import checkpoint_file
from ddops.stages.features import features as features_stage
from ddops.stages.teacher import teacher as teacher_stage
from ddops.training import schedule
from ddops.training.checkpoint import CheckpointFile
from ddops.training.errors import ReplicaLost, TrainingDiverged
from ddops.training.loop import build_optimizers, train
from ddops.training.schedule import batch_indices, ema_decay, learning_rate
from helpers.tiny import contents, kill_stage_in, write_tiny_params
from helpers.toy_training import DATASET_SIZE, Killed, dying_at, new_model, objective, run, training


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"))


def test_a_run_writes_curves_of_every_value(uninterrupted):
    curves = uninterrupted[1]
    tables = {name.rpartition("/")[2]: text.decode() for name, text in curves.items() if name.endswith(".tsv")}
    assert sorted(tables) == ["gradient_norm.tsv", "loss.tsv", "size.tsv"]
    steps = [line.split("\t")[0] for line in tables["loss.tsv"].splitlines()]
    assert steps == ["step", *map(str, range(3, 25, 3))]


def test_training_trains(uninterrupted):
    values = [float(line.split(b"\t")[1]) for line in uninterrupted[1]["plots/metrics/loss.tsv"].splitlines()[1:]]
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("death", [1, 4, 9, 23], ids=lambda step: f"killed at step {step}")
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, death, caplog):
    """Killed before the first checkpoint, right after one, between two (curve points past it), at the last step."""
    with pytest.raises(Killed):
        run(tmp_path, dying_at(death))
    with caplog.at_level(logging.INFO):
        assert run(tmp_path) == uninterrupted
    checkpointed = death // 4 * 4
    assert (f"toy: resuming at step {checkpointed} of 24" in caplog.text) == (checkpointed > 0)


def test_a_run_killed_again_and_again_still_equals_uninterrupted(tmp_path, uninterrupted):
    for death in (6, 10, 11, 19):
        with pytest.raises(Killed):
            run(tmp_path, dying_at(death))
    assert run(tmp_path) == uninterrupted


def test_a_finished_run_is_not_trained_further(tmp_path, uninterrupted):
    """The teacher stage relies on it: killed in its second part, it passes through the first at once."""
    assert run(tmp_path) == uninterrupted
    assert run(tmp_path, dying_at(0)) == uninterrupted


def test_what_looks_on_does_not_change_the_run(tmp_path, uninterrupted):
    """An evaluation in between that draws random numbers leaves the weights as they are, and joins the curves."""
    weights, curves = run(tmp_path, evaluate=lambda model: {"fid": float(torch.rand(()))}, evaluate_every=6)
    assert weights == uninterrupted[0]
    steps = [line.split(b"\t")[0] for line in curves["plots/metrics/fid.tsv"].splitlines()[1:]]
    assert steps == [b"6", b"12", b"18", b"24"]


def test_an_evaluation_between_two_points_of_the_curves_is_a_point_of_its_own(tmp_path):
    """None is left out because the curves are logged at other steps."""
    _, curves = run(tmp_path, evaluate=lambda model: {"fid": 1.0}, evaluate_every=7)
    steps = [line.split(b"\t")[0] for line in curves["plots/metrics/fid.tsv"].splitlines()[1:]]
    assert steps == [b"7", b"14", b"21", b"24"]


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, uninterrupted, caplog):
    with pytest.raises(Killed):
        run(tmp_path, dying_at(9), fingerprint="another run", config=training(learning_rate=0.2))
    with caplog.at_level(logging.INFO):
        assert run(tmp_path) == uninterrupted
    assert "starting anew" in caplog.text
    assert "resuming" not in caplog.text


@pytest.mark.parametrize("left", [0, 10, 0.5, -1], ids=lambda left: f"cut to {left}")
def test_a_truncated_checkpoint_starts_anew_and_says_so(tmp_path, uninterrupted, left, caplog):
    with pytest.raises(Killed):
        run(tmp_path, dying_at(9))
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else left])
    assert run(tmp_path) == uninterrupted
    assert f"{tmp_path / 'state.pt'} is damaged" in caplog.text
    assert "starting this stage anew" in caplog.text


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}], ids=["a list", "no fingerprint"])
def test_a_torch_file_that_is_not_a_checkpoint_is_not_resumed(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    assert CheckpointFile(tmp_path / "state.pt", "this run").load(["step"], range(9)) is None


@pytest.fixture
def killed(tmp_path):
    """The checkpoint of a run that was killed at step 9."""
    with pytest.raises(Killed):
        run(tmp_path, dying_at(9))
    return tmp_path / "state.pt"


def test_a_checkpoint_with_a_byte_flipped_anywhere_starts_anew(tmp_path, uninterrupted, killed, caplog):
    """Inside the tensors nothing else would notice it: another student would come out of it."""
    whole = killed.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 200):
        killed.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        caplog.clear()
        assert CheckpointFile(killed, "this run").load(["step"], range(25)) is None
        assert f"{killed} is damaged" in caplog.text
    assert run(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": None}, "it lacks model"),
        ({"step": None}, "it lacks step"),
        *(({"step": step}, "its step is") for step in (10**9, 25, -1, 2.0, "4")),
    ],
)
def test_a_checkpoint_that_cannot_be_of_this_run_starts_anew(tmp_path, uninterrupted, killed, change, reason, caplog):
    """Whoever sealed it: a step past the end would end the run untrained."""
    checkpoint = CheckpointFile(killed, "this run")
    state = {**torch.load(killed, weights_only=True), **change}
    state.pop("fingerprint")
    checkpoint.save({key: value for key, value in state.items() if value is not None})
    assert run(tmp_path) == uninterrupted
    assert f"is damaged ({reason}" in caplog.text


def test_a_checkpoint_without_a_seal_starts_anew(tmp_path, uninterrupted, killed, caplog):
    torch.save(torch.load(killed, weights_only=True), killed)
    assert run(tmp_path) == uninterrupted
    assert "is damaged (its contents are not those that were sealed)" in caplog.text


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_disk_that_is_full_is_named_and_nothing_half_written_is_left(tmp_path, size, monkeypatch):
    """/dev/full answers to every byte what a full disk does."""
    checkpoint = CheckpointFile(tmp_path / "state.pt", "this run")
    checkpoint.save({"step": 1})
    before = (tmp_path / "state.pt").read_bytes()
    monkeypatch.setattr(CheckpointFile, "_remove_halves", lambda self: None)
    (tmp_path / f".state.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoint.save({"step": 2, "weights": torch.ones(size)})
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "state.pt")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"state.pt": before}


class Malicious:
    """Unpickled the ordinary way, this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_never_runs_code(tmp_path, caplog):
    torch.save({"fingerprint": "this run", "model": Malicious(tmp_path / "proof")}, tmp_path / "state.pt")
    assert CheckpointFile(tmp_path / "state.pt", "this run").load(["step"], range(9)) is None
    assert "starting this stage anew" in caplog.text
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "proof").is_dir(), "the file is harmless, so the test above proves nothing"


def test_writing_a_checkpoint_that_fails_keeps_the_one_before(tmp_path):
    checkpoint = CheckpointFile(tmp_path / "state.pt", "this run")
    checkpoint.save({"step": 1})
    with pytest.raises((AttributeError, TypeError)):
        checkpoint.save({"step": lambda: None})
    assert checkpoint.load(["step"], range(9)) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, uninterrupted, bad):
    """NaN at step 6, the next checkpoint due at 8, the next curve point at 9: no poisoned state may reach the disk."""

    def diverging(model, indices_B, step):
        values = objective(model, indices_B, step)
        return {**values, "loss": values["loss"] * bad} if step == 6 else values

    with pytest.raises(TrainingDiverged, match=r"toy: .* step 8.* learning_rate"):
        run(tmp_path, diverging)
    state = CheckpointFile(tmp_path / "state.pt", "this run").load(["step"], range(1000))
    assert state is not None
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
    assert run(tmp_path) == uninterrupted


def test_weight_decay_is_on_matrices_alone(tmp_path):
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = training(ema_decay=0.0, learning_rate=0.1, final_learning_rate=0.1, warmup_steps=0, steps=3)

    def indifferent(model, indices_B, step):
        return {"loss": sum(parameter.sum() for parameter in model.parameters()) * 0.0}

    checkpoint = CheckpointFile(tmp_path / "state.pt", "")
    common = {"seed": 0, "dataset_size": 9, "checkpoint": checkpoint, "curves_dir": tmp_path / "c", "description": "-"}
    after = train(model, indifferent, config=config, **common)
    for name, value in before.items():
        if not value.is_floating_point():
            continue
        shrink = (1 - 0.1 * 0.1) ** 3 if name.endswith("weight") and value.ndim == 2 else 1.0
        torch.testing.assert_close(after[name], value * shrink, atol=1e-7, rtol=1e-6)


def test_the_result_is_the_moving_average_of_the_weights(tmp_path):
    """Against the recursion in float64, with the decay min(0.9, (1 + k) / (10 + k)); buffers are copied."""
    seen = []

    def spying(model, indices_B, step):
        seen.append({name: value.double().clone() for name, value in model.state_dict().items()})
        return objective(model, indices_B, step)

    run(tmp_path, spying)
    state = CheckpointFile(tmp_path / "state.pt", "this run").load(["step"], range(1000))
    weights = [*seen[1:], {name: value.double() for name, value in state["model"].items()}]
    for name, expected in seen[0].items():
        for k, current in enumerate(weights):
            decay = min(0.9, (1 + k) / (10 + k)) if "running" not in name and "batches" not in name else 0.0
            expected = decay * expected + (1 - decay) * current[name]
        torch.testing.assert_close(state["ema"][name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(state["ema"]["0.weight"], state["model"]["0.weight"])


# schedules


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate_warms_up_linearly_and_falls_like_a_cosine(warmup):
    config = training(steps=100, warmup_steps=warmup, learning_rate=3e-3, final_learning_rate=1e-4)
    for step in range(100):
        if step < warmup:
            expected = 3e-3 * (step + 1) / warmup
        else:
            expected = 1e-4 + (3e-3 - 1e-4) * math.cos(math.pi / 2 * (step - warmup) / (100 - warmup)) ** 2
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 100) == pytest.approx(1e-4)


def test_warm_up_to_the_last_step_divides_by_nothing():
    config = training(steps=10, warmup_steps=10)
    assert [learning_rate(config, step) for step in (0, 9)] == pytest.approx([0.005, 0.05])


def test_ema_decay_starts_low_and_ends_as_configured():
    config = training(ema_decay=0.95)
    assert [ema_decay(config, step) for step in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 9 / 18])
    assert ema_decay(config, 10_000) == 0.95


@pytest.mark.parametrize(("batch_size", "size"), [(5, 13), (13, 13), (30, 13), (4, 12)])
def test_every_epoch_is_a_permutation_and_batches_run_on_over_epochs(batch_size, size):
    stream = np.concatenate([batch_indices(3, step, batch_size, size).numpy() for step in range(24)])
    assert len(stream) == 24 * batch_size
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_is_a_function_of_seed_and_step_alone(monkeypatch):
    """Whatever was asked for before, and so whatever the cache of permutations holds."""
    forwards = [batch_indices(3, step, 5, 13) for step in range(20)]
    backwards = [batch_indices(3, step, 5, 13) for step in reversed(range(20))][::-1]
    monkeypatch.setattr(schedule, "_permutations", {})
    cold = []
    for step in range(20):
        schedule._permutations.clear()
        cold.append(batch_indices(3, step, 5, 13))
    for triple in zip(forwards, backwards, cold, strict=True):
        assert all(torch.equal(a, b) for a, b in itertools.pairwise(triple))
    assert not torch.equal(batch_indices(4, 0, 5, 13), forwards[0])


# real stages, killed as the kernel kills


SHORT = ["batch_size=16", "warmup_steps=2", "log_every=2", "checkpoint_every=3"]
KILLS = {
    "features": ("features", 2, "classifier: resuming at step 3 of 8", paths.CLASSIFIER),
    "teacher, in its tokenizer": ("teacher", 2, "tokenizer: resuming at step 3 of 8", paths.TOKENIZER),
    "teacher, in its transformer": ("teacher", 5, "teacher: resuming at step 3 of 8", paths.TOKENIZER),
}
"""The stage, the checkpoint that dies as it was to take its place (three a training), what resuming says, a result."""


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_stage_killed_with_sigkill_ends_with_the_same_bytes(kill, tmp_path, monkeypatch, caplog):
    """`python -m ddops.stages.<stage>`, dead in the middle of its work, then run again."""
    stage, number, message, result = KILLS[kill]
    trainings = ("features.training", "teacher.tokenizer_training", "teacher.training")
    overrides = [f"{training}.{setting}" for training in trainings for setting in ("steps=8", *SHORT)]
    workspaces = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for workspace in workspaces:
        write_tiny_params(workspace, *overrides, "features.channels=4")
    kill_stage_in(killed, stage, suffix=".pt", number=number)
    assert not (killed / result).exists()

    config = load_config(killed / "params.yaml")
    for workspace in workspaces:
        monkeypatch.chdir(workspace)
        with caplog.at_level(logging.INFO):
            if stage == "features":
                features_stage(config.seed, config.features)
            else:
                teacher_stage(config.seed, config.teacher)
        assert (message in caplog.text) == (workspace == killed)
    for directory in ("artifacts", "reports"):
        assert contents(whole / directory)
        assert contents(killed / directory) == contents(whole / directory)
    assert not contents(killed / paths.STATE), "no checkpoint, nor half of one"


def test_the_judge_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    """It is in the loss of DD1, so every machine would have another student."""
    made = []
    for threads in (1, 2):
        workspace = tmp_path / str(threads)
        write_tiny_params(
            workspace, "features.channels=32", *(f"features.training.{word}" for word in ("steps=8", *SHORT))
        )
        config = load_config(workspace / "params.yaml")
        monkeypatch.chdir(workspace)
        torch.set_num_threads(threads)
        try:
            features_stage(config.seed, config.features)
            assert torch.get_num_threads() == threads, "what follows has them again"
        finally:
            torch.set_num_threads(1)
        made.append((workspace / paths.CLASSIFIER).read_bytes())
    assert made[0] == made[1]


def test_a_checkpoint_belongs_to_its_settings_and_inputs(tmp_path):
    """All that a run depends on is in the fingerprint: a changed seed, setting or input file is another run."""
    config = training()
    (tmp_path / "teacher").write_bytes(b"one teacher")
    (tmp_path / "other").write_bytes(b"another teacher")

    def fingerprint(name="dd1", seed=0, settings=config, teacher="teacher"):
        return checkpoint_file("distill_dd1", name, [seed, settings], [tmp_path / teacher]).fingerprint

    assert fingerprint(settings=training()) == fingerprint()
    others = [
        fingerprint(name="dd2"),
        fingerprint(seed=1),
        fingerprint(settings=training(learning_rate=0.06)),
        fingerprint(teacher="other"),
    ]
    assert len({fingerprint(), *others}) == 5


# several processes


def smooth_model():
    """No dropout and no running statistics: what it learns does not depend on how a batch is shared."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))


def smooth_objective(model, indices_B, step):
    x = torch.linspace(-1, 1, DATASET_SIZE * 3).view(DATASET_SIZE, 3)[indices_B]
    return {"loss": (model(x) - x.prod(1, keepdim=True)).square().mean()}


def train_smooth(directory, on_step=smooth_objective, **changes):
    return train(
        smooth_model(),
        on_step,
        config=training(batch_size=6, **changes),
        seed=0,
        dataset_size=DATASET_SIZE,
        checkpoint=CheckpointFile(directory / "state.pt", "shared"),
        curves_dir=directory / "curves",
        description="shared",
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_a_batch_compute_what_one_does(tmp_path, processes):
    """To rounding: the gradient of a batch is the mean of its shares', and so are the values on the curves."""
    one, several = train_smooth(tmp_path / "one"), train_smooth(tmp_path / "several", processes=processes)
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, atol=1e-5, rtol=1e-4)
    losses = [
        [row["loss"] for _, row in torch.load(tmp_path / run / "state.pt", weights_only=True)["history"]]
        for run in ("one", "several")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_processes_resume_to_the_same_bytes(tmp_path):
    """Killed in the parent alone, in the middle: its replica ends by itself, and the same command goes on."""

    def dying(model, indices_B, step):
        if step == 10 and os.getpid() == parent:
            raise Killed
        if step == 0 and os.getpid() != parent:
            (tmp_path / "replica").write_text(str(os.getpid()))
        return smooth_objective(model, indices_B, step)

    parent = os.getpid()
    whole = train_smooth(tmp_path / "whole", processes=2)
    with pytest.raises(Killed):
        train_smooth(tmp_path / "killed", dying, processes=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "replica").read_text()), 0)
    resumed = train_smooth(tmp_path / "killed", processes=2)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with its parent")
def test_others_end_with_a_first_process_that_is_killed_and_do_not_work_on(tmp_path):
    file = tmp_path / "other"
    code = (
        "import os, signal, sys, time; from pathlib import Path; from ddops.training.replicas import replicas\n"
        "file = Path(sys.argv[1])\n"
        "with replicas(2) as group:\n"
        "    if not group.is_first:\n"
        "        file.write_text(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "    while not (file.exists() and file.read_text()):\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert result.returncode == -signal.SIGKILL
    other = Path("/proc") / file.read_text() / "stat"
    for _ in range(500):
        # Ended, or ended and not yet asked for by whoever inherited it.
        if not other.exists() or other.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("it works on without the first")


def test_a_lost_process_is_named_and_nothing_waits_for_it(tmp_path):
    def dying(model, indices_B, step):
        if step == 10 and os.getpid() != parent:
            os._exit(1)
        return smooth_objective(model, indices_B, step)

    parent = os.getpid()
    with pytest.raises(ReplicaLost, match="run the same command again"):
        train_smooth(tmp_path, dying, processes=2)
    assert train_smooth(tmp_path, processes=2)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Embeddings, heads, norms and biases are not for Muon (arXiv 2502.16982, section 2)."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    muon, adamw = build_optimizers(model, training(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon)
    assert [p is model["blocks"][0].weight for group in muon.param_groups for p in group["params"]] == [True]
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in rest} == {id(model["embedding"].weight), id(model["blocks"][0].bias)}
    assert len(build_optimizers(model, training(optimizer="adamw"))) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_restores_every_optimizer(tmp_path, optimizer):
    def blocks():
        torch.manual_seed(1)
        return nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))})

    def on_step(model, indices_B, step):
        if step == dies_at:
            raise Killed
        return smooth_objective(model["blocks"], indices_B, step)

    def go(directory):
        return train(
            blocks(),
            on_step,
            config=training(optimizer=optimizer),
            seed=0,
            dataset_size=DATASET_SIZE,
            checkpoint=CheckpointFile(directory / "state.pt", "optimizers"),
            curves_dir=directory / "curves",
            description="optimizers",
        )

    dies_at = None
    whole = go(tmp_path / "whole")
    dies_at = 14
    with pytest.raises(Killed):
        go(tmp_path / "killed")
    dies_at = None
    resumed = go(tmp_path / "killed")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
