"""The parts of the flows that need no server: the leash, the workspace's lock, DVC's stages and their endings."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from ddops.cli import main
from ddops.config.load import ConfigError
from ddops.flows import dvc
from ddops.flows.dvc import Outcome, Stage
from ddops.flows.leash import Leash
from ddops.flows.progress import Progress, parse_bar, unglued
from ddops.flows.workspace import LOCK, WorkspaceBusyError, compose_parameters, locked
from ddops.hub.records import DownloadError, HubAwayError
from ddops.stages.common import EXIT_REFUSED, EXIT_TRY_AGAIN, ModelRefusedError, StageError, exit_code
from helpers import forked, tiny_pipeline
from helpers.house import imported_names
from helpers.prefect_world import PATIENCE, alive, eventually

ROOT = Path(__file__).parents[2]

# A child in a session of its own that does not hear SIGTERM, as a stuck data loader may; then a line with its id.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "child" not in sys.argv:
    child = subprocess.Popen([sys.executable, sys.argv[1], sys.argv[1], "child"], start_new_session=True)
    print(child.pid, flush=True)
time.sleep(600)
"""


def leash(*command, **options):
    return Leash([sys.executable, *command], cwd=Path.cwd(), env=os.environ, **options)


@pytest.fixture
def stubborn(tmp_path):
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN)
    return [str(path), str(path)]


def test_output_comes_as_it_is_printed_and_the_exit_code_at_the_end():
    code = "import sys; print('one'); print(' 50%|##|', end='\\r'); sys.stderr.write('end'); sys.exit(7)"
    with leash("-u", "-c", code) as running:
        assert list(running.lines(30)) == ["one\n", " 50%|##|\r", "end"]
        assert running.wait() == 7


def test_a_signal_is_told_as_shells_tell_it():
    with leash("-c", "import os; os.kill(os.getpid(), 9)") as running:
        assert list(running.lines(30)) == []
        assert running.wait() == 128 + 9


def test_a_timeout_ends_even_what_does_not_hear_and_lives_in_another_session(stubborn):
    with pytest.raises(TimeoutError), leash(*stubborn, grace=0.3) as running:  # noqa: PT012
        child = int(next(running.lines(PATIENCE)))
        assert alive(child)
        list(running.lines(0.5))
    assert not alive(child)
    assert running.process.poll() is not None


def test_nothing_is_left_when_the_holder_is_killed(stubborn):
    """SIGKILL gives the holder no chance to do anything; its end of the pipe closes all the same."""
    code = (
        "import os, sys; from pathlib import Path; from ddops.flows.leash import Leash\n"
        "with Leash([sys.executable, *sys.argv[1:]], cwd=Path.cwd(), env=os.environ, grace=0.3) as running:\n"
        "    for line in running.lines(60): print(running.process.pid, line, end='', flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, *stubborn], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    held, child = map(int, holder.stdout.readline().split())
    assert alive(held)
    assert alive(child)
    holder.kill()
    holder.wait()
    eventually(lambda: not alive(child) and not alive(held), "the end of what the holder held")


def test_nothing_is_left_when_the_program_that_holds_is_killed_too():
    with leash("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)") as running:
        child = int(next(running.lines(30)))
        os.kill(running.process.pid, signal.SIGKILL)
    eventually(lambda: not alive(child), "the end of the command")


def test_what_a_command_leaves_behind_is_ended():
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    with leash("-c", code) as running:
        (line,) = running.lines(30)
        assert running.wait() == 0
        assert not alive(int(line))


def test_a_line_that_follows_a_bar_is_told_from_it():
    bar, line = "\rdd1:  45%|##| 27/60 [00:03<00:03, 9.0step/s]", "ERROR: failed to run: work, exited with -9\n"
    assert unglued(bar + line) == [bar + "\r", line]
    for whole in (bar, bar + "\n", line, "accuracy 45% | good [really] | yes\n"):
        assert unglued(whole) == [whole]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (
            "\rdd1 student:  45%|####5     | 27/60 [00:03<00:03, 9.0step/s]\r",
            ("dd1 student", 45, "27/60 [00:03<00:03, 9.0step/s]"),
        ),
        ("100%|##########| 5/5 [00:01<00:00]\n", ("", 100, "5/5 [00:01<00:00]")),
        ("accuracy 45% | good\n", None),
        ("teacher: resuming at step 20 of 60\n", None),
    ],
)
def test_progress_bars_are_told_from_lines(piece, expected):
    assert parse_bar(piece) == (expected and Progress(*expected))


