"""Models that others wrote, in tiny sizes, on eight host devices: what the plan runs is what the model computes.

Training steps return updated parameters and optimizer state, so their gradients are compared, too. What is not among the
test libraries is left to `make models-test`, whose environment has them all.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from autoshard import Workload
from benchmarks import models_beyond, models_frameworks, models_huggingface, models_own

NEEDS = {
    "equinox": "equinox",
    "penzai": "penzai",
    "keras-hub": "keras_hub",
    "haiku": "haiku",
    "linen": "flax",
    "nnx": "flax",
}
FAST = (
    "llama 3 8b unrolled prefill",
    "mixtral 8x7b prefill",
    "deepseek-v2 lite decode",
    "t5 v1.1 xxl forward",
)
"""Those that run with the other tests; the rest is slow."""


def zoo() -> list[Any]:
    """Every model and phase, once per structure: larger sizes of one model have the same tiny one."""
    found = []
    for module in (models_own, models_huggingface, models_beyond, models_frameworks):
        for (model, phase), build in module.cases().items():
            name = f"{model} {phase}"
            if "70b" in name or "405b" in name:
                continue
            library = (
                "transformers" if module in (models_huggingface, models_beyond) else NEEDS.get(model.partition(" ")[0])
            )
            library = "optax" if library is None and "train" in phase else library
            missing = library is not None and importlib.util.find_spec(library) is None
            marks = [pytest.mark.skipif(missing, reason=f"{library} is not installed (make models-test)")]
            marks += [pytest.mark.long if name in FAST else pytest.mark.slow]
            found.append(pytest.param(build, phase, id=name, marks=marks))
    return found


def filled(work: Workload) -> tuple[Any, ...]:
    """Arguments of the workload's shapes: small numbers, tokens and positions that are all in range."""
    numbers = np.random.default_rng(0)

    def array(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            drawn = 0.1 * numbers.standard_normal(leaf.shape) if leaf.shape else 0.1  # an epsilon may not be negative
            drawn = abs(drawn) if jax.tree_util.keystr(path).endswith("['var']") else drawn  # nor a running variance
            return jnp.asarray(drawn, leaf.dtype)
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        return jnp.asarray(numbers.integers(1, 4, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(array, work.args)


def positive(state: Any) -> Any:
    """An optimizer's state as it can be: second moments are squares."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) if hasattr(leaf, "shape") else leaf, state)


@pytest.mark.parametrize(("build", "phase"), zoo())
def test_a_model_computes_what_it_computed(build: Any, phase: str) -> None:
    with jax.numpy_dtype_promotion("standard"):
        work = build(tiny=True)
        args = filled(work)
        if phase.startswith("train"):
            args = (args[0], positive(args[1]), *args[2:])
        where = "cpu:8" if phase.startswith("train") else "cpu:2x4"
        plan = autoshard.search(work.fn, *work.args, topology=where, donate_argnums=work.donate_argnums)
        expected = jax.jit(work.fn)(*args)
        found = plan.jit(work.fn)(*jax.tree.map(jnp.copy, args))
    assert (plan.proof.status, plan.proof.gap) == ("OPTIMAL", 0.0)
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(expected)) > 0
    for (path, leaf), plain in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(leaf, np.float64), np.asarray(plain, np.float64)
        # bf16 has 8 bits, and sums in another order differ in the last ones
        assert np.isfinite(other).all()
        scale = np.abs(other).max(initial=1e-6)
        assert np.abs(one - other).max(initial=0.0) <= 0.03 * scale, jax.tree_util.keystr(path)
