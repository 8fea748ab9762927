"""Sweeps: job files, points, lower bounds, the frontier, answers; the store and workers are in test_sweep_faults.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from typer.testing import CliRunner

from autoshard.cli import app
from autoshard.plan import load
from autoshard.sweep.analysis import answers
from autoshard.sweep.analysis.advice import advice
from autoshard.sweep.analysis.answers import render
from autoshard.sweep.analysis.frontier import cheapest, fastest, frontier, gains, longest, switches
from autoshard.sweep.analysis.rows import Row, SweepResult, family, load_sweep, sweep_result
from autoshard.sweep.job import Job, JobError
from autoshard.sweep.job_file import job_of, line_of
from autoshard.sweep.lower_bounds import lower_bound, reason_to_prune
from autoshard.sweep.points import Point, Unmade, key, points, topologies, trace_run
from autoshard.sweep.results import FAILED, INFEASIBLE, PRUNED, SOLVED, result_from_dict
from autoshard.sweep.runner import Sweep
from autoshard.sweep.slice_shapes import shapes
from autoshard.sweep.store import Store
from autoshard.sweep.worker import solve, unpack
from costmodels.machine.chips import chip
from costmodels.machine.topology import parse_topology
from tests.support.effort import examples
from tests.support.jobs import JOB, job, written
from tests.support.layout_strategies import blocks
from tests.support.models import Block, arguments, function
from tests.support.paths import SUPPORT
from tests.support.sweep_target import network
from tests.support.tracing import trace

# --- The job file


@pytest.mark.parametrize(
    ("line", "with_this", "says"),
    [
        ("batch = [8, 64]", "batch = []", "line 9: vary.batch: must have at least one entry, got none"),
        ("counts = [4]", "counts = [0]", "line 15: chips.counts.0: input should be greater than or equal to 1, got 0"),
        ("counts = [4]", "cuonts = [4]", "line 15: chips.cuonts: is not a key of a job"),
        ("[price]", "[prices]", "line 17: prices: is not a key of a job"),
        ('kinds = "v5e"', "", "line 13: chips: must have topologies, or kinds and counts"),
        (
            'of = "batch"',
            'of = "batches"',
            "line 6: phases.decode.arguments.batch: 'batches': batches must be a number among the job's variables batch",
        ),
        ("network", "network-2", "line 5: phases.decode.target: "),
        ("sweep_target", "no_such_file", "line 5: phases.decode.target: there is no file"),
        ("[phases.decode]", "[phases.other]", "line 4: phases.other: a phase that is neither prefill nor decode needs"),
        ("v5e = 1.2", "v5e = -1", "line 18: price.per_chip_hour.v5e: input should be greater than 0, got -1"),
        ("width = [256, 1024]", "width = [256, 1024", "is not valid TOML: "),
        (
            "width = [256, 1024]",
            "width = 256\nbatch = 3",
            "is not valid TOML: Cannot overwrite a value (at line 11, column 10): batch = 3.",
        ),
        (
            "[vary]",
            "[together]\nphases = ['decode', 'chat']\n[vary]",
            "line 9: together.phases: unknown phase 'chat'",
        ),
        (
            "[vary]",
            "[together]\nphases = ['decode']\n[vary]",
            "line 9: together.phases: must name two or more phases, got decode",
        ),
        ('kinds = "v5e"', 'kinds = ["v5e", "v5x"]', "line 14: chips.kinds.1: there is no chip 'v5x' in the catalogue"),
        ("counts = [4]", "counts = [4, 7]", "line 15: chips.counts.1: there is no slice of 7 v5e chips"),
        ("counts = [4]", "topologies = ['v5e:4x']", "line 15: chips.topologies.0: "),
        ("counts = [4]", "topologies = ['mine.toml']", "line 15: chips.topologies.0: "),
        (":network", ":netwrok", "line 5: phases.decode.target: "),
        (
            "dtype = {",
            "type = {",
            "line 6: phases.decode.arguments: network takes batch, width, dtype, trouble, sign: ",
        ),
        ("batch = [8, 64]", "batch = [8, 64]\ncontext = 7", "line 10: vary.context: nothing depends on it"),
        ("v5e = 1.2", "v4 = 3.2, v5e = 1.2", "line 18: price.per_chip_hour.v4: the job has no chip v4; it has v5e"),
        (
            "counts = [4]",
            'counts = [4]\ntopologies = ["v4:2x2x1"]',
            "line 19: price.per_chip_hour: lacks a price of v4; give prices of all chips of the job, or of none",
        ),
        (
            "[price]",
            "[constraints]\nseconds_to_first_token = 1\n[price]",
            "line 18: constraints.seconds_to_first_token: applies to prefill phases only, and there are none",
        ),
        (
            "[price]",
            "[frontier]\nper = 'size'\n[price]",
            "line 18: frontier.per: size is not a variable; the variables are batch, width, weights",
        ),
    ],
)
def test_a_bad_job_file_is_refused_with_line_and_key(tmp_path: Path, line: str, with_this: str, says: str):
    with pytest.raises(JobError) as caught:
        job(tmp_path, JOB.replace(line, with_this))
    assert says in str(caught.value)


def test_all_faults_of_a_job_file_are_listed_at_once(tmp_path: Path):
    with pytest.raises(JobError) as caught:
        job(tmp_path, JOB.replace("counts = [4]", "counts = [0]").replace("[price]", "[prices]"))
    assert len(str(caught.value).splitlines()) == 2


def test_the_line_of_a_missing_key_is_that_of_its_table():
    assert line_of(JOB, ("chips", "colour")) == 13
    assert line_of(JOB, ("phases", "decode", "target")) == 5
    assert line_of("", ("chips",)) == 0


def test_the_command_refuses_a_bad_job(tmp_path: Path):
    done = CliRunner().invoke(app, ["sweep", str(written(tmp_path, JOB.replace("[vary]", "[varies]")))])
    assert done.exit_code == 1
    assert "line 8: varies" in done.output


# --- Shapes and points


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("v4", 1, ((1,),)),
        ("v4", 8, ((2, 4), (2, 2, 2))),
        ("v4", 16, ((4, 4), (2, 2, 4))),
        ("v4", 64, ((4, 4, 4),)),
        ("v4", 128, ((4, 4, 8),)),
        ("v4", 256, ((4, 4, 16), (4, 8, 8))),
        ("v4", 3, ()),
        ("v5e", 16, ((16,), (2, 8), (4, 4))),
        ("v5e", 256, ((16, 16),)),
        ("h100", 4, ((4,),)),
        ("h100", 32, ((4, 8),)),
        ("h100", 12, ()),
        ("cpu", 8, ((8,), (2, 4))),
    ],
)
def test_the_shapes_of_a_count_of_chips(name: str, count: int, expected: tuple):
    assert set(shapes(chip(name), count)) == set(expected)


@given(st.sampled_from(["v4", "v5e", "v5p", "v6e", "h100", "cpu"]), st.integers(1, 512))
def test_every_shape_is_a_topology_of_so_many_chips(name: str, count: int):
    for sides in shapes(chip(name), count):
        assert parse_topology(f"{name}:{'x'.join(map(str, sides))}").size == count


def test_a_count_that_comes_in_no_slice_is_refused(tmp_path: Path):
    with pytest.raises(JobError, match="there is no slice of 3 v5e chips"):
        topologies(replace(job(tmp_path), counts=(3,)))


def test_a_phase_has_a_point_for_each_combination_of_what_it_reads(tmp_path: Path):
    every = list(points(job(tmp_path)))
    assert len(every) == len(set(map(str, every))) == 2 * 8  # v5e:4 and v5e:2x2
    asked = job(tmp_path)
    (phase,) = asked.phases
    fewer = replace(phase, arguments={**phase.arguments, "dtype": "float32"})
    assert len(list(points(replace(asked, phases=(fewer,))))) == 2 * 4


def test_an_expression_that_is_no_whole_number_somewhere_spoils_that_point_only(tmp_path: Path):
    every = list(points(job(tmp_path, JOB.replace('{ of = "width" }', '{ of = "width / 512" }'))))
    spoilt = [point for point in every if isinstance(point, Unmade)]
    assert len(spoilt) == 8
    assert spoilt[0].why == "width / 512 must be a whole number, got 0.5"


def test_equal_points_have_one_key_and_others_another(tmp_path: Path):
    every = [point for point in points(job(tmp_path)) if isinstance(point, Point)]
    keys = [key(point) for point in every]
    assert len(set(keys)) == len(keys)
    again = replace(every[0], knobs=(), runs=(replace(every[0].runs[0], phase="other", tokens=1.0),))
    assert key(again) == keys[0]
    assert key(replace(every[0], memory_bytes=2**30)) != keys[0]


# --- Bounds


@examples(8)
@given(blocks(), st.sampled_from(["cpu:2", "v5e:2", "v4:2", "h100:2"]), st.sampled_from([0.0, 128.0]))
def test_no_plan_is_below_the_lower_bound(block: Block, name: str, keeps: float):
    from search.solve import Limits, NoPlan, search

    topology, program = parse_topology(name), trace(function(block), *arguments(block)).program
    if keeps:  # small arrays stay on the chip, the smaller for being split
        topology = replace(topology, chip=replace(topology.chip, on_chip_bytes=keeps))
    found = lower_bound(program, topology)
    try:
        solution = search(program, topology, Limits(rounds=5, wall_seconds=5.0))
    except NoPlan:
        reject()
    assert found.seconds <= solution.check.seconds * (1 + 1e-9)
    assert found.bytes <= solution.check.peak_bytes * (1 + 1e-9)


def test_the_bound_of_a_matmul_that_splits_evenly_is_its_price(tmp_path: Path):
    """2·m·k·n FLOPs at C, or its bytes at W, over n chips; no layout needs a collective where all is batch."""
    (point, *_) = points(job(tmp_path))
    assert isinstance(point, Point)
    program, topology = trace_run(point.runs[0]).traced.program, point.topology
    local = lower_bound(program, topology).seconds
    alone = lower_bound(program, parse_topology("v5e:1")).seconds
    assert alone / topology.size <= local <= alone


def test_arrays_that_may_stay_on_the_chip_are_no_part_of_the_bound():
    """A hidden array of 4 MiB stays there only in pieces; the bound must not count it, whole as it sees it."""
    work = network(2048, 256)
    program = trace(work.fn, *work.args).program
    plain = parse_topology("cpu:8")

    def bound(keeps: float) -> float:
        return lower_bound(program, replace(plain, chip=replace(plain.chip, on_chip_bytes=keeps))).seconds

    assert bound(2**20) == bound(2**30) < bound(0.0)


def test_points_are_ruled_out_by_memory_and_by_latency(tmp_path: Path):
    (point, *_) = points(job(tmp_path))
    assert isinstance(point, Point)
    assert reason_to_prune(point, None, None) == ""
    assert "a step takes at least" in reason_to_prune(point, 1e-9, None)
    assert "its arrays take at least" in reason_to_prune(replace(point, memory_bytes=1024.0), None, None)


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
    import autoshard

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


# --- The frontier and its answers


def a_row(latency: float, cost: float, **other: Any) -> Row:
    numbers: dict[str, Any] = {
        "latency_seconds": latency,
        "chip_seconds_per_token": cost,
        "peak_bytes": 1e9,
        "budget_bytes": 2e9,
    }
    row = Row("decode", "decode", "v5e:4", "v5e", 4, {}, SOLVED, **numbers)
    return replace(row, **other)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_frontier_is_what_no_row_beats(places: list[tuple[int, int]]):
    rows = [a_row(latency, cost) for latency, cost in places]
    best = {(row.latency_seconds, row.chip_seconds_per_token) for row in frontier(rows)}
    beaten = {(a, b) for (a, b), (c, d) in itertools.product(places, places) if c <= a and d <= b and (c, d) != (a, b)}
    assert best == set(places) - beaten
    assert list(best) is not None and [r.latency_seconds for r in frontier(rows)] == sorted(a for a, _ in best)


def test_the_answers_of_a_few_rows():
    layout = {"decode": {"params['up']": "WS-1D: output over xy"}}
    other = {"decode": {"params['up']": "WG-X: output over y, batch over x"}}
    slow = a_row(0.05, 0.1, chips=16, knobs={"context": 8192, "weights": "bf16"}, layout=other)
    fast = a_row(0.01, 0.4, chips=16, knobs={"context": 2048, "weights": "bf16"}, layout=layout)
    small = a_row(0.02, 0.3, chips=4, knobs={"context": 2048, "weights": "int8"}, layout=layout)
    rows = [slow, fast, small]
    assert cheapest(rows, 0.03) is small
    assert cheapest(rows, 0.001) is None
    assert fastest(rows, 16) is fast
    assert longest(rows, "context") is slow
    assert longest(rows, "context", 0.03) is small
    assert [gain.latency for gain in gains(rows, "weights", "bf16", "int8")] == [0.5]
    assert [each.changes for each in switches(frontier(rows))] == [("up: WS-1D → WG-X",)]


def a_request(first: float, token: float, cost: float, **other: Any) -> Row:
    seconds = {"fill": first, "decode": token}
    kinds = {"fill": "prefill", "decode": "decode"}
    row = a_row(
        first + 64 * token, cost, kind="request", phase="fill + decode", phase_seconds=seconds, phase_kinds=kinds
    )
    return replace(row, **other)


def test_limits_are_of_the_phases_that_are_laid_out_together():
    """A request's own latency is that of prefill and all its tokens: no limit is a limit of that."""
    quick, cheap, slow = a_request(3.0, 0.02, 0.2), a_request(1.0, 0.025, 0.3), a_request(0.5, 0.05, 0.1)
    rows = (quick, cheap, slow)
    assert cheapest(rows) is slow
    assert cheapest(rows, 0.03) is quick
    assert cheapest(rows, 0.03, 2.0) is cheap
    assert cheapest(rows, None, 0.7) is slow
    assert cheapest(rows, 0.01) is None
    limits = {"seconds_per_token": 0.03, "seconds_to_first_token": 2.0}
    sweep = SweepResult("s", rows, constraints=limits)
    (answer,) = answers.answers(sweep)
    assert answer.row is cheap
    assert answer.words.startswith(
        "fill + decode: the cheapest at 30.0 ms a token or less and 2.00 s to the first token or less is v5e:4: "
        "2.60 s a request (1.00 s to the first token, 25.0 ms a token), 300 chip-ms a token"
    )
    (none,) = answers.answer_cheapest(sweep, "fill + decode", 0.01)
    assert "no plan takes 10.0 ms a token or less; the nearest is v5e:4" in none.words
    assert "Allowed are at most 30.0 ms a token, 2.00 s to the first token." in render(sweep)


