"""The demo runs end to end, and what it prints is what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import autoshard
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

DEMO = ROOT / "examples" / "demo.py"


@cache
def ran(directory: Path) -> str:
    """What the demo prints, run from another directory.

    `readline`, which pytest imports, sets COLUMNS for child processes only. `os.environ` lacks it.
    """
    command = [sys.executable, str(DEMO)]
    found = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=dict(os.environ))
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.mark.tpu
def test_the_plan_is_proven_written_and_audited(directory: Path) -> None:
    text = ran(directory)
    assert "palm-540b-decode on v4:4x4x4\n" in text
    assert "OPTIMAL: under this cost model no plan that fits is faster (gap 0)" in text
    assert "palm-540b-decode on v4:4x4x4, compiled for the TPU: as planned" in text
    peak = re.search(r"peak memory +\S+ GiB +\S+ GiB +(\S+)\n", text)
    assert peak and float(peak[1]) == pytest.approx(1, abs=0.05)
    plan = autoshard.load(directory / "plan.json")
    assert plan.explain() in text
    assert [path.name for path in directory.iterdir()] == ["plan.json"]


@pytest.mark.tpu
def test_prefill_beside_decode_with_prices(directory: Path) -> None:
    text = ran(directory)
    phases = [
        line.split(":")[0] for line in text.splitlines() if re.match(r"(decode|prefill), batch \d+: .* per chip", line)
    ]
    assert phases == ["decode, batch 64", "prefill, batch 1", "prefill, batch 64"]
    assert text.count("    so: ") == 3
    assert text.count("OPTIMAL, gap 0") == 3


@pytest.mark.tpu
def test_a_tiny_palm_is_run_and_compared(directory: Path) -> None:
    text = ran(directory)
    assert len(re.findall(r"results are split over the devices; the largest difference is", text)) == 2