def test_the_graph_gives_the_order_and_the_file_what_the_flow_needs_to_know():
    """From this repository's own dvc.yaml: a stage that is added there is in the flow."""
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    found = dvc.stages(ROOT)
    names = [stage.name for stage in found]
    assert sorted(names) == sorted(declared)
    for stage in found:
        assert all(names.index(needed) < names.index(stage.name) for needed in stage.needs)
        assert stage.timeout == declared[stage.name].get("meta", {}).get("timeout", dvc.DEFAULT_TIMEOUT)
    assert {stage.name: stage.device for stage in found}["gate"] == "cpu"
    assert {stage.name: stage.device for stage in found}["teacher"] == "gpu"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline.make(tmp_path_factory.mktemp("flows") / "work", ["teacher", "distill_dd1"])


def change(workspace, text):
    (workspace / "dvc.yaml").write_text(text)


def test_a_target_leaves_out_what_does_not_lead_to_it(pipeline):
    assert [stage.name for stage in dvc.stages(pipeline, "teacher")] == ["teacher"]
    with pytest.raises(dvc.DvcError, match="nonsense"):
        dvc.stages(pipeline, "nonsense")


def test_what_is_tracked_by_itself_is_no_stage(tmp_path):
    """A production model is: it must not stand in the way of the next run."""
    workspace = tiny_pipeline.make(tmp_path / "work", ["teacher", "distill_dd1"])
    (workspace / "production").mkdir()
    (workspace / "production" / "model.onnx").write_text("promoted")
    forked.run_module(
        "dvc", "add", "--quiet", "production/model.onnx", cwd=workspace, env=tiny_pipeline.environment(workspace)
    )
    assert [(stage.name, stage.needs) for stage in dvc.stages(workspace)] == [
        ("teacher", ()),
        ("distill_dd1", ("teacher",)),
    ]


@pytest.mark.parametrize(
    ("meta", "said"),
    [({"timeout": 0}, "timeout"), ({"timeout": "1h"}, "timeout"), ({"device": "tpu"}, "cpu, gpu")],
)
def test_impossible_meta_is_refused_by_name(pipeline, meta, said):
    before = (pipeline / "dvc.yaml").read_text()
    change(pipeline, yaml.safe_dump(tiny_pipeline.declared(["teacher"], teacher=meta)))
    with pytest.raises(dvc.DvcError, match=rf"dvc.yaml: teacher.meta.*{said}"):
        dvc.stages(pipeline)
    change(pipeline, before)


def reproduce(workspace, behaviour, **stage):
    tiny_pipeline.behave(workspace, teacher=behaviour)
    heard = []
    result = dvc.reproduce(Stage("teacher", (), **stage), workspace, heard.append, force="force" in behaviour)
    return result, heard


@pytest.mark.slow
def test_what_becomes_of_a_stage(pipeline):
    """One after the other in one workspace: each failure leaves it as it was, so the stage runs again."""
    result, _ = reproduce(pipeline, {"exit": 1, "say": ["reading", "Traceback", "ValueError: no such class"]})
    assert result.outcome is Outcome.FAILED
    assert result.message.startswith("exited with 1\n")
    assert "ValueError: no such class" in result.message
    assert "git add" not in result.message
    assert reproduce(pipeline, {"refuse": True})[0].outcome is Outcome.REFUSED
    result, heard = reproduce(pipeline, {"killed": True})
    assert result.outcome is Outcome.KILLED, "though DVC says so on the line that the progress bar began"
    assert result.message.startswith("killed by signal 9")
    assert any("failed to reproduce 'teacher'" in piece and parse_bar(piece) is None for piece in heard)
    result, _ = reproduce(pipeline, {"exit": 75})
    assert result.outcome is Outcome.TRY_AGAIN
    # Long enough for DVC to come to the stage, however busy the machine is.
    before, patience = len(tiny_pipeline.ran(pipeline)), 1 + math.ceil(3 * result.seconds)
    result, _ = reproduce(pipeline, {"steps": 6000}, timeout=patience)
    assert result.outcome is Outcome.TIMED_OUT
    assert result.message.startswith(f"not done after {patience} s")
    (stage,) = tiny_pipeline.ran(pipeline)[before:]
    assert not alive(stage[1])
    result, heard = reproduce(pipeline, {})
    assert result.outcome is Outcome.RAN
    assert "teacher at work\n" in heard
    assert reproduce(pipeline, {})[0].outcome is Outcome.UP_TO_DATE
    (pipeline / "artifacts" / "teacher").unlink()
    assert reproduce(pipeline, {})[0].outcome is Outcome.RESTORED
    assert reproduce(pipeline, {"force": True})[0].outcome is Outcome.RAN