def test_a_limit_of_one_phase_is_none_of_another():
    first = a_row(0.5, 0.1, kind="prefill", phase="prefill")
    sweep = SweepResult("s", (first, a_row(0.02, 0.1)))
    assert answers.limits_of(sweep, "prefill", 0.03, 2.0) == (None, 2.0)
    assert answers.limits_of(sweep, "decode", 0.03, 2.0) == (0.03, None)
    assert cheapest([first], None, 0.4) is None
    assert cheapest([first], None, 0.6) is first


def test_points_of_another_length_have_a_frontier_of_their_own():
    """Else the short ones beat all others, which do more."""
    rows = tuple(a_row(0.01 * n * batch, n / batch, knobs={"n": n, "batch": batch}) for n in (1, 4) for batch in (1, 2))
    sweep = SweepResult("s", rows, constraints={"seconds_per_token": 0.015}, per=("n",))
    assert [(part.name, part.rows) for part in sweep.parts("decode")] == [
        ("decode, n 1", rows[:2]),
        ("decode, n 4", rows[2:]),
    ]
    assert [answer.row for answer in answers.answers(sweep)] == [rows[0], None]
    assert [answer.row for answer in answers.answer_fastest(sweep, "decode", 4)] == [rows[0], rows[2]]
    words = render(sweep)
    for said in (
        "decode, n 1: the frontier of 2 plans",
        "decode, n 4: the frontier of 2 plans",
        "- decode, n 4: the cheapest",
    ):
        assert said in words
    assert replace(sweep, per=()).parts("decode")[0].name == "decode"


