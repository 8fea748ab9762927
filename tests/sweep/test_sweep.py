"""Whole sweeps, and their commands; the store and workers are in test_sweep_faults.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import autoshard
from autoshard import load
from autoshard.cli import app
from autoshard.sweep import compiled as compiled_module
from autoshard.sweep.analysis.answers import render
from autoshard.sweep.analysis.frontier import fastest
from autoshard.sweep.analysis.rows import Row, load_sweep, sweep_result
from autoshard.sweep.job import Job
from autoshard.sweep.job_file import job_of
from autoshard.sweep.points import Point, points
from autoshard.sweep.results import FAILED, INFEASIBLE, PRUNED, SOLVED, result_from_dict
from autoshard.sweep.runner import Sweep
from autoshard.sweep.store import Store
from autoshard.sweep.worker import solve, unpack
from costmodels.machine import chip
from tests.support.cli import run
from tests.support.paths import SUPPORT
from tests.support.scripts.jobs import JOB, job, written
from tests.support.scripts.sweep_target import network

# --- The whole of it


def done_rows(asked: Job, **options: Any) -> tuple[Row, ...]:
    every = list(points(asked))
    return sweep_result(asked, list(Sweep(every, constraints=asked.constraints, **options)), every).rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, ...]:
    return done_rows(job(tmp_path_factory.mktemp("job")))


def test_every_point_becomes_a_proven_row_in_order(rows: tuple[Row, ...]):
    assert [row.outcome for row in rows] == [SOLVED] * 16
    assert {row.status for row in rows} == {"OPTIMAL"}
    assert [row.name for row in rows[:2]] == [
        "v5e:2x2, batch 8, width 256, weights bfloat16",
        "v5e:2x2, batch 8, width 256, weights float32",
    ]


def test_the_numbers_of_a_row_follow_from_its_seconds(rows: tuple[Row, ...]):
    for row in rows:
        batch, width = row.knobs["batch"], row.knobs["width"]
        assert isinstance(batch, int) and isinstance(width, int)
        assert row.tokens == batch
        assert row.chip_seconds_per_token == pytest.approx(4 * row.seconds / batch)
        assert row.price == pytest.approx(1e6 * row.chip_seconds_per_token * 1.2 / 3600)
        flops = 2 * batch * width * 4 * width * 2
        rate = chip("v5e").matmul_flops_per_second(str(row.knobs["weights"]))
        assert row.mfu == pytest.approx(flops / (row.seconds * 4 * rate))
        assert len(row.layout["decode"]) == 2


def test_a_point_is_the_plan_of_the_public_search(tmp_path: Path):

    (point, *_) = points(job(tmp_path))
    assert isinstance(point, Point)
    found = solve(point)
    work = network(8, 256)
    plan = autoshard.search(work.fn, *work.args, topology="v5e:2x2", name="network")
    assert found.phases["decode"].seconds == plan.estimate.seconds
    assert unpack(found.plans["decode"]).choice == plan.choice
    assert result_from_dict(found.to_dict()) == found


def test_an_impossible_point_does_not_stop_the_others(tmp_path: Path):
    text = JOB.replace("width = [256, 1024]", "width = [256, 1024, 131072]")
    text = text.replace('weights = ["bfloat16", "float32"]', 'weights = ["bfloat16", "no-such-type"]')
    found = done_rows(job(tmp_path, text))
    outcomes = {(row.knobs["width"], row.knobs["weights"]): row.outcome for row in found}
    assert outcomes[(256, "bfloat16")] == SOLVED
    assert outcomes[(131072, "bfloat16")] == PRUNED
    assert outcomes[(256, "no-such-type")] == FAILED
    why = next(row.why for row in found if row.outcome == FAILED)
    assert "network in" in why and "no-such-type" in why


def test_a_point_that_fits_no_layout_says_so(tmp_path: Path):
    text = JOB.replace("[price]", "[constraints]\nmemory_gib = 0.0011\n\n[price]")
    found = done_rows(job(tmp_path, text.replace("weights = [", 'weights = "bfloat16"\n# [')))
    assert {row.outcome for row in found} == {SOLVED, PRUNED, INFEASIBLE} - {
        each for each in (INFEASIBLE,) if each not in {row.outcome for row in found}
    }
    assert all(row.peak_bytes <= 0.0011 * 2**30 for row in found if row.outcome == SOLVED)


def test_together_phases_share_one_layout(tmp_path: Path):
    text = JOB.replace(
        "[phases.decode]",
        "[phases.prefill]\ntarget = 'sweep_target.py:network'\n"
        "arguments = { batch = { of = 'batch * input_length' }, width = 256 }\n\n[phases.decode]",
    )
    text = text.replace(
        "[vary]", "[together]\nphases = ['prefill', 'decode']\n\n[vary]\ninput_length = 16\noutput_length = 4"
    )
    text = text.replace("width = [256, 1024]", "width = 256").replace(
        'weights = ["bfloat16", "float32"]', "weights = 'bfloat16'"
    )
    found = done_rows(job(tmp_path, text))
    both = [row for row in found if row.phase == "prefill + decode"]
    assert [row.outcome for row in both] == [SOLVED] * 4
    assert {(row.kind, row.handoff_seconds) for row in both} == {("request", 0.0)}
    alone = {(row.phase, row.topology, row.knobs["batch"]): row.seconds for row in found}
    for row in both:
        prefill, decode = (alone[(name, row.topology, row.knobs["batch"])] for name in ("prefill", "decode"))
        assert row.seconds >= (prefill + 4 * decode) * (1 - 1e-9)
        assert row.seconds == pytest.approx(row.phase_seconds["prefill"] + 4 * row.phase_seconds["decode"])


# --- The command


def test_the_command_solves_resumes_and_answers(tmp_path: Path):
    path, out = written(tmp_path), tmp_path / "out"
    command = ["sweep", str(path), "-o", str(out), "--workers", "0"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "toy: 16 points, 16 with a plan (all proven optimal)" in first.stdout
    assert "16 points solved, 0 known from the store" in first.stderr
    second = CliRunner().invoke(app, command)
    assert second.stdout == first.stdout
    assert "0 points solved, 16 known from the store" in second.stderr
    with Store(out / "points.sqlite") as store:
        assert len(list(store.attempts())) == len(store.keys()) == 16
    found = load_sweep(out / "toy.json")
    assert len(found.rows) == 16
    assert render(found) == first.stdout
    ask = ["ask", str(out / "toy.json"), "--under-ms", "1", "--chips", "4", "--longest", "width"]
    answered = CliRunner().invoke(app, [*ask, "--gain", "weights:float32:bfloat16"])
    assert answered.exit_code == 0, answered.output
    lines = answered.stdout.splitlines()
    for count, start in enumerate(
        (
            "decode, width 256: the cheapest at 1.00 ms per token or less is v5e:",
            "decode, width 1024: the cheapest at 1.00 ms per token or less is v5e:",
            "decode, width 256: the fastest on 4 chips at 1.00 ms per token or less is v5e:",
            "decode, width 1024: the fastest on 4 chips at 1.00 ms per token or less is v5e:",
            "decode: the largest width at 1.00 ms per token or less is 1024 (the largest of the job",
            "decode: weights bfloat16 is 1.",
        )
    ):
        assert lines[count].startswith(start)
    assert len([line for line in lines if " × " in line]) == 8


def test_the_plan_of_an_answer_is_written(tmp_path: Path):
    path = written(tmp_path, JOB.replace("[8, 64]", "8").replace("[256, 1024]", "256"))
    assert CliRunner().invoke(app, ["sweep", str(path), "-o", str(tmp_path / "out"), "--workers", "0"]).exit_code == 0
    ask = ["ask", str(tmp_path / "out" / "toy.json"), "--chips", "4", "--save", str(tmp_path / "plan.json")]
    answered = CliRunner().invoke(app, ask)
    assert answered.exit_code == 0, answered.output
    plan = load(tmp_path / "plan.json")
    row = fastest(load_sweep(tmp_path / "out" / "toy.json").rows, 4)
    assert row is not None
    assert (plan.topology.name, plan.estimate.seconds) == (row.topology, row.seconds)
    assert "exists; --force" in CliRunner().invoke(app, ask).output
    for flags, says in (
        (["--under-ms", "1"], "--save needs exactly one answer, got 2"),
        (["--under-ms", "0"], "--under-ms must be a number above 0, got 0"),
        (["--first-token-ms", "1"], "That limit does not apply to the phases of"),
        (["--where", "weights=int4"], "No point has weights=int4; weights has bfloat16, float32"),
        (["--where", "wieghts=int4"], "No point has wieghts=int4; there are batch, width, weights, topology, chip"),
        (["--phase", "prefill"], "The phase must be one of decode, got prefill"),
    ):
        refused = CliRunner().invoke(app, [*(ask[:2] if "--first-token-ms" in flags else [*ask, "--force"]), *flags])
        assert refused.exit_code == 2 and says in refused.output
    (tmp_path / "out" / "points.sqlite").unlink()
    assert "does not exist" in CliRunner().invoke(app, [*ask, "--force"]).output


def test_another_job_finds_the_points_of_the_first(tmp_path: Path):
    command = [
        "sweep",
        str(written(tmp_path)),
        "-o",
        str(tmp_path / "a"),
        "--store",
        str(tmp_path / "s"),
        "--workers",
        "0",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    (tmp_path / "other").mkdir()
    path = written(tmp_path / "other", JOB.replace('name = "toy"', 'name = "other"').replace("[8, 64]", "[8, 16]"))
    command = ["sweep", str(path), "-o", str(tmp_path / "b"), "--store", str(tmp_path / "s"), "--workers", "0"]
    assert "8 points solved, 8 known from the store" in CliRunner().invoke(app, command).stderr


def test_a_job_in_python_needs_no_file():
    data = {
        "phases": {"step": {"target": "sweep_target.py:network", "tokens": "8"}},
        "chips": {"topologies": ["cpu:2"]},
    }
    assert [point.name for point in points(job_of(data, SUPPORT / "scripts"))] == ["step on cpu:2"]


def test_a_frontier_is_compiled_once_per_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Audited:
        step_seconds = 0.5

    def audit(plan: Any, fn: Any, *args: Any, target: str) -> Audited:
        calls.append(target)
        return Audited()

    monkeypatch.setattr(compiled_module, "audit", audit)
    job = tmp_path / "job.toml"
    target = SUPPORT / "scripts" / "sweep_target.py"
    job.write_text(
        f'[phases.decode]\ntarget = "{target}:network"\narguments = {{ batch = {{ of = "batch" }} }}\n'
        '[vary]\nbatch = [8]\n[chips]\ntopologies = ["cpu:2"]\n'
    )
    for _ in range(2):
        found = run("sweep", job, "-o", tmp_path, "--workers", "0", "--verify", "host", "--json")
        assert found.exit_code == 0, found.output
        (row,) = json.loads(found.stdout)["rows"]
        assert row["compiled_seconds"] == {"decode": 0.5}
    assert calls == ["host"]
