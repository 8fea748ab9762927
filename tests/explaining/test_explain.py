"""A plan as text, whole."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard._util.paths import shared_name, star_numbers
from autoshard._util.tables import percent, size, table, time
from autoshard.explaining.bottlenecks import regimes
from autoshard.explaining.explain import render, spec_text
from autoshard.plan import Plan
from autoshard.planning.records import ArrayPlan, Estimate, OperationPlan, PlannedCollective
from autoshard.sweep.results import layout_words
from autoshard.tracing.pytrees import Nesting
from costmodels.machine.topology import parse_topology
from search.answer.assignment import Choice
from search.formulation.layouts import Layout
from search.solve import Proof

GIB = 2.0**30


def operation(name: str, **more) -> OperationPlan:
    given = {
        "primitive": "dot_general",
        "source": "model.py:7",
        "einsum": "ac,cb->ab",
        "splits": ((), ("y", "z"), ("x",)),
        "strategy": "WS-2D: contracted over x, output over yz",
        "count": 8,
        "flops": 8 * 2.0 * 64 * 256 * 128,
        "bytes": 1e6,
        "compute_seconds": 1e-4,
        "memory_seconds": 2e-4,
        "seconds": 2e-4,
        "collective_seconds": 0.0,
        "regime": "HBM",
        "matmul": True,
        "sizes": (64, 256, 128),
    }
    return OperationPlan(name, **{**given, **more})


def plan() -> Plan:
    """A made-up plan, so that no cost model changes what is printed."""
    return Plan(
        name="decode",
        topology=parse_topology("v4:4x4x1"),
        fingerprint="",
        arguments=(
            ArrayPlan("params['w']", (8, 128, 256), "bfloat16", Layout(((), ("x",), ("y",))), 32768.0),
            ArrayPlan("cache", (8, 64, 2048), "bfloat16", Layout(((), ("y", "x"), ())), 131072.0, donated=True),
        ),
        constants=(ArrayPlan("constant 0", (64,), "float32", Layout(((),)), 256.0),),
        results=(ArrayPlan("result", (8, 64, 2048), "bfloat16", Layout(((), ("y", "x"), ())), 131072.0),),
        in_tree=Nesting(None),
        out_tree=Nesting(None),
        choice=Choice((), {}),
        estimate=Estimate(
            3e-3,
            1e-3,
            1.5e-3,
            1.25e-3,
            3.5 * GIB,
            "dot_general params['w'] (model.py:7)",
            7 * GIB,
            (
                PlannedCollective("all-gather", ("y", "x"), 65536.0, 8, 1e-3, "x (model.py:5) for dot_general"),
                PlannedCollective("all-reduce", ("x",), 4096.0, 8, 2e-4, "dot_general (model.py:7), where it is made"),
                PlannedCollective("all-gather", ("x",), 4096.0, 1, 5e-5, "tanh (model.py:9), where it is made"),
            ),
        ),
        proof=Proof("OPTIMAL", 3e-3, 3e-3, 0.0, 1.25, states=12635, branches=2),
        operations=(
            operation(
                "dot_general params['w'] (model.py:7)",
                collective_seconds=1e-3,
                regime="communication",
                runner_up="WS-1D: output over xy: +0.5 ms if this operation alone changed",
            ),
            operation("dot_general (model.py:8)", einsum="abc,adc->abd", sizes=(4, 4, 4, 4), splits=((), (), (), ())),
            operation("tanh (model.py:9)", matmul=False, primitive="tanh", einsum="ab->ab", strategy="replicated"),
            operation("add (model.py:9)", matmul=False, einsum="ab,ab->ab", seconds=1e-6),
            operation("cache", matmul=False, seconds=0.0),
        ),
        warnings=("sort at model.py:3 has no sharding rule: its arrays are replicated",),
    )


WHOLE = """\
decode on v4:4x4x1
  chips        16 × v4; x: line of 4, 45 GB/s; y: line of 4, 45 GB/s; z: 1
  collectives  per-axis bandwidth (the links of their axes); 0.0 % hidden behind computation
  step time    3.00 ms = 1.75 ms on the chip + 1.25 ms of collectives
               (the operations alone: 1.50 ms at HBM's rate, 1.00 ms at the compute units')
  peak memory  3.5 GiB of 7 GiB per chip (50.0 %), at dot_general params['w'] (model.py:7)
  proof        OPTIMAL: under this cost model no plan that fits is faster (gap 0)
               12,635 strategies and layouts, 2 branches, 1.2 s

