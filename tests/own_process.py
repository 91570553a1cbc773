"""Processes of their own that tests start; found by every test, as pyproject.toml says."""

import os
import subprocess
from pathlib import Path

import lrrobust


def environment(**changes):
    """Where this package is found, and computes on one core."""
    return {**os.environ, "PYTHONPATH": str(Path(lrrobust.__file__).parents[1]), "OMP_NUM_THREADS": "1", **changes}


def run_process(*command, **options):
    """Runs it to its end, for two minutes at most, and keeps what it says."""
    options = {"env": environment(), "timeout": 120, **options}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
