"""``python -m MODULE`` without the second or two that its imports take: in a fork of this process, which keeps them.

A real process, with streams, environment, directory and exit code of its own; only its command line is this one's.
"""

import importlib
import os
import runpy
import subprocess
import sys
import tempfile
import traceback

LOADED = {
    "dvc": ("dvc.cli.parser", "dvc.repo.index", "dvc.data_cloud", "dvc.analytics", "dvc.rwlock", "scmrepo.git"),
    "gto.cli": ("gto.cli",),
}
"""What to load here, once, before forking."""


def run(command, *, cwd=".", env=os.environ, capture_output=True, text=True, check=False):
    """What ``subprocess.run`` gives; this interpreter's modules are forked, other commands are not."""
    if list(command[:2]) == [sys.executable, "-m"]:
        done = run_module(*command[2:], cwd=cwd, env=env)
        if check:
            done.check_returncode()
        return done
    return subprocess.run(command, cwd=cwd, env=env, capture_output=capture_output, text=text, check=check)


def run_module(module, *arguments, cwd=".", env=os.environ):
    """What ``subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)`` gives."""
    for name in LOADED.get(module, ()):
        importlib.import_module(name)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os._exit(_become(module, arguments, cwd, dict(env), output.fileno(), errors.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for stream in (output, errors):
            stream.seek(0)
            said.append(stream.read())
    return subprocess.CompletedProcess([sys.executable, "-m", module, *arguments], code, *said)


def _become(module, arguments, cwd, env, output, errors):
    """In the child: run the module to its end; gives the exit code, and raises nothing."""
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [module, *arguments]
        if module == "dvc":
            importlib.import_module("dvc.logger").setup()  # done when DVC is imported, with the streams of then
        try:
            # runpy warns of a module that is there already; a package is none.
            if not hasattr(sys.modules.get(module), "__path__"):
                sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
