"""Matmuls of compiled programs: FLOPs by source line, and what is computed more often than planned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.auditing import findings
from autoshard.auditing.findings import Repeated, find_repeated
from autoshard.auditing.hlo_costs import flops_formed_again, matmul_flops

PLANNED = {"model.py:1": 100.0, "model.py:2": 100.0}

CASES = {
    "as planned": ({"model.py:1": 100.0, "model.py:2": 100.0}, ()),
    "a little padding": ({"model.py:1": 100.5, "model.py:2": 100.0}, ()),
    "less, as sums": ({"model.py:1": 100.0}, ()),
    "told apart by other lines": ({"model.py:3": 100.0, "model.py:2": 100.0}, ()),
    "one line twice": (
        {"model.py:1": 200.0, "model.py:2": 100.0},
        (Repeated("model.py:1", 100.0, 200.0, 0.0),),
    ),
    "two lines, the worst first": (
        {"model.py:1": 200.0, "model.py:2": 400.0},
        (Repeated("model.py:2", 100.0, 400.0, 300.0), Repeated("model.py:1", 100.0, 200.0, 0.0)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lines_that_compute_more_than_planned(case: str) -> None:
    compiled, expected = CASES[case]
    assert find_repeated(PLANNED, compiled, {"model.py:2": 300.0}, 0.01) == expected


def test_flops_by_the_users_line() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def once(a, b):
        return a @ b

    def replicated(a, b):
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P())) @ b

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    found = []
    for fn, result in ((once, rows), (replicated, whole)):
        lowered = jax.jit(fn, in_shardings=(rows, whole), out_shardings=result).lower(shape, shape)
        (line,) = matmul_flops(lowered.compile().as_text() or "").items()
        found.append(line)
    assert [flops for _, flops in found] == [2 * 64**3 / 8, 2 * 64**3]
    assert all(source.startswith("test_work.py:") for source, _ in found)


# As libtpu writes a product that two fusions use: formed in each of them, here in one of them by a fusion within.
TWICE = """\
HloModule m

%scores (q: bf16[8,16], k: bf16[16,32]) -> f32[8,32] {{
  %q = bf16[8,16]{{1,0}} parameter(0)
  %k = bf16[16,32]{{1,0}} parameter(1)
  ROOT %inner = f32[8,32]{{1,0}} dot(%q, %k), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="jit(f)/dot_general" source_file="/home/user/model.py" source_line=7}}
}}

%largest (q.1: bf16[8,16], k.1: bf16[16,32], mask: pred[8,32]) -> f32[8,32] {{
  %q.1 = bf16[8,16]{{1,0}} parameter(0)
  %k.1 = bf16[16,32]{{1,0}} parameter(1)
  %mask = pred[8,32]{{1,0}} parameter(2)
  %found = f32[8,32]{{1,0}} fusion(%q.1, %k.1), kind=kOutput, calls=%scores
  ROOT %kept = f32[8,32]{{1,0}} select(%mask, %found, %found)
}}

%exponential (q.2: bf16[8,16], k.2: bf16[16,32]) -> f32[8,32] {{
  %q.2 = bf16[8,16]{{1,0}} parameter(0)
  %k.2 = bf16[16,32]{{1,0}} parameter(1)
  %same = f32[8,32]{{1,0}} dot(%q.2, %k.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="jit(f)/dot_general" source_file="/home/user/model.py" source_line=7}}
  ROOT %e = f32[8,32]{{1,0}} exponential(%same)
}}

ENTRY %main (q.3: bf16[8,16], k.3: bf16[16,32], mask.1: pred[8,32], k.4: bf16[16,32]) -> f32[8,32] {{
  %q.3 = bf16[8,16]{{1,0}} parameter(0)
  %k.3 = bf16[16,32]{{1,0}} parameter(1)
  %mask.1 = pred[8,32]{{1,0}} parameter(2)
  %k.4 = bf16[16,32]{{1,0}} parameter(3)
  %m = f32[8,32]{{1,0}} fusion(%q.3, %k.3, %mask.1), kind=kOutput, calls=%largest
  %s = f32[8,32]{{1,0}} fusion(%q.3, {second}), kind=kOutput, calls=%exponential
  ROOT %r = f32[8,32]{{1,0}} subtract(%s, %m)
}}
"""


@pytest.mark.parametrize(("second", "again"), [("%k.3", {"model.py:7": 2.0 * 8 * 16 * 32}), ("%k.4", {})])
def test_what_two_fusions_form_from_the_same_operands(second: str, again: dict[str, float]) -> None:
    text = TWICE.format(second=second)
    assert matmul_flops(text) == {"model.py:7": 2 * 2.0 * 8 * 16 * 32}
    assert flops_formed_again(text) == again


def test_a_product_formed_again_is_no_replicated_operand() -> None:
    twice = {"model.py:1": 200.0, "model.py:2": 100.0}
    for again, expected in ((100.0, ("computed again", False)), (50.0, ("replicated", True))):
        said, bound = findings.find_in_work(PLANNED, twice, {"model.py:1": again})
        assert (said.kind, said.counts) == expected
        assert (bound.kind, bound.counts) == ("FLOPs", True), "1.5 times the planned FLOPs, whatever the reason"


def test_flops_within_their_bounds_are_said_and_do_not_count() -> None:
    little = {"model.py:1": 107.0, "model.py:2": 100.0}
    (said,) = findings.find_in_work(PLANNED, little, {"model.py:1": 7.0})
    assert (said.kind, said.counts) == ("computed again", False)


GEMM = """\
HloModule m

ENTRY %main (p: bf16[8,16], w: bf16[16,32]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %call = (bf16[8,32]{1,0}, s8[4194304]{0}) custom-call(%p, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/dot_general" source_file="/home/user/model.py" source_line=7}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = bf16[8,32]{1,0} get-tuple-element(%call), index=0
}
"""


def test_a_gpu_librarys_matmul_counts() -> None:
    assert matmul_flops(GEMM) == {"model.py:7": 2 * 8 * 16 * 32}