def test_numbers_that_make_no_tokens_are_other_work(tmp_path: Path):
    assert job(tmp_path).per == ("width",)
    assert job(tmp_path, JOB.replace("[price]", "[frontier]\nper = []\n[price]")).per == ()
    lengths = JOB.replace("batch = [8, 64]", "batch = 8\ninput_length = 2").replace("decode", "prefill")
    lengths = lengths.replace('batch = { of = "batch" }', 'batch = { of = "batch * input_length" }')
    assert job(tmp_path, lengths).per == ("input_length", "width")


def test_where_all_chips_have_prices_cheap_is_money():
    dear = a_row(0.01, 0.1, chip="v4", topology="v4:4", price=9.0)
    slow = a_row(0.02, 0.2, price=3.0)
    assert cheapest([dear, slow], 0.03) is slow
    assert frontier([dear, slow]) == (dear, slow)
    assert frontier([dear, replace(slow, price=None)]) == (dear,)
    assert "2.0 times slower and 3 times cheaper" in (" ".join(advice(SweepResult("s", (dear, slow))))).replace(
        "2 t", "2.0 t"
    )


def test_reasons_are_told_once_a_slice():
    why = "Too large. At its fullest it holds:\n 3 GiB"
    rows = tuple(a_row(1, 1, knobs={"batch": b, "size": s}, outcome=INFEASIBLE, why=why) for b in (1, 2) for s in "ab")
    words = render(SweepResult("s", (*rows, a_row(1, 1, knobs={"batch": 1, "size": "c"}))))
    assert words.count("No layout fits: decode on v5e:4 (4 points; of the first): Too large.\n") == 1
    assert "At its fullest" not in words


