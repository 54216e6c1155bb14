"""A real Prefect server and worker for tests, and its REST API. Each process is a real one, and can be killed."""

import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from datetime import datetime

import httpx

from ddops.flows import environment
from helpers import tiny_pipeline

PATIENCE = 600
"""Seconds to wait for something to happen, on a machine that is busy with other things."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def eventually(condition, what, patience=PATIENCE):
    """What ``condition()`` gives, as soon as that is true."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.25)
    raise AssertionError(f"{what}: not within {patience} s")


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Receiver:
    """A web server that keeps what is posted to it."""

    def __init__(self):
        self.received = received = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/notify"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()


class Patient(httpx.HTTPTransport):
    """Asks again where the server says that it is busy (503: SQLite is locked), as Prefect's own clients do."""

    def handle_request(self, request):
        for _ in range(20):
            response = super().handle_request(request)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            response.read()
            time.sleep(0.5)
        return response


class World:
    """Server, worker and their logs, in a directory."""

    def __init__(self, directory, workspace, **settings):
        self.directory, self.workspace = directory, workspace
        self.port = free_port()
        api = f"http://127.0.0.1:{self.port}/api"
        self.api = httpx.Client(base_url=api, timeout=PATIENCE, trust_env=False, transport=Patient())
        self.calls = directory / "calls.log"
        own = tiny_pipeline.environment(workspace)
        audit = str(tiny_pipeline.ROOT / "tests" / "helpers" / "audit")
        self.env = {
            **own,
            **environment.settings(workspace),
            "PYTHONPATH": os.pathsep.join([audit, own["PYTHONPATH"]]),
            "DDOPS_AUDIT_LOG": str(self.calls),
            "PREFECT_API_URL": str(self.api.base_url).rstrip("/"),
            "PREFECT_HOME": str(directory / "prefect"),
            # So that tests do not wait long for the next poll; more polls keep the server busy with nothing else.
            "PREFECT_WORKER_QUERY_SECONDS": "0.7",
            "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "PREFECT_SERVER_SERVICES_TRIGGERS_EVENTS_LOOP_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "0.5",
            "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",
            **settings,
        }
        self.server = self.worker = None

    def spawn(self, name, *arguments, workspace=None):
        """A process of this interpreter that stays, with a log of its own."""
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=workspace or self.workspace,
                env=self.env if workspace is None else {**self.env, environment.WORKSPACE: str(workspace)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_server(self):
        self.server = self.spawn("server", "-m", "prefect", "server", "start", "--port", str(self.port))

        def healthy():
            assert self.server.poll() is None, (self.directory / "server.log").read_text()
            with suppress(httpx.TransportError):
                return self.api.get("/health").status_code == 200

        eventually(healthy, "the server's health")

    def keep_empty_database(self):
        """The server's, as it has just been made: that takes a new server five seconds."""
        with (
            closing(sqlite3.connect(self.directory / "prefect" / "prefect.db")) as made,
            closing(sqlite3.connect(self.directory / "empty.db")) as kept,
        ):
            made.backup(kept)

    def give_empty_database(self, home):
        """Put it where a server that is started with that PREFECT_HOME finds it."""
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / "empty.db", home / "prefect.db")

    def kill_server(self):
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def start_worker(self):
        self.worker = self.spawn("worker", "-m", "ddops.flows.worker")

    def kill_worker(self):
        """SIGKILL to the worker alone: what it started is not asked."""
        os.kill(self.worker.pid, signal.SIGKILL)
        self.worker.wait()

    def run(self, *arguments, workspace=None):
        """A command of this interpreter, with the server known to it."""
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=workspace or self.workspace,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    def close(self):
        for process in filter(None, (self.worker, self.server)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # The API

    def post(self, path, status=(200, 201), **body):
        answer = eventually(lambda: self._answer(path, body), path)[0]
        assert answer.status_code in status, answer.text
        return answer.json()

    def _answer(self, path, body):
        answer = self.api.post(path, json=body)
        # Prefect's own clients try again too: SQLite is locked now and then on a busy machine.
        return [] if answer.status_code == 503 else [answer]

    def deployment(self, name="on-demand"):
        return self.api.get(f"/deployments/name/retrain/{name}").raise_for_status().json()

    def ask_for_run(self, deployment="on-demand", **parameters):
        """A run's id; it is taken up by the worker."""
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return self.post(path, parameters={"preset": "smoke", "retry_seconds": 0.2, **parameters})["id"]

    def run_of(self, run):
        return self.api.get(f"/flow_runs/{run}").raise_for_status().json()

    def ended(self, run, patience=PATIENCE):
        """(type, name, message) of the state a run ends in."""

        def state():
            found = self.run_of(run)["state"]
            return found if found["type"] in ENDED else None

        found = eventually(state, f"the end of run {run}", patience)
        return found["type"], found["name"], found["message"]

    def seconds_of_silence(self, run):
        """From a run's last heartbeat to the state it ended in."""
        events = {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run}"]},
        }
        beats = self.post("/events/filter", filter=events)["events"]
        last = max(datetime.fromisoformat(beat["occurred"]) for beat in beats)
        return (datetime.fromisoformat(self.run_of(run)["end_time"]) - last).total_seconds()

    def tasks(self, run):
        """State of each task of a run, in the order they were made."""

        def recorded():
            tasks = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}}, sort="EXPECTED_START_TIME_ASC")
            return all(task["state"] and task["state"]["type"] in ENDED for task in tasks) and tasks

        # The server writes a task's last state a moment after the run's; a task has been seen with its state's type
        # and without the state itself.
        return {task["name"]: task["state"] for task in eventually(recorded, "the tasks' states")}

    def artifacts(self, run):
        """Type and content of each artifact of a run, by key."""
        found = self.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {artifact["key"]: (artifact["type"], artifact["data"]) for artifact in found}

    def logs(self, run):
        found = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        return "\n".join(entry["message"] for entry in found)

    def cancel(self, run):
        """As the page's button does."""
        self.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