@pytest.mark.parametrize(
    ("code", "expected"), [(1, Outcome.FAILED), (255, Outcome.FAILED), (-9, Outcome.KILLED), (137, Outcome.KILLED)]
)
def test_exit_codes_have_meanings(code, expected):
    assert dvc.outcome_of(code) is expected


def test_stages_say_by_their_exit_code_what_kind_of_failure_it_was():
    assert exit_code(ModelRefusedError("no")) == EXIT_REFUSED
    assert exit_code(HubAwayError("away")) == EXIT_TRY_AGAIN
    assert exit_code(DownloadError("wrong hash")) == exit_code(StageError("no")) == 1


def test_a_stage_sees_nothing_of_prefects(monkeypatch):
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    assert not [name for name in dvc.environment() if name.startswith("PREFECT")]


def test_one_run_a_workspace(tmp_path):
    said = []
    with locked(tmp_path, "first", 0, said.append), pytest.raises(WorkspaceBusyError, match=r"held by first \(process"):  # noqa: SIM117
        with locked(tmp_path, "second", 0, said.append):
            pass
    with locked(tmp_path, "second", 0, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["holder"] == "second"
    assert said == []


def test_who_waits_says_for_whom_and_gets_its_turn(tmp_path):
    order, started = [], threading.Event()

    def first():
        with locked(tmp_path, "first", 0, order.append):
            started.set()
            time.sleep(1.2)
            order.append("first is done")

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with locked(tmp_path, "second", PATIENCE, order.append):
        assert "held by first" in order[0]
        assert order[1:] == ["first is done"]
    thread.join()


def test_the_lock_outlives_a_killed_run_only_until_its_stage_is_gone(tmp_path, stubborn):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from ddops.flows.leash import Leash; from ddops.flows.workspace import locked\n"
        "with locked(Path(sys.argv[1]), 'killed', 0, print) as lock:\n"
        "    command = [sys.executable, *sys.argv[2:]]\n"
        "    with Leash(command, cwd=Path.cwd(), env=os.environ, grace=3, keep_open=[lock]) as running:\n"
        "        for line in running.lines(60): print(line, end='', flush=True)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, *stubborn], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    with pytest.raises(WorkspaceBusyError), locked(tmp_path, "too early", 0, print):
        pass
    with locked(tmp_path, "next", PATIENCE, print):
        assert not alive(child)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense", None, None, []), "no preset named 'nonsense'"),
        (("smoke", None, None, ["dd1.training.stepz=3"]), "did you mean 'steps'"),
        (("smoke", None, None, ["preset=digits"]), "a parameter of its own"),
        (("smoke", -1, None, []), "seed"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_written(arguments, said):
    with pytest.raises(ConfigError, match=said):
        compose_parameters(ROOT, *arguments)


def test_parameters_reach_the_configuration():
    values = compose_parameters(ROOT, "smoke", 5, 400, ["dd1.training.steps=7"])
    assert (values["preset"], values["seed"]) == ("smoke", 5)
    assert values["trajectories"]["count"] == 400
    assert values["dd1"]["training"]["steps"] == 7


def test_the_flows_know_little_of_ddops_and_ddops_nothing_of_them():
    allowed = {"ddops.config.load", "ddops.stages", "ddops.stages.paths", "ddops.stages.common"}
    allowed |= {"ddops.evaluation.gate"}  # says which figures compare
    allowed |= {"ddops.extras", "ddops.extras.explain_at_the_top"}
    allowed |= {"ddops.lock", "ddops.lock.held", "ddops.lock.HeldError"}
    allowed |= {"ddops.files", "ddops.production", "ddops.reports"}  # what stages and promotions wrote, read
    allowed |= {"ddops", "ddops.git"}  # that Git refuses is told as everywhere
    for file in (ROOT / "src/ddops/flows").glob("*.py"):
        used = {
            name
            for name in imported_names(file)
            if name.split(".")[0] == "ddops" and not name.startswith("ddops.flows")
        }
        assert {
            name for name in used if not {name, name.rpartition(".")[0], ".".join(name.split(".")[:3])} & allowed
        } == set(), file


def test_without_prefect_the_command_names_its_extra(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["run"]) == 1
    assert "pip install 'ddops[prefect]'" in capsys.readouterr().err


def test_prefect_is_kept_out_of_what_needs_none_of_it():
    """The leash and the stages' endings are tried without a server, and `ddops run` says what is wrong at once."""
    modules = ", ".join(f"ddops.flows.{name}" for name in ("leash", "dvc", "workspace", "progress", "environment"))
    code = f"import sys, {modules}; print('prefect' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
