"""Random layouts, and the law that they must not change what a program computes.

| name | is |
|---|---|
| `mesh_shapes()` | shapes of meshes of up to eight host devices |
| `blocks()` | sizes of small transformer blocks (`models.Block`) |
| `random_choice` | a feasible choice of strategies and layouts, drawn uniformly node by node |
| `assert_well_formed` | a check of a program's factors against its values' shapes |
| `assert_layouts_do_not_matter` | runs a function under random choices; its results must equal the unsharded ones |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from autoshard.annotating.pins import pin_program
from autoshard.emitting.program import emit
from autoshard.tracing.blocks import Block as StepBlock
from autoshard.tracing.blocks import BranchStep, LoopStep, OpStep, Traced
from costmodels.machine.topology import Topology, parse_topology
from search.answer.assignment import Choice, choice_of
from search.formulation.layouts import Layout
from search.formulation.problem import FORBIDDEN, Edge, Problem, build
from tests.support.models import Block
from tests.support.tracing import trace

FEASIBLE = FORBIDDEN / 10
"""Seconds: what costs more is impossible."""

MESH_SHAPES = ("2", "3", "4", "6", "8", "2x2", "2x4", "4x2", "2x2x2")


def mesh_shapes() -> st.SearchStrategy[str]:
    """Shapes of meshes of up to eight devices; 3 and 6 divide few dimensions."""
    return st.sampled_from(MESH_SHAPES)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Small transformer blocks: multi-head, grouped or multi-query; gated or not; parallel or serial; scanned or not."""
    kv_heads = draw(st.sampled_from((1, 2, 4)))
    return Block(
        batch=draw(st.sampled_from((1, 2, 4, 6))),
        context=draw(st.sampled_from((4, 6, 8))),
        layers=draw(st.integers(1, 3)),
        d_model=draw(st.sampled_from((4, 6, 8, 12))),
        d_ff=draw(st.sampled_from((8, 12, 16))),
        kv_heads=kv_heads,
        queries_per_kv=draw(st.sampled_from((1, 2, 3))),
        d_head=draw(st.sampled_from((2, 4, 6))),
        gated=draw(st.booleans()),
        parallel=draw(st.booleans()),
        scanned=draw(st.booleans()),
        decode=draw(st.booleans()),
        vocab=draw(st.sampled_from((7, 8, 12))),
    )


# --- Random feasible choices


@lru_cache
def quick() -> dict[str, Any]:
    """Compiler options for programs that run once: they compile five times faster."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    known = {**options, "xla_cpu_use_fusion_emitters": False}  # an option until JAX 0.12
    try:
        jax.jit(lambda: 0, compiler_options=known)()
    except jax.errors.JaxRuntimeError:
        return options
    return known


@lru_cache
def cpu_topology(shape: str) -> Topology:
    """Host devices in a mesh of this shape, such as `"2x2x2"`."""
    return parse_topology(f"cpu:{shape}")


def mesh_of(topology: Topology) -> jax.sharding.Mesh:
    """The mesh of a topology over the first host devices."""
    sizes = tuple(topology.axis_sizes.values())
    return jax.sharding.Mesh(np.array(jax.devices()[: prod(sizes)]).reshape(sizes), tuple(topology.axis_sizes))


class _Domains:
    """The states that are still possible for each node; taking some away takes more away along the edges."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.allowed = [node.cost < FEASIBLE for node in problem.nodes]
        self.settle(range(len(problem.edges)))

    def fix(self, node: int, state: int) -> None:
        self.allowed[node] = np.arange(len(self.allowed[node])) == state
        self.settle(self.problem.incident[node])

    def settle(self, edges: Sequence[int] | range) -> None:
        """Keeps the states that every edge gives a partner, until nothing changes."""
        waiting = list(edges)
        while waiting:
            edge = self.problem.edges[waiting.pop()]
            for node, supported in ((edge.a, self._backward(edge)), (edge.b, self._forward(edge))):
                kept = self.allowed[node] & supported
                if kept.sum() < self.allowed[node].sum():
                    self.allowed[node] = kept
                    waiting += self.problem.incident[node]

    def _forward(self, edge: Edge) -> np.ndarray:
        layouts = np.unique(edge.rows[self.allowed[edge.a]])
        return np.any(edge.matrix[layouts] < FEASIBLE, axis=0)[edge.columns]

    def _backward(self, edge: Edge) -> np.ndarray:
        layouts = np.unique(edge.columns[self.allowed[edge.b]])
        return np.any(edge.matrix[:, layouts] < FEASIBLE, axis=1)[edge.rows]

    def possible(self) -> bool:
        return all(allowed.any() for allowed in self.allowed)


def random_states(problem: Problem, rng: np.random.Generator, fixed: dict[int, int] | None = None) -> np.ndarray | None:
    """A feasible state for every node, some of them given; `None` if there is none or the draw runs into a corner."""
    domains = _Domains(problem)
    states = np.zeros(len(problem.nodes), dtype=np.intp)
    given = list((fixed or {}).items())
    for node in [*(node for node, _ in given), *(i for i in _in_program_order(problem) if i not in dict(given))]:
        if not domains.possible():
            return None
        states[node] = dict(given)[node] if node in dict(given) else rng.choice(np.flatnonzero(domains.allowed[node]))
        domains.fix(node, int(states[node]))
    return states if domains.possible() and problem.objective(states) < FEASIBLE else None