Matmuls
  operation     einsum        strategy                                  runs    time  bound by       collectives
  ────────────  ────────────  ────────────────────────────────────────  ────  ──────  ─────────────  ───────────
  params['w']   ac,cb->ab     WS-2D: contracted over x, output over yz     8  200 µs  communication      1.00 ms
      next: WS-1D: output over xy: +0.5 ms if this operation alone changed
  (model.py:8)  abc,adc->abd  WS-2D: contracted over x, output over yz     8  200 µs  HBM                      -

Other operations
  operation          einsum  strategy    runs    time  bound by  collectives
  ─────────────────  ──────  ──────────  ────  ──────  ────────  ───────────
  tanh (model.py:9)  ab->ab  replicated     8  200 µs  HBM                 -
  1 more, each below 0.5 % of the step: 1.00 µs, collectives 0 s

Collectives
  kind        axes  payload  runs     time  array, for operation
  ──────────  ────  ───────  ────  ───────  ──────────────────────────────────────────
  all-gather  xy     64 KiB     8  1.00 ms  x (model.py:5) for dot_general
  all-reduce  x       4 KiB     8   200 µs  dot_general (model.py:7), where it is made
  all-gather  x       4 KiB     1  50.0 µs  tanh (model.py:9), where it is made
  in all: 9 all-gathers, 516 KiB, 1.05 ms; 8 all-reduces, 32 KiB, 200 µs

Arguments (160.2 KiB per chip)
  path         array                         PartitionSpec        per chip
  ───────────  ────────────────────────────  ───────────────────  ────────
  params['w']  bfloat16[8,128,256]           P(None, 'x', 'y')      32 KiB
  cache        bfloat16[8,64,2048], donated  P(None, ('y', 'x'))   128 KiB
  constant 0   float32[64]                   P()                     256 B

Results (128 KiB per chip)
  path    array                PartitionSpec        per chip
  ──────  ───────────────────  ───────────────────  ────────
  result  bfloat16[8,64,2048]  P(None, ('y', 'x'))   128 KiB

Constants of v4 without a published or measured source
  constant                     value  status   why
  ───────────────────────────  ─────  ───────  ─────────────────────────────────────────────────────────────────────────
  collective_overhead_seconds  1e-06  assumed  about one hop more; Scaling Book, part 3, measured 8 us where its 3 hops…
  wire_efficiency                  1  assumed  links reach their rate; the latency of hops and launches is apart

Warnings
  - sort at model.py:3 has no sharding rule: its arrays are replicated
"""

LOCAL_SLICES = """
Local slices (110 µs: read and written in HBM, nothing is sent)
  axes  shard  runs     time  array, for operation
  ────  ─────  ────  ───────  ───────────────────────────────────
  xy    2 MiB     8   100 µs  tanh (model.py:9), where it is made
  y     1 MiB     1  10.0 µs  x (model.py:5) for add (model.py:9)
