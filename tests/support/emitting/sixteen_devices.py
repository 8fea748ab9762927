"""Laws on sixteen host devices, in a process of its own: the other tests have eight."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT


def check_on_sixteen_devices(module: str, examples: int) -> None:
    """Runs a module's laws with so many examples.

    **Raises:** `AssertionError` with the end of its errors.
    """
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, str(examples)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
