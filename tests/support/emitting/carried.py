"""One random plan carried in each way by `jax.jit`: equal results, and arguments and results in the planned shardings.

    JAX_NUM_CPU_DEVICES=16 python -m tests.support.emitting.carried EXAMPLES

runs the law on meshes of up to sixteen devices, in a process of its own: the other tests have eight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from autoshard.carrying.candidates import places
from autoshard.emitting.constrained import constrained
from autoshard.emitting.program import emit
from autoshard.emitting.sharding import spec_of
from autoshard.planning.carriage import WAYS
from search.answer.assignment import needed_layout, produced_layout
from tests.support.emitting.einsum_graphs import LARGER_MESH_SHAPES, Graph, arguments_of, graphs
from tests.support.layout_strategies import blocks, cpu_topology, mesh_of, problem_of, quick, random_choices
from tests.support.models import Block, arguments, function
from tests.support.tracing import trace


def assert_carried(
    fn: Callable[..., Any], args: Sequence[Any], mesh_shape: str, seed: int, gradients: bool = False
) -> None:
    """Runs a function under one random choice of layouts, carried in each way, with a random part of the constraints."""
    topology, rng = cpu_topology(mesh_shape), np.random.default_rng(seed)
    traced = trace(fn, *args)
    program, mesh = traced.program, mesh_of(topology)
    (choice,) = random_choices(problem_of(traced, topology), rng, 1)
    flat, structure = jax.tree.flatten(tuple(args))
    ins = [spec_of(produced_layout(program, choice, program.operations[i].outputs[0].value)) for i in program.arguments]
    sinks = [i for i in program.results if program.operations[i].inputs]
    outs = [spec_of(needed_layout(program, choice, i, 0)) if i in sinks else jax.P() for i in program.results]
    part = rng.choice((0.0, 0.7, 1.0))  # the first is the program with nothing but its loops in place
    chosen = [place.constraint for place in places(traced, choice, topology) if rng.random() < part]
    constants = traced.constants
    runs: dict[str, Callable[..., Any]] = {
        "manual": emit(traced, choice, topology, mesh),
        "constraints": constrained(traced, choice, topology, mesh, chosen),
        "specs": lambda *flat: jax.tree.leaves(fn(*jax.tree.unflatten(structure, flat[: len(ins)]))),
    }
    expected = jax.tree.leaves(fn(*args))
    for way in WAYS:
        run = runs[way]

        def planned(*flat: Any, run: Callable[..., Any] = run) -> Any:
            return run(*flat, *constants)

        shardings = [[NamedSharding(mesh, spec) for spec in specs] for specs in (ins, outs)]
        jitted = jax.jit(planned, in_shardings=shardings[0], out_shardings=shardings[1])
        compiled = jitted.lower(*flat).compile(compiler_options=quick())
        found = compiled(*(jax.device_put(a, sharding) for a, sharding in zip(flat, shardings[0], strict=True)))
        for got, wanted, sharding in zip(found, expected, shardings[1], strict=True):
            assert_equal(got, wanted)
            assert got.sharding.is_equivalent_to(sharding, got.ndim), way
        if gradients:
            assert_same_gradients(jitted, lambda *flat: jax.tree.leaves(fn(*jax.tree.unflatten(structure, flat))), flat)


def assert_equal(got: Any, wanted: Any) -> None:
    """Integers to the bit, other numbers up to rounding."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    if np.issubdtype(wanted.dtype, np.integer):
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4 * float(np.abs(wanted).max(initial=1e-30)))


def assert_same_gradients(run: Callable[..., Any], fn: Callable[..., Any], flat: Sequence[Any]) -> None:
    """The gradients of a weighted sum of all results by all arguments of floating point."""
    at = [i for i, array in enumerate(flat) if jnp.issubdtype(jnp.asarray(array).dtype, jnp.floating)]

    def loss(of: Callable[..., Any]) -> Callable[..., Any]:
        def total(*arrays: Any) -> Any:
            return sum(jnp.sum(jnp.sin(each.astype(jnp.float32))) for each in of(*arrays))

        return total

    got = jax.jit(jax.grad(loss(run), argnums=at), compiler_options=quick())(*flat)
    for found, wanted in zip(got, jax.grad(loss(fn), argnums=at)(*flat), strict=True):
        assert_equal(found, wanted)


def main(examples: int) -> None:
    """The law on larger meshes, for graphs and for blocks with their gradients."""

    @given(graph=graphs(), mesh_shape=st.sampled_from(LARGER_MESH_SHAPES), seed=st.integers(0, 2**16))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    def law(graph: Graph, mesh_shape: str, seed: int) -> None:
        assert_carried(graph, arguments_of(graph), mesh_shape, seed)

    @given(block=blocks(), mesh_shape=st.sampled_from(LARGER_MESH_SHAPES), seed=st.integers(0, 2**16))
    @settings(max_examples=max(1, examples // 2), deadline=None, derandomize=True, database=None)
    def law_of_blocks(block: Block, mesh_shape: str, seed: int) -> None:
        assert_carried(function(block), arguments(block), mesh_shape, seed, gradients=not block.decode)

    law()
    law_of_blocks()


if __name__ == "__main__":
    main(int(sys.argv[1]))