"""
SYMBOLIC = "      FLOPs per chip and run: 2 · a · b/yz · c/x = 4.194e+06 where a = 64, b = 256, c = 128"


def test_a_plan_as_text() -> None:
    assert render(plan()) == WHOLE


def test_local_slices_get_rows() -> None:
    """They are not among the collectives, and their seconds are a part of the step that the head names."""
    slices = (
        PlannedCollective("slice", ("y",), 2**20, 1, 1e-5, "x (model.py:5) for add (model.py:9)"),
        PlannedCollective("slice", ("y", "x"), 2**21, 8, 1e-4, "tanh (model.py:9), where it is made"),
    )
    made_up = plan()
    text = render(replace(made_up, estimate=replace(made_up.estimate, slices=slices)))
    assert "3.00 ms = 1.75 ms on the chip + 1.14 ms of collectives + 110 µs of local slices" in text
    assert LOCAL_SLICES in text
    assert "in all: 9 all-gathers, 516 KiB, 1.05 ms; 8 all-reduces, 32 KiB, 200 µs" in text


def test_a_planned_slice_has_its_row() -> None:
    """Of an array that is pinned whole on every chip, a chip cuts the part that it works on."""
    found = autoshard.search(
        lambda x, w: jnp.tanh(x @ w),
        jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16),
        topology="v5e:2x1",
        pins={"x": jax.P(), "w": jax.P()},
    )
    (row,) = found.estimate.slices
    assert row.bytes == 4096 * 4096 * 2 / 2 and 0 < row.seconds == found.estimate.slice_seconds
    rows = found.explain().split("Local slices (")[1].split("\n\n")[0].splitlines()
    assert rows[0].startswith(time(row.seconds)) and len(rows) == 4
    assert rows[3].split()[:3] == ["x", "16", "MiB"] and "x for dot_general" in rows[3]


def test_formulas_when_asked_for() -> None:
    added = set(render(plan(), symbolic=True).splitlines()) - set(WHOLE.splitlines())
    assert SYMBOLIC in added and len(added) == 2


@pytest.mark.parametrize("width", [100, 120, 140])
def test_tables_fit_the_width(width: int) -> None:
    assert max(map(len, render(plan(), width=width).splitlines())) <= width


def test_who_decided_is_said() -> None:
    """The solver by name, its status, what it was given, and what presolve had done before."""
    proof = Proof(
        status="OPTIMAL",
        objective_seconds=3e-3,
        bound_seconds=3e-3,
        gap=0.0,
        wall_seconds=1.5,
        booleans=737,
        states=12661,
        branches=4,
        solver="CP-SAT 9.15.6755",
        solver_status="OPTIMAL",
        constraints=520,
        fixed_by_presolve=12049,
        presolve_bound_seconds=2.97e-3,
        presolve_seconds=1.375,
        solver_seconds=0.125,
    )
    lines = render(replace(plan(), proof=proof)).splitlines()
    assert lines[6:9] == [
        "  proof        OPTIMAL: under this cost model no plan that fits is faster (gap 0)",
        "  presolve     left 612 of 12,661 strategies and layouts, and a bound 1.0 % below the plan, in 1.4 s",
        "  solver       CP-SAT 9.15.6755: OPTIMAL, 737 booleans, 520 constraints, 4 branches, 0.1 s",
    ]
    assert sum(proof.account()[key] for key in ("presolve_seconds", "solver_seconds")) == proof.wall_seconds


def test_a_step_that_costs_nothing_is_explained() -> None:
    """Nothing but a reversal: the solver's bound is 0, of which no share can be taken."""
    free = autoshard.search(lambda x: jnp.flip(x, 1), jax.ShapeDtypeStruct((2, 64), jnp.float32), topology="v5e:2x1")
    assert free.estimate.seconds == 0
    assert "a bound 0.0 % below the plan" in free.explain()


def test_what_is_not_proven_is_said() -> None:
    found = render(replace(plan(), proof=Proof("FEASIBLE", 3e-3, 2.7e-3, 0.1, 60.0)))
    assert "  proof        FEASIBLE: no plan is faster than 2.70 ms (gap 10.0 %)\n" in found


def test_layers_that_are_planned_alike_are_one_row() -> None:
    layers = tuple(
        operation(f"dot_general params['layers'][{i}]['w'] (model.py:7)", count=1, seconds=1e-4 + 1e-12 * i)
        for i in range(3)
    )
    text = render(replace(plan(), operations=(*layers, operation("dot_general params['head'] (model.py:9)", count=1))))
    assert [line.split() for line in text.splitlines() if "params['layers']" in line] == [
        "params['layers'][*]['w'] ac,cb->ab WS-2D: contracted over x, output over yz 3 300 µs HBM -".split()
    ]