def _in_program_order(problem: Problem) -> list[int]:
    def place(i: int) -> float:
        node = problem.nodes[i]
        return problem.program.producers[node.of][0] + 0.5 if node.is_hub else node.of

    return sorted(range(len(problem.nodes)), key=place)


def traced_on(topology: Topology, fn: Callable[..., Any], *args: Any) -> Traced:
    """A traced function, its pins put in terms of a topology."""
    traced = trace(fn, *args)
    return replace(traced, program=pin_program(traced.program, traced.paths, topology, None)[0])


def problem_of(traced: Traced, topology: Topology) -> Problem:
    """The search problem of a traced function, memory unlimited."""
    return build(traced.program, topology, float("inf"))


def random_choice(problem: Problem, rng: np.random.Generator, fixed: dict[int, int] | None = None) -> Choice | None:
    """A random feasible choice, as `random_states`."""
    states = random_states(problem, rng, fixed)
    return None if states is None else choice_of(problem, states)


def random_choices(problem: Problem, rng: np.random.Generator, count: int) -> list[Choice]:
    """That many random feasible choices."""
    found: list[Choice] = []
    for _ in range(10 * count):
        choice = random_choice(problem, rng)
        found += [] if choice is None else [choice]
        if len(found) == count:
            return found
    raise AssertionError(f"{problem.program.name} has no feasible layout, or too few are ever found")


# --- The law


def op_steps(block: StepBlock) -> Iterator[OpStep]:
    """Every equation of a block and of the blocks inside it."""
    for step in block.steps:
        if isinstance(step, OpStep):
            yield step
        elif isinstance(step, LoopStep):
            yield from op_steps(step.body)
            yield from op_steps(step.condition) if step.condition else ()
        elif isinstance(step, BranchStep):
            for inner in step.blocks:
                yield from op_steps(inner)


def run_planned(traced: Traced, topology: Topology, choices: Sequence[Choice], *args: Any) -> list[list[Any]]:
    """The flat results of a traced function under each choice, all in one compilation."""
    mesh = mesh_of(topology)

    def all_of_them(*flat: Any) -> list[list[Any]]:
        return [emit(traced, choice, topology, mesh)(*flat) for choice in choices]

    flat = (*jax.tree.leaves(args), *traced.constants)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(all_of_them, in_shardings=whole, compiler_options=quick())(*flat)


def assert_equal(
    planned: Sequence[Any], unsharded: Any, tolerance: float = 1e-4, defined: Callable[..., list[Any]] | None = None
) -> None:
    """Flat results equal a pytree's leaves: exactly, or within a tolerance relative to the largest number.

    `defined` maps results to what of them is defined, where that is less than all.
    """
    expected = jax.tree.leaves(unsharded)
    assert [(a.shape, a.dtype) for a in planned] == [(a.shape, a.dtype) for a in expected]
    if defined is not None:
        planned, expected = (defined(*map(jnp.asarray, jax.device_get(each))) for each in (planned, expected))
    for got, want in zip(planned, expected, strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        planned_type = got.dtype
        if jnp.issubdtype(planned_type, np.inexact):
            wide = np.complex128 if jnp.issubdtype(got.dtype, np.complexfloating) else np.float64
            got, want = np.asarray(got).astype(wide), np.asarray(want).astype(wide)
            largest = np.abs(want[np.isfinite(want)]).max(initial=1e-30)
            error = max(tolerance, 4 * float(jnp.finfo(planned_type).eps))
            np.testing.assert_allclose(got, want, rtol=error, atol=error * largest)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def assert_well_formed(traced: Traced) -> None:
    """The factors of every dimension multiply to its size; a dimension that is broadcast has size 1 and none."""
    program = traced.program
    for op in program.operations:
        for use in (*op.inputs, *op.outputs):
            shape = tuple(prod(op.factors[i].size for i in dim) for dim in use.dims)
            assert shape == program.values[use.value].shape, op.name


def assert_layouts_do_not_matter(
    fn: Callable[..., Any],
    *args: Any,
    shape: str = "2x2x2",
    count: int = 4,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Traced:
    """Traces a function, runs it under `count` random feasible choices and compares with the unsharded results."""
    topology = cpu_topology(shape)
    traced = traced_on(topology, fn, *args)
    assert_well_formed(traced)
    choices = random_choices(problem_of(traced, topology), np.random.default_rng(seed), count)
    unsharded = jax.jit(fn)(*args)
    for planned in run_planned(traced, topology, choices, *args):
        assert_equal(planned, unsharded, tolerance)
    return traced


SHARES = {1: (1,), 2: (3, -2), 3: (5, -1, -3), 4: (2, -3, 5, -3)}
"""The share that each position along an axis holds of a partial sum; each row adds up to 1."""


def pieces(array: np.ndarray, layout: Layout, sizes: dict[str, int]) -> np.ndarray:
    """Every chip's piece of an array, chips first, by the definition of a layout."""
    found = []
    for at in np.ndindex(*sizes.values()):
        coordinate = dict(zip(sizes, at, strict=True))
        part = array
        for dim, axes in enumerate(layout.dims):
            index = reduce(lambda i, axis: i * sizes[axis] + coordinate[axis], axes, 0)
            part = np.split(part, prod(sizes[axis] for axis in axes), axis=dim)[index]
        found.append(part * prod(SHARES[sizes[axis]][coordinate[axis]] for axis in layout.partial))
    return np.stack(found)
