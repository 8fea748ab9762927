"""Programs with their authors' own rules: every spec divides its array, and processes keep their processor seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from math import prod

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from benchmarks import logical_axes
from benchmarks.contestants import EXPERTS, program_of, workload_of
from benchmarks.peers import CASES, run_limited
from costmodels.machine import parse_topology

RULED = [case for case in CASES if case.example == EXPERTS]


def splits(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The axes of every entry of a spec."""
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]


def assert_divides(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    """Every dimension has a multiple of its chips, and no axis splits two."""
    entries = splits(spec)
    axes = [axis for entry in entries for axis in entry]
    assert len(axes) == len(set(axes)), spec
    for size, entry in zip(shape, entries, strict=False):
        assert size % prod(sizes[axis] for axis in entry) == 0, (spec, shape)


@pytest.mark.parametrize("case", RULED, ids=lambda case: case.name)
def test_experts_rules_divide_every_array_and_use_an_axis_once(case):
    program, topology = program_of(case), parse_topology(case.topology)
    assert program is not None
    sizes = dict(axis for factors in logical_axes.factored(topology) for axis in factors)
    assert prod(sizes.values()) == topology.size
    assert len({rules.name for rules in program.rules}) == len(program.rules)
    for rules in program.rules:
        leaves = jax.tree_util.tree_leaves(program.named)
        specs = [logical_axes.spec_of(rules, leaf.names, leaf.shape, topology) for leaf in leaves]
        for leaf, spec in zip(leaves, specs, strict=True):
            assert_divides(spec, leaf.shape, sizes)
        assert any(entry for spec in specs for entry in splits(spec)), rules.name


RULE_SETS = (*logical_axes.SERVING, *logical_axes.TRAINING)


@given(
    st.sampled_from(RULE_SETS),
    st.sampled_from(("v5e:2x4", "v5e:4x4", "v5p:2x2x2")),
    st.lists(
        st.tuples(st.sampled_from(sorted(RULE_SETS[-1].tensor | {"embed", "batch"})), st.integers(1, 48)), max_size=4
    ),
)
def test_rules_divide_any_array_and_use_an_axis_once(rules, name, dims):
    topology, names = parse_topology(name), " ".join(name for name, _ in dims)
    sizes = dict(axis for factors in logical_axes.factored(topology) for axis in factors)
    shape = tuple(size for _, size in dims)
    assert_divides(logical_axes.spec_of(rules, names, shape, topology), shape, sizes)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] * (case.phase == "training"), id=case.name) for case in RULED],
)
def test_a_donated_argument_comes_back(case):
    """The results after the first are shaped as the donated argument, so its specs are theirs."""
    work = workload_of(case)
    for donated in work.donate_argnums:
        with jax.numpy_dtype_promotion("standard"):
            _, result = jax.eval_shape(work.fn, *work.args)
        shapes = [
            [(leaf.shape, leaf.dtype) for leaf in jax.tree_util.tree_leaves(tree)]
            for tree in (result, work.args[donated])
        ]
        assert shapes[0] == shapes[1]
        assert jax.tree_util.tree_structure(result) == jax.tree_util.tree_structure(work.args[donated])


def test_rules_constrain_only_while_they_are_in_force():
    mesh, topology = jax.sharding.AbstractMesh((2, 2, 2), ("x0", "y0", "y1")), parse_topology("v5e:2x4")
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    serving = logical_axes.SERVING[-1]

    def constraints() -> list[str]:
        jaxpr = jax.make_jaxpr(lambda x: logical_axes.constrain(x, "batch act_heads"))(x)
        return [str(eqn.params["sharding"].spec) for eqn in jaxpr.eqns]

    with logical_axes.in_force(serving, mesh, topology):
        assert constraints() == [str(PartitionSpec(("x0",), ("y0", "y1")))]
    assert constraints() == []


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        ("print('one')", "one", ""),
        ("raise ValueError('two')", "", "ValueError: two"),
        ("print('row', flush=True)\nwhile True: pass", "row", "not done in 1 processor seconds"),
    ],
)
@pytest.mark.long
def test_a_process_keeps_its_processor_seconds(code, said, reason):
    out, why = run_limited([sys.executable, "-S", "-c", code], os.environ, 1)
    assert (out.strip(), why) == (said, reason)
