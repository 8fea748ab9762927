"""Plans travel between versions of JAX."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest

import autoshard
from tests.support.effort import mostly_long
from tests.support.paths import DATA, ROOT
from tests.support.scripts import versions

OTHER = os.environ.get("AUTOSHARD_OTHER_PYTHON")
NO_OTHER = "AUTOSHARD_OTHER_PYTHON names no Python with another JAX"


WRITTEN = [f"{version}/{name}" for version in ("0.10", "0.12") for name in versions.CASES]
OF_SWEEPS = ("0.10/palm_prefill", "0.12/palm_decode", "0.12/llama_unrolled")


@pytest.mark.parametrize("written", mostly_long(WRITTEN, "0.12/palm_prefill", slow=OF_SWEEPS))
def test_a_plan_that_another_jax_wrote_is_audited_and_runs(written: str) -> None:
    found = versions.check(DATA / f"jax-{written}.json")
    assert found["written"].startswith(written.split("/")[0]) and found["collectives"] > 0


def other(*words: object) -> Any:
    """What the other Python says."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [str(OTHER), "-m", "tests.support.scripts.versions", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not OTHER, reason=NO_OTHER)
def test_plans_of_this_jax_run_under_the_other(tmp_path: Path) -> None:
    versions.write(tmp_path)
    found = other("check", tmp_path)
    assert found.keys() == versions.CASES.keys()
    for each in found.values():
        assert each["written"] == jax.__version__ != each["checked"]


@pytest.mark.skipif(not OTHER, reason=NO_OTHER)
def test_plans_of_the_other_jax_run_under_this_and_are_the_same(tmp_path: Path) -> None:
    assert other("write", tmp_path).keys() == versions.CASES.keys()
    for name in versions.CASES:
        file = tmp_path / f"{name}.json"
        found = versions.check(file)
        assert found["checked"] == jax.__version__ != found["written"]
        theirs, ours = autoshard.load(file), versions.planned(name)
        assert (theirs.fingerprint, theirs.choice) == (ours.fingerprint, ours.choice)
        assert theirs.estimate.seconds == pytest.approx(ours.estimate.seconds)


@pytest.mark.skipif(not OTHER, reason=NO_OTHER)
def test_the_other_python_has_another_jax() -> None:
    command = [str(OTHER), "-c", "import jax; print(jax.__version__)"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() != jax.__version__
