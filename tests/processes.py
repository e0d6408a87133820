"""Processes that the scripts start: their surroundings, which of them live, waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SLOW = 280  # seconds; the machine may be busy


def env(state: Path) -> dict[str, str]:
    """The scripts in this interpreter's environment, with what they keep in a folder of the test's."""
    return {**os.environ, "FEDMM_VENV": sys.prefix, "FEDMM_STATE": str(state), "FEDMM_HOME": str(state / "cache")}


def wait_until(happened, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return bool(done)


def commands_about(folder: Path) -> set[str]:
    """The command lines of living processes that name it."""
    seen = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in seen if str(folder) in line}
