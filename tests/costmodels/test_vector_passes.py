"""Loops of the vector unit: what they load and store, what a matmul hides, and what the TPU compiler's cycles say."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import autoshard
from autoshard.auditing.hlo_collectives import estimated_cycles
from autoshard.emitting.targets import tpu_devices
from costmodels.machine.chips import Chip, chip
from costmodels.operations import OperationCost, price, start_seconds
from costmodels.program.program import Program
from costmodels.program.vector_passes import ends_pass, is_streamed, vector_uses
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
ROWS, WIDTH = 256, 4096


def traced(fn, *shapes) -> Program:
    return trace(fn, *(S(shape, jnp.bfloat16) for shape in shapes)).program


def costs(program: Program, on: Chip) -> list[OperationCost]:
    return [price(program, op, np.ones((1, len(op.factors))), on) for op in program.operations]


def elements(program: Program) -> dict[str, list[int]]:
    """Per primitive with a loop of the vector unit, the arrays that it loads and stores."""
    found: dict[str, list[int]] = {}
    for op in program.operations:
        for index in vector_uses(program, op):
            found.setdefault(op.primitive, []).append(int(np.prod(program.values[op.use(index).value].shape)))
    return found


def norm(x):
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)


def test_a_residual_addition_is_a_loop_and_a_gate_before_a_matmul_is_not():
    def fn(x, gate, up, down):
        return x + (jax.nn.silu(x @ gate) * (x @ up)) @ down

    program = traced(fn, (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
    found = elements(program)
    assert found == {"dot_general": [ROWS * WIDTH] * 3, "add": [ROWS * WIDTH] * 3}
    assert [op.primitive for op in program.operations if ends_pass(program, op)] == ["add"]


def test_a_norm_before_a_matmul_loads_its_array_once():
    program = traced(lambda x, w: norm(x).astype(x.dtype) @ w, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert sum(map(sum, elements(program).values())) == 2 * ROWS * WIDTH  # and the matmul's result
    assert [op.primitive for op in program.operations if ends_pass(program, op)] == ["reduce_sum"]


def test_a_softmax_stores_what_its_matmul_reads():
    def fn(q, k, v):
        scores = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
        visible = jnp.arange(1024)[:, None] + 1024 >= jnp.arange(2048)
        return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype) @ v

    program = traced(fn, (1024, 128), (2048, 128), (2048, 128))
    loops = {name: sizes for name, sizes in elements(program).items() if name in ("select_n", "sub", "div")}
    assert loops == {"select_n": [1024 * 2048], "div": [1024 * 2048]}


SHAPES = {
    "its own shape": (lambda h, x: h * x + x, (8, 1024), (8, 1024), []),
    "rows": (lambda h, x: h * x, (64, 1024), (1024,), ["broadcast_in_dim"]),
    "rows, twice": (lambda h, x: h * x + x, (64, 1024), (1024,), ["broadcast_in_dim"]),
    "rows of another type": (lambda h, x: h * x.astype(h.dtype), (64, 1024), (1024,), ["broadcast_in_dim"]),
    "lanes": (lambda h, x: h * x[..., None], (8, 1024, 16), (8, 1024), ["broadcast_in_dim"]),
    "a view": (lambda h, x: h + x.reshape(8, 8, 128), (8, 8, 128), (8, 1024), ["reshape"]),
    "a matmul": (lambda h, x: h @ x.reshape(1024, 1024), (64, 1024), (1024, 8, 128), []),
    "one row": (lambda h, x: h * x.astype(h.dtype), (1, 1024), (1024,), []),
    "few elements": (lambda h, x: h * x[:, None], (8, 16), (8,), ["broadcast_in_dim"]),
}
"""Bodies of loops, the shapes of a carry and of a slice, and the views of the slice that start a loop of the vector unit."""


@pytest.mark.parametrize("case", SHAPES)
def test_a_slice_that_arithmetic_reads_in_another_shape_is_cut_out_by_a_loop_of_its_own(case: str):
    body, carry, sliced, starts = SHAPES[case]
    program = traced(lambda h, xs: lax.scan(lambda h, x: (body(h, x), None), h, xs)[0], carry, (16, *sliced))
    views = [op for op in program.operations if not op.flops_per_point and op.op_class == "fused"]
    assert [op.primitive for op in views if ends_pass(program, op)] == starts
    started = sum(start_seconds(program, op, chip("v5e")) for op in views)
    assert started == pytest.approx(len(starts) * chip("v5e").vector_overhead_seconds * (case != "few elements"))


def test_a_recurrence_takes_the_time_of_its_slices():
    """1.44 times the plan without the starts of the two slices that are broadcast along the lanes (libtpu 0.0.50)."""

    def recur(state, decays, inputs):
        def step(h, each):
            decay, x = each
            return h * jnp.exp(decay)[..., None] + x[..., None], h.sum(-1)

        return lax.scan(step, state, (decays, inputs))

    args = [S(shape, jnp.float32) for shape in ((8, 1024, 16), (256, 8, 1024), (256, 8, 1024))]
    plan = autoshard.search(recur, *args, topology="v5e:1x1")
    replayed = autoshard.audit(plan, recur, *args, target="tpu").replay
    assert replayed is not None
    assert replayed.seconds == pytest.approx(plan.estimate.seconds, rel=0.2)
    assert not any("fault" in warning for warning in plan.warnings)  # the solver counts the slices' starts, too
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)


def squares(x):
    wide = x.astype(jnp.float32)
    return (wide * wide).sum(-1)


REDUCTIONS = {
    "sum of squares": (squares, True),
    "sum of exponentials": (lambda x: jnp.exp(x.astype(jnp.float32) - 1).sum(-1), True),
    "maximum": (lambda x: (x * 2).max(-1), True),
    "a softmax": (lambda x: jax.nn.softmax(x * 2), False),
    "a map": (lambda x: jnp.tanh(x) * 2, False),
    "a map that is also summed": (lambda x: (x * 2, (x * 2).sum(-1)), False),
}


@pytest.mark.parametrize("name", ["v4", "v5e", "v6e"])
@pytest.mark.parametrize("case", REDUCTIONS)
def test_a_reduction_waits_for_its_reads(case: str, name: str):
    """It does not read while it computes; what is written does."""
    fn, waits = REDUCTIONS[case]
    program, on = traced(fn, (8192, WIDTH)), chip(name)
    found = [cost for cost in costs(program, on) if cost.memory_seconds[0] > 1e-6 and cost.vector_seconds[0] > 1e-6]
    (cost,) = found[:1]
    longest, both = np.maximum(cost.memory_seconds, cost.vector_seconds), cost.memory_seconds + cost.vector_seconds
    assert cost.seconds - cost.overhead_seconds == pytest.approx(both if waits else longest)


def test_the_compiler_reduces_after_it_reads():
    """64 Mi elements: 624 µs, where HBM takes 216 and the vector unit 401 (libtpu 0.0.50)."""
    args = [S((2048, 32768), jnp.bfloat16)]
    plan = autoshard.search(squares, *args, topology="v5e:1x1")
    replayed = autoshard.audit(plan, squares, *args, target="tpu").replay
    assert replayed is not None
    assert replayed.seconds == pytest.approx(plan.estimate.seconds, rel=0.08)
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)


@pytest.mark.parametrize(("width", "starts"), [(64, False), (128, True)])
def test_loops_over_less_than_a_register_have_no_start(width: int, starts: bool):
    program, on = traced(lambda x: jnp.sin(x) + 1, (8, width)), chip("v4")
    started = [start_seconds(program, op, on) for op in program.operations]
    assert max(started) == (on.vector_overhead_seconds if starts else 0.0)


def test_a_mask_of_a_matmul_is_a_pass_over_its_operand_and_one_of_a_sum_is_free():
    program = traced(lambda x, w: (x @ w, x.sum(-1)), (ROWS, WIDTH), (WIDTH, 8))

    @given(masks=st.integers(1, 3), shards=st.sampled_from((1, 2, 4)), name=st.sampled_from(("v4", "v5e", "v6e")))
    def law(masks: int, shards: int, name: str):
        for op in program.operations:
            split = np.full((1, len(op.factors)), shards)
            plain, masked = (price(program, each, split, chip(name)) for each in (op, replace(op, masked=(0,) * masks)))
            own = ROWS * WIDTH / shards**2 / chip(name).vector_elements_per_second
            added = masks * own if op.op_class == "matmul" else 0.0
            assert masked.vector_seconds == pytest.approx(plain.vector_seconds + added)
            assert masked.seconds >= plain.seconds

    law()


def test_matmuls_in_loops_wait_for_their_operands():
    def looped(x, stack):
        return lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    program = traced(looped, (8, 256), (4, 256, 256))
    assert [is_streamed(program, op) for _, op in program.matmuls()] == [True]
    program = traced(lambda x, w: x @ w, (8, 256), (256, 256))
    assert [is_streamed(program, op) for _, op in program.matmuls()] == [False]


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_weights_outside_of_loops_are_read_while_their_matmul_starts(name: str):
    """Of a start as long as the read of the weight, the core waits for none, of a longer one for the rest."""

    def step(x, w):
        return jnp.tanh(x) @ w

    on = replace(chip(name), vector_elements_per_second=0.0)
    program = traced(step, (8, 4096), (4096, 4096))
    (_, op), one = next(iter(program.matmuls())), np.ones((1, 3))

    def seconds(start: float, of: Chip = on) -> float:
        return price(program, op, one, replace(of, op_overhead_seconds=start)).seconds[0]

    free = read = seconds(0.0)
    assert seconds(read / 2, replace(on, prefetch_bytes=0.0)) == pytest.approx(free + read / 2)
    if on.prefetch_bytes:
        assert seconds(read / 4) == free < seconds(2 * read) < free + 2 * read
    else:
        assert seconds(read / 4) == pytest.approx(free + read / 4)


@given(st.sampled_from(["v4", "v5e", "v5p", "v6e"]), st.floats(1, 10), st.floats(0, 1))
def test_a_faster_vector_unit_never_costs_more(name: str, faster: float, part: float):
    program = traced(lambda x, w: x + norm(x @ w).astype(x.dtype), (ROWS, WIDTH), (WIDTH, WIDTH))
    on = chip(name)
    better = replace(
        on,
        vector_elements_per_second=on.vector_elements_per_second * faster,
        vector_overhead_seconds=on.vector_overhead_seconds * part,
        stream_overhead_seconds=on.stream_overhead_seconds * part,
    )
    for slow, fast in zip(costs(program, on), costs(program, better), strict=True):
        assert fast.seconds[0] <= slow.seconds[0]


def test_without_a_rate_there_is_no_loop():
    program = traced(lambda x, w: x + norm(x @ w).astype(x.dtype), (ROWS, WIDTH), (WIDTH, WIDTH))
    bare = replace(chip("v4"), vector_elements_per_second=0.0, vector_overhead_seconds=0.0)
    for cost in costs(program, bare):
        longest = max(cost.compute_seconds[0], cost.memory_seconds[0])
        assert cost.vector_seconds[0] == 0 and cost.seconds[0] == pytest.approx(longest + cost.overhead_seconds[0])


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "shape"), [("v4", (2, 2, 1)), ("v5e", (2, 2)), ("v5p", (2, 2, 1)), ("v6e", (2, 2))])
def test_loops_take_as_long_as_the_compiler_says(name: str, shape: tuple[int, ...]):
    """A norm of an array, without matmuls, within 35 % of libtpu's cycles."""

    def fn(x):
        return norm(x).astype(x.dtype)

    on = chip(name)
    device = tpu_devices(f"{name}:{'x'.join(map(str, shape))}", shape, name)[0]
    held = jax.sharding.SingleDeviceSharding(device)
    given_ = S((1024, WIDTH), jnp.bfloat16, sharding=held)
    cycles = estimated_cycles(jax.jit(fn).lower(given_).compile().as_text() or "")
    assert cycles and on.clock_hertz
    planned = sum(float(cost.seconds[0]) for cost in costs(traced(fn, (1024, WIDTH)), on))
    assert planned == pytest.approx(cycles / on.clock_hertz, rel=0.35)


def test_work_may_be_as_deep_as_a_model_of_many_layers() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(400):
            x = x + jnp.tanh(x)
        return x @ w

    found = elements(traced(layers, (8, 128), (128, 128)))
    assert set(found) == {"dot_general"}
