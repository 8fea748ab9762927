"""`autoshard calibrate` on host devices: it runs, writes a topology that search takes, and says how far off it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import autoshard
from autoshard.calibrating.microbenchmarks import QUICK, Ranges, cases
from autoshard.calibrating.timing import HASTE
from autoshard.cli import app
from costmodels.fitting import COLLECTIVES
from costmodels.machine.chips import Constant
from costmodels.machine.topology import Topology, parse_topology
from costmodels.machine.topology_file import topology_toml
from tests.support.paths import ROOT
from tests.support.strategies import topologies


@pytest.fixture(scope="module")
def calibration() -> autoshard.Calibration:
    return autoshard.calibrate("cpu:2", dtypes=("float32",), ranges=QUICK, patience=HASTE)


@pytest.mark.long
def test_a_calibration_measures_every_kind_and_holds_sizes_out(calibration: autoshard.Calibration):
    kinds = {timing.kind for timing in calibration.timings}
    assert kinds == {"matmul", "one row", "vector", "memory", *COLLECTIVES}
    assert all(timing.seconds > 0 for timing in calibration.timings)
    assert {timing.series for timing in calibration.timings if not timing.fitted} == {
        timing.series for timing in calibration.timings
    }
    # So short timings may not tell every constant, on a busy machine hardly any; what they do not tell stays as it was.
    before, after = calibration.before.chip.constants, calibration.topology.chip.constants
    assert set(calibration.measured) <= set(after)
    assert all(after[name] == before[name] for name in before if after[name].status != "measured")


def test_its_file_is_its_topology_and_search_takes_it(calibration: autoshard.Calibration, tmp_path: Path):
    import jax
    import jax.numpy as jnp

    path = tmp_path / "host.toml"
    calibration.save(path)
    again = parse_topology(path)
    assert again == calibration.topology
    assert again.chip.constants == calibration.topology.chip.constants
    assert path.read_text().startswith("# Measured by autoshard calibrate: 2 × ")
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    plan = autoshard.search(lambda a, b: a @ b, x, x, topology=path)
    assert plan.topology == calibration.topology


@pytest.mark.long
def test_the_command_prints_errors_writes_the_file_and_checks_a_step(tmp_path: Path):
    path = tmp_path / "host.toml"
    palm = f"{ROOT / 'examples' / 'palm.py'}:decode"
    tiny = ("--set", "size=tiny", "--set", "batch=8", "--set", "context=16")
    run = CliRunner().invoke(
        app, ["calibrate", "-d", "cpu:2", "--quick", "-o", str(path), "--check", palm, *tiny, "--json"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["residuals"][-1]["series"] == "all" and found["residuals"][-1]["held_out"] > 0
    (check,) = found["checks"]
    assert check["name"] == "palm-tiny-decode" and check["predicted_seconds"] > 0 and check["measured_seconds"] > 0
    assert f"Wrote {path}." in run.stderr and parse_topology(path).size == 2


def test_the_report_shows_constants_and_held_out_errors(calibration: autoshard.Calibration):
    text = str(calibration)
    assert text.startswith("cpu:2, measured in ")
    assert "hbm_bytes_per_second" in text and "all-gather over x" in text and "held out" in text


def test_devices_that_are_not_there():
    with pytest.raises(
        autoshard.TopologyError, match="v5e:4x4 cannot be measured: A mesh of x=4 × y=4 takes 16 devices"
    ):
        autoshard.calibrate("v5e:4x4")


@pytest.mark.parametrize("name", ["cpu:8", "cpu:2x4", "h100:8", "v5e:4x4"])
def test_a_fixed_third_of_every_series_is_held_out(name: str):
    found = cases(parse_topology(name), Ranges(), ("bfloat16",))
    series: dict[str, list[bool]] = {}
    for case in found:
        series.setdefault(case.timing.series, []).append(case.timing.fitted)
    assert all(len(flags) >= 6 and flags.count(False) == len(flags) // 3 for flags in series.values())


@given(topologies(), st.sampled_from(["measured", "given", "assumed"]), st.floats(1e-3, 1e15), st.text(max_size=20))
def test_a_topology_file_reads_back_as_it_was(topology: Topology, status, value: float, source: str):
    import tempfile
    from dataclasses import replace

    from costmodels.machine.topology import complete_axes

    chip = topology.chip.override({"hbm_bytes_per_second": Constant(value, source, status)}, "elsewhere")
    first, *rest = topology.axes
    changed = complete_axes(replace(topology, chip=chip))
    changed = replace(changed, axes=(replace(first, bytes_per_second=value), *rest))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.toml"
        path.write_text(topology_toml(changed, "two\nlines"), encoding="utf-8")
        again = parse_topology(path)
    assert again == changed
    assert again.chip.constants == changed.chip.constants
