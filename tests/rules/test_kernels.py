"""Pallas kernels without a rule of the user's: what their grids allow to be split, and that shards compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from autoshard.rules import Rule
from tests.support.layout_strategies import assert_layouts_do_not_matter, mesh_shapes, op_steps
from tests.support.tracing import trace


@dataclass(frozen=True)
class Kernel:
    """A grouped, blocked contraction `x[b h k], y[b h/group k] -> [b h]` with sums over k in scratch memory.

    `x` has its dimensions in the order `order`. With a table, the block of `y` along k is looked up for each step.
    """

    steps: tuple[int, int, int]
    blocks: tuple[int, int, int]
    group: int
    order: tuple[int, int, int]
    table: bool
    scratch: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(n * block for n, block in zip(self.steps, self.blocks, strict=True))

    def arguments(self) -> tuple[Array, ...]:
        random = np.random.default_rng(0)
        b, h, k = self.sizes
        x, y = random.standard_normal((b, h, k)), random.standard_normal((b, self.steps[1] // self.group, k))
        table = random.integers(0, self.steps[2], self.steps)
        return (
            jnp.asarray(x.transpose(self.order), jnp.float32),
            jnp.asarray(y, jnp.float32),
            jnp.asarray(table, jnp.int32),
        )

    def __call__(self, x: Array, y: Array, table: Array) -> Array:
        def body(*refs: Any) -> None:
            x_ref, y_ref, out_ref, *scratch = refs[self.table :]
            total = scratch[0] if scratch else out_ref

            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                total[...] = jnp.zeros(total.shape, total.dtype)

            block = x_ref[...].transpose(tuple(np.argsort(self.order)))
            total[...] += jnp.einsum("bhk,bgk->bh", block, y_ref[...])
            if scratch:
                out_ref[...] = total[...]

        def at_x(b: Any, h: Any, k: Any, *_: Any) -> tuple[Any, ...]:
            return tuple((b, h, k)[i] for i in self.order)

        def at_y(b: Any, h: Any, k: Any, *tables: Any) -> tuple[Any, ...]:
            return b, jax.lax.div(h, self.group), tables[0][b, h, k] if tables else k

        b, h, k = self.blocks
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int(self.table),
            grid=self.steps,
            in_specs=[pl.BlockSpec([self.blocks[i] for i in self.order], at_x), pl.BlockSpec((b, 1, k), at_y)],
            out_specs=pl.BlockSpec((b, h), lambda b, h, k, *_: (b, h)),
            scratch_shapes=[pltpu.VMEM((b, h), jnp.float32)] if self.scratch else [],
        )
        shape = jax.ShapeDtypeStruct(self.sizes[:2], jnp.float32)
        tables = (table,) if self.table else ()
        return pl.pallas_call(body, grid_spec=grid, out_shape=shape, interpret=True)(*tables, x, y)


@st.composite
def kernels(draw: st.DrawFn) -> Kernel:
    """Kernels of small grids; a group of 1 shares nothing, one of all heads shares everything."""
    group = draw(st.sampled_from((1, 2, 4)))
    heads = group * draw(st.sampled_from((1, 2, 4)))
    return Kernel(
        (draw(st.sampled_from((1, 2, 4, 6))), heads, draw(st.sampled_from((1, 2, 3)))),
        (draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3))), draw(st.sampled_from((1, 2)))),
        group,
        draw(st.permutations((0, 1, 2)).map(tuple)),  # pyright: ignore[reportArgumentType]
        draw(st.booleans()),
        draw(st.booleans()),
    )


def rule_of_kernel(fn: Callable[..., Any], *args: Any) -> Rule:
    """The rule of the only kernel of a function."""
    (rule,) = (step.rule for step in op_steps(trace(fn, *args).block) if step.eqn.primitive.name == "pallas_call")
    return rule


@pytest.mark.long
@settings(max_examples=10)
@given(kernels(), mesh_shapes())
def test_shards_compute_what_the_whole_kernel_does(kernel: Kernel, shape: str) -> None:
    assert_layouts_do_not_matter(lambda x, y, t: kernel(x * 2, y, t) + 1, *kernel.arguments(), shape=shape, count=2)


@pytest.mark.long
@settings(max_examples=10)
@given(kernels())
def test_a_grid_dimension_is_split_if_its_steps_are_independent(kernel: Kernel) -> None:
    b, h, _ = kernel.steps
    if b == h == 1:
        return
    rule = rule_of_kernel(kernel, *kernel.arguments())
    free = sorted(factor.size for factor in rule.factors if factor.kind == "parallel")
    group = kernel.group if kernel.group < h else 1  # all heads share one block: nothing is grouped
    assert free == sorted(n for n in (b, h // group, group) if n > 1)
    assert rule.exact and not rule.reason


def test_a_table_is_split_with_the_steps_that_look_it_up() -> None:
    kernel = Kernel((4, 4, 2), (2, 1, 2), 2, (1, 0, 2), True, True)
    rule = rule_of_kernel(kernel, *kernel.arguments())
    assert str(rule) == "[a,bc,d],[bc,ae,f],[ag,b,h] -> [ai,bc] whole={d,e,f,g,h,i}"


@pytest.mark.long
def test_heads_and_their_groups_are_split_over_different_axes() -> None:
    kernel = Kernel((2, 8, 2), (1, 3, 2), 2, (2, 1, 0), False, True)
    assert_layouts_do_not_matter(lambda x, y, t: kernel(x * 2, y, t) + 1, *kernel.arguments(), count=2)


# --- what may not be split

ROWS = pl.BlockSpec((2, 4), lambda i: (i, 0))
X = jnp.arange(32.0).reshape(8, 4)


def copy(x_ref: Any, out_ref: Any, *_: Any) -> None:
    out_ref[...] = jnp.broadcast_to(x_ref[...], out_ref.shape)


def add_step(x_ref: Any, out_ref: Any) -> None:
    out_ref[...] = x_ref[...] + pl.program_id(0).astype(x_ref.dtype)


def add_step_in_a_loop(x_ref: Any, out_ref: Any) -> None:
    out_ref[...] = x_ref[...]
    step = pl.program_id(0)

    @pl.loop(0, 2)
    def _(i: Any) -> None:
        out_ref[...] += (i * step).astype(out_ref.dtype)


def count_steps(x_ref: Any, out_ref: Any, count_ref: Any) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        count_ref[...] = jnp.zeros(count_ref.shape, count_ref.dtype)

    count_ref[...] += 1.0
    out_ref[...] = x_ref[...] + count_ref[...]


def running_sum(x_ref: Any, out_ref: Any, total_ref: Any) -> None:
    total_ref[...] += x_ref[...]  # not initialised: the interpreter begins with zeros
    out_ref[...] = total_ref[...]


def restart_outside(x: Array) -> Array:
    def body(x_ref: Any, out_ref: Any, total_ref: Any) -> None:
        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            total_ref[...] = jnp.zeros(total_ref.shape, total_ref.dtype)

        total_ref[...] += x_ref[...]
        out_ref[...] = total_ref[...]

    tile = pl.BlockSpec((4, 1), lambda i, j: (i, j))
    return pl.pallas_call(
        body,
        grid=(2, 4),
        in_specs=[tile],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype),
        scratch_shapes=[pltpu.VMEM((4, 1), jnp.float32)],
        interpret=True,
    )(x)


def accumulate(x_ref: Any, out_ref: Any) -> None:
    out_ref[...] += x_ref[...]


def run(body: Any, *arrays: Array, inputs: Any = ROWS, output: Any = ROWS, steps: int = 4, **options: Any) -> Array:
    """A kernel on arrays of X's shape."""
    shape, specs = jax.ShapeDtypeStruct(X.shape, X.dtype), [inputs] * len(arrays)
    return pl.pallas_call(
        body, grid=(steps,), in_specs=specs, out_specs=output, out_shape=shape, interpret=True, **options
    )(*arrays)


