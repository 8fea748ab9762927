"""The memory of unrolled layers: its rows and its analyses grow no faster than the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.tracing.trace import trace
from costmodels.machine.topology import parse_topology
from costmodels.program.program import Program
from search.answer import check_donations
from search.answer.check_memory import _Account
from search.formulation.layer_folding import classes
from search.formulation.problem import build
from search.memory import fused_products
from search.memory.constraints import rows

Array = jax.Array


def _program(layer, layers: int) -> Program:
    def step(x: Array, w: Array) -> Array:
        for _ in range(layers):
            x = layer(x, w)
        return x

    x, w = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return annotate_traffic(trace(step, x, w)).program


def _residual(x: Array, w: Array) -> Array:
    return x + jnp.tanh(x * (x * x).sum(-1, keepdims=True)) @ w


def _joined(x: Array, w: Array) -> Array:
    """A layer with a concatenation, whose operands a TPU writes."""
    y = x @ w
    return jnp.concatenate([jnp.tanh(y[:, :32]), jnp.exp(y[:, 32:])], axis=1)


def _calls(monkeypatch: pytest.MonkeyPatch, module, name: str, run) -> int:
    count, original = 0, getattr(module, name)

    def counted(*args):
        nonlocal count
        count += 1
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counted)
        run()
    return count


def test_kernels_are_followed_once(monkeypatch: pytest.MonkeyPatch):
    """Twice the layers are twice the work, for the solver and for the checker."""
    solver, checker = [], []
    for layers in (12, 24):
        program = _program(_residual, layers)
        taken = lambda program=program: list(fused_products.taken_in(program))  # noqa: E731
        inside = lambda program=program: _Account(program)._inside  # noqa: E731
        solver.append(_calls(monkeypatch, fused_products, "is_in_place", taken))
        checker.append(_calls(monkeypatch, check_donations, "_keeps_order", inside))
    assert solver[1] <= 2.2 * solver[0]
    assert checker[1] <= 2.2 * checker[0]


def test_equal_layers_have_equal_rows():
    """The temporaries of a layer's copies are one kind, so more layers add no rows."""
    topology = parse_topology("v5e:1x4")
    found = []
    for layers in (4, 8):
        program = _program(_joined, layers)
        found.append(len(rows(build(program, topology, 1e9, classes(program)))))
    assert found[0] == found[1]
