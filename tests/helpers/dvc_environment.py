"""The environment of a command that tests run in a workspace of their own."""

import os
import sys
from pathlib import Path


def dvc_environment(private, source, **more):
    """This interpreter on the code in ``source``, one thread, DVC's configuration in ``private``, not the user's.

    Rounding depends on the number of threads; two would also be slower on models this small. Progress bars are shown,
    whatever the user's setting: tests look for them.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TQDM_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(private),
        "DVC_SYSTEM_CONFIG_DIR": str(private),
        "DVC_SITE_CACHE_DIR": str(private),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **more,
    }