def test_a_frontier_names_every_layout_in_full():
    long = "WS-2D: contracted over x, output over yz, as long as it may be " * 4
    rows = tuple(
        a_row(n, 1 / n, layout={"decode": {"params['up']": f"{long}{n % 2}"}}, knobs={"batch": n}) for n in (1, 2, 3)
    )
    lines = render(SweepResult("s", tuple(replace(row, status="OPTIMAL") for row in rows))).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("  v5e:4 ")] == ["A", "B", "A"]
    assert sum("WS-2D" in line for line in lines if line.startswith(("  A ", "  B "))) == 2
    assert "…" not in "".join(lines)


def test_costs_have_no_exponents_that_people_must_read():
    row = a_row(0.0104, 1.33, status="OPTIMAL")
    words = render(SweepResult("s", (row, a_row(0.1, 0.0000338, status="OPTIMAL"))))
    assert "1330 chip-ms a token" in words and "0.0338 chip-ms a token" in words and "e+" not in words


def test_attention_is_no_product_by_a_weight():
    layout = {"scores": "query-sharded over x", "params['up']": "WG-X: batch over x", "more": "head-sharded over y"}
    row = a_row(1, 1, layout={"decode": layout})
    assert row.headline == "WG-X: batch over x | attention query-sharded over x"
    assert row.family == "WG-X with query-sharded"
    both = replace(row, layout={"prefill": layout, "decode": {"params['up']": "WS-1D: output over y"}})
    assert both.headline == "prefill WG-X: batch over x | attention query-sharded over x; decode WS-1D: output over y"
    assert both.family == "prefill WG-X with query-sharded, decode WS-1D"


