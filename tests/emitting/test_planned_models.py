"""Random small transformers on random meshes: what the plan runs equals the plain function, and lies where the plan says."""

from __future__ import annotations

from math import prod

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

import autoshard
from tests.support.effort import examples
from tests.support.layout_strategies import blocks, mesh_shapes
from tests.support.models import Block, arguments, function


@examples(8, least=3)
@given(block=blocks(), shape=mesh_shapes(), seed=st.integers(0, 2**16))
def test_a_planned_model_computes_what_the_plain_one_does(block: Block, shape: str, seed: int) -> None:
    """Equal results, arguments and results in the planned layouts, a proven plan, and the planned collectives compiled."""
    fn, args = function(block), arguments(block, seed)
    plan = autoshard.search(fn, *args, topology=f"cpu:{shape}")
    assert (plan.proof.status, plan.proof.gap) == ("OPTIMAL", 0.0)

    mesh = plan.make_mesh(jax.devices()[: prod(map(int, shape.split("x")))])
    run = plan.jit(fn, mesh=mesh)
    found, expected = run(*args), jax.jit(fn)(*args)
    for leaf, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(plain), rtol=2e-4, atol=2e-5)

    compiled = run.lower(*args).compile()
    for sides, specs in ((compiled.input_shardings[0], plan.in_specs), (compiled.output_shardings, plan.out_specs)):
        wanted = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        for leaf, place in zip(jax.tree.leaves(sides), jax.tree.leaves(wanted), strict=True):
            assert leaf.is_equivalent_to(place, 6) or leaf == place

    audit = autoshard.audit(plan, fn, *args, target="host", devices=list(mesh.devices.flat))
    assert not [each for each in audit.differences if each.kind in ("missing", "unplanned") and each.counts]
