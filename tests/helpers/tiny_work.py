"""A stage of the pipeline that tests/helpers/tiny_pipeline.py makes: sleeps, prints, fails, as behave.yaml says."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
STATE = Path(".ddops/state")
RAN = Path(".ddops/ran")


def work(name, outputs, behaviour):
    """Give the exit code."""
    with RAN.open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    print(f"{name} at work", flush=True)
    if behaviour.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour.get("stray"):
        start_stray()
    if behaviour.get("steps"):
        train(name, behaviour["steps"])
    while behaviour.get("until") and not Path(behaviour["until"]).exists():
        time.sleep(0.05)
    if behaviour.get("fill"):
        fill_the_disk()
    if behaviour.get("killed"):
        print("\rloss:  45%|####| 27/60 [00:03<00:03, 9.0step/s]", end="", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    for text in behaviour.get("say", []):
        print(text, file=sys.stderr, flush=True)
    for path in map(Path, outputs):
        write(path, name, refused=behaviour.get("refuse"))
    if behaviour.get("refuse"):
        print("FAILED near the teacher: exceeded by 5.5", file=sys.stderr)
        return 3
    tries = sum(line.split()[0] == name for line in RAN.read_text().splitlines())
    if tries <= behaviour.get("flaky", 0):
        return 75
    return behaviour.get("exit", 0)


def start_stray():
    """A process in a session of its own, as torchrun starts them."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    Path(".ddops/stray").write_text(str(subprocess.Popen(sleep, start_new_session=True).pid))


def train(name, steps):
    """Ten steps a second, with a checkpoint after each, and a progress bar as tqdm draws it."""
    checkpoint = STATE / name
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if first:
        print(f"{name}: resuming at step {first} of {steps}", flush=True)
    for step in range(first, steps):
        time.sleep(0.1)
        checkpoint.write_text(str(step + 1))
        bar = f"\r{name}: {100 * (step + 1) // steps:3d}%|###| {step + 1}/{steps} [00:01<00:01, 9.9step/s]"
        print(bar, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    checkpoint.unlink()


def fill_the_disk():
    with (STATE / "huge").open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def write(path, name, refused):
    seed = yaml.safe_load(Path("params.yaml").read_text())["seed"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "metrics.json":
        path.write_text(json.dumps({"dd1_1step": {"fid": 7.5 + seed}, "teacher": {"fid": 4.0}}))
    elif path.name == "gate.json":
        rule = {"rule": "near the teacher", "quantity": "dd1_1step.fid", "value": 7.5, "bound": "at most 2"}
        decision = {"passed": not refused, "outcome": "refused" if refused else "accepted", "override": None}
        model = {"student_sha256": "5" * 64, "checks": []}
        path.write_text(json.dumps({**decision, **model, "rules": [{**rule, "passed": not refused}]}))
    elif path.name == "grids":
        path.mkdir()
        (path / "dd1_1step.png").write_bytes(base64.b64decode(PNG))
    else:
        path.write_text(f"{name} {seed}")


if __name__ == "__main__":
    STATE.mkdir(parents=True, exist_ok=True)
    behaviours = yaml.safe_load(Path("behave.yaml").read_text()) or {}
    raise SystemExit(work(sys.argv[1], sys.argv[2:], behaviours.get(sys.argv[1], {})))
