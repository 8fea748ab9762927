"""Arrays that the TPU compiler makes of its own, and results beside the donated arguments that they overwrite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from autoshard.auditing.findings import find_in_time
from search.memory.buffers import buffers
from search.memory.conversions import conversions
from search.memory.results_first import results_first
from search.memory.tpu_temporaries import joined_operands
from tests.support.cases import Case
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32
A = S((8192, 8192), bf16)
SMALL = S((8, 8), f32)
SCALARS = 1
"""The condition of a branch."""


def trained(weights: Any, x: Any) -> Any:
    """A step of float32 weights in a stack, which a scan converts."""

    @jax.checkpoint
    def body(x: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(x @ w.astype(bf16)), None

    loss = lambda weights: jnp.square(lax.scan(body, x, weights)[0].astype(f32)).sum()  # noqa: E731
    return weights - 1e-3 * jax.grad(loss)(weights)


CASES = {
    "product over its operand": Case(lambda a, b: a @ b, (A, A), (0,)),
    "read after its product": Case(lambda a, b: (a @ b, jnp.tanh(a)), (A, A), (0,)),
    "exchanged": Case(lambda a, b: (b * 2, a * 2), (A, A), (0, 1)),
    "read in a loop": Case(
        lambda a, b, s: lax.scan(lambda c, x: (jnp.tanh(c @ x + a), None), b, s)[0],
        (A, A, S((3, 8192, 8192), bf16)),
        (0,),
    ),
    "joined": Case(lambda a, b: jnp.tanh(jnp.concatenate([jnp.tanh(a), jnp.tanh(b)])), (A, A)),
    "stacked": Case(lambda a, b: jnp.stack([jnp.tanh(a), jnp.tanh(b)]), (A, A)),
    "sorted": Case(lambda a: jnp.sort(a, -1), (A,)),
    "running sums": Case(lambda a: jnp.cumsum(a, 0), (A,)),
    "largest": Case(lambda a: lax.top_k(a, 64)[0], (A,)),
    "multiplied as bfloat16": Case(
        lambda c, s: lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), c, s)[0],
        (S((8192, 8192), f32), S((3, 8192, 8192), f32)),
    ),
    "one of two products": Case(lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: b @ a), (A, A)),
    "a product or an argument": Case(lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a), (A, A)),
    "rows written in a branch": Case(
        lambda a, b: lax.cond(a[0, 0] > 0, lambda: lax.dynamic_update_slice(a, b[:64], (8, 0)), lambda: a), (A, A)
    ),
    "written over its product": Case(lambda a, b: jnp.tanh(a @ b), (A, A)),
    "formed in its product": Case(lambda a, b: jnp.tanh(a) @ jnp.tanh(b), (A, A)),
    "read while the result is written": Case(lambda a, b: jax.nn.softmax(a @ b, -1), (A, A)),
    "a sum in another order": Case(lambda s: s.sum(0).T, (S((3, 8192, 8192), f32),)),
    "cast in its product": Case(lambda a, b: jnp.matmul(a, b, preferred_element_type=f32).astype(bf16), (A, A)),
    "rolled": Case(lambda a: jnp.tanh(jnp.roll(a, 7, 0)), (A,)),
    "added up": Case(
        lambda s: lax.scan(lambda c, x: (c + x.T @ x, None), jnp.zeros_like(s[0]), s)[0], (S((3, 8192, 8192), bf16),)
    ),
    "stacked products": Case(
        lambda s, a: lax.scan(lambda c, x: (c, jnp.tanh(x @ a)), 0, s)[1], (S((3, 8192, 8192), bf16), A)
    ),
    "copied before a loop": Case(
        lambda a, b: (lambda c: (c, jnp.matmul(c, a.astype(bf16), preferred_element_type=f32)))(
            lax.fori_loop(0, 3, lambda i, c: c @ b, b)
        ),
        (S((8192, 8192), f32), A),
        (0,),
    ),
    "picked from a transposition": Case(lambda a: a.T[jnp.argmax(a, -1)], (A,)),
    "made with a conversion": Case(
        lambda s, a: (lax.scan(lambda c, x: (c, jnp.tanh(x @ a.astype(bf16))), 0, s)[1], jnp.tanh(a)),
        (S((3, 8192, 8192), bf16), S((8192, 8192), f32)),
        (0,),
    ),
    "converted": Case(trained, (S((16, 4096, 4096), f32), S((4096, 4096), bf16)), (0,)),
}


@pytest.mark.tpu
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_what_the_compiler_makes_is_in_the_planned_peak(name: str) -> None:
    case = CASES[name]
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1", donate_argnums=case.donated)
    found = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)


def arrays(fn: Any, donated: tuple[int, ...] = (0,), count: int = 2) -> int:
    """The number of arrays that a function of small matrices takes, one for each that lives beside another."""
    return len(buffers(trace(fn, *[SMALL] * count, donate_argnums=donated).program))


@pytest.mark.parametrize(
    ("fn", "more"),
    [
        (lambda a, b: jnp.tanh(a) + b, 0),
        (lambda a, b: (jnp.tanh(a), a @ b), 1),
        (lambda a, b: (a @ b, jnp.tanh(a)), 2),
        (lambda a, b: a.T + b, 1),
        (lambda a, b: jnp.tanh(a.reshape(64)).reshape(8, 8) + b, 0),
        (lambda a, b: a / a.sum(0) + b, 0),
        (lambda a, b: lax.dynamic_update_slice(a, b, (0, 0)), 0),
    ],
)
def test_results_need_an_array_beside_the_argument_that_they_overwrite_only_while_it_is_read(
    fn: Any, more: int
) -> None:
    assert arrays(fn) == 2 + more


def test_arguments_that_both_results_read_are_overwritten_in_one_kernel_only() -> None:
    assert arrays(lambda a, b: (a + b, a * b), (0, 1)) == 2
    assert arrays(lambda a, b: (b * 2, a * 2), (0, 1)) == 3


def test_reductions_alone_need_no_operands_of_a_concatenation() -> None:
    joined = lambda a, b: jnp.concatenate([jnp.tanh(a), jnp.tanh(b)])  # noqa: E731
    assert len(joined_operands(trace(joined, SMALL, SMALL).program)) == 2
    assert joined_operands(trace(lambda a, b: joined(a, b).sum(0), SMALL, SMALL).program) == ()


@pytest.mark.parametrize(
    ("fn", "wanted"),
    [
        (lambda a, b: jnp.tanh(a @ b), 3),
        (lambda a, b: (lambda p: jnp.tanh(p) * p)(a @ b), 3),
        (lambda a, b: (a @ b, jnp.tanh(a @ b)), 4),
        (lambda a, b: jnp.tanh(a) @ b, 3),
        (lambda a, b: (lambda t: (t @ b, t @ a))(jnp.tanh(a)), 5),
        (lambda a, b: a.sum(0) + b, 3),
    ],
)
def test_elementwise_work_inside_the_kernels_of_products_takes_no_array(fn: Any, wanted: int) -> None:
    assert arrays(fn, ()) == wanted


@pytest.mark.parametrize(
    ("fn", "wanted"),
    [
        (lambda a, b: a @ b @ b, 1),
        (lambda a, b: a @ b @ b @ b, 1),
        (lambda a, b: jax.nn.softmax(a @ b, -1), 1),
        (lambda a, b: (a @ b @ b, jnp.tanh(b)), 0),
    ],
)
def test_arrays_lie_in_the_memory_of_results_that_are_made_after_all_their_readers(fn: Any, wanted: int) -> None:
    """The number of those that do not; the last has a result that can wait."""
    program = trace(fn, SMALL, SMALL).program
    found = next(results_first(program, buffers(program)))
    assert len(found) == 2 + len(program.results) + wanted


def test_stacks_are_converted_before_a_loop_unless_it_piles_up_the_slices() -> None:
    def body(x: Any, w: Any) -> tuple[Any, Any]:
        narrow = w.astype(bf16)
        return jnp.tanh(x @ narrow), narrow

    args = S((4, 8, 8), f32), S((8, 8), bf16)
    once = trace(lambda w, x: lax.scan(lambda x, w: (body(x, w)[0], None), x, w)[0], *args).program
    assert [each.bytes for each in conversions(once)] == [4 * 8 * 8 * 2]
    assert conversions(trace(lambda w, x: lax.scan(body, x, w), *args).program) == ()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (lambda c, w: jnp.tanh(c @ w), [3 * 8 * 8 * 2]),
        (lambda c, w: jnp.tanh(c @ w.T), [3 * 8 * 8 * 2]),
        (lambda c, w: jnp.tanh(c.astype(bf16) @ w.astype(bf16)).astype(f32) @ w, [3 * 8 * 8 * 2]),
        (lambda c, w: jnp.tanh(c @ w) + w, []),
        (lambda c, w: jnp.tanh(jnp.matmul(c, w, precision="high")), []),
        (lambda c, w: jnp.tanh(c @ (w * 2)), []),
        (lambda c, w: jnp.tanh(c.astype(bf16) @ w.astype(bf16)).astype(f32) + w, []),
    ],
)
def test_float32_weights_that_a_loop_reads_only_in_bfloat16_are_converted_before_it(
    body: Any, found: list[int]
) -> None:
    stack = S((3, 8, 8), f32)
    traced = trace(lambda c, s: lax.scan(lambda c, w: (body(c, w), None), c, s)[0], SMALL, stack)
    assert [each.bytes for each in conversions(traced.program)] == found


def test_constants_are_converted_before_the_outermost_loop_that_does_not_change_them() -> None:
    def nested(c: Any, s: Any, m: Any) -> Any:
        inner = lambda c: lax.scan(lambda c, w: (jnp.tanh(c @ w) @ m, None), c, s)[0]  # noqa: E731
        return lax.fori_loop(0, 2, lambda i, c: inner(c), c)

    program = trace(nested, SMALL, S((3, 8, 8), f32), SMALL).program
    loops = [i for i, op in enumerate(program.operations) if op.region]
    found = conversions(program)
    assert sorted(each.bytes for each in found) == [8 * 8 * 2, 3 * 8 * 8 * 2]
    assert {(each.first, each.last) for each in found} == {(loops[0], loops[-1])}


@pytest.mark.parametrize(
    ("branch", "other", "wanted"),
    [
        (lambda a, b: a @ b, lambda a, b: b @ a, 3),
        (lambda a, b: jnp.tanh(a @ b), lambda a, b: b @ a, 3),
        (lambda a, b: jnp.tanh(a @ b), lambda a, b: a, 4),
        (lambda a, b: a @ b, lambda a, b: a, 4),
        (lambda a, b: lax.dynamic_update_slice(a, b[:2], (0, 0)), lambda a, b: a, 4),  # with the rows
        (lambda a, b: lax.dynamic_update_slice(a, b[:2], (0, 0)), lambda a, b: b @ a, 5),  # with the rows
    ],
)
def test_branches_read_arrays_where_they_lie_and_write_into_the_result(branch: Any, other: Any, wanted: int) -> None:
    assert arrays(lambda a, b: lax.cond(a[0, 0] > 0, branch, other, a, b), ()) == wanted + SCALARS


def test_a_step_that_was_planned_without_cost_is_slow() -> None:
    (found,) = find_in_time(0.0, 1e-3, ())
    assert "planned without cost" in found.text


STACK = S((3, 8, 8), bf16)


@pytest.mark.parametrize(
    ("fn", "args", "wanted"),
    [
        (lambda a, b: (a @ b).astype(bf16), (SMALL, SMALL), 3),
        (lambda a, b: (lambda p: (p.astype(bf16), p))(a @ b), (SMALL, SMALL), 4),
        (lambda s: lax.scan(lambda c, x: (c + x.T @ x, None), jnp.zeros_like(s[0]), s)[0], (STACK,), 2),
        (lambda s: lax.scan(lambda c, x: (c + (x.T @ x) @ x, None), jnp.zeros_like(s[0]), s)[0], (STACK,), 3),
        (lambda s: lax.scan(lambda c, x: (c + jnp.tanh(c @ x), None), s[0], s)[0], (STACK,), 3),
        (lambda s: lax.scan(lambda c, x: (c, jnp.tanh(x @ x)), 0, s)[1], (STACK,), 2),
        (lambda a, s: lax.scan(lambda c, x: (c, jnp.tanh(x @ x)), a, s), (STACK, STACK), 3),
    ],
)
def test_kernels_that_take_in_a_product_write_into_carries_and_stacks(fn: Any, args: Any, wanted: int) -> None:
    """The number of arrays that are not numbers; a product that the kernel does not take in is one."""
    program = trace(fn, *args).program
    found = [each for each in buffers(program) if len(program.values[each.value].shape) > 1]
    assert len(found) == wanted


def test_a_rolled_array_is_read_where_it_is() -> None:
    assert joined_operands(trace(lambda a: jnp.roll(a, 3, 0), SMALL).program) == ()
    assert len(joined_operands(trace(lambda a: jnp.roll(jnp.tanh(a), 3, 0), SMALL).program)) == 2


def test_a_gather_copies_the_transposition_of_an_array_that_others_read() -> None:
    pick = lambda a: a.T[jnp.arange(8)[::-1]]  # noqa: E731
    shown = lambda fn: buffers(trace(fn, SMALL).program)[0].members  # noqa: E731
    assert shown(pick) == (0, 1)
    assert shown(lambda a: (pick(a), jnp.tanh(a))) == (0,)


def test_an_operation_may_make_several_arrays_of_an_argument() -> None:
    plan = autoshard.search(lambda x: jnp.split(jnp.tanh(x), 2), SMALL, topology="v5e:1x1")
    assert [array.shape for array in plan.results] == [(4, 8), (4, 8)]
    assert not any("checker" in text for text in plan.warnings)