SCRATCH: dict[str, Any] = {"scratch_shapes": [pltpu.VMEM((2, 4), jnp.float32)]}
REFUSED: dict[str, tuple[Callable[[Array], Array], str]] = {
    "step": (lambda x: run(add_step, x), "computes with its step in `convert_element_type`"),
    "step in a loop": (lambda x: run(add_step_in_a_loop, x), "computes with its step"),
    "reversed": (lambda x: run(copy, x, inputs=pl.BlockSpec((2, 4), lambda i: (3 - i, 0))), "not in the order"),
    "doubled": (
        lambda x: run(copy, x, inputs=pl.BlockSpec((1, 4), lambda i: (2 * i, 0)), output=ROWS),
        "not in the order",
    ),
    "remainder": (
        lambda x: run(
            copy,
            x,
            inputs=pl.BlockSpec((3, 4), lambda i: (i, 0)),
            steps=3,
            output=pl.BlockSpec((3, 4), lambda i: (i, 0)),
        ),
        "last block of .* is not whole",
    ),
    "one result": (
        lambda x: run(
            accumulate, x, inputs=pl.BlockSpec((8, 1), lambda i: (0, i)), output=pl.BlockSpec((8, 4), lambda i: (0, 0))
        ),
        "every step of it writes the same blocks",
    ),
    "diagonal": (
        lambda x: run(copy, x, inputs=pl.BlockSpec((2, 1), lambda i: (i, i)), output=ROWS),
        "indexes several dimensions",
    ),
    "count": (lambda x: run(count_steps, x, **SCRATCH), "computes with its step in `eq`"),
    "running sum": (lambda x: run(running_sum, x, **SCRATCH), "scratch memory may carry data"),
    "restarted by outer steps": (restart_outside, "dimension 1 is not split because scratch memory may carry data"),
    "overwritten": (lambda x: run(copy, x, input_output_aliases={0: 0}), "input_output_aliases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_grid_as_a_whole_is_replicated_and_said(name: str) -> None:
    fn, why = REFUSED[name]
    rule = rule_of_kernel(fn, X)
    assert {factor.kind for factor in rule.factors} == {"whole"} and not rule.exact
    (warning,) = trace(fn, X).program.warnings
    assert "has no sharding rule: its arrays are replicated; every chip computes all of it," in warning
    assert "256 B of HBM traffic, because" in warning and "`autoshard.rule`" in warning
    assert re.search(why, warning)
    assert_layouts_do_not_matter(lambda x: fn(x * 2) + 1, X, shape="2x2", count=2)