def test_chips_of_several_kinds_without_prices_are_said_to_count_alike():
    rows = (a_row(0.5, 0.1), a_row(0.5, 0.1, chip="v4"))
    assert "a second of v5e and of v4 counts the same" in render(SweepResult("s", rows))
    assert "alike" not in render(SweepResult("s", tuple(replace(row, price=1.0) for row in rows)))
    assert "alike" not in render(SweepResult("s", rows[:1]))


def test_the_longest_is_told_of_every_slice_and_within_limits():
    rows = (
        a_row(0.02, 0.1, knobs={"context": 2048}),
        a_row(0.09, 0.1, knobs={"context": 8192}, topology="v5e:8", chips=8),
        a_row(0.03, 0.1, knobs={"context": 4096}, topology="v5e:8", chips=8),
        a_row(0.0, 0.0, knobs={"context": 16384}, outcome=INFEASIBLE),
    )
    sweep = SweepResult("s", rows)
    longest_of_all, within = (str(answers.answer_longest(sweep, "decode", "context", limit)) for limit in (None, 0.03))
    assert longest_of_all.startswith("decode: the largest context is 8192: v5e:8, context 8192")
    assert longest_of_all.endswith("By slice: 2048 on v5e:4, 8192 on v5e:8.")
    assert within.startswith("decode: the largest context at 30.0 ms a token or less is 4096: v5e:8")
    assert "no context from 2048 to 16384 has a plan at 1.00 ms" in str(
        answers.answer_longest(sweep, "decode", "context", 0.001)
    )


def test_a_family_has_no_axes():
    assert family("WS-2D: contracted over x, output over yz") == "WS-2D"
    assert family("batch-sharded over xy, head-sharded over z") == "batch-sharded, head-sharded"
    assert family("replicated") == "replicated"


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
            "decode, width 256: the cheapest at 1.00 ms a token or less is v5e:",
            "decode, width 1024: the cheapest at 1.00 ms a token or less is v5e:",
            "decode, width 256: the fastest on 4 chips at 1.00 ms a token or less is v5e:",
            "decode, width 1024: the fastest on 4 chips at 1.00 ms a token or less is v5e:",
            "decode: the largest width at 1.00 ms a token or less is 1024 (the largest of the job",
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
    assert [point.name for point in points(job_of(data, SUPPORT))] == ["step on cpu:2"]