def test_a_searched_plan_explains_itself() -> None:
    def fn(x, w):
        return jnp.tanh(x @ w)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 4096), (4096, 8192))]
    found = autoshard.search(fn, *shapes, topology="v4:2x2x1", name="one layer")
    text = found.explain()
    assert text.startswith("one layer on v4:2x2x1\n") and "OPTIMAL" in text
    for word in ("Matmuls", "ac,cb->ab", "Arguments", "bfloat16[4096,8192]", "Results", "Warnings"):
        assert word in text
    assert "2·w_1·x_0" in found.explain(symbolic=True)


# --- Numbers and tables


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(((), ())), "P()"),
        (Layout((("x",), ())), "P('x')"),
        (Layout(((), ("z", "y"))), "P(None, ('z', 'y'))"),
    ],
)
def test_specs_as_they_are_written(layout: Layout, text: str) -> None:
    assert spec_text(layout) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 s"),
        (2.5e-8, "25.0 ns"),
        (8.69e-4, "869 µs"),
        (0.0235297, "23.5 ms"),
        (9.999e-3, "10.0 ms"),
        (12.3, "12.3 s"),
    ],
)
def test_times(number: float, text: str) -> None:
    assert time(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (4, "4 B"),
        (32768, "32 KiB"),
        (1024 * 1010, "0.99 MiB"),
        (18224197340, "16.97 GiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


def test_shares() -> None:
    assert percent(0.0123) == "1.2 %"


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["params['h']['0']['w']", "params['h']['11']['w']"], "params['h']['*']['w']"),
        (["add [3]['w1'] (a_2.py:10)", "add [4]['w1'] (a_2.py:10)"], "add [*]['w1'] (a_2.py:10)"),
        (["['mlp_3/~/linear_0']", "['mlp_4/~/linear_0']"], "['mlp_*/~/linear_0']"),
        (["[0][1]", "[0][2]", "[0][1]"], "[0][*]"),
        (["[0][1]"], "[0][1]"),
    ],
)
def test_layers_share_a_name(names: list[str], shared: str) -> None:
    assert len(set(map(star_numbers, names))) == 1
    assert shared_name(names) == shared


@pytest.mark.parametrize(("one", "other"), [("['w1']", "['w2']"), ("(a.py:1)", "(a.py:2)"), ("[0]['w']", "[0]['v']")])
def test_other_things_share_none(one: str, other: str) -> None:
    assert star_numbers(one) != star_numbers(other)


def test_paths_keep_their_last_keys() -> None:
    lines = table(("path", "bytes"), [("params['layers'][*]['attention']['wq']", "1")], "/>", width=36)
    assert lines[2] == "…[*]['attention']['wq']            1"


def test_only_flexible_columns_are_wrapped() -> None:
    lines = table(("name", "where"), [("wq", "a long place in the user's code"), ("w", "b")], "<~", width=24)
    assert lines == [
        "name  where",
        "────  ──────────────────",
        "wq    a long place in",
        "      the user's code",
        "w     b",
    ]


def test_numbers_that_tell_things_apart_are_kept() -> None:
    """Two weights of one layer, which differ in what they do, are no layers alike in any table."""

    def gated(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return (jnp.tanh(x) @ params["wi_0"]) * (jnp.tanh(x) @ params["wi_1"])[:, :1]

    shapes = {"x": (64, 512), "wi_0": (512, 1024), "wi_1": (512, 2048)}
    x, *weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes.values())
    plan = autoshard.search(gated, dict(zip(("wi_0", "wi_1"), weights, strict=True)), x, topology="v5e:2x2")
    both = {"params['wi_0']", "params['wi_1']"}
    assert set(layout_words(plan)) == both
    assert both <= {work.name for work in regimes(plan).works}
    assert all(name in render(plan) for name in both)
