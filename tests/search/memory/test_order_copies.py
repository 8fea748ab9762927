"""Arrays that the TPU compiler copies into another memory order: what loops stack, and columns that an index picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import autoshard
from costmodels.machine import parse_topology
from search.answer.assignment import choice_of
from search.answer.check_memory import alive_bytes
from search.formulation.problem import build
from search.memory.constraints import rows
from search.memory.order_copies import stack_copies
from search.memory.tpu_temporaries import operations_with_temporaries
from tests.support.cases import Case
from tests.support.layout_strategies import random_states
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32
N = 8192


def matrix(*shape: int, dtype: Any = bf16) -> Any:
    """One of a size above what stays on a chip; of `N` rows and columns by default."""
    return S(shape or (N, N), dtype)


def indices(count: int = 1024) -> Any:
    return S((count,), jnp.int32)


def stacked(form: Callable[..., Any]) -> Callable[..., Any]:
    """A loop that stacks what is formed of each slice of a stack."""
    return lambda s, *others: lax.scan(lambda c, x: (c, form(x, *others)), 0, s)[1]


def softmax(x: Any) -> Any:
    return jax.nn.softmax(x, -1)


def attention(c: Any, s: Any) -> Any:
    """Probabilities of float32 scores, stored in bfloat16 for each layer."""

    def layer(c: Any, x: Any) -> Any:
        scores = jnp.einsum("bqhd,bkhd->bhqk", c, x, preferred_element_type=f32)
        probabilities = softmax(scores).astype(bf16)
        return jnp.einsum("bhqk,bkhd->bqhd", probabilities, x), probabilities

    return lax.scan(layer, c, s)


STACKED = {
    "transposed": (Case(stacked(lambda x: x.T), (matrix(3, N, N),)), 2),
    "transposed and added": (Case(stacked(lambda x: x + jnp.tanh(x.T)), (matrix(3, N, N),)), 2),
    "rows before heads": (Case(stacked(lambda x: x.transpose(1, 0, 2)), (matrix(3, 64, 128, N),)), 1),
    "a transposed carry": (
        Case(lambda c, s: lax.scan(lambda c, x: (jnp.tanh(c @ x), c.T), c, s)[1], (matrix(), matrix(3, N, N))),
        1,
    ),
    "written transposed": (
        Case(lambda s, o: lax.fori_loop(0, 3, lambda i, o: o.at[i].set(s[i].T), o), (matrix(3, N, N),) * 2, (1,)),
        2,
    ),
    "softmax of a product": (Case(stacked(lambda x, a: softmax(x @ a)), (matrix(3, N, N), matrix())), 1),
    "a product and its sums": (
        Case(stacked(lambda x, a: (lambda p: (p, p.sum(-1)))(x @ a)), (matrix(3, N, N), matrix())),
        1,
    ),
    "stored attention": (Case(attention, (matrix(4, 2048, 8, 128), matrix(3, 4, 2048, 8, 128))), 2),
    "softmax": (Case(stacked(softmax), (matrix(3, N, N),)), 0),
    "softmax along the rows": (Case(stacked(lambda x, a: jax.nn.softmax(x @ a, 0)), (matrix(3, N, N), matrix())), 0),
    "a product": (Case(stacked(lambda x, a: jnp.tanh(x @ a)), (matrix(3, N, N), matrix())), 0),
}
"""Stacks, and the number of arrays that the copies need; a product of which the slices are picked from is one more."""
COLUMNS = {
    "picked": (Case(lambda a, i: a[:, i], (matrix(), indices())), 1),
    "picked by few": (Case(lambda a, i: a[:, i], (matrix(), indices(8))), 1),
    "picked from slices": (Case(lambda s, i: stacked(lambda x: x[:, i])(s), (matrix(3, N, N), indices())), 1),
    "picked and padded": (Case(lambda a, i, j: a[:, i, j], (matrix(64, 1024, 1024), indices(), indices())), 1),
    "picked twice": (
        Case(lambda a, b, i: (lambda p: (p[:, i], p @ b, p))(jnp.tanh(a)), (matrix(), matrix(), indices())),
        1,
    ),
    "written": (Case(lambda a, i, b: a.at[:, i].set(b), (matrix(), indices(), matrix(N, 1024)), (0,)), 1),
    "rows picked": (Case(lambda a, i: a[i], (matrix(), indices())), 0),
    "elements picked": (Case(lambda a, i, j: a[i, j], (matrix(), indices(), indices())), 0),
    "picked from a product": (Case(lambda a, b, i: (a @ b)[:, i], (matrix(), matrix(), indices())), 0),
    "picked for each row": (Case(lambda a, i: jnp.take_along_axis(a, i, -1), (matrix(), S((N, 8), jnp.int32))), 0),
    "one picked": (Case(lambda a, i: a[:, i], (matrix(), indices(1))), 0),
}
"""Columns that are picked or written, and the number of operations that copy an array for it."""


@pytest.mark.tpu
@pytest.mark.long
@pytest.mark.parametrize("case", [case for case, _ in (STACKED | COLUMNS).values()], ids=[*STACKED, *COLUMNS])
def test_copies_into_another_order_are_in_the_planned_peak(case: Case) -> None:
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1", donate_argnums=case.donated)
    found = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)


@pytest.mark.parametrize("name", STACKED)
def test_what_is_stacked_in_another_order_is_copied(name: str) -> None:
    case, wanted = STACKED[name]
    assert sum(each.count for each in stack_copies(trace(case.fn, *case.args).program)) == wanted


@pytest.mark.parametrize("name", COLUMNS)
def test_an_array_is_copied_for_columns_that_an_index_picks(name: str) -> None:
    case, wanted = COLUMNS[name]
    assert len(operations_with_temporaries(trace(case.fn, *case.args).program)) == wanted


@pytest.mark.parametrize("case", [case for case, _ in (STACKED | COLUMNS).values()], ids=[*STACKED, *COLUMNS])
def test_rows_and_checker_count_the_same_copies(case: Case) -> None:
    topology = parse_topology("v5e:2x1")
    topology = replace(topology, chip=replace(topology.chip, on_chip_bytes=1.0))
    program = trace(case.fn, *case.args, donate_argnums=case.donated).program
    problem = build(program, topology, np.inf)
    for seed in range(3):
        states = random_states(problem, np.random.default_rng(seed))
        assert states is not None
        alive = max(alive_bytes(program, topology, choice_of(problem, states)))
        assert alive == pytest.approx(max(rows(problem).bytes(problem, states)))


def test_copies_are_found_in_work_of_any_depth() -> None:
    """Each array is looked at once, though there is a path to it for every choice between two operands."""

    def deep(x: Any) -> Any:
        for _ in range(60):
            x = x + jnp.tanh(x)
        return x.T

    assert [each.count for each in stack_copies(trace(stacked(deep), matrix(3, N, N)).program)] == [2]
